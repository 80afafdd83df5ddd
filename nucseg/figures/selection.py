"""Figure 3 (the two levels of clusters and the three terms of CPS), Figure 6 (random against CPS picks), coverage.

Each function takes arrays and returns a matplotlib figure; none reads or writes a file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.decomposition import PCA

from nucseg.figures.style import colour_of

DPI = 100
MOST_POINTS = 3000  # in a scatter plot: more only make the file large
MOST_THUMBNAILS = 12  # in a row
TERMS = ("$d_1$ to the centre", "$d_2$ to the largest fine cluster", "$d_3$ inside the patch")
_MEASURES = {  # of `coverage_table`: what they are called, and what they measure
    "coverage": ("distance to the nearest pick", "mean over all patches, in feature space; lower is closer"),
    "redundancy": ("redundancy", "mean cosine to the nearest other pick; lower is more varied"),
}
TERM_COLOURS = ("#4477aa", "#ccbb44", "#aa3377")


def figure3(
    features: np.ndarray,
    sub_features: np.ndarray,
    result: Any,
    thumbnail_of: Callable[[int], np.ndarray],
    shown: int | None = None,
    note: str = "",
    seed: int = 0,
) -> Figure:
    """Draw Figure 3: left the two levels of clusters, right the three terms of Eq. 1, below the patches themselves.

    Parameters
    ----------
    features, sub_features
        (n, d) and (n, 4, d), as given to `nucseg.selection.cps`.
    result
        Its `CPS`: chosen (k1,), coarse (n,), fine (n, 4), terms (n, 3).
    thumbnail_of
        From a row of `features` to its patch, (h, w, 3) uint8.
    shown
        The coarse cluster whose sub-regions are drawn; None: the largest.
    note
        A line at the bottom, for example that the images are synthetic.
    seed
        Draws the points that are shown where there are more than 3,000.

    Returns
    -------
    Figure
        The patch nearest to each coarse centre (d1 smallest) is a square, the chosen one a star.
    """
    k1 = len(result.chosen)
    nearest = [_first_min(result.terms[:, 0], result.coarse == k) for k in range(k1)]
    shown = int(np.bincount(result.coarse).argmax()) if shown is None else shown
    if not 0 <= shown < k1:
        raise ValueError(f"shown: expected a coarse cluster in 0..{k1 - 1}, got {shown}")
    columns = min(k1, MOST_THUMBNAILS)
    figure = Figure(figsize=(10, 6.6), dpi=DPI, layout="constrained")
    figure.get_layout_engine().set(wspace=0.01, w_pad=0.02)
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.0, 1.0))
    left, middle, right = top.subplots(1, 3)

    colours = _colours(k1)
    _level(left, features, result.coarse, colours, seed, (("s", nearest), ("*", result.chosen)))
    left.set_title(
        f"coarse: {len(features):,} patches, $K_1$ = {k1}\nsquare: nearest to the centre, star: chosen", fontsize=9
    )

    rows = np.flatnonzero(result.coarse == shown)
    fine = result.fine[rows].ravel()
    largest = int(np.bincount(fine).argmax())
    fine_colours = np.array([colours[shown] if c == largest else _grey(c) for c in range(fine.max() + 1)])
    own = int(np.flatnonzero(rows == result.chosen[shown])[0])
    parts = [4 * own + p for p in range(4)]
    _level(middle, sub_features[rows].reshape(-1, features.shape[1]), fine, fine_colours, seed, (("*", parts),))
    share = (fine == largest).mean()
    middle.set_title(
        f"fine, in cluster {shown}: {len(fine):,} sub-regions\n"
        f"in colour the largest of {fine.max() + 1} ({share:.0%}), stars: the choice",
        fontsize=9,
    )
    _term_bars(right, result.terms[nearest], result.terms[result.chosen], colours)

    panels = bottom.subplots(2, columns, squeeze=False)
    for row, (name, picks) in enumerate((("nearest\nto centre", nearest), ("chosen", result.chosen))):
        for k in range(columns):
            _thumbnail(panels[row, k], thumbnail_of(int(picks[k])), colours[k])
            if row == 0:
                panels[row, k].set_title(f"{k}", fontsize=8, color=colours[k])
        panels[row, 0].set_ylabel(name, fontsize=8)
    if columns < k1:
        note = f"the first {columns} of {k1} clusters are shown. {note}"
    _foot(figure, note)
    return figure


def figure6(
    random_selection: Any,
    cps_selection: Any,
    crop_of: Callable[[Any], np.ndarray],
    redundancy: Sequence[float],
    twins: Sequence[tuple[int, int]] | None = None,
    note: str = "",
) -> Figure:
    """Draw Figure 6: the patches of a random selection above those of CPS.

    Parameters
    ----------
    random_selection, cps_selection
        `nucseg.selection.Selection`.
    crop_of
        From a `Patch` to its pixels, (h, w, 3) uint8.
    redundancy
        Of the two selections, from `nucseg.selection.redundancy`: mean similarity of a pick to its nearest other pick.
    twins
        For each selection the two picks that are most alike, from `nucseg.selection.most_alike`; framed.
    note
        A line at the bottom.
    """
    selections = (random_selection, cps_selection)
    names = short_ids(patch.image_id for s in selections for patch in s.patches)
    columns = min(max(len(s.patches) for s in selections), MOST_THUMBNAILS)
    figure = Figure(figsize=(11, 2 * (11 / max(columns, 5) + 0.55)), dpi=DPI, layout="constrained")
    for number, (band, selection) in enumerate(zip(figure.subfigures(2, 1), selections, strict=True)):
        images = len({p.image_id for p in selection.patches})
        band.suptitle(
            f"{selection.strategy}: {len(selection.patches)} patches of {images} images, "
            f"{selection.label_share:.2%} of the pixels, redundancy {redundancy[number]:.3f}",
            fontsize=10,
        )
        panels = band.subplots(1, columns, squeeze=False)[0]
        for i, axes in enumerate(panels):
            if i >= len(selection.patches):
                axes.set_axis_off()
                continue
            patch = selection.patches[i]
            framed = twins is not None and i in twins[number]
            _thumbnail(axes, crop_of(patch), "#cc3311" if framed else "0.7", 3 if framed else 0.8)
            axes.set_xlabel(names[patch.image_id], fontsize=7)
    frame = "red frames: the two picks that are most alike. " if twins is not None else ""
    _foot(figure, f"{frame}redundancy: mean cosine similarity of a pick to its nearest other pick. {note}")
    return figure


def figure_coverage(tables: pd.DataFrame | Mapping[str, pd.DataFrame], note: str = "") -> Figure:
    """Draw how far patches are from their nearest pick, and how alike the picks are: one point a seed, a bar the mean.

    Parameters
    ----------
    tables
        Result of `nucseg.selection.coverage_table`, or one for each dataset by name.
    note
        A line at the bottom.
    """
    tables = {"": tables} if isinstance(tables, pd.DataFrame) else tables
    count = max(table["strategy"].nunique() for table in tables.values())
    figure = Figure(figsize=(9, (0.3 * count + 1.3) * len(tables)), dpi=DPI, layout="constrained")
    grid = figure.subplots(len(tables), 2, squeeze=False)
    for panels, (name, table) in zip(grid, tables.items(), strict=True):
        order = table.groupby("strategy")["coverage"].mean().sort_values(ascending=False).index
        for axes, (column, meaning) in zip(panels, _MEASURES.items(), strict=True):
            for y, strategy in enumerate(order):
                values = table.loc[table["strategy"] == strategy, column].to_numpy()
                colour = colour_of(strategy)
                axes.plot(values, np.full(len(values), y), "o", ms=4, alpha=0.5, color=colour, mec="none")
                axes.plot([values.mean()] * 2, [y - 0.35, y + 0.35], color=colour, lw=2.5)
            axes.set_yticks(range(len(order)), order, fontsize=8)
            axes.tick_params(axis="x", labelsize=8)
            title, label = meaning
            axes.set_title(f"{name} {title}".strip(), fontsize=9)
            axes.set_xlabel(label, fontsize=8)
            axes.grid(axis="x", lw=0.4)
            axes.spines[["top", "right"]].set_visible(False)
        panels[1].set_yticklabels([])
    _foot(figure, f"one point a seed, bar: mean of {_seeds(tables)} seeds; CPS and its variants share a colour. {note}")
    return figure


def short_ids(image_ids: Iterable[str], most: int = 14) -> dict[str, str]:
    """Return a short name for each image that still tells them apart.

    The two fields of a TCGA barcode that name the slide. Where another name is longer than `most` characters: what
    follows the words that all begin with, of this the two ends. Whole names where these would not differ.
    """
    ids = sorted(set(image_ids))
    common = re.sub(r"[^-_. ]*$", "", max(ids, key=len)) if len(ids) > 1 else ""
    while not all(name.startswith(common) for name in ids):
        common = re.sub(r"[^-_. ]*[-_. ]$", "", common)  # one word less
    short, longest = {}, max(map(len, ids), default=0)
    for name in ids:
        fields = name.split("-")
        if fields[0] == "TCGA" and len(fields) > 2:
            short[name] = "-".join(fields[1:3])
            continue
        rest = name if longest <= most else name.removeprefix(common) or name
        half = (most - 1) // 2
        short[name] = rest if len(rest) <= most else f"{rest[:half]}…{rest[half + 1 - most :]}"
    return short if len(set(short.values())) == len(ids) else {name: name for name in ids}


def _level(
    axes: Axes,
    points: np.ndarray,
    labels: np.ndarray,
    colours: np.ndarray,
    seed: int,
    marks: Sequence[tuple[str, Sequence[int]]],
) -> None:
    """Scatter of one level of clusters in the plane of their two first principal components."""
    points = np.asarray(points, dtype=np.float32)
    rows = np.random.default_rng(seed).permutation(len(points))[:MOST_POINTS]
    if len(rows) < 2:
        axes.set_axis_off()
        return
    pca = PCA(2, svd_solver="full" if min(points.shape) < 10 else "randomized", random_state=seed).fit(points[rows])
    plane = pca.transform(points[rows])
    axes.scatter(*plane.T, s=5, c=colours[labels[rows]], alpha=0.45, linewidths=0, rasterized=True)
    for shape, picks in marks:
        place = pca.transform(points[list(picks)])
        size = 110 if shape == "*" else 36
        axes.scatter(*place.T, s=size, marker=shape, c=colours[labels[list(picks)]], edgecolors="black", linewidths=1.2)
    explained = pca.explained_variance_ratio_
    axes.set_xlabel(f"PC 1 ({explained[0]:.0%} of the variance)", fontsize=8)
    axes.set_ylabel(f"PC 2 ({explained[1]:.0%})", fontsize=8)
    axes.set_xticks([])
    axes.set_yticks([])


def _term_bars(axes: Axes, nearest: np.ndarray, chosen: np.ndarray, colours: np.ndarray) -> None:
    """The three terms as stacked bars: pale for the patch nearest to the centre, full for the chosen one."""
    k1 = len(chosen)
    for terms, shift, alpha in ((nearest, -0.2, 0.4), (chosen, 0.2, 1.0)):
        base = np.zeros(k1)
        for i in range(3):
            label = TERMS[i] if alpha == 1 else None
            axes.bar(np.arange(k1) + shift, terms[:, i], 0.36, base, color=TERM_COLOURS[i], alpha=alpha, label=label)
            base += terms[:, i]
    axes.set_xticks(range(k1), [str(k) for k in range(k1)], fontsize=8)
    for tick, colour in zip(axes.get_xticklabels(), colours, strict=True):
        tick.set_color(colour)
    axes.tick_params(axis="y", labelsize=8)
    axes.set_xlabel("coarse cluster", fontsize=8)
    axes.set_ylabel("distance in feature space", fontsize=8)
    axes.set_ylim(0, 1.35 * float(max(nearest.sum(1).max(), chosen.sum(1).max(), 1e-9)))
    axes.legend(fontsize=7, loc="upper left", frameon=False)
    axes.set_title("Eq. 1 by coarse cluster\npale: nearest to the centre, full: chosen", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def _thumbnail(axes: Axes, image: np.ndarray, colour: Any, width: float = 2.0) -> None:
    # Every second pixel of a 256-pixel patch: a thumbnail is about 100 pixels wide, and notebooks stay small.
    stride = max(1, image.shape[0] // 128)
    axes.imshow(image[::stride, ::stride], interpolation="antialiased")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(color=colour, linewidth=width)


def _colours(count: int) -> np.ndarray:
    """(count, 4) colours, different for up to 20 clusters."""
    return np.array([colormaps["tab10" if count <= 10 else "tab20"](i % 20) for i in range(count)])


def _grey(number: int) -> tuple[float, float, float, float]:
    level = 0.45 + 0.12 * (number % 4)
    return (level, level, level, 1.0)


def _first_min(values: np.ndarray, where: np.ndarray) -> int:
    rows = np.flatnonzero(where)
    return int(rows[np.argmin(values[rows])])


def _seeds(tables: Mapping[str, pd.DataFrame]) -> str:
    counts = sorted({int(table["seed"].nunique()) for table in tables.values()})
    return "/".join(map(str, counts))


def _foot(figure: Figure, note: str) -> None:
    """Write a note at the bottom, above the line that `style.sign` writes."""
    height = figure.get_figheight()
    figure.get_layout_engine().set(rect=(0, 0.34 / height, 1, 1 - 0.34 / height))
    figure.text(0.01, 0.17 / height, note.strip(), fontsize=8, ha="left", va="bottom")
