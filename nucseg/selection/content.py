"""How much nucleus a patch holds, by the haematoxylin channel, and how much tissue at all; no labels are used."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from skimage.color import rgb2hed
from skimage.filters import gaussian, threshold_otsu

SMOOTHING = 2.0  # pixels: a nucleus is several pixels wide, stain grain is not
GLASS = 220  # a pixel whose darkest colour is this bright is bare glass, or fat, which looks the same
BLACK = 30  # one whose brightest colour is this dark was never scanned, or is masked; no stain is so dark


def nuclear_content(
    images: Iterable[np.ndarray], grids: Iterable[tuple[np.ndarray, np.ndarray]], size: int
) -> np.ndarray:
    """Share of each patch's pixels above its image's Otsu threshold in the haematoxylin channel.

    Parameters
    ----------
    images
        (H, W, 3) uint8.
    grids
        For each image the rows and the columns of its patches.
    size
        Side of a patch, pixels.

    Returns
    -------
    np.ndarray
        (n,) float64 in 0..1, patches in the order of the images and grids. The threshold is the image's own because
        stain strength differs between slides more than between tissues.
    """
    shares = []
    for image, (rows, cols) in zip(images, grids, strict=True):
        stain = gaussian(rgb2hed(image)[..., 0], SMOOTHING)
        above = stain > threshold_otsu(stain) if np.ptp(stain) > 0 else np.zeros(stain.shape, dtype=bool)
        shares.append(_share(above, rows, cols, size))
    return np.concatenate(shares)


def tissue_share(image: np.ndarray, rows: np.ndarray, cols: np.ndarray, size: int) -> np.ndarray:
    """Share of the pixels of each patch of an image (H, W, 3) uint8 that show tissue, (n,) float64 in 0..1."""
    return _share(shows_tissue(image), rows, cols, size)


def shows_tissue(image: np.ndarray) -> np.ndarray:
    """Which pixels of an image (H, W, 3) uint8 are neither bare glass nor black, (H, W) bool."""
    return (image.min(axis=2) < GLASS) & (image.max(axis=2) >= BLACK)


def _share(mask: np.ndarray, rows: np.ndarray, cols: np.ndarray, size: int) -> np.ndarray:
    """Share of the pixels of each patch that a mask holds, from one table of sums."""
    kind = np.int32 if mask.size < 2**31 else np.int64
    sums = np.pad(mask.cumsum(0, dtype=kind).cumsum(1, dtype=kind), ((1, 0), (1, 0)))
    r, c = np.asarray(rows), np.asarray(cols)
    inside = sums[r + size, c + size] - sums[r, c + size] - sums[r + size, c] + sums[r, c]
    return inside / size**2
