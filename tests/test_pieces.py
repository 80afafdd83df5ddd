"""Pieces of masks, and what the map segmenters do with them, against SciPy and scikit-image on whole images."""

import numpy as np
import pytest
from scipy import ndimage
from skimage.segmentation import watershed

from nucseg.models.maps import at_least, flood, mark_the_rest, score_instances
from nucseg.models.pieces import Pieces, filled, opened

DISC = np.hypot(*np.mgrid[-2:3, -2:3]) < 2.5


def masks():
    """Masks of all sizes from 1x1, of fine and coarse grain, nearly empty to nearly full; empty and full ones too."""
    rng = np.random.default_rng(0)
    for grain in (0, 0.7, 1.5, 3):
        for share in (0.1, 0.5, 0.9):
            for shape in ((1, 1), (1, 9), (9, 1), *rng.integers(2, 40, (12, 2))):
                values = ndimage.gaussian_filter(rng.random(shape), grain)
                yield values > np.quantile(values, 1 - share)
    for shape in ((1, 1), (1, 7), (7, 1), (12, 17)):
        yield np.zeros(shape, dtype=bool)
        yield np.ones(shape, dtype=bool)


def test_pieces_are_those_of_scipy_in_the_same_order():
    for mask in masks():
        expected, count = ndimage.label(mask)
        pieces = Pieces(mask)
        assert pieces.count == count
        assert np.array_equal(pieces.paint(np.arange(1, count + 1, dtype=np.int32)), expected)
        assert np.array_equal(pieces.areas(), np.bincount(expected.ravel(), minlength=count + 1)[1:])
        rim = np.concatenate((expected[0], expected[-1], expected[:, 0], expected[:, -1]))
        assert np.array_equal(pieces.at_border(), np.isin(np.arange(1, count + 1), rim))


def test_holes_and_openings_are_those_of_scipy():
    changed = [0, 0]
    for mask in masks():
        assert np.array_equal(filled(mask), ndimage.binary_fill_holes(mask))
        assert np.array_equal(opened(mask), ndimage.binary_opening(mask, DISC))
        changed = [n + (a != mask).any() for n, a in zip(changed, (filled(mask), opened(mask)), strict=True)]
    assert min(changed) > 20


def test_small_pieces_go_and_the_rest_is_marked():
    for mask in masks():
        parts, count = ndimage.label(mask)
        area = np.bincount(parts.ravel(), minlength=count + 1)
        assert np.array_equal(at_least(mask, 5), np.isin(parts, np.flatnonzero(area[1:] >= 5) + 1))
        seeds = np.random.default_rng(1).random(mask.shape) < 0.02
        markers = ndimage.label(seeds)[0]  # some of them outside the mask
        expected = markers.copy()
        for i in range(1, count + 1):
            if not (markers[parts == i] > 0).any():
                expected[parts == i] = expected.max() + 1
        assert np.array_equal(mark_the_rest(markers, mask), expected)


@pytest.mark.parametrize("flat", [False, True])
def test_flooding_is_the_watershed_of_the_whole_image_but_for_ties(flat):
    several, unlike, pixels = 0, 0, 0
    for seed in range(150):
        rng = np.random.default_rng(seed)
        shape = rng.integers(3, 50, 2)
        mask = ndimage.gaussian_filter(rng.random(shape), 2) > rng.choice([0, 0.49, 0.5])
        height = ndimage.gaussian_filter(rng.normal(size=shape), rng.choice([0.5, 1, 2]))
        if flat:  # as inside nuclei
            height = np.maximum(height, 0)
        markers = ndimage.label(ndimage.gaussian_filter(rng.random(shape), 1) > rng.choice([0.55, 0.6, 0.65]))[0]
        found = flood(height, markers, mask)
        expected = watershed(height, mark_the_rest(markers, mask), mask=mask)
        assert found.dtype == expected.dtype
        several += len(np.unique(found)) > 3
        unlike, pixels = unlike + np.count_nonzero(found != expected), pixels + np.count_nonzero(mask)
    assert several > 50
    assert unlike <= (0.01 * pixels if flat else 0)


def test_nuclei_are_scored_by_the_mean_of_their_pixels():
    rng = np.random.default_rng(0)
    labels = ndimage.label(rng.random((60, 70)) < 0.5)[0] * 3
    probability = rng.random(labels.shape, dtype=np.float32)
    found = score_instances(labels, probability, 4)
    kept = [i for i in np.unique(labels[labels > 0]) if np.count_nonzero(labels == i) >= 4]
    expected = sum((np.int32(1 + n) * (labels == i) for n, i in enumerate(kept)), np.zeros(labels.shape, np.int32))
    assert found.labels.dtype == np.int32
    assert np.array_equal(found.labels, expected)
    np.testing.assert_allclose(found.scores, [probability[labels == i].mean() for i in kept], rtol=1e-6)
