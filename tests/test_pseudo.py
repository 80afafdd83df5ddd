"""Pseudo-labelling: filters, the truth in annotated patches, nuclei at a patch's border, crops."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from nucseg.config import ConfigError, from_mapping
from nucseg.labels import IGNORE
from nucseg.models.base import Instances
from nucseg.pseudo import PseudoConfig, filter_instances, merge_truth, pseudo_pairs


def squares(*boxes: tuple[int, int, int, int], shape: tuple[int, int] = (40, 40)) -> np.ndarray:
    """A label map of rectangles (row, column, height, width), ids 1, 2, ... in order."""
    labels = np.zeros(shape, np.int32)
    for number, (r, c, h, w) in enumerate(boxes, start=1):
        labels[r : r + h, c : c + w] = number
    return labels


def cut(labels: np.ndarray, row: int, col: int, size: int) -> tuple[int, int, int, np.ndarray]:
    return row, col, size, labels[row : row + size, col : col + size].copy()


def same_partition(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two label maps hold the same nuclei under other ids."""
    pairs = np.unique(np.stack((a.ravel(), b.ravel())), axis=1)
    return (
        len(np.unique(pairs[0])) == len(np.unique(pairs[1])) == pairs.shape[1] and (a > 0).tolist() == (b > 0).tolist()
    )


# -- filters ---------------------------------------------------------------------------------------------------------


def test_unsure_small_and_large_nuclei_are_dropped_and_counted():
    labels = squares((0, 0, 5, 5), (10, 0, 5, 5), (20, 0, 2, 2), (20, 20, 15, 15))
    prediction = Instances(labels, np.array([0.9, 0.4, 0.9, 0.9], np.float32))
    kept, doubtful, dropped = filter_instances(prediction, PseudoConfig(confidence=0.5, min_area=10, max_area=100))
    assert np.array_equal(kept > 0, labels == 1)
    assert np.array_equal(doubtful, labels > 1)
    assert dropped == {"unsure": 1, "small": 1, "large": 1}


def test_scores_that_do_not_fit_the_ids_are_refused():
    with pytest.raises(ValueError, match="1 scores for ids up to 2"):
        filter_instances(Instances(squares((0, 0, 5, 5), (10, 0, 5, 5)), np.ones(1, np.float32)), PseudoConfig())


# -- truth in the annotated patches ----------------------------------------------------------------------------------


def test_a_nucleus_cut_by_a_patch_is_completed_from_the_prediction_and_not_doubled():
    true = squares((12, 15, 6, 10))  # the patch ends at column 20
    predicted = squares((11, 14, 8, 12))
    labels, replaced = merge_truth(predicted, [cut(true, 0, 0, 20)])
    assert np.unique(labels).tolist() == [0, 1]
    assert np.array_equal(labels[:20, :20] > 0, true[:20, :20] > 0)
    assert np.array_equal(labels[:, 20:] > 0, predicted[:, 20:] > 0)
    assert replaced == 1


def test_a_prediction_that_the_truth_denies_goes_and_a_mere_overhang_keeps_its_outer_part():
    nothing = squares()
    denied, _ = merge_truth(squares((5, 10, 6, 13)), [cut(nothing, 0, 0, 20)])  # 10 of 13 columns inside
    assert not denied.any()
    kept, replaced = merge_truth(squares((5, 17, 6, 13)), [cut(nothing, 0, 0, 20)])  # 3 of 13 inside
    assert np.array_equal(kept, squares((5, 20, 6, 10)))
    assert replaced == 0


def test_a_predicted_nucleus_beyond_the_border_does_not_join_a_true_one_that_lies_apart():
    true = squares((12, 2, 6, 6))  # well inside the patch
    predicted = squares((12, 2, 6, 6), (12, 20, 6, 6))
    labels, replaced = merge_truth(predicted, [cut(true, 0, 0, 20)])
    assert same_partition(labels, predicted)
    assert replaced == 1


def test_overlapping_patches_share_their_nuclei_whatever_their_ids():
    true = squares((5, 5, 10, 20), (25, 10, 6, 6), (8, 30, 6, 6))
    first, second = cut(true, 0, 0, 20), cut(true, 3, 12, 25)
    second[3][second[3] > 0] += 100
    labels, _ = merge_truth(np.zeros_like(true), [first, second])
    known = np.zeros(true.shape, bool)
    known[:20, :20] = known[3:28, 12:37] = True
    assert same_partition(labels, np.where(known, true, 0))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6))
