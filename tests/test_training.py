"""The training loop, on a model of one convolution."""

import numpy as np
import pytest
import torch
from torch import nn

from nucseg.augment import AugmentConfig
from nucseg.models.base import Instances, Segmenter
from nucseg.store import OutOfTime
from nucseg.training import TrainingConfig, TrainingDivergedError, learning_rate, train


class Dot(Segmenter):
    """Tells dark pixels from bright ones."""

    def __init__(self, seed=0, fail_at=None):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Dropout(0.2), nn.Conv2d(4, 1, 1))
        self.calls, self.fail_at = 0, fail_at

    def prepare(self, image):  # without the types that the tests' hook would check before the loop does
        return image

    def loss(self, images, label_maps):
        self.calls += 1
        term = nn.functional.binary_cross_entropy_with_logits(self.conv(images)[:, 0], (label_maps > 0).float())
        return {"ce": term * (float("nan") if self.calls == self.fail_at else 1.0), "zero": 0 * term}

    def predict_instances(self, image):
        return Instances(np.zeros(image.shape[:2], dtype=np.int32), np.zeros(0, dtype=np.float32))


def make_pairs(count=3, size=64, seed=0):
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(count):
        labels = np.kron(rng.integers(0, 2, (size // 8, size // 8)), np.ones((8, 8), dtype=np.int64))
        labels = labels * (1 + np.arange(size)[:, None] // 8)
        image = np.where(labels[..., None] > 0, 60, 200) + rng.integers(-20, 20, (size, size, 3))
        pairs.append((image.astype(np.uint8), labels.astype(np.int32)))
    return pairs


SHORT = TrainingConfig(iterations=30, batch=4, crop=32, lr=0.05, validate_every=10, log_every=5)


def test_the_loss_falls_and_the_curve_has_a_row_per_interval():
    result = train(Dot(), make_pairs(), SHORT)
    assert [row["iteration"] for row in result.curve] == [5, 10, 15, 20, 25, 30]
    assert result.curve[-1]["ce"] < 0.6 * result.curve[0]["ce"]
    assert result.curve[0]["total"] == pytest.approx(result.curve[0]["ce"])
    assert result.best_iteration == 30
    assert result.peak_memory == 0


def test_equal_seeds_give_equal_weights_and_the_global_state_is_left_alone():
    state = torch.get_rng_state()
    models = [Dot() for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        train(model, make_pairs(), SHORT, seed=seed, augment=AugmentConfig())
    assert torch.equal(torch.get_rng_state(), state)
    first, same, other = (model.state_dict()["conv.0.weight"] for model in models)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_a_validation_value_that_is_no_number_is_never_the_best_for_long():
    values = iter([float("nan"), 0.5, float("nan")])
    assert train(Dot(), make_pairs(), SHORT, validate=lambda model: next(values)).best_iteration == 20


def test_the_best_state_is_that_of_the_highest_validation_value():
    values, weights = iter([0.1, 0.9, 0.3]), []

    def validate(model):
        assert not model.training
        weights.append(model.state_dict()["conv.0.weight"].clone())
        return next(values)

    model = Dot()
    result = train(model, make_pairs(), SHORT, validate=validate)
    assert result.best_iteration == 20
    assert torch.equal(result.best_state["conv.0.weight"], weights[1])
    assert torch.equal(model.state_dict()["conv.0.weight"], weights[2])
    assert [row["val"] for row in result.curve if "val" in row] == [0.1, 0.9, 0.3]


@pytest.mark.parametrize("settings", [{}, {"ema": 0.9}, {"optimiser": "sgd"}])
def test_a_resumed_training_ends_where_an_unbroken_one_does(settings, tmp_path):
    config = TrainingConfig(**{**vars(SHORT), **settings})
    whole = Dot()
    unbroken = train(whole, make_pairs(), config, seed=5, augment=AugmentConfig())
    path = tmp_path / "state.pt"

    def stop_at_first(snapshot):
        torch.save(snapshot(), path)
        raise OutOfTime

    with pytest.raises(OutOfTime):
        train(Dot(), make_pairs(), config, seed=5, augment=AugmentConfig(), checkpoint=stop_at_first)
    resumed = Dot(seed=9)
    state = torch.load(path, weights_only=True)
    assert state["iteration"] == 5
    result = train(resumed, make_pairs(), config, seed=5, augment=AugmentConfig(), resume_from=state)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert [row["total"] for row in result.curve] == [row["total"] for row in unbroken.curve]
    assert unbroken.seconds_before == 0 < result.seconds_before < result.seconds


def test_a_loss_that_is_not_a_number_stops_the_training_and_names_iteration_and_terms():
    with pytest.raises(TrainingDivergedError, match=r"iteration 7 \(ce nan, zero 0"):
        train(Dot(fail_at=7), make_pairs(), SHORT)


def test_averaged_weights_are_the_exponential_average():
    seen = []

    class Watched(Dot):
        def loss(self, images, label_maps):
            seen.append(self.conv[2].weight.detach().clone())
            return super().loss(images, label_maps)

    config = TrainingConfig(iterations=4, batch=2, crop=32, ema=0.5, log_every=1, validate_every=0)
    model, plain = Watched(), Dot()
    train(model, make_pairs(), config)
    train(plain, make_pairs(), TrainingConfig(**{**vars(config), "ema": 0.0}))
    after = [*seen[1:], plain.conv[2].weight.detach()]  # weights after steps 1 to 4
    expected = after[0]
    for weight in after[1:]:
        expected = 0.5 * expected + 0.5 * weight
    torch.testing.assert_close(model.conv[2].weight.detach(), expected)


@pytest.mark.parametrize("warmup", [0.1, 0.3])
def test_the_one_cycle_rate_is_torchs(warmup):
    config = TrainingConfig(iterations=50, lr=0.01, warmup=warmup)
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    # torch's rise ends one step before warmup * iterations, ours on it: the curves are shifted by up to one step.
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.01, total_steps=50, pct_start=warmup)
    theirs = []
    for _ in range(50):
        theirs.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        cycle.step() if len(theirs) < 50 else None
    ours = [learning_rate(config, i) for i in range(1, 51)]
    assert ours[0] == pytest.approx(theirs[0])
    assert ours[-1] == pytest.approx(theirs[-1])
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 0.2 * 0.01


def test_constant_and_cosine_rates():
    constant = TrainingConfig(iterations=100, lr=0.005, schedule="constant", warmup=0.0)
    assert {learning_rate(constant, i) for i in range(1, 101)} == {0.005}
    cosine = TrainingConfig(iterations=101, lr=1.0, schedule="cosine-warmup", warmup=0.1)
    rates = [learning_rate(cosine, i) for i in range(1, 102)]
    assert max(rates) == rates[10] == 1.0
    assert rates[5] == pytest.approx(0.5)
    assert rates[55] == pytest.approx(0.5)
    assert rates[-1] == pytest.approx(0.0)


def test_wrong_input_is_named():
    image, labels = make_pairs(1)[0]
    with pytest.raises(ValueError, match="nothing to train on"):
        train(Dot(), [], SHORT)
    with pytest.raises(ValueError, match=r"pairs\[1\]: the image is"):
        train(Dot(), [(image, labels), (image, labels[:-1])], SHORT)
    with pytest.raises(ValueError, match=r"pairs\[0\] image: expected"):
        train(Dot(), [(image / 255, labels)], SHORT)
    with pytest.raises(ValueError, match="pair_weights"):
        train(Dot(), [(image, labels)], SHORT, pair_weights=[1.0, 2.0])
    with pytest.raises(ValueError, match="iterations must be at least 1, got 0"):
        TrainingConfig(iterations=0)


def test_a_constant_rate_falls_to_a_tenth_at_each_drop():
    config = TrainingConfig(iterations=101, lr=0.1, schedule="constant", warmup=0.0, drops=(0.5, 0.75))
    rates = [learning_rate(config, i) for i in range(1, 102)]
    assert rates == pytest.approx([0.1] * 50 + [0.01] * 25 + [0.001] * 26)
    for changes in ({"drops": (1.5,)}, {"drops": (0.5,), "schedule": "one-cycle"}):
        with pytest.raises(ValueError, match="drops are shares"):
            TrainingConfig(**{"schedule": "constant", **changes})
