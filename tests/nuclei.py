"""Drawn nuclei for the tests of segmenters, and what a loop over nuclei says of them."""

import numpy as np
from scipy import ndimage


def ellipses(size=96, count=14, seed=0):
    """Overlapping ellipses, later ones on top, with ids far apart."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((size, size), dtype=np.int32)
    yy, xx = np.mgrid[:size, :size]
    for i in range(count):
        y, x = rng.uniform(0, size, 2)
        a, b = rng.uniform(4, 10, 2)
        labels[((yy - y) / a) ** 2 + ((xx - x) / b) ** 2 < 1] = 3 + 11 * i
    return labels


def picture(seed=0, size=96):
    """An image whose nuclei are darker and bluer than what is around them, and their label map."""
    labels = ellipses(size, seed=seed)
    rng = np.random.default_rng(seed)
    image = np.where(labels[..., None] > 0, (90, 60, 130), (225, 170, 205)) + rng.integers(-15, 16, (size, size, 3))
    return image.astype(np.uint8), labels


def two_touching(size=64):
    """Two discs that share a border: label map."""
    labels = np.zeros((size, size), dtype=np.int32)
    yy, xx = np.mgrid[:size, :size]
    labels[(yy - 32) ** 2 + (xx - 22) ** 2 < 100] = 1
    labels[((yy - 32) ** 2 + (xx - 41) ** 2 < 100) & (labels == 0)] = 2
    return labels


def depth_by_nucleus(labels, border_is_an_edge=False):
    """SciPy's chessboard distance transform of each nucleus alone."""
    depth = np.zeros(labels.shape)
    for i in np.unique(labels[labels > 0]):
        mask = np.pad(labels == i, 1) if border_is_an_edge else labels == i
        distance = ndimage.distance_transform_cdt(mask, "chessboard")
        depth += distance[1:-1, 1:-1] if border_is_an_edge else distance
    return depth
