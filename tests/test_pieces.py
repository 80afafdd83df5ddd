"""Pieces of masks, and what the map segmenters do with them, against SciPy and scikit-image on whole images."""

import numpy as np
import pytest
from scipy import ndimage
from skimage.segmentation import watershed

from nucseg.models import maps
from nucseg.models.maps import at_least, flood, mark_the_rest, score_instances
from nucseg.models.pieces import Pieces, beside, filled, opened, widened

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
        assert [pieces.window(i) for i in range(count)] == ndimage.find_objects(expected)


def test_holes_openings_and_neighbours_are_those_of_scipy():
    changed = [0, 0]
    for mask in masks():
        assert np.array_equal(filled(mask), ndimage.binary_fill_holes(mask))
        assert np.array_equal(opened(mask), ndimage.binary_opening(mask, DISC))
        assert np.array_equal(beside(mask), ndimage.binary_dilation(mask))
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


def test_a_window_is_widened_as_far_as_the_image_goes():
    image = np.arange(80).reshape(8, 10)
    for window in ((slice(0, 3), slice(4, 5)), (slice(5, 8), slice(7, 10)), (slice(0, 8), slice(0, 10))):
        wide, inner = widened(window, 2)
        assert np.array_equal(image[wide][inner], image[window])
        padded = np.pad(image, 2, constant_values=-1)[tuple(slice(side.start, side.stop + 4) for side in window)]
        assert np.array_equal(image[wide].ravel(), padded[padded >= 0])


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("level", ["nothing", "floor", "steps", "copies"])
def test_flooding_is_the_watershed_of_the_whole_image_whatever_is_level(level, together, monkeypatch):
    monkeypatch.setattr(maps, "WINDOW", 10**9 if together else 0)
    real, answers, several = maps._order_matters, [], 0
    monkeypatch.setattr(maps, "_order_matters", lambda *a: answers.append(real(*a)) or answers[-1])
    for seed in range(150):
        rng = np.random.default_rng(seed)
        shape = rng.integers(3, 50, 2)
        mask = ndimage.gaussian_filter(rng.random(shape), 2) > rng.choice([0, 0.49, 0.5])
        height = ndimage.gaussian_filter(rng.normal(size=shape), rng.choice([0.5, 1, 2]))
        height /= height.std()
        if level == "floor":
            height = np.maximum(height, rng.choice([-1.5, -1, 0]))
        if level == "steps":
            height = np.rint(2 * height)
        markers = ndimage.label(ndimage.gaussian_filter(rng.random(shape), 1) > rng.choice([0.55, 0.6, 0.65]))[0]
        if level == "copies":  # two of the same, side by side
            mask[:, -1] = False
            mask, height, markers = (np.tile(a, (1, 2)) for a in (mask, height, markers))
            markers = ndimage.label(markers)[0]
        found = flood(height.__getitem__, markers, mask)
        expected = watershed(height, mark_the_rest(markers, mask), mask=mask)
        assert found.dtype == expected.dtype
        assert np.array_equal(found, expected)
        several += len(np.unique(found)) > 3
    assert several > 50
    matters = {"nothing": {False}, "floor": {False, True}, "steps": {True}, "copies": {False}}
    assert set(answers) == matters[level]


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
