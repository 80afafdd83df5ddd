"""Are synthetic images any good? Measures for Table II's systems, all but one without any trained segmenter.

Synthetic images are compared with held-out real patches of the same tissue, nuclei and background apart, because Dice
and AJI after training say little about *what* a generator gets wrong. The paper reports none of these.

=====================  ==============================================================================================
colour                 earth mover's distance between the pixel values of real and synthetic nuclei (background)
Frechet distance       between encoder features of small windows on nuclei (on background), the rest painted grey
boundary sharpness     gradient on the masks' outlines over the gradient elsewhere; real and synthetic should agree
mask adherence         Dice between a segmenter's prediction on a synthetic image and the mask it was painted from
memorisation           distance to the nearest crop of the training patch over that of held-out real patches; 1 is
                       no nearer than another patch of the tissue, 0 a copy
=====================  ==============================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Integer, UInt8
from scipy import ndimage
from scipy.stats import wasserstein_distance
from torch import Tensor

COMPONENTS = ("nuclei", "background")
Images = UInt8[np.ndarray, "n h w 3"]
Labels = Integer[np.ndarray, "n h w"]
FakeImages = UInt8[np.ndarray, "m y x 3"]
FakeLabels = Integer[np.ndarray, "m y x"]


def _where(labels: Labels, component: str) -> np.ndarray:
    return labels > 0 if component == "nuclei" else labels == 0


def colour_statistics(images: Images, labels: Labels) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return mean and standard deviation of R, G and B (0..255) in nuclei and background; NaN where there is none."""
    result = {}
    for component in COMPONENTS:
        pixels = images[_where(labels, component)].astype(float)
        nothing = np.full(3, np.nan)
        result[component] = (pixels.mean(0), pixels.std(0)) if len(pixels) else (nothing, nothing)
    return result


def colour_contrast(images: Images, labels: Labels) -> tuple[float, float]:
    """How much darker (mean grey, 0..255) and bluer (share of blue) nuclei are than background; NaN without both."""
    (inside, _), (outside, _) = colour_statistics(images, labels).values()
    return float(outside.mean() - inside.mean()), float(inside[2] / inside.sum() - outside[2] / outside.sum())


def colour_distance(
    real: Images, real_labels: Labels, fake: FakeImages, fake_labels: FakeLabels, samples: int = 20_000, seed: int = 0
) -> dict[str, float]:
    """Earth mover's distance between real and synthetic pixel values, mean over R, G, B, in grey levels (0..255)."""
    rng, result = np.random.default_rng(seed), {}
    for component in COMPONENTS:
        a, b = real[_where(real_labels, component)], fake[_where(fake_labels, component)]
        if not len(a) or not len(b):
            result[component] = float("nan")
            continue
        a, b = (x[rng.integers(len(x), size=samples)] if len(x) > samples else x for x in (a, b))
        result[component] = float(np.mean([wasserstein_distance(a[:, c], b[:, c]) for c in range(3)]))
    return result


