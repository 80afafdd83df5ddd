"""Augmentation: exact geometry, labels that follow, colour changes that stay mild."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from nucseg.augment import AugmentConfig, augment
from nucseg.labels import IGNORE

STILL = {"rot90": False, "flip": False, "colour_probability": 0.0, "blur_probability": 0.0, "noise_probability": 0.0}


def batch(b=4, h=32, w=32, seed=0):
    rng = np.random.default_rng(seed)
    images = torch.from_numpy(rng.random((b, 3, h, w), dtype=np.float32))
    return images, torch.from_numpy(rng.integers(0, 50, (b, h, w)).astype(np.int32))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_with_everything_off_nothing_changes():
    images, labels = batch()
    moved, moved_labels = augment(images, labels, AugmentConfig(**STILL), generator())
    assert torch.equal(moved, images)
    assert torch.equal(moved_labels, labels)


def test_the_precision_of_a_training_step_does_not_reach_it():
    images, labels = batch(h=64, w=64)
    config = AugmentConfig(rotate=180.0, scale=(0.8, 1.25), colour_probability=1.0, blur_probability=1.0)
    exact = augment(images, labels, config, generator(), size=32)
    with torch.autocast("cpu", torch.bfloat16):
        found = augment(images, labels, config, generator(), size=32)
    assert torch.equal(found[0], exact[0])
    assert torch.equal(found[1], exact[1])


def test_rotations_and_flips_are_exact_and_all_eight_occur():
    images, labels = batch(b=64)
    images[:], labels[:] = images[:1].clone(), labels[:1].clone()
    moved, moved_labels = augment(images, labels, AugmentConfig(**STILL | {"rot90": True, "flip": True}), generator())
    variants = [
        (torch.rot90(i, k, (1, 2)), torch.rot90(m, k, (0, 1)))
        for i, m in ((images[0], labels[0]), (images[0].flip(2), labels[0].flip(1)))
        for k in range(4)
    ]
    seen = set()
    for image, label_map in zip(moved, moved_labels, strict=True):
        matches = [n for n, (i, m) in enumerate(variants) if torch.equal(i, image) and torch.equal(m, label_map)]
        assert len(matches) == 1
        seen.add(matches[0])
    assert seen == set(range(8))


def test_a_rectangle_keeps_its_shape_and_its_pixels():
    images, labels = batch(h=24, w=40)
    moved, moved_labels = augment(images, labels, AugmentConfig(**STILL | {"rot90": True, "flip": True}), generator())
    assert moved.shape == images.shape
    assert torch.equal(moved_labels.flatten(1).sort().values, labels.flatten(1).sort().values)
    assert torch.equal(moved.flatten(1).sort().values, images.flatten(1).sort().values)


def test_labels_follow_the_image_under_rotation_and_scale():
    # An image that shows its own label map: after the move, every pixel away from an outline must still agree.
    yy, xx = np.mgrid[:128, :128]
    labels = np.zeros((128, 128), dtype=np.int32)
    for i, (y, x) in enumerate([(40, 45), (80, 60), (60, 95), (30, 90)]):
        labels[(yy - y) ** 2 + (xx - x) ** 2 < 130] = 7 * (i + 1)
    labels = torch.from_numpy(labels)[None].repeat(6, 1, 1)
    images = (labels.float() / 28)[:, None].repeat(1, 3, 1, 1)
    config = AugmentConfig(**STILL | {"rot90": True, "flip": True, "rotate": 30.0, "scale": (0.8, 1.25)})
    moved, moved_labels = augment(images, labels, config, generator(), size=72)
    assert moved.shape == (6, 3, 72, 72)
    for image, label_map in zip(moved, moved_labels, strict=True):
        assert set(label_map.unique().tolist()) <= {0, 7, 14, 21, 28}
        flat = ndimage.maximum_filter(label_map.numpy(), 5) == ndimage.minimum_filter(label_map.numpy(), 5)
        flat[[0, 1, -2, -1]] = flat[:, [0, 1, -2, -1]] = False  # the neighbour may lie outside
        np.testing.assert_allclose(image[0].numpy()[flat], label_map.numpy()[flat] / 28, atol=1e-4)
        assert (label_map > 0).sum() > 300


def test_unknown_pixels_move_with_the_image_and_stay_unknown():
    images, labels = batch(b=8, h=64, w=64)
    labels = torch.where(labels < 20, IGNORE, torch.where(labels < 40, 0, 3)).to(torch.int32)
    images = labels[:, None].expand(-1, 3, -1, -1).float().add(1) / 4
    still = AugmentConfig(**STILL | {"rot90": True, "flip": True})
    moved, moved_labels = augment(images, labels, still, generator())
    assert torch.equal((moved[:, 0] * 4 - 1).round().int(), moved_labels)
    config = AugmentConfig(**STILL | {"rotate": 180.0, "scale": (0.5, 0.6)})  # far beyond the window: mirrored
    _, turned = augment(images, labels, config, generator())
    assert {IGNORE, 0} <= set(turned.unique().tolist())
    assert turned.min() == IGNORE
    assert (turned == IGNORE).float().mean().item() == pytest.approx((labels == IGNORE).float().mean().item(), abs=0.03)


def test_ids_of_mirrored_nuclei_are_new_and_bounded():
    labels = torch.arange(1, 65, dtype=torch.int32).reshape(1, 8, 8).repeat_interleave(4, 1).repeat_interleave(4, 2)
    images = torch.zeros(8, 3, 32, 32)
    config = AugmentConfig(**STILL | {"rotate": 180.0, "scale": (0.25, 0.3)})
    _, moved = augment(images, labels.expand(8, -1, -1), config, generator())
    assert 64 < moved.max() <= config.largest_id(64)
    assert AugmentConfig().largest_id(64) == 64


def test_a_window_of_the_stated_size_needs_no_pixel_from_beyond():
    config = AugmentConfig(**STILL | {"rotate": 180.0, "scale": (0.7, 1.0)})
    side = config.window(48)
    labels = torch.ones(16, side, side, dtype=torch.int32)
    images = torch.zeros(16, 3, side, side)
    _, moved = augment(images, labels, config, generator(), size=48)
    assert (moved == 1).all()  # a mirrored pixel would carry another id
    _, short = augment(images[..., :50, :50], labels[:, :50, :50], config, generator(), size=48)
    assert (short > 1).any()


def test_the_centred_square_is_the_centre():
    images, labels = batch(h=40, w=40)
    moved, moved_labels = augment(images, labels, AugmentConfig(**STILL), generator(), size=32)
    assert torch.equal(moved, images[..., 4:36, 4:36])
    assert torch.equal(moved_labels, labels[..., 4:36, 4:36])


@pytest.mark.parametrize("size", [31, 32, 33])
def test_an_odd_difference_stays_on_whole_pixels(size):
    images, labels = batch(h=47, w=47)
    moved, _ = augment(images, labels, AugmentConfig(**STILL), generator(), size=size)
    windows = images.unfold(2, size, 1).unfold(3, size, 1)  # (b, 3, rows, cols, size, size)
    start = (47 - size) // 2
    assert any(torch.equal(moved, windows[:, :, start + i, start + j]) for i in (0, 1) for j in (0, 1))


def test_blur_equals_scipys_gaussian():
    images, labels = batch(b=2, h=40, w=40)
    config = AugmentConfig(**STILL | {"blur_probability": 1.0, "blur_sigma": (1.0, 1.0)})
    moved, _ = augment(images, labels, config, generator())
    expected = ndimage.gaussian_filter(images.numpy(), (0, 0, 1, 1), mode="mirror", radius=(0, 0, 3, 3))
    np.testing.assert_allclose(moved.numpy(), expected, atol=1e-5)


def test_colour_changes_spare_labels_and_stay_mild():
    images, labels = batch(b=16)
    images = images * 0.4 + 0.4
    config = AugmentConfig(**STILL | {"colour_probability": 1.0})
    moved, moved_labels = augment(images, labels, config, generator())
    assert torch.equal(moved_labels, labels)
    shift = (moved - images).abs().mean(dim=(1, 2, 3))
    assert (shift > 1e-3).all()
    assert shift.max() < 0.15


def test_without_strength_the_colour_maps_are_the_identity():
    images, labels = batch()
    config = AugmentConfig(
        **STILL | {"colour_probability": 1.0, "stain": 0.0, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0,
                   "hue": 0.0}
    )  # fmt: skip
    moved, _ = augment(images, labels, config, generator())
    np.testing.assert_allclose(moved.numpy(), images.clamp(min=1 / 255).numpy(), atol=2e-3)


def test_noise_has_the_stated_spread():
    images, labels = torch.full((8, 3, 64, 64), 0.5), torch.zeros(8, 64, 64, dtype=torch.int32)
    config = AugmentConfig(**STILL | {"noise_probability": 1.0, "noise_sigma": (0.05, 0.05)})
    moved, _ = augment(images, labels, config, generator())
    assert moved.std().item() == pytest.approx(0.05, rel=0.03)


def test_equal_generators_give_equal_batches_and_the_input_is_not_touched():
    images, labels = batch()
    kept = images.clone()
    first, second = (augment(images, labels, AugmentConfig(rotate=20.0), generator(3)) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert torch.equal(images, kept)
    assert first[0].min() >= 0
    assert first[0].max() <= 1


@pytest.mark.parametrize(
    "wrong", [{"blur_probability": 1.5}, {"scale": (1.2, 0.8)}, {"stain": -0.1}, {"rotate": 200.0}]
)
def test_a_setting_out_of_range_is_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        AugmentConfig(**wrong)
