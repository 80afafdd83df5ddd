"""DIST: bounds of the distance target, loss, H-maxima and watershed, scores, and the network."""

import pickle

import numpy as np
import pytest
import torch
from nuclei import depth_by_nucleus, ellipses, picture, two_touching
from scipy import ndimage

from nucseg.data import load_dataset
from nucseg.encoders import EncoderError
from nucseg.inference import InferenceConfig
from nucseg.labels import IGNORE
from nucseg.metrics import aji
from nucseg.models.dist import Dist, DistConfig, instances_from_distance
from nucseg.models.distances import distance_bounds
from nucseg.training import TrainingConfig, train

SMALL = DistConfig(features=8, halvings=3, reach=16, inference=InferenceConfig(tile=128, overlap=32))


def small(seed=0, config=SMALL):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Dist(config=config)


def test_the_loss_is_the_mean_squared_error_and_nothing_between_the_bounds(monkeypatch):
    model = small()
    labels = np.zeros((1, 64, 64), dtype=np.int32)
    labels[0] = two_touching()
    maps = torch.from_numpy(labels)
    rng = torch.Generator().manual_seed(0)
    said = 5 * torch.rand(1, 64, 64, generator=rng)
    monkeypatch.setattr(model, "distances", lambda images: said)
    images = torch.zeros(1, 3, 64, 64)
    expected = ((said[0].numpy() - depth_by_nucleus(labels[0])) ** 2).mean()  # nothing is cut: all is certain
    assert model.loss(images, maps)["distance"].item() == pytest.approx(expected, rel=1e-5)

    cut = maps[:, 24:, :32].contiguous()
    lowest, highest = distance_bounds(cut, 16)
    assert (lowest < highest).any()
    images = torch.zeros(1, 3, 40, 32)
    for share in (0.0, 0.3, 1.0):
        said = lowest + share * (highest - lowest)
        assert model.loss(images, cut)["distance"] == 0
    said = highest + 1
    assert model.loss(images, cut)["distance"] == 1
    said = lowest - 2
    assert model.loss(images, cut)["distance"] == 4


def test_what_is_said_inside_an_unknown_area_changes_nothing_and_gets_no_gradient(monkeypatch):
    model = small()
    labels = np.stack([ellipses(seed=s) for s in range(2)])
    labels[:, 20:60, 30:70] = IGNORE
    maps, images = torch.from_numpy(labels), torch.zeros(2, 3, 96, 96)
    known = maps != IGNORE
    rng = torch.Generator().manual_seed(0)
    said = torch.randn(2, 96, 96, generator=rng).requires_grad_()
    monkeypatch.setattr(model, "distances", lambda images: said)
    first = model.loss(images, maps)["distance"]
    (gradient,) = torch.autograd.grad(first, said)
    assert not gradient[~known].any()
    assert gradient[known & (maps == 0)].all()
    said = torch.where(known, said, torch.full_like(said, 1e6))
    assert model.loss(images, maps)["distance"] == first


@pytest.mark.parametrize("value", [0, IGNORE])
def test_a_crop_without_nuclei_or_knowledge_gives_a_finite_differentiable_loss(value):
    model = small()
    terms = model.loss(torch.rand(2, 3, 64, 64), torch.full((2, 64, 64), value, dtype=torch.int32))
    terms["distance"].backward()
    assert torch.isfinite(terms["distance"])
    assert (terms["distance"] == 0) == (value == IGNORE)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def mean_iou(true, pred):
    scores = []
    for i in np.unique(true[true > 0]):
        overlaps = np.bincount(pred[true == i], minlength=2)
        overlaps[0] = 0
        j = overlaps.argmax()
        scores.append(overlaps[j] / np.count_nonzero((true == i) | (pred == j)) if overlaps[j] else 0.0)
    return float(np.mean(scores))


def true_maps(labels):
    return depth_by_nucleus(labels)[None].astype(np.float32)


def test_true_distances_give_back_the_nuclei_also_where_they_touch():
    labels = two_touching()
    assert ndimage.label(labels)[1] == 1
    found = instances_from_distance(true_maps(labels), DistConfig(depth=1.0))
    assert found.labels.dtype == np.int32
    assert found.labels.max() == 2
    assert mean_iou(labels, found.labels) > 0.97
    assert (found.scores > 0.75).all()


