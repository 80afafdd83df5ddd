"""Beyond the paper: label-budget curves, a forest plot of all rows, and the mean ranks of the strategies.

Each function takes what `nucseg.tables.strategies` and `nucseg.tables.forest` computed and returns a matplotlib figure;
none reads or writes a file. Colours are Okabe and Ito's, which colour-blind readers tell apart, and nothing is told by
colour alone.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.transforms import blended_transform_factory
from PIL import Image

from nucseg.figures.style import colour_of
from nucseg.outcomes import NOT_IN_PROFILE, NOT_YET, REFERENCE, BudgetCurve, signed
from nucseg.stats import RankTest

INK, GREY, FAINT = "0.2", "0.55", "0.85"
BLUE, GREEN, VERMILION = "#0072B2", "#009E73", "#D55E00"
DASHED = (0, (4, 3))
COLUMNS = 5  # panels side by side
_AXES = {
    "label_share": ("annotated pixels, % of the training images", FuncFormatter(lambda x, _: f"{100 * x:g}")),
    "label_nuclei": ("annotated nuclei", FuncFormatter(lambda x, _: f"{x:,.0f}")),
}
_TITLES = {
    "I": "I · Selection",
    "II": "II · Augmentation",
    "III": "III · Framework",
    "IV": "IV · Segmenters",
    "V": "V · Against all labels, same segmenter",
    "VI": "VI · K1 and K2",
    "S": "S · Selection strategies, nothing painted (not in the paper)",
}


def png(figure: Figure, colours: int = 64, dpi: int = 100) -> bytes:
    """Return a figure as a PNG of few colours, a third of the usual size: notebooks carry their pictures."""
    whole, light = io.BytesIO(), io.BytesIO()
    figure.savefig(whole, format="png", dpi=dpi, bbox_inches="tight")
    # Not PIL's usual method, which mixes the few pixels of a thin coloured line into the many grey ones.
    few = Image.open(whole).convert("RGB").quantize(colours, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(light, "png", optimize=True)
    return light.getvalue()


# -- label-budget curves ---------------------------------------------------------------------------------------


def budget_curves(curves: Sequence[BudgetCurve]) -> Figure | None:
    """Draw AJI against what was annotated, one panel per strategy beside random crops.

    None where no strategy was run on two budgets: a point is no curve, and Table B has its number.

    Parameters
    ----------
    curves
        Blocks of panels from top to bottom, usually against pixels and against nuclei. One without points becomes a
        line that says so, and experiments whose nuclei were not counted are left out and their number printed.

    Returns
    -------
    Figure
        A panel for each strategy on two budgets or more: this one in colour (band or bar: worst to best seed), random
        crops in dark grey, the others faint (dots: on one budget only), and full supervision as a dashed line.
    """
    drawn = [curve for curve in curves if len(curve.points)]
    several = drawn[0].points.groupby("selection").filter(lambda own: own["k1"].nunique() > 1) if drawn else []
    if not len(several):
        return None
    best = several.groupby("selection")["mean"].max().sort_values(ascending=False)
    panels = [name for name in best.index if name != REFERENCE] or [REFERENCE]
    columns = min(len(panels), COLUMNS)
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(max(2.2 * columns, 6.0), (1.6 * lines + 0.55) * len(drawn)), layout="constrained")
    for curve, part in zip(drawn, figure.subfigures(len(drawn), 1, squeeze=False)[:, 0], strict=True):
        axes = part.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
        for axis in axes.ravel()[len(panels) :]:
            axis.set_axis_off()
        for place, name in enumerate(panels):
            _budget_panel(axes.ravel()[place], curve, name)
            axes.ravel()[place].tick_params(labelbottom=place + columns >= len(panels))
        label, ticks = _AXES[curve.against]
        axes[0, 0].xaxis.set_major_formatter(ticks)
        axes[0, 0].xaxis.set_major_locator(MaxNLocator(4, min_n_ticks=2))
        axes[0, 0].set_xlim(0, 1.08 * curve.points["x"].max())
        axes[0, 0].margins(y=0.12)
        below = [f"{label}{_left_out(curve)}"]
        if curve is drawn[-1]:
            below += [f"not drawn against {_AXES[c.against][0]}{_left_out(c)}" for c in curves if not len(c.points)]
        part.supxlabel("\n".join(below), fontsize=8)
        part.supylabel(f"AJI, mean of {curve.images} images", fontsize=8)
    legend = _budget_legend(drawn[0], panels)
    figure.legend(handles=legend, loc="outside upper center", ncols=len(legend), fontsize=7.5, frameon=False)
    return figure


def _budget_panel(axis: Axes, curve: BudgetCurve, name: str) -> None:
    colour = colour_of(name) if name != REFERENCE else INK
    axis.axhline(curve.full[0], color=INK, linewidth=0.8, linestyle=DASHED, zorder=1)
    for other, points in curve.points.groupby("selection"):
        if other not in (name, REFERENCE):
            alone = {"marker": "o", "markersize": 2} if len(points) == 1 else {}
            axis.plot(points["x"], points["mean"], color=FAINT, linewidth=0.8, zorder=1, **alone)
    for shown, shade, order in ((REFERENCE, INK if name == REFERENCE else GREY, 2), (name, colour, 3)):
        points = curve.points[curve.points["selection"] == shown].sort_values("x")
        if len(points) > 1:
            axis.fill_between(points["x"], points["low"], points["high"], color=shade, alpha=0.2, linewidth=0)
        else:
            axis.vlines(points["x"], points["low"], points["high"], color=shade, alpha=0.5, linewidth=2, zorder=order)
        # Points of one seed each make no curve: nobody knows how far they would lie apart with another one.
        line = {"linewidth": 1.6} if (points["seeds"] > 1).all() else {"linewidth": 1.0, "linestyle": (0, (1, 2))}
        axis.plot(points["x"], points["mean"], color=shade, marker="o", markersize=3, zorder=order, **line)
    seeds = curve.points.loc[curve.points["selection"] == name, "seeds"]
    count = "" if seeds.empty else f"{seeds.min()}" if seeds.nunique() == 1 else f"{seeds.min()}-{seeds.max()}"
    axis.set_title(name, fontsize=9, color=colour, fontweight="bold", loc="left")
    axis.set_title(
        f"{count} seed{'s' * (count != '1')}" if count else "not counted", fontsize=6.5, color=GREY, loc="right"
    )
    axis.tick_params(labelsize=7, color=GREY, length=2)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(GREY)


def _budget_legend(curve: BudgetCurve, panels: Sequence[str]) -> list[Line2D | Patch]:
    points = set(curve.points["selection"]) - {REFERENCE, *panels}
    made = [Line2D([], [], color=GREY, linewidth=1.6, marker="o", markersize=3, label=REFERENCE)]
    made += [Line2D([], [], color=FAINT, linewidth=1.0, label="the others")] * (len(panels) > 1)
    dot = {"linestyle": "", "marker": "o", "markersize": 3, "color": FAINT}
    which = " and ".join(sorted(points)) if len(points) < 3 else "other strategies"
    made += [Line2D([], [], **dot, label=f"{which}: on one budget only")] * bool(points)
    if (curve.points["seeds"] == 1).any():
        made += [Line2D([], [], color=GREY, linewidth=1.0, linestyle=(0, (1, 2)), label="one seed each")]
    if (curve.points["seeds"] > 1).any():
        made += [Patch(color=GREY, alpha=0.3, linewidth=0, label="worst to best seed")]
    if np.isfinite(curve.full[0]):
        made += [Line2D([], [], color=INK, linewidth=0.8, linestyle=DASHED, label="all labels")]
    return made


def _left_out(curve: BudgetCurve) -> str:
    if not curve.left_out:
        return ""
    return f" ({curve.left_out} experiment{'s' * (curve.left_out > 1)} left out: nuclei not counted)"


# -- forest plot -----------------------------------------------------------------------------------------------


def forest_plot(frame: pd.DataFrame) -> Figure:
    """Draw each row's paired difference in AJI to its reference, with its interval, grouped by table.

    Parameters
    ----------
    frame
        As `nucseg.tables.forest.forest_frame` returns it.

    Returns
    -------
    Figure
        Thin: the interval over images, its numbers beside it. The pale bar behind is the interval over seeds, where
        there are several. Blue where all intervals of a row lie above 0, vermilion where they lie below, else grey:
        the interval over images alone does not know the luck of the patches. Rows that are not compared are listed in
        grey with the reason, and one that repeats a comparison of an earlier table names that table; of those that were
        not run only the number is told, where there are others.
    """
    frame, rest = _those_that_ran(frame)
    lines = _forest_lines(frame)
    height = 0.165 * len(lines)
    below = 0.65 if rest else 0.45  # inches
    figure = Figure(figsize=(10.0, height + below + 0.45))
    axis = figure.add_axes((0.36, below / (height + below + 0.45), 0.36, height / (height + below + 0.45)))
    axis.set_ylim(len(lines) - 0.4, -0.6)
    reach = np.nanmax([frame[["mean difference", "CI low", "CI high"]].abs().max().max(), 0.01])
    # Two seeds can give an interval of any length; it may leave the picture.
    pale = np.nanmax([frame[["seeds CI low", "seeds CI high"]].abs().max().max(), 0.0])
    reach = 1.08 * max(reach, min(pale, 2 * reach))
    axis.set_xlim(-reach, reach)
    axis.set_axisbelow(True)
    axis.axvline(0, color=INK, linewidth=0.8, zorder=1.5)
    beside = blended_transform_factory(axis.transAxes, axis.transData)
    shaded = False
    for y, line in enumerate(lines):
        if isinstance(line, str):
            shaded = False
            axis.text(-0.98, y, line, transform=beside, fontsize=8.5, fontweight="bold", color=INK, va="center")
            continue
        if line is None:
            continue
        shaded = not shaded
        if shaded:
            axis.axhspan(y - 0.5, y + 0.5, xmin=-1.0, xmax=1.78, color="0.965", zorder=0, clip_on=False)
        _forest_row(axis, y, line, beside)
    for x, text, align in ((1.02, "difference [95 % interval]", "left"), (1.72, "images × seeds", "right")):
        axis.text(x, -1.0, text, transform=beside, fontsize=7, color=GREY, ha=align, va="bottom")
    for x, text, align in ((-reach, "◂ reference better", "left"), (reach, "row better ▸", "right")):
        axis.text(x, -1.0, text, fontsize=7, color=VERMILION if x < 0 else BLUE, ha=align, va="bottom")
    what = "AJI of the row minus AJI of its reference (◇), paired by test image, seeds averaged\n"
    what += "thin: interval over images" + "; pale: interval over seeds" * bool(pale)
    colours = "in colour only where both exclude 0" if pale else "in colour where it excludes 0"
    axis.set_xlabel(f"{what}; {colours}" + f"\n{rest}" * bool(rest), fontsize=8)
    axis.xaxis.set_major_locator(MaxNLocator(7))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:+.3g}".replace("-", "−") if abs(x) > 1e-9 else "0"))
    axis.grid(axis="x", color="0.9", linewidth=0.6)
    axis.tick_params(labelsize=7, color=GREY, length=2)
    axis.yaxis.set_visible(False)
    axis.spines[["left", "right", "top"]].set_visible(False)
    axis.spines["bottom"].set_color(GREY)
    return figure


def _those_that_ran(frame: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Leave out rows that were not run, and say how many; where none was run, those that may still be stay."""
    absent, later = frame["why"] == NOT_IN_PROFILE, frame["why"] == NOT_YET
    later &= not (absent | later).all()
    counts = {NOT_YET: later.sum(), NOT_IN_PROFILE: absent.sum()}
    return frame[~absent & ~later], "; ".join(f"{name}: {count} more" for name, count in counts.items() if count)


