"""Quality measures rank what is better first, and agree with known values."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.linalg import sqrtm

from nucseg.gan import quality


def scene(count, seed, nucleus=(80, 50, 140), tissue=(220, 170, 195), noise=8.0, size=64):
    rng = np.random.default_rng(seed)
    rows, cols = np.mgrid[:size, :size]
    labels = np.zeros((count, size, size), np.int32)
    for one in labels:
        for k in range(1, 7):
            r, c = rng.integers(6, size - 6, 2)
            one[(rows - r) ** 2 + (cols - c) ** 2 < 30] = k
    images = np.where((labels > 0)[..., None], nucleus, tissue) + rng.normal(0, noise, (*labels.shape, 3))
    return images.clip(0, 255).astype(np.uint8), labels


def pooled(windows):
    """A small deterministic stand-in for an encoder."""
    return torch.cat([windows.mean((2, 3)), windows.std((2, 3))], 1)


def test_colour_statistics_tell_nuclei_and_background_apart():
    images, labels = scene(2, 0, noise=0.0)
    stats = quality.colour_statistics(images, labels)
    np.testing.assert_allclose(stats["nuclei"][0], (80, 50, 140))
    np.testing.assert_allclose(stats["background"][0], (220, 170, 195))
    np.testing.assert_allclose(stats["nuclei"][1], 0)


def test_a_shift_of_the_nuclei_is_their_colour_distance_and_leaves_the_background_alone():
    real, fake = scene(2, 0, noise=0.0), scene(2, 1, nucleus=(90, 60, 150), noise=0.0)
    distance = quality.colour_distance(*real, *fake)
    assert distance["nuclei"] == pytest.approx(10)
    assert distance["background"] == pytest.approx(0)


def test_the_frechet_distance_agrees_with_the_matrix_square_root():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(200, 4)) @ rng.normal(size=(4, 4)), rng.normal(1, 2, (150, 4))
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    wanted = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)
    assert quality.frechet_distance(a, b) == pytest.approx(wanted)
    assert quality.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_windows_show_their_component_only():
    images, labels = scene(2, 0)
    windows = quality.component_windows(images, labels, "nuclei", side=16, count=20)
    assert windows.shape == (20, 3, 16, 16)
    grey = 128 / 255
    light = (windows.mean(1) > 0.6) & ((windows - grey).abs().amax(1) > 0.01)
    assert not light.any()  # no pixel of the light background
    assert len(quality.component_windows(images, np.zeros_like(labels), "nuclei")) == 0


def test_frechet_distances_find_the_component_that_is_wrong():
    real, same, wrong = scene(3, 0), scene(3, 1), scene(3, 2, nucleus=(170, 120, 160))
    good = quality.component_frechet(*real, *same, pooled, side=16, count=80)
    bad = quality.component_frechet(*real, *wrong, pooled, side=16, count=80)
    assert bad["nuclei"] > 5 * good["nuclei"]
    assert bad["background"] < 2 * good["background"] + 1e-3


def test_blurred_nuclei_have_less_sharp_boundaries():
    clean, labels = scene(2, 0, noise=0.0)
    grain = np.random.default_rng(0).normal(0, 4, clean.shape)

    def grainy(images):
        return (images + grain).clip(0, 255).astype(np.uint8)

    sharp = quality.boundary_sharpness(grainy(clean), labels)
    soft = quality.boundary_sharpness(grainy(ndimage.gaussian_filter(clean.astype(float), (0, 2, 2, 0))), labels)
    elsewhere = quality.boundary_sharpness(grainy(clean), labels[:, ::-1, ::-1])
    assert sharp > 1.5 * soft
    assert sharp > 1.5 * elsewhere
    assert np.isnan(quality.boundary_sharpness(clean, np.zeros_like(labels)))


def test_adherence_is_dice_and_full_where_both_are_empty():
    images, labels = scene(1, 0)
    assert quality.mask_adherence(images, labels, lambda image: labels[0]) == 1
    assert quality.mask_adherence(images, labels, lambda image: (labels[0] == 0).astype(int)) == 0
    half = labels[0].copy()
    half[:32] = 0
    inside = (half > 0).sum()
    wanted = 2 * inside / (inside + (labels[0] > 0).sum())
    assert quality.mask_adherence(images, labels, lambda image: half) == pytest.approx(wanted)
    assert quality.mask_adherence(images, np.zeros_like(labels), lambda image: np.zeros((64, 64), int)) == 1


def test_a_copy_is_memorised_and_another_image_is_not():
    images, _ = scene(3, 0)
    source, held_out = images[0], images[1:2]
    assert quality.memorisation(images[:1], held_out, source, count=20) == pytest.approx(0, abs=1e-3)
    assert quality.memorisation(images[2:], held_out, source, count=60) == pytest.approx(1, abs=0.2)


def test_the_nearest_crop_agrees_with_a_loop():
    rng = np.random.default_rng(1)
    query = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    larger = rng.integers(0, 256, (10, 11, 3), dtype=np.uint8)
    loop = min(
        np.sqrt(np.mean((query.astype(float) - larger[r : r + 8, c : c + 8]) ** 2)) for r in range(3) for c in range(4)
    )
    assert quality.nearest_crop_distance(query[None], larger, side=8, count=1)[0] == pytest.approx(loop, rel=1e-4)


def test_assess_names_every_measure():
    (fake, fake_labels), (real, real_labels) = scene(2, 0), scene(2, 1)
    held_out = list(zip(real, real_labels, strict=True))
    measures = quality.assess(fake, fake_labels, held_out, real[0], pooled, lambda image: fake_labels[0])
    assert set(measures) == {
        "colour_nuclei", "colour_background", "sharpness_ratio", "memorisation", "frechet_nuclei",
        "frechet_background", "adherence",
    }  # fmt: skip
    assert all(np.isfinite(v) for v in measures.values())
    assert "adherence" not in quality.assess(fake, fake_labels, held_out, real[0])