def frechet_distance(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> float:
    """Frechet distance |mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)) between two sets of features seen as Gaussians."""
    if len(a) < 2 or len(b) < 2:
        return float("nan")
    mean = np.sum((a.mean(0) - b.mean(0)) ** 2)
    cov_a, cov_b = np.atleast_2d(np.cov(a, rowvar=False)), np.atleast_2d(np.cov(b, rowvar=False))
    # tr (A B)^(1/2) = tr (A^(1/2) B A^(1/2))^(1/2): symmetric, so that rounding cannot make it complex
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    return float(max(mean + np.trace(cov_a) + np.trace(cov_b) - 2 * cross, 0.0))


def component_windows(
    images: Images, labels: Labels, component: str, side: int = 32, count: int = 200, seed: int = 0
) -> Float[Tensor, "m 3 side side"]:
    """Cut windows centred on random pixels of a component, everything else in them painted grey; [0, 1].

    Windows are drawn from all images alike; fewer than `count` (possibly none) only if no window fits on the component.
    """
    if min(images.shape[1:3]) < side:
        raise ValueError(f"windows of {side} px do not fit images of {images.shape[1:3]}")
    rng, half = np.random.default_rng(seed), side // 2
    where = _where(labels, component)
    inner = np.zeros_like(where)
    inner[:, half : where.shape[1] - side + half + 1, half : where.shape[2] - side + half + 1] = True
    centres = np.argwhere(where & inner)
    if not len(centres):
        return torch.zeros(0, 3, side, side)
    windows = []
    for i, row, col in centres[rng.integers(len(centres), size=count)]:
        place = (i, slice(row - half, row - half + side), slice(col - half, col - half + side))
        windows.append(np.where(where[place][..., None], images[place], 128))
    return torch.from_numpy(np.stack(windows)).movedim(-1, 1).float() / 255


def component_frechet(
    real: Images,
    real_labels: Labels,
    fake: FakeImages,
    fake_labels: FakeLabels,
    encode: Callable[[Tensor], Tensor],
    side: int = 32,
    count: int = 200,
    dimensions: int = 32,
    seed: int = 0,
) -> dict[str, float]:
    """Frechet distance between encoder features of real and synthetic windows, nuclei and background apart.

    Parameters
    ----------
    encode
        (b, 3, h, w) in [0, 1] -> (b, width), for example a `nucseg.encoders.Encoder`.
    side, count
        Window side in pixels, and windows per set.
    dimensions
        Features are projected on that many principal axes of the real windows: a few hundred windows cannot fill the
        covariance of a thousand features.
    """
    result = {}
    for component in COMPONENTS:
        sets = []
        for images, labels, offset in ((real, real_labels, 0), (fake, fake_labels, 1)):
            windows = component_windows(images, labels, component, side, count, seed + offset)
            with torch.no_grad():
                batches = [encode(b).cpu().double().numpy() for b in windows.split(64)] if len(windows) else []
            sets.append(np.concatenate(batches) if batches else np.zeros((0, 1)))
        if not len(sets[0]) or not len(sets[1]):
            result[component] = float("nan")
            continue
        centre = sets[0].mean(0)
        axes = np.linalg.svd(sets[0] - centre, full_matrices=False)[2][:dimensions]
        result[component] = frechet_distance((sets[0] - centre) @ axes.T, (sets[1] - centre) @ axes.T)
    return result


def boundary_sharpness(images: Images, labels: Labels) -> float:
    """Mean grey-level gradient within 1.5 pixels of the masks' outlines, over the mean gradient elsewhere."""
    on, off = [], []
    for image, mask in zip(images, labels > 0, strict=True):
        grey = image.astype(float).mean(2)
        steep = np.hypot(ndimage.sobel(grey, 0), ndimage.sobel(grey, 1))
        if not mask.any() or mask.all():
            continue
        near = (ndimage.distance_transform_edt(mask) + ndimage.distance_transform_edt(~mask)) <= 1.5
        on.append(steep[near])
        off.append(steep[~near])
    if not on:
        return float("nan")
    return float(np.concatenate(on).mean() / max(np.concatenate(off).mean(), 1e-9))


def mask_adherence(images: Images, labels: Labels, predict: Callable[[np.ndarray], np.ndarray]) -> float:
    """Mean Dice between the foreground that `predict` finds in each image and the mask it was painted from.

    `predict` takes (H, W, 3) uint8 and returns a label map (H, W): a segmenter trained on real patches only. Two empty
    masks agree fully.
    """
    scores = []
    for image, truth in zip(images, labels > 0, strict=True):
        found = predict(image) > 0
        total = found.sum() + truth.sum()
        scores.append(2 * (found & truth).sum() / total if total else 1.0)
    return float(np.mean(scores))


def nearest_crop_distance(
    images: Images,
    source: UInt8[np.ndarray, "height width 3"],
    side: int = 16,
    count: int = 100,
    stride: int = 1,
    seed: int = 0,
) -> Float[np.ndarray, " count"]:
    """RMSE (grey levels) between random crops of `images` and the nearest crop of `source`, every position tried."""
    rng = np.random.default_rng(seed)

    def crops(image: np.ndarray, step: int) -> np.ndarray:
        view = np.lib.stride_tricks.sliding_window_view(image, (side, side, 3))[::step, ::step, 0]
        return view.reshape(-1, side * side * 3)

    pool = torch.from_numpy(crops(source, stride).astype(np.float32))
    high, wide = images.shape[1] - side + 1, images.shape[2] - side + 1
    queries = []
    for _ in range(count):
        i, r, c = rng.integers(len(images)), rng.integers(high), rng.integers(wide)
        queries.append(images[i, r : r + side, c : c + side].reshape(-1).astype(np.float32))
    distances = torch.cdist(torch.from_numpy(np.stack(queries)), pool).min(1).values
    return (distances / (side * np.sqrt(3))).numpy()


def memorisation(
    fake: FakeImages,
    held_out: Images,
    source: UInt8[np.ndarray, "height width 3"],
    side: int = 16,
    count: int = 100,
    seed: int = 0,
) -> float:
    """Median distance of synthetic crops to the training patch over that of held-out real crops: 1 none, 0 a copy."""
    ours = np.median(nearest_crop_distance(fake, source, side, count, seed=seed))
    theirs = np.median(nearest_crop_distance(held_out, source, side, count, seed=seed))
    return float(ours / max(theirs, 1e-9))


def assess(
    fake: FakeImages,
    fake_labels: FakeLabels,
    held_out: Sequence[tuple[np.ndarray, np.ndarray]],
    source: UInt8[np.ndarray, "height width 3"],
    encode: Callable[[Tensor], Tensor] | None = None,
    predict: Callable[[np.ndarray], np.ndarray] | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Measure the images of one system for one annotated patch.

    Parameters
    ----------
    fake, fake_labels
        Synthetic images (n, s, s, 3) and the label maps they were painted from (n, s, s).
    held_out
        Real patches of the same tissue that the system has not seen: image and label map, of one size.
    source
        The annotated patch that it was trained on.
    encode, predict
        For the Frechet distances and mask adherence; without them those entries are left out.

    Returns
    -------
    measures
        By name; distances are better when smaller, ``sharpness_ratio`` (synthetic over real) and ``memorisation`` when
        nearer to 1, ``adherence`` when larger.
    """
    real, real_labels = np.stack([image for image, _ in held_out]), np.stack([labels for _, labels in held_out])
    measures = {f"colour_{k}": v for k, v in colour_distance(real, real_labels, fake, fake_labels, seed=seed).items()}
    measures["sharpness_ratio"] = boundary_sharpness(fake, fake_labels) / boundary_sharpness(real, real_labels)
    measures["memorisation"] = memorisation(fake, real, source, seed=seed)
    if encode is not None:
        distances = component_frechet(real, real_labels, fake, fake_labels, encode, seed=seed)
        measures |= {f"frechet_{k}": v for k, v in distances.items()}
    if predict is not None:
        measures["adherence"] = mask_adherence(fake, fake_labels, predict)
    return measures
