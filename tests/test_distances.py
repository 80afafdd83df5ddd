"""Distances inside nuclei against a loop over nuclei."""

import numpy as np
import pytest
import torch
from nuclei import depth_by_nucleus, ellipses
from scipy import ndimage

from nucseg.labels import IGNORE
from nucseg.models.distances import distance_bounds, of_its_largest


def bounds(labels, reach=32):
    return [found.numpy() for found in distance_bounds(torch.from_numpy(np.atleast_3d(labels.T).T), reach)]


def test_bounds_equal_a_loop_over_nuclei_with_and_without_the_border():
    maps = np.stack([ellipses(seed=s) for s in range(3)] + [np.zeros((96, 96), dtype=np.int32)])
    lowest, highest = bounds(maps)
    for i, labels in enumerate(maps):
        np.testing.assert_array_equal(highest[i], depth_by_nucleus(labels))
        np.testing.assert_array_equal(lowest[i], depth_by_nucleus(labels, border_is_an_edge=True))
    assert (highest > lowest).any()
    assert highest.max() > 5


@pytest.mark.parametrize("seed", range(4))
def test_the_true_distance_lies_between_the_bounds_of_a_crop_with_holes(seed):
    labels = ellipses(140, count=45, seed=seed)
    truth = depth_by_nucleus(labels)[22:118, 30:126]
    crop = labels[22:118, 30:126].copy()
    crop[20:50, 30:70] = IGNORE
    crop[ellipses(seed=seed + 10) > 120] = IGNORE
    lowest, highest = (found[0] for found in bounds(crop))
    known = crop != IGNORE
    assert (lowest <= truth)[known].all()
    assert (truth <= highest)[known].all()
    assert not highest[crop == 0].any()
    edge = np.pad(~known, 1, constant_values=True)
    far = ndimage.distance_transform_cdt(~edge, "chessboard")[1:-1, 1:-1] > truth  # the edge is nearer
    assert (lowest == highest)[known & far].all()
    assert 0.05 < (lowest < highest)[known & (crop > 0)].mean() < 0.6


def test_bounds_turn_with_the_nuclei_and_do_not_depend_on_their_ids():
    labels = ellipses()
    plain = bounds(labels)
    for change in (np.flipud, np.fliplr, np.transpose, np.rot90):
        turned = bounds(np.ascontiguousarray(change(labels)))
        assert all(np.array_equal(change(a[0]), b[0]) for a, b in zip(plain, turned, strict=True))
    other = bounds(np.where(labels > 0, 5000 - labels, 0))
    assert all(np.array_equal(a, b) for a, b in zip(plain, other, strict=True))


def test_no_distance_is_longer_than_the_reach():
    labels = np.ones((40, 40), dtype=np.int32)
    labels[20:, :5] = 0
    full = depth_by_nucleus(labels)
    for reach in (1, 2, 7):
        lowest, highest = (found[0] for found in bounds(labels, reach))
        np.testing.assert_array_equal(highest, np.minimum(full, reach))
        assert lowest.max() == min(reach, 20)
    assert (bounds(np.ones((32, 32), dtype=np.int32), 9)[1] == 9).all()  # no edge in sight


def test_images_of_a_batch_do_not_see_each_other():
    labels = torch.from_numpy(np.stack([ellipses(seed=seed) for seed in range(3)]))
    together = distance_bounds(labels, 32)[1]
    assert all(torch.equal(together[i], distance_bounds(labels[i : i + 1], 32)[1][0]) for i in range(3))
    relative = of_its_largest(together, labels, int(labels.max()))
    for i, image in enumerate(labels):
        for nucleus in image.unique():
            inside = image == nucleus
            if nucleus > 0:
                assert relative[i][inside].max() == 1
                expected = together[i][inside] / together[i][inside].max()
                torch.testing.assert_close(relative[i][inside], expected)
            else:
                assert not relative[i][inside].any()
