"""Our reading of MDC-Net: losses that leave out what is unknown, nuclei from maps, and that it learns."""

import numpy as np
import pytest
import torch
from nuclei import two_touching

from nucseg.labels import IGNORE
from nucseg.metrics import aji
from nucseg.models import build
from nucseg.models.distances import distance_bounds, of_its_largest
from nucseg.models.mdcnet import MDCNet, MDCNetConfig, entropy_and_dice, nuclei_of
from nucseg.training import TrainingConfig, train

SMALL = MDCNetConfig(widths=(16, 16, 8, 8))


def discs(size=96, seed=0):
    """Round nuclei that hardly overlap, darker than what is around them: image and label map."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    labels = np.zeros((size, size), dtype=np.int32)
    for i in range(14):
        row, col, radius = *rng.uniform(0, size, 2), rng.uniform(7, 10)
        disc = np.hypot(y - row, x - col) < radius
        if (labels[disc] > 0).mean() < 0.05:
            labels[disc & (labels == 0)] = i + 1
    shade = np.where(labels[..., None] > 0, (90, 60, 130), (225, 170, 205)) + rng.integers(-15, 16, (size, size, 3))
    return shade.astype(np.uint8), labels


def true_maps(labels, contour_width=2):
    batch = torch.from_numpy(labels.astype(np.int64))[None]
    _, distances = distance_bounds(batch, 32)
    contour = (distances > 0) & (distances <= contour_width)
    relative = of_its_largest(distances, batch, int(batch.max()))
    return torch.cat(((batch > 0).float(), contour.float(), relative)).numpy()


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build("mdcnet", config=SMALL)


@pytest.mark.parametrize("seed", range(4))
def test_true_maps_give_back_the_nuclei(seed):
    labels = discs(seed=seed)[1]
    found = nuclei_of(true_maps(labels), MDCNetConfig())
    assert aji(labels, found.labels) > 0.9
    assert found.labels.max() == len(found.scores)


def test_touching_nuclei_are_two():
    found = nuclei_of(true_maps(two_touching()), MDCNetConfig()).labels
    assert found.max() == 2
    assert found[32, 22] != found[32, 41]


def test_a_shallow_saddle_is_no_border():
    labels = np.zeros((60, 80), dtype=np.int32)
    labels[20:40, 20:60] = 1
    maps = true_maps(labels)
    maps[2, :, 38:42] *= 0.92
    assert nuclei_of(maps, MDCNetConfig(depth=0.2)).labels.max() == 1
    maps[2, :, 36:44] *= 0.3
    assert nuclei_of(maps, MDCNetConfig(depth=0.2)).labels.max() == 2


def test_maps_without_maxima_or_without_nuclei():
    nothing = nuclei_of(np.zeros((3, 40, 40), dtype=np.float32), MDCNetConfig())
    assert not nothing.labels.any()
    assert nothing.scores.shape == (0,)
    flat = np.zeros((3, 40, 40), dtype=np.float32)
    flat[0, 5:15, 5:15], flat[0, 25:35, 25:35] = 0.7, 0.9  # a mask, and no distance anywhere
    found = nuclei_of(flat, MDCNetConfig())
    assert found.labels.max() == 2
    assert sorted(found.scores.tolist()) == pytest.approx([0.7, 0.9])


def test_what_is_unknown_adds_to_no_term(model, monkeypatch):
    images = torch.rand(2, 3, 64, 64)
    labels = torch.zeros(2, 64, 64, dtype=torch.long)
    labels[:, 10:30, 10:30], labels[:, 40:60, 30:50] = 4, 9
    labels[0, :, 50:] = IGNORE
    with torch.no_grad():
        maps = model.eval()._predict(images)

    def terms():
        return {name: float(term) for name, term in model.loss(images, labels).items()}

    monkeypatch.setattr(model, "_predict", lambda _images: maps)
    before = terms()
    maps[0, :, :, 50:] += 3
    assert terms() == pytest.approx(before)
    maps[0, :, :, :50] += 3
    assert all(value != pytest.approx(before[name]) for name, value in terms().items())


@pytest.mark.parametrize("value", [0, IGNORE])
def test_crops_without_nuclei_teach_without_harm(model, value):
    terms = model.train().loss(torch.rand(2, 3, 64, 64), torch.full((2, 64, 64), value))
    sum(terms.values()).backward()
    assert all(torch.isfinite(term) for term in terms.values())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    model.zero_grad()


def test_entropy_and_dice_by_hand():
    logits = torch.tensor([[[0.0, 2.0], [-1.0, 5.0]]])
    truth = torch.tensor([[[True, True], [False, False]]])
    known = torch.tensor([[[True, True], [True, False]]])
    p = logits.sigmoid()[0]
    entropy = -(p[0, 0].log() + p[0, 1].log() + (1 - p[1, 0]).log()) / 3
    dice = (2 * (p[0, 0] + p[0, 1]) + 1) / (p[0, 0] + p[0, 1] + p[1, 0] + 2 + 1)
    torch.testing.assert_close(entropy_and_dice(logits, truth, known), entropy + 1 - dice)


def test_it_learns_in_fifty_steps(model):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build("mdcnet", config=SMALL)
    config = TrainingConfig(iterations=50, batch=4, crop=64, lr=5e-3, log_every=50, validate_every=0)
    train(model, [discs(seed=seed) for seed in range(4)], config, seed=1)
    image, labels = discs(seed=9)
    assert aji(labels, model.predict(image)) > 0.6


@pytest.mark.gpu
def test_a_captured_bf16_training_learns():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build("mdcnet", config=SMALL, pretrained=False).cuda()
    config = TrainingConfig(
        iterations=50, batch=4, crop=64, lr=5e-3, precision="bf16", cuda_graph=True, log_every=1, validate_every=0
    )
    losses = [row["total"] for row in train(model, [discs(seed=seed) for seed in range(4)], config, seed=1).curve]
    assert len(set(losses)) == 50
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    image, labels = discs(seed=9)
    assert model.predict(image).shape == labels.shape


@pytest.mark.parametrize("shape", [(32, 32), (70, 41), (33, 100)])
def test_any_size_keeps_its_resolution(model, shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    assert model.predict(image).shape == shape


def test_half_precision_is_finite(model):
    images, labels = torch.rand(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.long)
    labels[:, 10:40, 10:40] = 1
    with torch.autocast("cpu", torch.bfloat16):
        terms = model.train().loss(images, labels)
    assert all(term.dtype == torch.float32 and torch.isfinite(term) for term in terms.values())


@pytest.mark.parametrize(
    "wrong", [{"widths": (8, 8)}, {"threshold": 1.0}, {"depth": 0.0}, {"mask": -1.0}, {"contour_width": 0}]
)
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        MDCNetConfig(**wrong)


def test_it_takes_any_encoder_and_says_where_it_started():
    assert MDCNet(config=SMALL, pretrained=False).initialised_from == "random weights"
    assert build("mdcnet", "efficientnet_lite0", SMALL).initialised_from == "efficientnet_lite0 (ImageNet)"