def test_crowded_nuclei_are_mostly_recovered():
    labels = np.concatenate([ellipses(seed=s) for s in range(4)], axis=1)
    labels = np.where(labels > 0, labels + 1000 * (np.arange(labels.shape[1]) // 96), 0).astype(np.int32)
    assert mean_iou(labels, instances_from_distance(true_maps(labels), DistConfig(depth=1.0)).labels) > 0.8


def test_two_maxima_are_two_nuclei_only_if_the_distance_falls_by_the_depth_between_them():
    ridge = np.zeros((1, 40, 60), dtype=np.float32)
    ridge[0, 10:30, 10:50] = 4
    ridge[0, 12:28, 12:24] = ridge[0, 12:28, 36:48] = 6.5
    for depth, count in ((0.0, 2), (1.0, 2), (2.4, 2), (2.6, 1), (5.0, 1)):
        found = instances_from_distance(ridge, DistConfig(depth=depth))
        assert found.labels.max() == len(found.scores) == count, depth


def test_low_and_small_pieces_are_nuclei_from_the_smallest_area_on():
    maps = np.full((1, 40, 40), -3.0, dtype=np.float32)  # the network says less than nothing
    maps[0, 10:15, 10:15] = 0.7
    found = instances_from_distance(maps, DistConfig(depth=2.0))
    assert (found.labels > 0).sum() == 25
    assert not instances_from_distance(maps, DistConfig(min_area=26)).labels.any()
    assert not instances_from_distance(maps, DistConfig(threshold=0.8)).labels.any()


def test_empty_and_full_maps():
    nothing = instances_from_distance(np.zeros((1, 40, 40), dtype=np.float32), DistConfig())
    assert not nothing.labels.any()
    assert nothing.scores.shape == (0,)
    full = instances_from_distance(np.full((1, 40, 40), 9.0, dtype=np.float32), DistConfig())
    assert (full.labels == 1).all()
    np.testing.assert_allclose(full.scores, [0.9])


def test_the_score_rises_with_the_mean_distance_and_is_one_half_at_one_pixel():
    labels = two_touching()
    maps = true_maps(labels)
    mean = [maps[0][labels == i].mean() for i in (1, 2)]
    scores = {}
    for share in (0.6, 1.0, 1.5):
        scores[share] = instances_from_distance(share * maps, DistConfig(threshold=0.1)).scores
        np.testing.assert_allclose(scores[share], [share * m / (1 + share * m) for m in mean], rtol=1e-5)
    assert (scores[0.6] < scores[1.0]).all()
    assert (scores[1.0] < scores[1.5]).all()
    flat = np.zeros((1, 32, 32), dtype=np.float32)
    flat[0, 4:20, 4:20] = 1
    np.testing.assert_allclose(instances_from_distance(flat, DistConfig()).scores, [0.5])


def test_scores_stay_between_0_and_1_on_noise():
    maps = np.random.default_rng(0).normal(0, 200, (1, 64, 64)).astype(np.float32)
    found = instances_from_distance(maps, DistConfig(min_area=0, depth=0.0))
    assert found.labels.max() == len(found.scores) > 3
    assert np.array_equal(np.unique(found.labels), np.arange(len(found.scores) + 1))
    assert ((found.scores >= 0) & (found.scores <= 1)).all()


def test_the_network_has_the_size_of_a_unet_of_32_features():
    with torch.device("meta"):
        model = Dist()
        assert model.distances(torch.empty(1, 3, 256, 256)).shape == (1, 256, 256)
    assert sum(p.numel() for p in model.parameters()) == 7_763_041  # as public U-Nets with BatchNorm and 32 features
    assert model.initialised_from == "random weights"
    deepest = max(model.modules(), key=lambda module: getattr(module, "out_channels", 0))
    assert deepest.out_channels == 512


@pytest.mark.parametrize("halvings", [1, 5])
def test_maps_keep_the_resolution_of_any_input(halvings):
    model = small(config=DistConfig(features=2, halvings=halvings)).eval()
    with torch.no_grad():
        assert model.maps(torch.rand(1, 3, 70, 41)).shape == (1, 1, 70, 41)
    found = model.predict_instances(np.random.default_rng(0).integers(0, 256, (33, 47, 3), dtype=np.uint8))
    assert found.labels.shape == (33, 47)


def test_equal_seeds_give_equal_weights_and_losses():
    images, maps = torch.rand(2, 3, 64, 64), torch.from_numpy(np.stack([ellipses(64, seed=s) for s in (0, 1)]))
    first, again, other = (small(seed).loss(images, maps)["distance"].item() for seed in (0, 0, 1))
    assert first == again != other


def test_autocast_and_channels_last_are_finite_and_the_last_layer_is_exact():
    model = small().to(memory_format=torch.channels_last)
    images = torch.rand(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(images, torch.from_numpy(np.stack([ellipses(64)] * 2)))["distance"]
        maps = model.maps(images)
    loss.backward()
    assert loss.dtype == maps.dtype == torch.float32
    assert not torch.equal(maps, maps.bfloat16().float())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_wrong_settings_are_named():
    for name, value in (
        ("features", 0), ("halvings", 6), ("reach", 0), ("threshold", 0.0), ("depth", -1.0), ("min_area", -1)
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"{name} must be .*, got {value}"):
            DistConfig(**{name: value})
    with pytest.raises(EncoderError, match=r"cannot use weights\.pt"):
        Dist(weights="weights.pt")


def test_what_follows_the_network_can_be_sent_to_a_process():
    finish = pickle.loads(pickle.dumps(small().finish))
    assert finish(true_maps(two_touching())).labels.max() == 2


def test_dist_learns_to_tell_ellipses_apart():
    model = small()
    pairs = [picture(seed) for seed in range(4)]
    config = TrainingConfig(iterations=60, batch=3, crop=64, lr=0.01, log_every=20, validate_every=0)
    result = train(model, pairs, config, seed=1)
    losses = [row["distance"] for row in result.curve]
    assert losses[-1] < 0.6 * losses[0]
    image, labels = picture(9)
    found = model.predict_instances(image)
    assert found.labels.max() == len(found.scores)
    assert aji(labels, found.labels) > 0.5


def test_true_distances_give_back_kumars_nuclei(real_data):
    sample = load_dataset("kumar", real_data).val[0]
    labels = np.ascontiguousarray(sample.labels[:400, :400])
    _, highest = distance_bounds(torch.from_numpy(labels)[None], 32)
    assert aji(labels, instances_from_distance(highest.numpy(), DistConfig(depth=1.0)).labels) > 0.95


@pytest.mark.gpu
def test_a_captured_bf16_training_learns():
    config = TrainingConfig(
        iterations=40, batch=4, crop=64, lr=0.01, precision="bf16", cuda_graph=True, log_every=1, validate_every=0
    )
    result = train(small().cuda(), [picture(seed) for seed in range(4)], config)
    losses = [row["distance"] for row in result.curve]
    assert len(set(losses)) == 40
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