def _forest_lines(frame: pd.DataFrame) -> list[pd.Series | str | None]:
    """Return the lines of the plot from top to bottom: headings, rows, and None for a gap between tables."""
    lines: list[pd.Series | str | None] = []
    for table, group in frame.groupby("table", sort=False):
        lines += [None] * bool(lines) + [_TITLES.get(str(table), str(table))]
        lines += [row for _, row in group.iterrows()]
    return lines


def _forest_row(axis: Axes, y: int, line: pd.Series, beside) -> None:
    label = line["row"].replace("[run with ", "[")
    ran = line["images"] > 0
    text = {"fontsize": 7.5, "va": "center", "transform": beside}
    axis.text(-0.96, y, label, color=INK if ran else GREY, **text)
    if ran:
        axis.text(1.72, y, f"{line['images']:.0f} × {line['seeds']:.0f}", color=GREY, ha="right", **text)
    if line["why"] == "reference":
        axis.plot(0, y, marker="D", markersize=4.5, markerfacecolor="white", markeredgecolor=INK, zorder=3)
        axis.text(1.02, y, "reference", color=GREY, **text)
        return
    if line["why"]:
        axis.text(1.02, y, line["why"], color=GREY, style="italic", **text)
        return
    mean, low, high = line["mean difference"], line["CI low"], line["CI high"]
    # One without an interval over images stays grey; one without several seeds is judged by the images alone.
    ends = np.array([low, high, *line[["seeds CI low", "seeds CI high"]].dropna()], float)
    colour = BLUE if (ends > 0).all() else VERMILION if (ends < 0).all() else "0.45"
    if not np.isnan(line["seeds CI low"]):
        axis.hlines(y, line["seeds CI low"], line["seeds CI high"], color=colour, alpha=0.22, linewidth=6, zorder=1.8)
    axis.hlines(y, low, high, color=colour, linewidth=1.6, zorder=2)
    axis.plot(mean, y, marker="o", markersize=4.5, color=colour, zorder=3)
    interval = "" if np.isnan(low) else f"  [{_signed(low)}, {_signed(high)}]"
    axis.text(1.02, y, f"{_signed(mean)}{interval}", color=INK, **text)
    if line["repeats"]:
        axis.text(1.42, y, f"as {line['repeats']}", color=GREY, style="italic", **text)


