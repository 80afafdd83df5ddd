"""The images of several synthesisers side by side, each on a label map that it was asked to paint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from nucseg.figures.style import outline


def figure_systems(
    annotated: Sequence[tuple[np.ndarray, np.ndarray]],
    systems: Mapping[str, Sequence[tuple[np.ndarray, np.ndarray] | None]],
) -> Figure:
    """Draw one row of pictures for each annotated patch, and under it the same with the label maps outlined.

    Parameters
    ----------
    annotated
        Image (s, s, 3) uint8 and label map (s, s) of each annotated patch.
    systems
        By name, an image and its label map for each annotated patch, None where a system has none.

    Raises
    ------
    ValueError
        If a system has another number of pictures than there are patches.
    """
    columns = {"annotated patch": list(annotated), **{name: list(pictures) for name, pictures in systems.items()}}
    for name, pictures in columns.items():
        if len(pictures) != len(annotated):
            raise ValueError(f"{name}: {len(pictures)} pictures for {len(annotated)} annotated patches")
    figure = Figure(figsize=(1.35 * len(columns), 2.7 * len(annotated) + 0.3), layout="constrained")
    axes = figure.subplots(2 * len(annotated), len(columns), squeeze=False)
    for c, (name, pictures) in enumerate(columns.items()):
        axes[0, c].set_title(name, fontsize=8)
        for r, picture in enumerate(pictures):
            for axis in axes[2 * r : 2 * r + 2, c]:
                axis.set_axis_off()
            if picture is None:
                axes[2 * r, c].text(0.5, 0.5, "none", ha="center", va="center", fontsize=8)
                continue
            axes[2 * r, c].imshow(picture[0], interpolation="nearest")
            axes[2 * r + 1, c].imshow(outline(*picture), interpolation="nearest")
    return figure
