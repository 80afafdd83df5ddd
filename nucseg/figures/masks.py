"""Fig. 4: one iteration of the mask synthesis in four steps (a), masks of Hou et al. beside ours (b); and realism."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle

from nucseg.labels import check_label_map
from nucseg.masks import STATISTICS, SynthesisSteps, realism

_NEW = "#ffffff"  # e_q, wherever it is shown
_DISC = "#e03c31"  # its centre and its disc of radius R_q
_COLOURS = ("black", "#4477aa", "#ee7733", "#228833", "#aa3377")  # of kinds of masks, the real ones first


def colour_instances(labels: np.ndarray) -> np.ndarray:
    """Paint each nucleus in its own bright colour on black; (H, W, 3) float in 0..1, the same id always the same."""
    check_label_map(labels)
    ids, place = np.unique(labels, return_inverse=True)
    hue = (ids * 0.61803398875) % 1  # golden-ratio steps: neighbouring ids get distant hues
    phase = np.abs((hue[:, None] * 6 + np.array([0, 4, 2])) % 6 - 3) - 1
    value = np.where(ids % 2, 0.95, 0.75)[:, None]
    colours = value * (1 - 0.65 * (1 - np.clip(phase, 0, 1)))
    colours[ids == 0] = 0
    return colours[place.reshape(labels.shape)]


def figure4(
    real_labels: np.ndarray,
    image: np.ndarray | None,
    ours: Sequence[np.ndarray],
    hou: Sequence[np.ndarray],
    steps: SynthesisSteps,
) -> Figure:
    """Draw Fig. 4; instances in bright colours on black, as in the paper.

    Parameters
    ----------
    real_labels
        Label map (H, W) of the annotated patch.
    image
        The patch itself, (H, W, 3) uint8, or None where it is not at hand.
    ours, hou
        At least one label map each, from `synthesize_masks` and `hou_polygons`; the first three are drawn.
    steps
        From `synthesis_steps`, on the same patch.

    Returns
    -------
    figure
        Top row: the four steps. Below: the real mask (and the image), masks of Hou et al., ours.
    """
    if len(ours) < 1 or len(hou) < 1:
        raise ValueError(
            f"figure 4 needs at least one mask of each method, got {len(ours)} of ours and {len(hou)} of Hou"
        )
    figure = Figure(figsize=(10, 8.2), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.08)
    left = ["real", "real"] if image is None else ["real", "image"]
    axes = figure.subplot_mosaic(
        [
            ["step1", "step2", "step3", "step4"],
            [left[0], "hou1", "hou2", "hou3"],
            [left[1], "ours1", "ours2", "ours3"],
        ]
    )
    _draw_steps([axes[f"step{i}"] for i in (1, 2, 3, 4)], steps)
    _show(axes["real"], colour_instances(real_labels), f"real mask: {_summary(real_labels)}")
    if image is not None:
        _show(axes["image"], image, "real image")
    for key, masks, method in (("hou", hou, "Hou et al."), ("ours", ours, "ours")):
        for i in (0, 1, 2):
            if i < len(masks):
                _show(axes[f"{key}{i + 1}"], colour_instances(masks[i]), f"{method}: {_summary(masks[i])}")
            else:
                axes[f"{key}{i + 1}"].set_axis_off()
    axes["step1"].text(-0.04, 1.12, "(a)", transform=axes["step1"].transAxes, fontsize=11, fontweight="bold")
    axes["real"].text(-0.04, 1.12, "(b)", transform=axes["real"].transAxes, fontsize=11, fontweight="bold")
    return figure


_UNITS = {
    "area": "area, px²",
    "eccentricity": "eccentricity (0: round)",
    "solidity": "solidity (1: no dents)",
    "nearest_neighbour": "centre to the next, px",
    "density": "covered share of a mask",
}


def figure_realism(kinds: Mapping[str, Mapping[str, np.ndarray]]) -> Figure:
    """Draw how the nuclei of real and of synthetic masks are distributed: one panel for each statistic.

    Parameters
    ----------
    kinds
        By name, the real masks first: results of `nucseg.masks.shape_statistics`.

    Returns
    -------
    figure
        Cumulative shares: at each value, how many nuclei (or masks) lie below it. The area between a curve and that of
        the real masks is their Wasserstein distance, which stands above the panel; areas of nuclei have a logarithmic
        axis, on which it is not.
    """
    figure = Figure(figsize=(11, 2.9), layout="constrained")
    real, *others = kinds
    for axis, name in zip(figure.subplots(1, len(STATISTICS), sharey=True), STATISTICS, strict=True):
        for kind, colour in zip(kinds, _COLOURS[: len(kinds)], strict=True):
            if (values := kinds[kind][name]).size:
                axis.ecdf(values, color=colour, linewidth=1.6 if kind == real else 1.1, label=kind)
        far = [f"{kind} {distance:{'.0f' if distance >= 10 else '.2g'}}" for kind in others
               if np.isfinite(distance := realism(kinds[real], kinds[kind])[name])]  # fmt: skip
        axis.set_title("distance: " + ", ".join(far), fontsize=7.5)
        axis.set_xlabel(_UNITS[name], fontsize=8)
        if name == "area":  # one polygon over half a patch would squeeze all others into a line
            axis.set_xscale("log")
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("share below", fontsize=8)
    # Nuclei are solid: the curves rise at the right, and leave this corner free.
    figure.axes[STATISTICS.index("solidity")].legend(fontsize=7, frameon=False, loc="upper left")
    return figure


def _show(axis: Axes, picture: np.ndarray, title: str) -> None:
    axis.imshow(picture, interpolation="nearest")
    axis.set_title(title, fontsize=8)
    axis.set_axis_off()


def _summary(labels: np.ndarray) -> str:
    return f"{np.unique(labels[labels > 0]).size} nuclei cover {(labels > 0).mean():.0%}"


def _draw_steps(axes: Sequence[Axes], steps: SynthesisSteps) -> None:
    row, col = steps.position
    titles = (
        "(1) draw $e_q$ from $E$, measure $R_q$",
        "(2) dilate $M_{q-1}$ by $R_q$",
        "(3) a random position outside",
        "(4) insert: $M_q$",
    )
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=9)
        axis.set(xticks=[], yticks=[])

    # (1) the nucleus alone, on the scale of its own disc
    half = int(np.ceil(steps.reach)) + 4
    alone = np.zeros((2 * half + 1, 2 * half + 1, 3))
    top, left = half - steps.centre[0], half - steps.centre[1]
    height, width = steps.nucleus.shape
    alone[top : top + height, left : left + width][steps.nucleus] = _rgb(_NEW)
    axes[0].imshow(alone, interpolation="nearest")
    axes[0].add_patch(Circle((half, half), steps.reach, fill=False, color=_DISC, linestyle="--"))
    axes[0].plot([half, half + steps.reach], [half, half], color=_DISC, linewidth=1)
    axes[0].plot(half, half, "+", color=_DISC)
    axes[0].set_xlabel(f"$R_q$ = {steps.reach:.1f} px", fontsize=8)

    before = colour_instances(steps.before)
    forbidden = before.copy()
    forbidden[steps.dilated & (steps.before == 0)] = 0.42
    axes[1].imshow(forbidden, interpolation="nearest")
    axes[2].imshow(forbidden, interpolation="nearest")
    axes[2].add_patch(Circle((col, row), steps.reach, fill=False, color=_DISC, linestyle="--"))
    axes[2].plot(col, row, "+", color=_DISC, markersize=8)

    after = before.copy()
    after[(steps.after > 0) & (steps.before == 0)] = _rgb(_NEW)
    axes[3].imshow(after, interpolation="nearest")
    margin = (steps.before.shape[0] - steps.size) / 2
    frame = Rectangle((margin - 0.5, margin - 0.5), steps.size, steps.size, fill=False, color="white", linewidth=0.8)
    axes[3].add_patch(frame)
    axes[3].set_xlabel("frame: what the crop keeps after Q iterations", fontsize=7)


def _rgb(colour: str) -> np.ndarray:
    return np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
