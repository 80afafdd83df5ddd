"""Validation scores after shorter and longer schedules (`nucseg.schedule_lengths`)."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from nucseg.figures.comparison import BLUE, DASHED, GREEN, GREY, INK, VERMILION

_LINES = ((BLUE, "o"), (VERMILION, "s"), (GREEN, "^"), (INK, "D"))
_OPEN = {"markersize": 5, "markerfacecolor": "white", "zorder": 3}
_TICKS, _LINE = 16, 9  # points below the axis that its numbers take, and those of a line of seconds


def schedule_plot(frame: pd.DataFrame) -> Figure:
    """Draw validation AJI against the length of the schedule: a line for the means of seeds, a dot for each seed.

    The seconds that the trainings took stand below the axis, in the colours of the lines. A mean of fewer seeds than
    the same row's other lengths have is an open marker.

    Parameters
    ----------
    frame
        As `nucseg.schedule_lengths.measure` returns it; ``row`` is what the legend says.
    """
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axis = figure.subplots()
    names = list(dict.fromkeys(frame["row"]))
    few, several = set(), False
    for k, name in enumerate(names):
        colour, marker = _LINES[k % len(_LINES)]
        lines = frame[frame["row"] == name]
        means = lines.groupby("iterations").agg(
            **{"AJI": ("validation AJI", "mean"), "seconds": ("seconds", "mean"), "seeds": ("seed", "nunique")}
        )
        axis.plot(means.index, means["AJI"], color=colour, marker=marker, markersize=5, label=name)
        most = means["seeds"].max()
        fewer = means[means["seeds"] < most]
        few |= {f"{seeds} of {most}" for seeds in fewer["seeds"]}
        axis.plot(fewer.index, fewer["AJI"], color=colour, marker=marker, linestyle="", **_OPEN)
        if most > 1:
            several = True
            axis.scatter(lines["iterations"], lines["validation AJI"], s=9, color=colour, alpha=0.45, linewidths=0)
        for iterations, mean in means.iterrows():
            place = {"xy": (iterations, 0), "xycoords": axis.get_xaxis_transform(), "annotation_clip": False}
            below = {"xytext": (0, -_TICKS - _LINE * k), "textcoords": "offset points", "ha": "center", "va": "top"}
            axis.annotate(f"{mean['seconds']:.0f} s", **place, **below, fontsize=6.5, color=colour)
    lengths = sorted(set(frame["iterations"]))
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(FixedLocator(lengths))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    for own in set(frame.loc[frame["part"] == 1, "iterations"]):
        axis.axvline(own, color=GREY, linewidth=0.8, linestyle=DASHED, zorder=0)
    what = "iterations of the whole schedule (dashed: the profile's), and seconds of training"
    what += " (mean of seeds)" * several
    axis.set_xlabel(what, labelpad=5 + _LINE * len(names), fontsize=8)
    axis.set_ylabel("AJI of the validation images", fontsize=8)
    axis.tick_params(labelsize=7, color=GREY)
    axis.margins(x=0.08, y=0.15)
    axis.grid(axis="y", color="0.92", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    handles = axis.get_legend_handles_labels()[0]
    dot = {"color": GREY, "linestyle": "", "marker": "o"}
    handles += [Line2D([], [], **dot, markersize=3, markeredgewidth=0, label="one seed")] * several
    handles += [Line2D([], [], **dot, **_OPEN, label=f"fewer seeds ({', '.join(sorted(few))})")] * bool(few)
    figure.legend(handles=handles, fontsize=7, frameon=False, loc="outside upper left", ncols=2)
    return figure
