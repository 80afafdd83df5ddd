"""Figure 7: segmented test crops, the truth outlined in green, the prediction in red, yellow where the two agree."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from scipy import ndimage

from nucseg.labels import check_label_map

# The paper's columns, in its order.
COLUMNS = ("HoVer-Net + Ours", "MRCNN + Ours", "HoVer-Net", "MRCNN", "NaiveAug + Plabel", "pix2pix + MRCNN")
_SIDE, _WIDTH = (2.1, 2.8), 8.4  # inches of a panel, at least and at most, and of all of them where that is enough
# Yellow, green and red mixed, is where the outlines agree. Told apart without red and green too (Okabe and Ito).
TRUTH, PREDICTION, BOTH = (0, 158, 115), (213, 94, 0), (240, 228, 66)
# Pixels that two outlines may lie apart and still agree. Two, all around a nucleus 8 pixels wide, are half of it.
AGREE = 1


class Row(NamedTuple):
    """One test crop."""

    image: np.ndarray  # (H, W, 3) uint8
    labels: np.ndarray  # (H, W), the truth
    predictions: Mapping[str, np.ndarray]  # column -> label map (H, W)
    title: str = ""  # for example the image's name and organ, "worst by AJI"


def figure7(
    rows: Sequence[Row | tuple], columns: Sequence[str] = COLUMNS, scores: Mapping[str, Sequence[float]] | None = None
) -> Figure:
    """Draw one line of panels per crop and one column per system that was run.

    Parameters
    ----------
    rows
        `Row`, or a plain tuple (image, labels, predictions[, title]).
    columns
        Systems, left to right. One without any prediction has no column, but is named in a line below: nothing is left
        out silently. Two with the same predictions and scores (one run that stands for two systems) share a column.
    scores
        Column -> AJI of each row, printed below the panels.

    Returns
    -------
    Figure
        Not attached to pyplot, so that nothing is shown twice in a notebook.

    Raises
    ------
    ValueError
        Without crops, without any prediction, or with predictions of an unknown system.
    """
    rows = [Row(*row) for row in rows]
    if not rows:
        raise ValueError("rows: no crop to draw")
    unknown = {name for row in rows for name in row.predictions} - set(columns)
    if unknown:
        raise ValueError(f"rows: predictions of {sorted(unknown)}, which are not among the columns {list(columns)}")
    absent = [name for name in columns if not any(name in row.predictions for row in rows)]
    columns = [name for name in columns if name not in absent]
    if not columns:
        raise ValueError("rows: no prediction of any system; nothing of this figure was run")
    groups = _alike(rows, columns, scores or {})
    side = min(max(_WIDTH / len(groups), _SIDE[0]), _SIDE[1])
    figure = Figure(figsize=(side * max(len(groups), 2), (side + 0.15) * len(rows) + 0.5), layout="constrained")
    axes = figure.subplots(len(rows), len(groups), squeeze=False)
    for i, (row, line) in enumerate(zip(rows, axes, strict=True)):
        for group, axis in zip(groups, line, strict=True):
            column = group[0]
            axis.set(xticks=[], yticks=[])
            for spine in axis.spines.values():
                spine.set_visible(False)
            if i == 0:
                axis.set_title(_title(group), fontsize=9)
            if column in row.predictions:
                pixels = max(row.labels.shape) * _enlargement(row.labels)
                width = math.ceil(pixels / (100 * side))  # a line of at least one pixel when printed at 100 dpi
                drawn = overlay(row.image, row.labels, row.predictions[column], width)
                axis.imshow(drawn, interpolation="antialiased")
                if scores and column in scores:
                    axis.set_xlabel(f"AJI {scores[column][i]:.3f}", fontsize=8)
            else:
                axis.set_facecolor("0.95")
                axis.set_box_aspect(row.image.shape[0] / row.image.shape[1])
                axis.text(0.5, 0.5, "not run on\nthis image", ha="center", va="center", fontsize=8, color="0.35",
                          transform=axis.transAxes)  # fmt: skip
        line[0].set_ylabel(row.title, fontsize=8)
    figure.legend(
        handles=[
            _line(TRUTH, "ground truth, missed"), _line(PREDICTION, "prediction, false"),
            _line(BOTH, f"both, within {AGREE} pixel"),
        ],
        loc="outside upper center", ncols=3, frameon=False, fontsize=9,
    )  # fmt: skip
    if absent:
        names = ", ".join(name.splitlines()[0] for name in absent)
        figure.supxlabel(f"not run in this profile: {names}", fontsize=8, color="0.35")
    return figure


def _title(group: Sequence[str]) -> str:
    """Return the names of a column's systems, what several have below their names once."""
    heads, _, tails = zip(*(name.partition("\n") for name in group), strict=True)
    if len(set(tails)) > 1:
        return ",\n".join(" ".join(name.split()) for name in group)
    return f"{', '.join(heads)}\n{tails[0]}".strip()


def _alike(rows: Sequence[Row], columns: Sequence[str], scores: Mapping[str, Sequence[float]]) -> list[list[str]]:
    """Return the columns in groups: together are those whose label maps are equal in every crop, and their scores."""
    groups: list[list[str]] = []
    for name in columns:
        for group in groups:
            maps = [(row.predictions.get(group[0]), row.predictions.get(name)) for row in rows]
            same = all(a is not None and b is not None and np.array_equal(a, b) for a, b in maps)
            if same and list(scores.get(group[0], ())) == list(scores.get(name, ())):
                group.append(name)
                break
        else:
            groups.append([name])
    return groups


def overlay(image: np.ndarray, true: np.ndarray, pred: np.ndarray, width: int = 1) -> np.ndarray:
    """Draw the outlines of two label maps into a copy of the image; (H, W, 3) uint8.

    Green is the true outline that no predicted one follows, red a predicted one that follows no true one, yellow the
    predicted one where it lies within `AGREE` pixels of a true one. Images under 300 pixels are drawn at twice their
    resolution, so that lines hide less.
    """
    check_label_map(true, "true")
    check_label_map(pred, "pred")
    if not image.shape[:2] == true.shape == pred.shape:
        raise ValueError(f"image, true, pred: shapes differ: {image.shape[:2]}, {true.shape}, {pred.shape}")
    factor = _enlargement(true)
    image, true, pred = (np.repeat(np.repeat(a, factor, axis=0), factor, axis=1) for a in (image, true, pred))
    drawn = image.copy()
    truth, found = outlines(true, width), outlines(pred, width)
    near = 2 * AGREE * factor + 1
    drawn[truth & ~ndimage.maximum_filter(found, near)] = TRUTH
    drawn[found] = PREDICTION
    drawn[found & ndimage.maximum_filter(truth, near)] = BOTH
    return drawn


def _enlargement(labels: np.ndarray) -> int:
    return 2 if max(labels.shape) < 300 else 1


def outlines(labels: np.ndarray, width: int = 1) -> np.ndarray:
    """Return the pixels of each nucleus next to another label, `width` pixels thick inwards; (H, W) bool."""
    size = 2 * width + 1
    # Across the image's border there is nothing, so a nucleus cut by it stays open there.
    differs = ndimage.maximum_filter(labels, size, mode="nearest") != ndimage.minimum_filter(
        labels, size, mode="nearest"
    )
    return differs & (labels > 0)


def _line(colour: tuple[int, int, int], label: str):
    from matplotlib.lines import Line2D

    return Line2D([], [], color=[c / 255 for c in colour], label=label)
