"""Properties of chosen patches against the AJI that they led to, and the best and the worst choice."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from nucseg.figures.style import colour_of
from nucseg.outcomes import signed

PANELS = 4  # properties that are drawn: those with the strongest correlations


def figure_choices(
    frame: pd.DataFrame,
    correlations: pd.DataFrame,
    words: Mapping[str, str],
    shown: Mapping[str, Sequence[np.ndarray]],
) -> Figure:
    """Draw the result of `nucseg.choices`.

    Parameters
    ----------
    frame, correlations
        Of `nucseg.choices.measure` and `nucseg.choices.correlations`.
    words
        What each measure is, for the axes.
    shown
        Patches (h, w, 3) uint8 of a few choices, by title; one row each.
    """
    columns = max(len(patches) for patches in shown.values())
    figure = Figure(figsize=(11, 3.3 + 1.5 * len(shown)), layout="constrained")
    top, *rows = figure.subfigures(1 + len(shown), 1, height_ratios=(3.1, *[1.5] * len(shown)))
    drawn = correlations.dropna()["measure"].head(PANELS)
    axes = top.subplots(1, max(len(drawn), 1), sharey=True, squeeze=False)[0]
    for axis, name in zip(axes, drawn, strict=False):
        for strategy, mine in frame.groupby("strategy"):
            axis.plot(
                mine[name], mine["AJI"], "o", ms=4, alpha=0.75, color=colour_of(strategy), mec="none", label=strategy
            )
        rho = correlations.set_index("measure").loc[name]
        every, within = (signed(rho[column], 2) for column in ("rho", "rho within"))
        axis.set_title(f"ρ {every}, within strategies {within}", fontsize=8)
        axis.set_xlabel(textwrap.fill(words[name], 36), fontsize=8)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("test AJI of what learnt from them", fontsize=8)
    top.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=7, fontsize=8, frameon=False)
    for row, (title, patches) in zip(rows, shown.items(), strict=True):
        row.suptitle(title, fontsize=9)
        panels = row.subplots(1, columns, squeeze=False)[0]
        for axis in panels:
            axis.set_axis_off()
        for axis, patch in zip(panels, patches, strict=False):
            axis.imshow(patch, interpolation="antialiased")
    return figure
