"""Distances inside nuclei against a loop over nuclei."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from nucseg.labels import IGNORE
from nucseg.models.distances import chessboard_distances, of_its_largest


def crowded(seed, size=60):
    """Overlapping discs, later ones on top: many nuclei touch, some are in pieces; a patch of unknown."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((size, size), dtype=np.int64)
    y, x = np.mgrid[:size, :size]
    for i in range(25):
        row, col, radius = *rng.uniform(0, size, 2), rng.uniform(2, 10)
        labels[np.hypot(y - row, x - col) < radius] = 3 * i + 2
    labels[20:30, 25:33] = IGNORE
    return labels


def by_loop(labels):
    """Distance of each nucleus to all that is not it; the border is no edge, as if the image went on as it is."""
    out = np.zeros(labels.shape)
    for i in np.unique(labels[labels > 0]):
        padded = np.pad(labels == i, 40, mode="edge")
        out += ndimage.distance_transform_cdt(padded, "chessboard")[40:-40, 40:-40]
    return out


@pytest.mark.parametrize("seed", range(3))
def test_distances_are_those_of_each_nucleus_alone(seed):
    labels = crowded(seed)
    found = chessboard_distances(torch.from_numpy(labels)[None], reach=40)[0].numpy()
    np.testing.assert_array_equal(found, by_loop(labels))


def test_images_of_a_batch_do_not_see_each_other():
    labels = torch.from_numpy(np.stack([crowded(seed) for seed in range(3)]))
    together = chessboard_distances(labels)
    assert all(torch.equal(together[i], chessboard_distances(labels[i : i + 1])[0]) for i in range(3))
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


def test_no_distance_is_longer_than_the_reach():
    whole = torch.ones(1, 50, 50, dtype=torch.long)
    whole[0, :, 0] = 0
    assert chessboard_distances(whole, reach=8).max() == 8
    assert chessboard_distances(whole, reach=64)[0, 5].tolist() == list(range(50))
    assert not chessboard_distances(torch.zeros(1, 9, 9, dtype=torch.long)).any()
