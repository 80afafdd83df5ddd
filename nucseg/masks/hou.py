"""Random polygons of Hou et al., what Fig. 4(b) compares the mask synthesis with.

Facts from the released script (SBU-BMI/quip_cnn_segmentation, image_synthesize.py; REFERENCE section 5): 460 x 460
canvas cut to 400 x 400; each nucleus a star-shaped polygon of 10-17 vertices with radius U(8.5, 13) times the image's
size bias N(1.2 + density/8, 0.32), irregularity 0.6 + U(0, 2), spike 0.04 + U(0, 0.2); one random quadrilateral warp
per image; N(20 + 30 density, 40) nuclei, 0 to 256; each larger than 140 px and overlapped by at most 15 % (50 tries).

Deviations, each with its reason:

- The masks are the middle of the 400 x 400 images, so that polygons keep their size in pixels; above 400 the canvas
  grows and the count with its area.
- Their nuclei also keep to the cytoplasm of a texture tile, and a tenth of the sparse images is empty. There is no
  texture here, and an empty mask compares with nothing.
- A label map holds one nucleus per pixel: where two overlap the earlier keeps its pixels. Parts of fewer than
  `min_area` pixels that the crop leaves are dropped, as in our synthesis.
- The size bias is kept at or above 0.5: near 0 no polygon would reach 140 px.
"""

from __future__ import annotations

import numpy as np
from skimage.draw import polygon2mask

_MARGIN = 30  # cut from each side of the canvas
_WARP = 310 / 460  # how far the corners of the warp may move, relative to the canvas
_SMALLEST = 140  # pixels of a nucleus on the canvas
_MOST_OVERLAP = 0.15
_BLOCK = 16  # side of the canvas blocks that are searched first


def hou_polygons(
    count: int = 50, size: int = 256, density: float = 1.0, seed: int = 0, min_area: int = 20
) -> np.ndarray:
    """Draw masks of random polygons from the fixed distribution of Hou et al. (baseline of Fig. 4b).

    Parameters
    ----------
    count
        How many masks.
    size
        Side of a mask in pixels.
    density
        Density level of the tissue; 20 + 30 `density` nuclei are expected on 400 x 400 pixels. `hou_density` finds it.
    seed
        The same seed gives the same masks.
    min_area
        Instances left with fewer pixels by the crop or by overlap are dropped.

    Returns
    -------
    masks
        (count, size, size) int32, ids 1..n in each.
    """
    if count < 1 or size < 1:
        raise ValueError(f"count and size must be at least 1, got {count} and {size}")
    return np.stack([_mask(size, density, min_area, np.random.default_rng((seed, i))) for i in range(count)])


def hou_density(labels: np.ndarray) -> float:
    """Return the density level at which as many polygons are expected as the label map holds nuclei per area.

    Kept to 0..3: the level also enlarges the polygons, and beyond that they no longer fit beside each other.
    """
    nuclei = np.unique(labels[labels > 0]).size
    return float(np.clip((nuclei * 400 * 400 / labels.size - 20) / 30, 0, 3))


def _mask(size: int, density: float, min_area: int, rng: np.random.Generator) -> np.ndarray:
    canvas = max(size, 400) + 2 * _MARGIN
    expected = rng.normal(20 + 30 * density, 40)
    nuclei = int(np.clip(expected, 0, 256) * (canvas / 460) ** 2)
    bias = max(rng.normal(1.2 + density / 8, 0.32), 0.5)
    source = _warp(canvas, rng)
    coarse, extent = _ranges(source), canvas * (1 + _WARP)

    labels = np.zeros((canvas, canvas), np.int32)
    for index in range(1, nuclei + 1):
        for _ in range(50):
            drawn = _polygon_on_canvas(source, coarse, extent, bias, rng)
            if drawn is None:
                break
            overlap = (labels[drawn] > 0).mean()
            if overlap <= _MOST_OVERLAP:
                break
        if drawn is None:
            continue
        # after 50 tries the script takes the nucleus all the same
        rows, cols = drawn
        free = labels[rows, cols] == 0
        labels[rows[free], cols[free]] = index

    start = (canvas - size) // 2
    labels = labels[start : start + size, start : start + size]
    keep = np.bincount(labels.ravel(), minlength=nuclei + 1) >= min_area
    keep[0] = False
    return (np.cumsum(keep) * keep)[labels].astype(np.int32)


