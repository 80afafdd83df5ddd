"""Validation scores after shorter and longer schedules (`nucseg.schedule_lengths`)."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from nucseg.figures.comparison import BLUE, DASHED, GREEN, GREY, INK, VERMILION

_LINES = ((BLUE, "o"), (VERMILION, "s"), (GREEN, "^"), (INK, "D"))


def schedule_plot(frame: pd.DataFrame) -> Figure:
    """Draw validation AJI against the length of the schedule: a line for the means of seeds, a dot for each seed.

    Parameters
    ----------
    frame
        As `nucseg.schedule_lengths.measure` returns it; ``row`` is what the legend says.
    """
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axis = figure.subplots()
    for k, (name, lines) in enumerate(frame.groupby("row", sort=False)):
        colour, marker = _LINES[k % len(_LINES)]
        means = lines.groupby("iterations")[["validation AJI", "seconds"]].mean()
        axis.plot(means.index, means["validation AJI"], color=colour, marker=marker, markersize=5, label=name)
        if lines["seed"].nunique() > 1:
            axis.scatter(lines["iterations"], lines["validation AJI"], s=9, color=colour, alpha=0.45, linewidths=0)
        for iterations, mean in means.iterrows():
            beside = {
                "xytext": (0, 6 if k % 2 else -12),
                "textcoords": "offset points",
                "ha": "center",
                "fontsize": 6.5,
                "color": GREY,
            }
            axis.annotate(f"{mean['seconds']:.0f} s", (iterations, mean["validation AJI"]), **beside)
    lengths = sorted(set(frame["iterations"]))
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(FixedLocator(lengths))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    for own in set(frame.loc[frame["part"] == 1, "iterations"]):
        axis.axvline(own, color=GREY, linewidth=0.8, linestyle=DASHED, zorder=0)
    axis.set(xlabel="iterations of the whole schedule (dashed: the profile's)", ylabel="AJI of the validation images")
    axis.xaxis.label.set_size(8)
    axis.yaxis.label.set_size(8)
    axis.tick_params(labelsize=7, color=GREY)
    axis.margins(y=0.15)
    axis.grid(axis="y", color="0.92", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(fontsize=7, frameon=False, loc="outside upper left", ncols=2)
    return figure
