"""What pixels show by their colour alone, haematoxylin or tissue at all, and how much of it a patch holds."""

from __future__ import annotations

import numpy as np
from skimage.color import rgb2hed

SMOOTHING = 2.0  # pixels: a nucleus is several pixels wide, stain grain is not
CHUNK = 2_000_000  # pixels whose stains are separated at a time
GLASS = 220  # a pixel whose darkest colour is this bright is bare glass, or fat, which looks the same
BLACK = 30  # one whose brightest colour is this dark was never scanned, or is masked; no stain is so dark


def haematoxylin(image: np.ndarray) -> np.ndarray:
    """Amount of haematoxylin in each pixel of an image (H, W, 3) uint8, (H, W) float32, in any unit.

    A few rows at a time: separating stains takes 90 bytes a pixel while it lasts.
    """
    rows = max(1, CHUNK // image.shape[1])
    return np.concatenate([rgb2hed(image[i : i + rows])[..., 0].astype(np.float32) for i in range(0, len(image), rows)])


def tissue_share(image: np.ndarray, rows: np.ndarray, cols: np.ndarray, size: int) -> np.ndarray:
    """Share of the pixels of each patch of an image (H, W, 3) uint8 that show tissue, (n,) float64 in 0..1."""
    return share(shows_tissue(image), rows, cols, size)


def shows_tissue(image: np.ndarray) -> np.ndarray:
    """Which pixels of an image (H, W, 3) uint8 are neither bare glass nor black, (H, W) bool."""
    return (image.min(axis=2) < GLASS) & (image.max(axis=2) >= BLACK)


def share(mask: np.ndarray, rows: np.ndarray, cols: np.ndarray, size: int) -> np.ndarray:
    """Share of the pixels of each patch that a mask holds, from one table of sums."""
    kind = np.int32 if mask.size < 2**31 else np.int64
    sums = np.pad(mask.cumsum(0, dtype=kind).cumsum(1, dtype=kind), ((1, 0), (1, 0)))
    r, c = np.asarray(rows), np.asarray(cols)
    inside = sums[r + size, c + size] - sums[r, c + size] - sums[r + size, c] + sums[r, c]
    return inside / size**2
