"""The pool of training images: windows, weights, mirrored borders."""

import numpy as np
import pytest
import torch

from nucseg.crops import CropPool, mirror_pair
from nucseg.labels import IGNORE

CPU = torch.device("cpu")


def test_crops_are_windows_of_their_images_with_their_labels():
    rng = np.random.default_rng(0)
    pairs = []
    for h, w in ((40, 70), (64, 33)):
        labels = np.arange(1, h * w + 1, dtype=np.int32).reshape(h, w)  # every pixel knows its place
        image = rng.integers(0, 256, (h, w, 3)).astype(np.uint8)
        pairs.append((image, labels))
    pool = CropPool(pairs, 32, CPU)
    images, labels = pool.draw(64, torch.Generator().manual_seed(0))
    corners = set()
    for crop, ids in zip(images, labels, strict=True):
        found = []
        for n, (image, whole) in enumerate(pairs):
            row, col = divmod(int(ids[0, 0]) - 1, whole.shape[1])
            if np.array_equal(whole[row : row + 32, col : col + 32], ids):
                window = image[row : row + 32, col : col + 32].transpose(2, 0, 1) / np.float32(255)
                found.append((n, row, col, np.allclose(window, crop.numpy())))
        assert any(same for *_, same in found)
        corners.add(found[0][:3])
    assert len(corners) > 40


def test_pair_weights_are_sampling_probabilities():
    pairs = [
        (np.full((32, 32, 3), value, dtype=np.uint8), np.zeros((32, 32), dtype=np.int32)) for value in (0, 100, 200)
    ]
    pool = CropPool(pairs, 32, CPU, weights=[3.0, 1.0, 0.0])
    images, _ = pool.draw(4000, torch.Generator().manual_seed(0))
    values = (images[:, 0, 0, 0] * 255).round().int()
    assert (values == 0).float().mean().item() == pytest.approx(0.75, abs=0.03)
    assert not (values == 200).any()


def test_small_pairs_are_mirrored_with_their_nuclei():
    labels = np.zeros((20, 24), dtype=np.int32)
    labels[0:5, 3:9] = 4  # touches the upper border
    labels[9:14, 8:15] = 9  # touches none
    image = np.repeat(labels[..., None] * 10, 3, axis=2).astype(np.uint8)
    padded, ids = mirror_pair(image, labels, 40)
    assert padded.shape == (40, 40, 3)
    assert ids.shape == (40, 40)
    assert np.array_equal(ids[10:30, 8:32], labels)
    assert np.array_equal(padded[..., 0] > 0, ids > 0)
    assert np.array_equal(ids == 4, np.pad(ids[5:15, 8:32] == 4, ((5, 25), (8, 8))))  # joined to its mirror image
    assert (ids == 9).sum() == 35
    assert len(np.unique(ids)) > 3


def test_what_is_unknown_stays_unknown_in_crops_and_in_mirrored_borders():
    labels = np.zeros((20, 20), dtype=np.int32)
    labels[0:6, 0:6] = IGNORE
    labels[8:12, 8:12] = 5
    labels[10, 10] = IGNORE
    image = (labels[..., None] + np.ones(3, dtype=np.int32)).astype(np.uint8)  # the image shows its label map
    padded, ids = mirror_pair(image, labels, 50)
    assert np.array_equal(padded[..., 0] == 0, ids == IGNORE)
    assert np.array_equal(padded[..., 0] == 1, ids == 0)
    assert np.array_equal(ids[15:35, 15:35], labels)
    pool = CropPool([(image, labels)], 32, CPU)
    images, crops = pool.draw(4, torch.Generator().manual_seed(0))
    assert torch.equal(images[:, 0] == 0, crops == IGNORE)
    assert pool.largest_id == 1  # the one nucleus, numbered anew
    nothing = CropPool([(image, np.full_like(labels, IGNORE))], 32, CPU)
    assert nothing.largest_id == 0
    assert (nothing.draw(2, torch.Generator().manual_seed(0))[1] == IGNORE).all()
