"""Micro-Net: eroded truth, border weights, loss, auxiliary outputs, post-processing, and the network."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from nuclei import ellipses, picture, two_touching
from scipy import ndimage

from nucseg.data import load_dataset
from nucseg.encoders import EncoderError
from nucseg.inference import InferenceConfig
from nucseg.labels import IGNORE
from nucseg.metrics import aji
from nucseg.models.micronet import (
    MicroNet,
    MicroNetConfig,
    border_weights,
    erode,
    instances_from_probability,
    nearest_two,
)
from nucseg.training import TrainingConfig, train

SMALL = MicroNetConfig(width=4, auxiliary_epoch=10, inference=InferenceConfig(tile=128, overlap=32))


def small(seed=0, config=SMALL):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MicroNet(config=config)


def batch(*maps):
    return torch.from_numpy(np.stack(maps))


def test_the_truth_is_eroded_nucleus_by_nucleus_by_a_cross_but_not_from_the_border_of_the_crop():
    maps = [ellipses(seed=s) for s in range(3)] + [np.zeros((96, 96), dtype=np.int32)]
    for labels, found in zip(maps, erode(batch(*maps)).numpy(), strict=True):
        expected = np.zeros_like(labels)
        for i in np.unique(labels[labels > 0]):
            expected[ndimage.binary_erosion(labels == i, border_value=1)] = i  # SciPy's default: the cross
        np.testing.assert_array_equal(found, expected)


def test_what_is_unknown_takes_nothing_from_a_nucleus():
    labels = np.full((8, 9), 5, dtype=np.int32)
    labels[2:5, 3:6] = IGNORE
    labels[7, 0] = 0
    found = erode(batch(labels))[0].numpy()
    labels[6, 0] = labels[7, 1] = 0
    np.testing.assert_array_equal(found, labels)


def distances_by_loop(labels):
    """Sort the distances of each pixel to each nucleus."""
    far = [ndimage.distance_transform_edt(labels != i) for i in np.unique(labels[labels > 0])]
    far += [np.full(labels.shape, np.inf)] * 2
    return np.sort(far, axis=0)[:2]


@pytest.mark.parametrize("seed", range(3))
def test_the_nearest_two_nuclei_are_those_of_a_loop(seed):
    labels = ellipses(48, count=8, seed=seed) * (2**20 + 1)  # ids up to 10^8
    labels = labels.astype(np.int64)
    labels[40:, 40:] = IGNORE
    near, second = (found[0].numpy() for found in nearest_two(batch(labels), 48))
    expected = distances_by_loop(labels)
    np.testing.assert_allclose(near, expected[0], rtol=1e-6)
    np.testing.assert_allclose(second, expected[1], rtol=1e-6)
    near, second = (found[0].numpy() for found in nearest_two(batch(labels), 6))
    for found, truth in ((near, expected[0]), (second, expected[1])):
        np.testing.assert_allclose(found[truth <= 6], truth[truth <= 6], rtol=1e-6)
        assert (found[truth > 6] > 6).all()


def test_the_nearest_two_of_too_few_nuclei_are_infinitely_far():
    one = np.zeros((20, 20), dtype=np.int32)
    one[3, 4] = 9
    near, second = nearest_two(batch(one, np.zeros_like(one)), 30)
    assert near[0, 6, 8] == 5
    assert torch.isinf(second).all()
    assert torch.isinf(near[1]).all()


def test_weights_are_unets_and_one_inside_nuclei():
    labels = erode(batch(*(ellipses(seed=s) for s in range(2))))
    found = border_weights(labels, 10.0, 5.0).numpy()
    for one, weights in zip(labels.numpy(), found, strict=True):
        near, second = distances_by_loop(one)
        expected = 1 + np.where(one > 0, 0, 10 * np.exp(-((near + second) ** 2) / 50))
        np.testing.assert_allclose(weights, expected, atol=0.12)  # farther than 15 px is not looked for
        close = second <= 15
        np.testing.assert_allclose(weights[close], expected[close], rtol=1e-5)
    assert found.max() > 9
    assert (border_weights(torch.zeros_like(labels), 10.0, 5.0) == 1).all()
    assert (border_weights(labels, 0.0, 5.0) == 1).all()


def test_targets_turn_with_the_nuclei():
    labels = ellipses()
    for target in (erode, lambda maps: border_weights(erode(maps), 10.0, 5.0)):
        plain = target(batch(labels))[0].numpy()
        for change in (np.flipud, np.fliplr, np.transpose, np.rot90):
            turned = target(batch(np.ascontiguousarray(change(labels))))[0].numpy()
            np.testing.assert_array_equal(turned, change(plain))


def fixed_logits(monkeypatch, model, *logits):
    monkeypatch.setattr(model, "logits", lambda images: list(logits))


def test_the_loss_is_the_weighted_cross_entropy_over_the_known_pixels(monkeypatch):
    model = small().eval()
    labels = np.stack([ellipses(48, count=6, seed=s) for s in range(2)])
    labels[:, 10:30, 15:35] = IGNORE
    maps = torch.from_numpy(labels)
    rng = torch.Generator().manual_seed(0)
    said = [torch.randn(2, 2, 48, 48, generator=rng) for _ in range(4)]
    fixed_logits(monkeypatch, model, *said)
    terms = model.loss(torch.zeros(2, 3, 48, 48), maps)
    known, eroded = labels != IGNORE, erode(maps)
    weights = border_weights(eroded, 10.0, 5.0).numpy()
    expected = []
    for logits in said:
        total = 0.0
        probability = logits.softmax(dim=1).numpy()
        for i, y, x in zip(*np.nonzero(known), strict=True):
            total -= weights[i, y, x] * np.log(probability[i, int(eroded[i, y, x] > 0), y, x])
        expected.append(total / known.sum())
    assert terms["main"].item() == pytest.approx(expected[0], rel=1e-4)
    assert terms["auxiliary"].item() == pytest.approx(sum(expected[1:]), rel=1e-4)


def test_what_is_said_inside_an_unknown_area_changes_nothing_and_gets_no_gradient(monkeypatch):
    model = small().eval()
    labels = np.stack([ellipses(seed=s) for s in range(2)])
    labels[:, 20:60, 30:70] = IGNORE
    maps, images = torch.from_numpy(labels), torch.zeros(2, 3, 96, 96)
    known = maps != IGNORE
    said = [torch.randn(2, 2, 96, 96, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in range(4)]
    fixed_logits(monkeypatch, model, *said)
    first = model.loss(images, maps)
    for gradient in torch.autograd.grad(sum(first.values()), said):
        assert not gradient.movedim(1, -1)[~known].any()
        assert gradient.movedim(1, -1)[known].any(dim=-1).all()
    fixed_logits(monkeypatch, model, *(torch.where(known[:, None], a, -20 * a) for a in said))
    assert model.loss(images, maps) == first


@pytest.mark.parametrize("value", [0, IGNORE])
def test_a_crop_without_nuclei_or_knowledge_gives_finite_differentiable_terms(value):
    model = small()
    terms = model.loss(torch.rand(2, 3, 64, 64), torch.full((2, 64, 64), value, dtype=torch.int32))
    sum(terms.values()).backward()
    assert all((term == 0) == (value == IGNORE) and torch.isfinite(term) for term in terms.values())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_auxiliary_losses_weigh_one_over_the_epoch_which_counts_training_calls(monkeypatch):
    model = small()
    maps, images = batch(ellipses(64)), torch.zeros(1, 3, 64, 64)
    fixed_logits(monkeypatch, model, *(torch.randn(1, 2, 64, 64, generator=torch.Generator()) for _ in range(4)))
    model.eval()
    whole = [model.loss(images, maps)["auxiliary"].item() for _ in range(12)][-1]
    assert model.calls == 0
    model.train()
    shares = [model.loss(images, maps)["auxiliary"].item() / whole for _ in range(25)]
    np.testing.assert_allclose(shares, [1.0] * 10 + [1 / 2] * 10 + [1 / 3] * 5, rtol=1e-5)
    resumed = small(seed=1)
    resumed.load_state_dict(model.state_dict())
    assert resumed.calls == 25


def test_each_output_learns_from_its_own_level():
    """The coarsest auxiliary output sees the third finest level and nothing finer; the main one sees all three."""
    model = small().eval()
    images = torch.rand(1, 3, 64, 64)
    main, fine, middle, coarse = (maps.sum() for maps in model.logits(images))
    joins = [join.join[0].weight for join in model.joins]  # strides 16, 8, 4, 2
    reached = [
        [g is not None for g in torch.autograd.grad(out, joins, retain_graph=True, allow_unused=True)]
        for out in (main, fine, middle, coarse)
    ]
    assert reached == [[True] * 4, [True] * 4, [True, True, True, False], [True, True, False, False]]


def test_the_image_enters_at_every_level():
    model = small().eval()
    seen = []
    for level in model.levels:
        level.side.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    images = torch.rand(1, 3, 64, 96)
    model.logits(images)
    assert [tuple(x.shape) for x in seen] == [(1, 3, 32, 48), (1, 3, 16, 24), (1, 3, 8, 12), (1, 3, 4, 6)]


def test_a_paler_image_looks_the_same_once_it_is_standardised():
    images = torch.rand(2, 3, 64, 64)
    images[1] *= 0.5
    paler = 0.5 + 0.3 * images
    model = small().eval()
    torch.testing.assert_close(model.maps(paler), model.maps(images), atol=1e-4, rtol=0)
    assert torch.isfinite(model.maps(torch.full_like(images, 0.3))).all()
    model = small(config=replace(SMALL, standardise=False)).eval()
    assert (model.maps(paler) - model.maps(images)).abs().max() > 1e-3


def conv(inputs, outputs, kernel):
    return inputs * outputs * kernel**2 + outputs


def test_the_network_has_the_published_size():
    count = 0
    for inputs, width in ((3, 64), (128, 128), (256, 256), (512, 512)):  # two branches, each with one BatchNorm
        count += conv(inputs, width, 3) + conv(3, width, 3) + 2 * conv(width, width, 3) + 4 * width
    count += conv(1024, 2048, 3) + conv(2048, 2048, 3)
    for width in (1024, 512, 256, 128):
        count += conv(2 * width, width, 2) + 2 * conv(width, width, 3) + 2 * conv(width, width, 5)
        count += conv(2 * width, width, 1)
    for inputs, width, kernel in ((128, 64, 2), (256, 128, 4), (512, 256, 8)):
        count += conv(inputs, width, kernel) + conv(width, width, 3) + conv(width, 2, 3)
    count += conv(64 + 128 + 256, 2, 3)
    with torch.device("meta"):
        model = MicroNet()
        logits = model.logits(torch.empty(1, 3, 252, 252))
    assert [tuple(maps.shape) for maps in logits] == [(1, 2, 252, 252)] * 4
    assert sum(p.numel() for p in model.parameters()) == count == 184_400_264
    assert model.initialised_from == "random weights"


def mean_iou(true, pred):
    scores = []
    for i in np.unique(true[true > 0]):
        overlaps = np.bincount(pred[true == i], minlength=2)
        overlaps[0] = 0
        j = overlaps.argmax()
        scores.append(overlaps[j] / np.count_nonzero((true == i) | (pred == j)) if overlaps[j] else 0.0)
    return float(np.mean(scores))


def true_maps(labels):
    return (erode(batch(labels)).numpy() > 0).astype(np.float32)


def test_true_maps_give_back_the_nuclei_also_where_they_touch():
    labels = two_touching()
    assert ndimage.label(labels)[1] == 1
    found = instances_from_probability(true_maps(labels), MicroNetConfig())
    assert found.labels.dtype == np.int32
    assert found.labels.max() == 2
    assert mean_iou(labels, found.labels) > 0.98
    np.testing.assert_array_equal(found.scores, 1)


def test_crowded_nuclei_are_mostly_recovered():
    labels = np.concatenate([ellipses(seed=s) for s in range(4)], axis=1)
    labels = np.where(labels > 0, labels + 1000 * (np.arange(labels.shape[1]) // 96), 0).astype(np.int32)
    found = instances_from_probability(true_maps(labels), MicroNetConfig())
    assert mean_iou(labels, found.labels) > 0.8
    assert np.array_equal(np.unique(found.labels), np.arange(len(found.scores) + 1))


def test_holes_are_filled_and_small_pieces_dropped_before_they_are_dilated():
    maps = np.zeros((1, 40, 40), dtype=np.float32)
    maps[0, 5:15, 5:15] = 0.9
    maps[0, 8:11, 8:11] = 0.1
    maps[0, 25:28, 25:28] = 0.8
    found = instances_from_probability(maps, MicroNetConfig(min_area=10))
    assert (found.labels > 0).sum() == 10 * 10 + 4 * 10  # the hole, and the four sides that a cross adds
    assert found.scores == pytest.approx([(91 * 0.9 + 9 * 0.1) / 100])
    assert instances_from_probability(maps, MicroNetConfig(min_area=9)).labels.max() == 2
    assert not instances_from_probability(maps, MicroNetConfig(threshold=0.95)).labels.any()


def test_nuclei_that_grow_into_each_other_stay_apart():
    maps = np.zeros((1, 20, 20), dtype=np.float32)
    maps[0, 4:16, 2:9] = maps[0, 4:16, 10:17] = 1
    found = instances_from_probability(maps, MicroNetConfig()).labels
    assert set(np.unique(found[6, 1:18])) == {1, 2}
    assert found[6, 8] == 1
    assert found[6, 10] == 2


def test_empty_and_full_maps():
    nothing = instances_from_probability(np.zeros((1, 40, 40), dtype=np.float32), MicroNetConfig())
    assert not nothing.labels.any()
    assert nothing.scores.shape == (0,)
    full = instances_from_probability(np.ones((1, 40, 40), dtype=np.float32), MicroNetConfig())
    assert (full.labels == 1).all()


def test_maps_keep_the_resolution_of_any_input_and_are_probabilities():
    model = small().eval()
    with torch.no_grad():
        maps = model.maps(torch.rand(1, 3, 70, 41))
    assert maps.shape == (1, 1, 70, 41)
    assert 0 < maps.min() < maps.max() < 1
    found = model.predict_instances(np.random.default_rng(0).integers(0, 256, (33, 47, 3), dtype=np.uint8))
    assert found.labels.shape == (33, 47)


def test_equal_seeds_give_equal_weights_and_losses():
    images, maps = torch.rand(2, 3, 64, 64), batch(ellipses(64), ellipses(64, seed=1))
    first, again, other = (small(seed).eval().loss(images, maps)["main"].item() for seed in (0, 0, 1))
    assert first == again != other


def test_autocast_and_channels_last_are_finite():
    model = small().to(memory_format=torch.channels_last)
    images = torch.rand(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        terms = model.loss(images, batch(ellipses(64), ellipses(64, seed=1)))
    sum(terms.values()).backward()
    assert all(term.dtype == torch.float32 for term in terms.values())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_wrong_settings_are_named():
    for name, value in (
        ("width", 0), ("dropout", 1.0), ("border", -1.0), ("sigma", 0.0), ("sigma", 21.0), ("auxiliary_epoch", 0),
        ("threshold", 1.0), ("min_area", -1),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"{name} must be .*, got {value}"):
            MicroNetConfig(**{name: value})
    with pytest.raises(EncoderError, match=r"cannot use weights\.pt"):
        MicroNet(weights="weights.pt")


def test_what_follows_the_network_can_be_sent_to_a_process():
    finish = pickle.loads(pickle.dumps(small().finish))
    assert finish(true_maps(two_touching())).labels.max() == 2


def test_micronet_learns_to_tell_ellipses_apart():
    model = small()
    pairs = [picture(seed) for seed in range(4)]
    config = TrainingConfig(iterations=60, batch=2, crop=64, lr=5e-3, log_every=20, validate_every=0)
    result = train(model, pairs, config, seed=1)
    losses = [row["main"] for row in result.curve]
    assert losses[-1] < 0.6 * losses[0], losses
    assert model.calls == 60
    image, labels = picture(9)
    found = model.predict_instances(image)
    assert found.labels.max() == len(found.scores)
    assert aji(labels, found.labels) > 0.5


def test_eroded_truth_gives_back_kumars_nuclei(real_data):
    sample = load_dataset("kumar", real_data).val[0]
    labels = np.ascontiguousarray(sample.labels[:400, :400])
    assert aji(labels, instances_from_probability(true_maps(labels), MicroNetConfig()).labels) > 0.98


@pytest.mark.gpu
def test_a_captured_training_counts_every_call():
    config = TrainingConfig(
        iterations=25, batch=4, crop=64, precision="bf16", cuda_graph=True, log_every=1, validate_every=0
    )
    model = small().cuda()
    result = train(model, [picture(seed) for seed in range(4)], config)
    assert model.calls == 25
    assert len({row["main"] for row in result.curve}) == 25
    shares = [row["auxiliary"] / row["main"] for row in result.curve]
    assert np.mean(shares[20:]) < 0.6 * np.mean(shares[:10])  # in the third epoch and in the first