def test_the_truth_stands_in_every_patch_and_the_prediction_outside(seed):
    rng = np.random.default_rng(seed)
    true, predicted = (
        squares(*(tuple(int(v) for v in (*rng.integers(0, 34, 2), *rng.integers(2, 12, 2))) for _ in range(8)))
        for _ in range(2)
    )
    patches, known = [], np.zeros(true.shape, bool)
    for _ in range(rng.integers(0, 3)):
        row, col = (int(v) for v in rng.integers(0, 25, 2))
        patches.append(cut(true, row, col, 15))
        known[row : row + 15, col : col + 15] = True
    labels, replaced = merge_truth(predicted, patches)
    assert np.unique(labels[labels > 0]).tolist() == list(range(1, labels.max() + 1))
    assert np.array_equal(labels[known] > 0, true[known] > 0)
    # Inside, two pixels of one label belong to one true nucleus, or the prediction joined two outside the patches.
    for row, col, size, patch in patches:
        window = labels[row : row + size, col : col + size]
        for value in np.unique(patch[patch > 0]):
            assert len(np.unique(window[patch == value])) == 1
    assert not labels[~known & (predicted == 0)].any()
    assert 0 <= replaced <= len(np.unique(predicted)) - 1


def test_without_patches_the_prediction_stands():
    predicted = squares((0, 0, 5, 5), (5, 5, 8, 8), (30, 30, 5, 5))
    labels, replaced = merge_truth(predicted, [])
    assert np.array_equal(labels, predicted)
    assert replaced == 0


def test_a_perfect_prediction_is_left_as_it_is():
    rng = np.random.default_rng(4)
    true, _ = ndimage.label(ndimage.gaussian_filter(rng.normal(size=(80, 80)), 3) > 0.06)
    true = true.astype(np.int32)
    labels, _ = merge_truth(true, [cut(true, 10, 10, 30), cut(true, 30, 35, 30)])
    assert same_partition(labels, true)


def test_a_patch_that_leaves_the_image_is_refused():
    with pytest.raises(ValueError, match=r"annotated patch 0.*do not fit an image of 40 x 40"):
        merge_truth(squares(), [(30, 0, 20, np.zeros((20, 20), np.int32))])


# -- crops -----------------------------------------------------------------------------------------------------------


def images_and_predictor(count: int = 3, size: int = 64, seed: int = 0):
    """Random images; a segmenter that recognises each by its first pixel, with random squares and scores."""
    rng = np.random.default_rng(seed)
    images = [rng.integers(0, 256, (size, size, 3), dtype=np.uint8) for _ in range(count)]
    answers = []
    for number, image in enumerate(images):
        image[0, 0] = number
        boxes = [tuple(int(v) for v in (*rng.integers(0, size - 8, 2), 7, 7)) for _ in range(12)]
        labels = squares(*boxes, shape=(size, size))
        answers.append(Instances(labels, rng.uniform(0.2, 1, labels.max()).astype(np.float32)))
    calls = []

    def predict(image: np.ndarray) -> Instances:
        calls.append(int(image[0, 0, 0]))
        return answers[calls[-1]]

    return images, answers, predict, calls


def test_every_image_is_predicted_once_and_gives_equally_many_crops():
    images, _, predict, calls = images_and_predictor(3)
    made = pseudo_pairs(predict, images, [[], [], []], PseudoConfig(crops=11, size=32), seed=1)
    assert calls == [0, 1, 2]
    assert sorted(np.bincount([image for image, _, _ in made.positions])) == [3, 4, 4]
    assert len(made.pairs) == 11
    for image, labels in made.pairs:
        assert image.shape == (32, 32, 3)
        assert image.dtype == np.uint8
        assert labels.shape == (32, 32)
        assert labels.dtype == np.int32