def _signed(value: float) -> str:
    digits = 3 if round(value, 3) else 4  # on which side of 0 an interval ends decides its colour
    return signed(value, digits) if round(value, digits) else "0"


# -- critical-difference diagram -------------------------------------------------------------------------------


def rank_plot(test: RankTest) -> Figure:
    """Draw the mean rank of every system, the best on top.

    The bar above the ranks is the critical difference: mean ranks that are closer are not told apart. Bars at the right
    join such systems.
    """
    k = len(test.systems)
    height = 0.24 * k
    figure = Figure(figsize=(7.0, height + 1.15))
    axis = figure.add_axes((0.25, 0.5 / (height + 1.15), 0.55, height / (height + 1.15)))
    axis.set_ylim(k - 0.5, -0.5)
    axis.set_xlim(0.7, k + 0.3)
    for y, (name, rank) in enumerate(zip(test.systems, test.mean_ranks, strict=True)):
        axis.hlines(y, 1, k, color=FAINT, linewidth=0.8, zorder=1)
        axis.plot(rank, y, marker="o", markersize=6, color=colour_of(name), zorder=3)
        axis.annotate(f"{rank:.1f}", (rank, y), (6, 1), textcoords="offset points", fontsize=7, color=INK)
    axis.set_yticks(range(k), test.systems, fontsize=8)
    for label, name in zip(axis.get_yticklabels(), test.systems, strict=True):
        label.set_color(colour_of(name))
    beside = blended_transform_factory(axis.transAxes, axis.transData)
    for place, (first, last) in enumerate(test.groups):
        axis.plot([1.03 + 0.035 * place] * 2, [first - 0.25, last + 0.25], color=INK, linewidth=3, transform=beside,
                  clip_on=False, solid_capstyle="butt")  # fmt: skip
    axis.text(
        1.02, 1 + 0.05 / height, "not told\napart", fontsize=6.5, color=GREY, transform=axis.transAxes, va="bottom"
    )
    above = blended_transform_factory(axis.transData, axis.transAxes)
    width = min(test.critical_difference, k - 1)
    y = 1 + 0.16 / height
    axis.plot([1, 1 + width], [y, y], color=GREY, linewidth=3, transform=above, clip_on=False, solid_capstyle="butt")
    axis.text(1, y + 0.1 / height, f"critical difference {test.critical_difference:.2f} (Nemenyi, {test.level:g})",
              fontsize=7.5, color=INK, transform=above, va="bottom")  # fmt: skip
    axis.set_xlabel(f"mean rank over {test.n} test images, 1 is best (Friedman p = {test.friedman_p:.2g})", fontsize=8)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.tick_params(labelsize=8, color=GREY, length=0)
    axis.spines[["left", "right", "top"]].set_visible(False)
    axis.spines["bottom"].set_color(GREY)
    return figure
