"""Scores of one predicted label map against one true label map (Sec. IV-B; REFERENCE 4).

Deviation: the AJI formula printed in the paper, read literally, lets predictions that touch a nucleus without being
its match go free. This is the official AJI of the MoNuSeg organisers (REFERENCE 4.1, A37), with AJI+, Dice on the
binary foreground (A39), PQ and F1 beside it.

The rules that all scores share (REFERENCE 4.5): two empty maps score 1, one empty map scores 0; a map without
background is fine; an id in several pieces is one nucleus; ids, their order and the integer dtype do not matter,
except that ties in AJI go to the lowest predicted id.

Everything follows from one sparse contingency table: the pairs of nuclei that share pixels, and how many they share.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from nucseg.labels import check_label_map


class PanopticQuality(NamedTuple):
    """Detection quality, segmentation quality and their product, each in [0, 1]."""

    dq: float
    sq: float
    pq: float


class _Overlaps(NamedTuple):
    """The contingency table: one entry per pair that shares pixels, sorted by (true, pred); nuclei count from 0."""

    true_areas: np.ndarray  # (n_true,) pixels, in the order of the ids
    pred_areas: np.ndarray  # (n_pred,)
    true: np.ndarray  # (pairs,) index into true_areas
    pred: np.ndarray  # (pairs,) index into pred_areas
    shared: np.ndarray  # (pairs,) pixels in both
    union: np.ndarray  # (pairs,) pixels in either
    iou: np.ndarray  # (pairs,) in (0, 1]

    @property
    def trivial(self) -> float | None:
        """The score of every metric when a map is empty, None when both hold nuclei."""
        if self.true_areas.size and self.pred_areas.size:
            return None
        return float(self.true_areas.size == self.pred_areas.size)


def dice(true: np.ndarray, pred: np.ndarray) -> float:
    """Return 2|X & Y| / (|X| + |Y|) on the binary foreground (A39), in [0, 1].

    Parameters
    ----------
    true, pred
        Label maps, (H, W), any integer dtype, 0 = background.

    Raises
    ------
    TypeError, ValueError
        If an argument is not a label map, or the shapes differ.

    Examples
    --------
    It is blind to nuclei that run together.

    >>> import numpy as np
    >>> dice(np.array([[1, 1, 2, 2, 0]]), np.array([[1, 1, 1, 1, 0]]))
    1.0
    """
    return _dice(_overlaps(true, pred))


def aji(true: np.ndarray, pred: np.ndarray) -> float:
    """Return the official aggregated Jaccard index (REFERENCE 4.1), in [0, 1].

    Every true nucleus takes the prediction of highest IoU, lowest id on ties; a prediction may serve several nuclei.
    The sum of shared pixels is divided by the sum of unions, plus the area of every prediction that serves none.

    Parameters
    ----------
    true, pred
        Label maps, (H, W), any integer dtype, 0 = background.

    Raises
    ------
    TypeError, ValueError
        If an argument is not a label map, or the shapes differ.

    Examples
    --------
    Two nuclei that run together: each takes the one prediction, and shares 2 of 4 pixels with it.

    >>> import numpy as np
    >>> aji(np.array([[1, 1, 2, 2, 0]]), np.array([[1, 1, 1, 1, 0]]))
    0.5

    One that is found as it is, and one invented pixel: 2 / (2 + 1).

    >>> round(aji(np.array([[1, 1, 0, 0]]), np.array([[1, 1, 0, 2]])), 3)
    0.667
    """
    return _aji(_overlaps(true, pred))


def aji_plus(true: np.ndarray, pred: np.ndarray) -> float:
    """Return AJI+ (REFERENCE 4.3), in [0, 1]: AJI with the one-to-one matching of highest total IoU.

    Neither AJI nor AJI+ bounds the other.

    Parameters
    ----------
    true, pred
        Label maps, (H, W), any integer dtype, 0 = background.

    Raises
    ------
    TypeError, ValueError
        If an argument is not a label map, or the shapes differ.
    """
    table = _overlaps(true, pred)
    return _aji_plus(table, _matching(table))


def panoptic_quality(true: np.ndarray, pred: np.ndarray, iou: float = 0.5) -> PanopticQuality:
    """Return detection, segmentation and panoptic quality (REFERENCE 4.4).

    Parameters
    ----------
    true, pred
        Label maps, (H, W), any integer dtype, 0 = background.
    iou
        A matched pair counts when its IoU is strictly higher than this, in [0, 1). From 0.5 on such pairs are unique;
        below, they come from the one-to-one matching of highest total IoU.

    Raises
    ------
    TypeError, ValueError
        If an argument is not a label map, the shapes differ, or `iou` is out of range.
    """
    if not 0 <= iou < 1:
        raise ValueError(f"iou: expected a threshold in [0, 1), got {iou}")
    table = _overlaps(true, pred)
    return _panoptic(table, iou, _matching(table) if iou < 0.5 else slice(None))


def evaluate(true: np.ndarray, pred: np.ndarray) -> dict[str, float | int]:
    """Return every score of one image: ``dice aji aji_plus dq sq pq f1 n_true n_pred``.

    ``f1`` is the detection F1 at IoU > 0.5, which equals ``dq``. ``n_true`` and ``n_pred`` count the nuclei: an image
    where both are 0 scores 1 everywhere, and is to be named in a report (REFERENCE 4.5).

    Parameters
    ----------
    true, pred
        Label maps, (H, W), any integer dtype, 0 = background.

    Raises
    ------
    TypeError, ValueError
        If an argument is not a label map, or the shapes differ.
    """
    table = _overlaps(true, pred)
    quality = _panoptic(table, 0.5, slice(None))
    return {
        "dice": _dice(table),
        "aji": _aji(table),
        "aji_plus": _aji_plus(table, _matching(table)),
        **quality._asdict(),
        "f1": quality.dq,
        "n_true": int(table.true_areas.size),
        "n_pred": int(table.pred_areas.size),
    }


def _overlaps(true: np.ndarray, pred: np.ndarray) -> _Overlaps:
    check_label_map(true, "true")
    check_label_map(pred, "pred")
    if true.shape != pred.shape:
        raise ValueError(f"true and pred: shapes differ, {true.shape} and {pred.shape}; score maps of the same image")
    true_index, true_areas = _enumerate(true)
    pred_index, pred_areas = _enumerate(pred)
    both = (true_index > 0) & (pred_index > 0)
    codes, shared = np.unique(
        (true_index[both] - 1) * max(pred_areas.size, 1) + (pred_index[both] - 1), return_counts=True
    )
    t, p = np.divmod(codes, max(pred_areas.size, 1))
    union = true_areas[t] + pred_areas[p] - shared
    return _Overlaps(true_areas, pred_areas, t, p, shared, union, shared / union)


def _enumerate(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the nuclei renumbered 1..n in the order of their ids, flat int64, and their n areas."""
    flat = labels.ravel()
    top = int(flat.max(initial=0))
    if top <= 4 * flat.size:  # the usual case: a table of ids is much faster than sorting a million pixels
        counts = np.bincount(flat.astype(np.int64), minlength=1)
        ids = np.flatnonzero(counts[1:]) + 1
        lookup = np.zeros(counts.size, dtype=np.int64)
        lookup[ids] = np.arange(1, ids.size + 1)
        return lookup[flat], counts[ids]
    ids, index, counts = np.unique(flat, return_inverse=True, return_counts=True)
    has_background = int(ids[0] == 0)
    return index.astype(np.int64) + 1 - has_background, counts[has_background:]


