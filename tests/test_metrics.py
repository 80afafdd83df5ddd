"""Metrics against worked cases, and against slow implementations that loop over masks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from nucseg.metrics import PanopticQuality, aji, aji_plus, dice, evaluate, panoptic_quality

SCORES = ("dice", "aji", "aji_plus", "dq", "sq", "pq", "f1")


def draw(shape, *boxes):
    """A label map with one box (rows, columns) per nucleus, ids 1, 2, ..."""
    labels = np.zeros(shape, dtype=np.int32)
    for number, (rows, columns) in enumerate(boxes, start=1):
        labels[slice(*rows), slice(*columns)] = number
    return labels


# The worked cases of REFERENCE 4.2, with their AJI and AJI+.
def case_a():
    true = draw((10, 40), ((0, 10), (5, 15)), ((0, 10), (20, 30)))
    return true, draw((10, 40), ((0, 10), (5, 30))), 0.4, 100 / 350


def case_b():
    true = draw((10, 30), ((0, 10), (5, 17)))
    return true, draw((10, 30), ((0, 10), (5, 14)), ((0, 10), (14, 22))), 0.45, 0.45


def case_c():
    true = draw((20, 60), ((0, 10), (0, 10)))
    pred = draw((20, 60), ((0, 4), (0, 10)), ((4, 10), (0, 10)))
    pred[10:20, 0:34] = 2
    return true, pred, 0.08, 0.08


def case_d():
    true = draw((10, 40), ((0, 10), (0, 10)), ((0, 10), (20, 30)))
    return true, draw((10, 40), ((0, 10), (20, 30))), 0.5, 0.5


@pytest.mark.parametrize("case", [case_a, case_b, case_c, case_d])
def test_aji_and_aji_plus_of_the_worked_cases(case):
    true, pred, expected, expected_plus = case()
    assert aji(true, pred) == pytest.approx(expected, abs=1e-12)
    assert aji_plus(true, pred) == pytest.approx(expected_plus, abs=1e-12)


def test_case_c_has_the_areas_that_it_claims():
    true, pred, _, _ = case_c()
    assert [(pred == 1).sum(), (pred == 2).sum(), ((pred == 2) & (true == 1)).sum()] == [40, 400, 60]


# Independent implementations: sets of pixels, loops over pairs, and for the assignment every permutation.
def pixels(labels):
    return [set(np.flatnonzero(labels == i)) for i in np.unique(labels) if i != 0]


def slow_aji(true, pred):
    trues, preds = pixels(true), pixels(pred)
    if not trues or not preds:
        return float(trues == preds)
    shared = union = 0
    used = set()
    for t in trues:
        ious = [len(t & p) / len(t | p) for p in preds]
        j = max(range(len(preds)), key=lambda j: (ious[j], -j))
        if ious[j] == 0:
            union += len(t)
            continue
        used.add(j)
        shared += len(t & preds[j])
        union += len(t | preds[j])
    return shared / (union + sum(len(p) for j, p in enumerate(preds) if j not in used))


def slow_matchings(true, pred):
    """The one-to-one matchings of highest total IoU, as lists of (true pixels, predicted pixels)."""
    trues, preds = pixels(true), pixels(pred)
    padded = preds + [set()] * len(trues)
    best, found = -1.0, []
    for choice in itertools.permutations(range(len(padded)), len(trues)):
        pairs = [(t, padded[j]) for t, j in zip(trues, choice, strict=True) if t & padded[j]]
        total = sum(len(t & p) / len(t | p) for t, p in pairs)
        if total > best + 1e-9:
            best, found = total, [pairs]
        elif total > best - 1e-9:
            found.append(pairs)
    return found


def slow_aji_plus(true, pred):
    """Every value that a best matching gives: equal totals may give different scores."""
    trues, preds = pixels(true), pixels(pred)
    if not trues or not preds:
        return [float(trues == preds)]
    values = []
    for pairs in slow_matchings(true, pred):
        shared = sum(len(t & p) for t, p in pairs)
        union = sum(len(t | p) for t, p in pairs)
        union += sum(len(t) for t in trues if t not in [a for a, _ in pairs])
        union += sum(len(p) for p in preds if p not in [b for _, b in pairs])
        values.append(shared / union)
    return values


def slow_quality(true, pred):
    trues, preds = pixels(true), pixels(pred)
    if not trues or not preds:
        return (float(trues == preds),) * 3
    ious = [len(t & p) / len(t | p) for t in trues for p in preds]
    ious = [iou for iou in ious if iou > 0.5]
    tp, fp, fn = len(ious), len(preds) - len(ious), len(trues) - len(ious)
    dq, sq = tp / (tp + fp / 2 + fn / 2), sum(ious) / max(tp, 1)
    return dq, sq, dq * sq


small_maps = arrays(np.int16, (4, 5), elements=st.integers(0, 4))


@settings(max_examples=150, deadline=None)
@given(true=small_maps, pred=small_maps)
def test_every_score_equals_a_loop_over_masks(true, pred):
    scores = evaluate(true, pred)
    assert scores["aji"] == pytest.approx(slow_aji(true, pred), abs=1e-12)
    assert any(scores["aji_plus"] == pytest.approx(value, abs=1e-9) for value in slow_aji_plus(true, pred))
    assert (scores["dq"], scores["sq"], scores["pq"]) == pytest.approx(slow_quality(true, pred), abs=1e-12)
    assert scores["f1"] == scores["dq"]
    either = (true > 0).sum() + (pred > 0).sum()
    expected = 2 * ((true > 0) & (pred > 0)).sum() / either if either else 1.0
    assert scores["dice"] == pytest.approx(expected, abs=1e-12)
    assert (scores["n_true"], scores["n_pred"]) == (len(pixels(true)), len(pixels(pred)))


def blobs(seed, shape=(96, 96), count=40, shift=0):
    rng = np.random.default_rng(seed)
    labels = np.zeros(shape, dtype=np.int64)
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    for number in range(1, count + 1):
        row, column = rng.uniform(0, shape)
        radius = rng.uniform(3, 8)
        labels[(rows - row - shift) ** 2 + (columns - column) ** 2 < radius**2] = number
    return labels


@pytest.mark.parametrize("seed", range(4))
def test_overlapping_blobs_agree_with_the_loops_and_one_dense_assignment(seed):
    from scipy.optimize import linear_sum_assignment

    true, pred = blobs(seed), blobs(seed, shift=3)
    pred[blobs(seed + 100, count=6) > 0] = 99
    assert aji(true, pred) == pytest.approx(slow_aji(true, pred), abs=1e-12)
    trues, preds = pixels(true), pixels(pred)
    table = np.array([[len(t & p) / len(t | p) for p in preds] for t in trues])
    pairs = [(i, j) for i, j in zip(*linear_sum_assignment(-table), strict=True) if table[i, j] > 0]
    shared = sum(len(trues[i] & preds[j]) for i, j in pairs)
    total = sum(map(len, trues)) + sum(map(len, preds)) - shared
    assert aji_plus(true, pred) == pytest.approx(shared / total, abs=1e-12)
    for iou in (0.0, 0.3):
        counted = [table[i, j] for i, j in pairs if table[i, j] > iou]
        quality = panoptic_quality(true, pred, iou=iou)
        assert quality.dq == pytest.approx(2 * len(counted) / (len(trues) + len(preds)))
        assert quality.sq == pytest.approx(np.mean(counted))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), dtype=st.sampled_from(["uint8", "int16", "uint16", "int32", "uint32", "int64"]))
def test_ids_their_order_and_dtype_do_not_matter(seed, dtype):
    true, pred = blobs(seed % 5, (48, 48), 12), blobs(seed % 5, (48, 48), 12, shift=2)
    rng = np.random.default_rng(seed)
    top = min(np.iinfo(dtype).max, 10**12)

    def renumber(labels):
        new = rng.choice(np.unique(rng.integers(1, top, size=100, endpoint=True)), 41, replace=False)
        return np.concatenate([[0], new])[labels].astype(dtype)

    expected, found = evaluate(true, pred), evaluate(renumber(true), renumber(pred))
    # These round blobs have no ties between best matches, so every score is the same to the last digit or two.
    assert found == pytest.approx(expected, abs=1e-12)


def test_the_largest_uint64_ids_are_ordinary_ids():
    true = np.zeros((4, 4), dtype=np.uint64)
    true[:2], true[2:] = np.iinfo(np.uint64).max, np.iinfo(np.uint64).max - 1
    assert evaluate(true, true)["aji"] == 1.0
    assert evaluate(true, true)["n_true"] == 2


def test_ties_go_to_the_lowest_predicted_id():
    # Predictions 1 and 2 each cover half of truth 1; prediction 2 alone also touches truth 2.
    true = np.array([[1, 1, 0, 0, 0, 0]])
    pred = np.array([[1, 2, 0, 0, 0, 0]])
    assert aji(true, pred) == pytest.approx(1 / 3)
    true = np.array([[1, 1, 1, 1, 2, 2]])
    pred = np.array([[7, 7, 3, 3, 3, 3]])  # truth 1: IoU 2/4 with 7, 2/6 with 3; truth 2: 2/4 with 3
    assert aji(true, pred) == pytest.approx((2 + 2) / (4 + 4))


def test_one_prediction_serves_two_nuclei_in_aji_but_not_in_aji_plus():
    true, pred, _, _ = case_a()
    assert aji(true, pred) > aji_plus(true, pred)


def test_a_prediction_that_touches_a_nucleus_without_being_its_match_costs_its_area():
    true = draw((10, 30), ((0, 10), (5, 17)))
    alone = draw((10, 30), ((0, 10), (5, 14)))
    _, both, _, _ = case_b()
    assert aji(true, alone) == pytest.approx(90 / 120)
    assert aji(true, both) == pytest.approx(90 / 200)


@pytest.mark.parametrize("shape", [(6, 7), (1, 1), (0, 0), (0, 5)])
def test_two_empty_maps_score_one_everywhere(shape):
    empty = np.zeros(shape, dtype=np.uint8)
    scores = evaluate(empty, empty)
    assert all(scores[name] == 1.0 for name in SCORES)
    assert (scores["n_true"], scores["n_pred"]) == (0, 0)
    assert (dice(empty, empty), aji(empty, empty), aji_plus(empty, empty)) == (1.0, 1.0, 1.0)
    assert panoptic_quality(empty, empty, iou=0.3) == PanopticQuality(1.0, 1.0, 1.0)


def test_exactly_one_empty_map_scores_zero_everywhere():
    empty, one = np.zeros((6, 7), dtype=np.int32), draw((6, 7), ((1, 3), (1, 3)))
    for pair in ((empty, one), (one, empty)):
        assert all(evaluate(*pair)[name] == 0.0 for name in SCORES)
        assert panoptic_quality(*pair, iou=0.3) == PanopticQuality(0.0, 0.0, 0.0)


def test_nuclei_that_never_meet_score_zero():
    scores = evaluate(draw((6, 7), ((0, 2), (0, 2))), draw((6, 7), ((3, 5), (3, 5))))
    assert all(scores[name] == 0.0 for name in SCORES)


def test_a_map_without_background_is_fine():
    true = np.repeat(np.arange(1, 5), 25).reshape(10, 10)
    assert all(evaluate(true, true)[name] == 1.0 for name in SCORES)
    pred = np.full((10, 10), 9)
    assert aji(true, pred) == pytest.approx(slow_aji(true, pred)) == pytest.approx(100 / 400)
    big = np.where(true > 2, 10**9, 10**9 + 7)  # ids too large for a table: the other branch
    assert aji(true, big) == pytest.approx(slow_aji(true, big))


def test_fragments_with_one_id_are_one_nucleus():
    true = draw((5, 20), ((0, 5), (0, 4)), ((0, 5), (10, 14)))
    true[true == 2] = 1
    assert evaluate(true, true)["n_true"] == 1
    one_piece = draw((5, 20), ((0, 5), (0, 4)))
    assert aji(true, one_piece) == pytest.approx(20 / 40)
    assert evaluate(true, one_piece)["dq"] == 0.0  # IoU is exactly 0.5, and a match is strictly above


def test_non_contiguous_memory_is_read_right():
    true, pred, expected, _ = case_b()
    assert aji(true.T, np.asfortranarray(pred).T) == pytest.approx(expected)
    assert aji(true[::-1], pred[::-1]) == pytest.approx(expected)


def test_the_arguments_are_not_changed():
    true, pred, _, _ = case_a()
    before = true.copy(), pred.copy()
    evaluate(true, pred)
    np.testing.assert_array_equal(true, before[0])
    np.testing.assert_array_equal(pred, before[1])


@pytest.mark.parametrize("metric", [dice, aji, aji_plus, panoptic_quality, evaluate])
def test_bad_input_is_refused_with_the_name_of_the_argument(metric):
    good = np.ones((4, 4), dtype=np.int32)
    with pytest.raises(TypeError, match="pred: a label map holds integers, got bool"):
        metric(good, good.astype(bool))
    with pytest.raises(TypeError, match="true: a label map holds integers, got float64"):
        metric(good.astype(float), good)
    with pytest.raises(ValueError, match="true: ids must be >= 0"):
        metric(-good, good)
    with pytest.raises(ValueError, match=r"true and pred: shapes differ, \(4, 4\) and \(3, 4\)"):
        metric(good, good[1:])


@pytest.mark.parametrize("iou", [-0.1, 1.0, float("nan")])
def test_an_impossible_threshold_is_refused(iou):
    with pytest.raises(ValueError, match=r"iou: expected a threshold in \[0, 1\)"):
        panoptic_quality(np.ones((2, 2), int), np.ones((2, 2), int), iou=iou)


def test_a_real_label_map_scores_one_against_itself_and_less_when_shifted(real_data):
    from PIL import Image

    path = sorted((real_data / "kumar" / "labels").glob("*.png"))[0]
    true = np.asarray(Image.open(path)).astype(np.int32)
    assert all(evaluate(true, true)[name] == 1.0 for name in SCORES)
    shifted = np.roll(true, 3, axis=1)
    scores = evaluate(true, shifted)
    assert 0 < scores["aji"] < scores["dice"] < 1
    assert scores["n_true"] == scores["n_pred"] == len(np.unique(true)) - 1