def _warp(canvas: int, rng: np.random.Generator) -> np.ndarray:
    """Where each canvas pixel comes from: (2, canvas, canvas) rows and columns of the larger drawing plane.

    The corners of the canvas go to random points near the corners of the plane, bilinearly in between; it makes the
    nuclei of one region alike in size and direction.
    """
    reach = _WARP * canvas
    moves = rng.uniform(0, reach, (2, 2, 2))  # axis, top/bottom, left/right
    far = canvas + reach
    corners = moves.copy()
    corners[0, 1] = far - moves[0, 1]  # rows of the bottom corners
    corners[1, :, 1] = far - moves[1, :, 1]  # columns of the right corners
    t = (np.arange(canvas) + 0.5) / canvas
    down, right = t[:, None], t[None, :]
    top = corners[:, 0, 0, None, None] * (1 - right) + corners[:, 0, 1, None, None] * right
    bottom = corners[:, 1, 0, None, None] * (1 - right) + corners[:, 1, 1, None, None] * right
    return (top * (1 - down) + bottom * down).astype(np.float32)


def _polygon(radius: float, rng: np.random.Generator) -> np.ndarray:
    """Return the vertices of one star-shaped polygon around the origin, (n, 2)."""
    vertices = int(rng.integers(10, 18))
    irregularity = min(0.6 + rng.uniform(0, 2), 1) * 2 * np.pi / vertices
    spike = (0.04 + rng.uniform(0, 0.2)) * radius
    steps = rng.uniform(2 * np.pi / vertices - irregularity, 2 * np.pi / vertices + irregularity, vertices)
    angles = rng.uniform(0, 2 * np.pi) + np.cumsum(steps * 2 * np.pi / steps.sum())
    radii = np.clip(rng.normal(radius, spike, vertices), 0, 2 * radius)
    return np.stack([radii * np.sin(angles), radii * np.cos(angles)], axis=1)


def _polygon_on_canvas(
    source: np.ndarray, coarse: np.ndarray, extent: float, bias: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray] | None:
    """Draw polygons until one covers more than 140 canvas pixels; return its rows and columns there."""
    for _ in range(500):
        shape = _polygon(int(bias * rng.uniform(8.5, 13)), rng)
        low = np.floor(shape.min(axis=0))
        height, width = (np.ceil(shape.max(axis=0)) - low + 1).astype(int)
        row, col = rng.uniform(0, extent, 2) + low
        # only the blocks of the canvas that can show it
        (first_row, last_row), (first_col, last_col) = coarse
        blocks = (last_row >= row) & (first_row < row + height) & (last_col >= col) & (first_col < col + width)
        if not blocks.any():
            continue
        down, right = np.flatnonzero(blocks.any(axis=1)) * _BLOCK, np.flatnonzero(blocks.any(axis=0)) * _BLOCK
        window = source[:, down[0] : down[-1] + _BLOCK, right[0] : right[-1] + _BLOCK]
        near = (window[0] >= row) & (window[0] < row + height) & (window[1] >= col) & (window[1] < col + width)
        rows, cols = np.nonzero(near)
        if rows.size <= _SMALLEST:
            continue
        inside = polygon2mask((height, width), shape - low)
        hit = inside[(window[0][rows, cols] - row).astype(int), (window[1][rows, cols] - col).astype(int)]
        if hit.sum() > _SMALLEST:
            return rows[hit] + down[0], cols[hit] + right[0]
    return None


def _ranges(source: np.ndarray) -> np.ndarray:
    """Smallest and largest source row and column of each block of the canvas: (axis, low/high, blocks, blocks)."""
    edges = np.arange(0, source.shape[1], _BLOCK)
    low, high = (f.reduceat(f.reduceat(source, edges, axis=1), edges, axis=2) for f in (np.minimum, np.maximum))
    return np.stack([low, high], axis=1)