def _matching(table: _Overlaps) -> np.ndarray:
    """Return which pairs belong to the one-to-one matching of highest total IoU, as indices into the table.

    Nuclei that are not linked by overlaps cannot compete, so each connected group of them is solved by itself: a few
    nuclei at a time, where one assignment over the whole image would need a dense table of millions of zeros.
    """
    if not table.iou.size:
        return np.zeros(0, dtype=np.int64)
    n_true, n_pred = table.true_areas.size, table.pred_areas.size
    links = coo_array(
        (np.ones(table.iou.size, dtype=np.int8), (table.true, n_true + table.pred)),
        shape=(n_true + n_pred, n_true + n_pred),
    )
    _, group = connected_components(links, directed=False)
    order = np.argsort(group[table.true], kind="stable")
    starts = np.flatnonzero(np.diff(group[table.true][order], prepend=-1))
    sizes = np.diff(starts, append=order.size)
    matched = [order[starts[sizes == 1]]]
    for start, size in zip(starts[sizes > 1], sizes[sizes > 1], strict=True):
        pairs = order[start : start + size]
        rows, row = np.unique(table.true[pairs], return_inverse=True)
        columns, column = np.unique(table.pred[pairs], return_inverse=True)
        iou = np.zeros((rows.size, columns.size))
        iou[row, column] = table.iou[pairs]
        where = np.full(iou.shape, -1)
        where[row, column] = pairs
        chosen = where[linear_sum_assignment(iou, maximize=True)]
        matched.append(chosen[chosen >= 0])  # the assignment may fill up with pairs that do not overlap
    return np.concatenate(matched)


def _dice(table: _Overlaps) -> float:
    if table.trivial is not None:
        return table.trivial
    return float(2 * table.shared.sum() / (table.true_areas.sum() + table.pred_areas.sum()))


def _aji(table: _Overlaps) -> float:
    if table.trivial is not None:
        return table.trivial
    order = np.lexsort((table.pred, -table.iou, table.true))
    best = order[np.diff(table.true[order], prepend=-1) > 0]  # the first pair of every true nucleus that has one
    return _aggregate(table, best)


def _aji_plus(table: _Overlaps, matched: np.ndarray) -> float:
    return _aggregate(table, matched) if table.trivial is None else table.trivial


def _aggregate(table: _Overlaps, pairs: np.ndarray) -> float:
    """Shared pixels of the pairs over their unions plus the area of every nucleus, true or predicted, in no pair."""
    missed, unused = table.true_areas.copy(), table.pred_areas.copy()
    missed[table.true[pairs]] = 0
    unused[table.pred[pairs]] = 0
    return float(table.shared[pairs].sum() / (table.union[pairs].sum() + missed.sum() + unused.sum()))


def _panoptic(table: _Overlaps, threshold: float, candidates: np.ndarray | slice) -> PanopticQuality:
    if table.trivial is not None:
        return PanopticQuality(table.trivial, table.trivial, table.trivial)
    iou = table.iou[candidates]
    iou = iou[iou > threshold]
    dq = 2 * iou.size / (table.true_areas.size + table.pred_areas.size)
    sq = float(iou.mean()) if iou.size else 0.0
    return PanopticQuality(dq, sq, dq * sq)