@pytest.mark.parametrize("positions", [1, 5])
def test_crops_hold_the_filtered_prediction_and_the_truth_of_the_patches(positions):
    images, answers, predict, _ = images_and_predictor(2)
    config = PseudoConfig(crops=8, size=32, confidence=0.6, min_area=10, positions=positions)
    patch = cut(squares((3, 3, 9, 9), shape=(64, 64)), 0, 0, 24)
    made = pseudo_pairs(predict, images, [[patch], []], config, seed=2)
    whole = [
        merge_truth(filter_instances(answer, config)[0], patches, 10)[0]
        for answer, patches in zip(answers, [[patch], []], strict=True)
    ]
    for (image, labels), (number, row, col) in zip(made.pairs, made.positions, strict=True):
        assert np.array_equal(image, images[number][row : row + 32, col : col + 32])
        assert same_partition(labels, whole[number][row : row + 32, col : col + 32])
    present = sum(len(np.unique(answer.labels)) - 1 for answer in answers)
    assert made.kept + sum(made.dropped.values()) == present


def test_dropped_nuclei_become_unknown_where_asked_and_nowhere_else():
    images, answers, predict, _ = images_and_predictor(2)
    config = PseudoConfig(crops=20, size=32, confidence=0.6, min_area=10)
    patch = cut(squares((3, 3, 9, 9), shape=(64, 64)), 0, 0, 24)
    plain = pseudo_pairs(predict, images, [[patch], []], config, seed=2)
    asked = pseudo_pairs(predict, images, [[patch], []], replace(config, unsure="ignore"), seed=2)
    assert asked.positions == plain.positions
    assert (asked.kept, asked.dropped) == (plain.kept, plain.dropped)
    unknown = 0
    for (_, with_holes), (_, labels), (number, row, col) in zip(asked.pairs, plain.pairs, asked.positions, strict=True):
        doubtful = filter_instances(answers[number], config)[1]
        if number == 0:
            doubtful[:24, :24] = False  # there the truth is known
        here = doubtful[row : row + 32, col : col + 32] & (labels == 0)
        assert np.array_equal(with_holes == IGNORE, here)
        assert np.array_equal(np.where(here, 0, with_holes), labels)
        unknown += here.sum()
    assert unknown > 500


def test_equal_seeds_give_equal_crops_and_other_seeds_others():
    images, _, predict, _ = images_and_predictor()
    runs = [pseudo_pairs(predict, images, [[]] * 3, PseudoConfig(crops=6, size=32), seed=s) for s in (7, 7, 8)]
    assert runs[0].positions == runs[1].positions
    assert all(np.array_equal(a[1], b[1]) for a, b in zip(runs[0].pairs, runs[1].pairs, strict=True))
    assert runs[0].positions != runs[2].positions


def test_more_positions_give_crops_with_fewer_doubtful_pixels():
    images, answers, predict, _ = images_and_predictor(3, seed=5)
    doubt = {}
    for positions in (1, 12):
        config = PseudoConfig(crops=60, size=24, confidence=0.7, min_area=1, positions=positions)
        doubtful = [filter_instances(answer, config)[1] for answer in answers]
        made = pseudo_pairs(predict, images, [[]] * 3, config, seed=3)
        doubt[positions] = sum(doubtful[i][r : r + 24, c : c + 24].sum() for i, r, c in made.positions)
    assert doubt[12] < 0.5 * doubt[1]


def test_an_image_smaller_than_a_crop_is_taken_whole():
    images, answers, predict, _ = images_and_predictor(1, size=48)
    made = pseudo_pairs(predict, images, [[]], PseudoConfig(crops=2, size=256, confidence=0, min_area=0))
    assert all(np.array_equal(image, images[0]) for image, _ in made.pairs)
    assert all(same_partition(labels, answers[0].labels) for _, labels in made.pairs)


def test_a_list_of_patches_for_every_image_is_required():
    images, _, predict, _ = images_and_predictor(2)
    with pytest.raises(ValueError, match="for each of 2 images"):
        pseudo_pairs(predict, images, [[]], PseudoConfig(crops=2, size=32))


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"crops": 0}, "crops"),
        ({"confidence": 2.0}, "confidence"),
        ({"min_area": 9, "max_area": 5}, "min_area"),
        ({"unsure": "forget"}, "unsure"),
        ({"method": "teacher"}, "method"),
        ({"teacher": {"decai": 0.9}}, "decay"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(values, name):
    with pytest.raises(ConfigError, match=name):
        from_mapping(PseudoConfig, values, "profile")
