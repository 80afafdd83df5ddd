"""Fig. 5: CSinGAN's pyramid for one patch (mask, noise, output, real at every scale), its critics' maps, its losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nucseg.gan.csingan import ScaleView

_COLUMNS = ("mask $m_n$", "noise $z_n$ (equal contrast)", "output $y_n$", "real $x_n$")
_CRITICS = {"global": "$D_g$ (whole image)", "foreground": "$D_f$ (nuclei)", "background": "$D_b$ (background)"}


def figure5(
    views: Sequence[ScaleView],
    critic_maps: Mapping[str, Float[np.ndarray, "h w"]],
    history: Sequence[Float[np.ndarray, "steps terms"]],
    terms: Sequence[str],
) -> Figure:
    """Draw Fig. 5 for one patch.

    Parameters
    ----------
    views
        One for each scale, coarsest first, from `CSinGAN.views`.
    critic_maps
        From `CSinGAN.critic_maps`: by region, NaN where a critic does not look.
    history
        Losses of this patch for each scale: ``synthesiser.history[n][:, i]``.
    terms
        Names of the loss terms, ``synthesiser.terms``.

    Returns
    -------
    figure
        Top: a row for each scale, coarsest first. Bottom: the critics' maps, and two panels of losses over steps.
    """
    if not views:
        raise ValueError("figure 5 needs at least one scale")
    if len(history) != len(views):
        raise ValueError(f"figure 5: {len(views)} scales but losses of {len(history)}")
    unknown = set(critic_maps) - set(_CRITICS)
    if unknown:
        raise ValueError(f"figure 5: unknown critics {sorted(unknown)}; expected some of {sorted(_CRITICS)}")
    high = 1.95 * len(views)
    figure = Figure(figsize=(8.0, high + 4.2), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(high, 4.2))
    _pyramid(top, views)
    grid = bottom.add_gridspec(2, 1, height_ratios=(1.2, 1.0))
    maps = grid[0].subgridspec(1, 1 + len(critic_maps))
    _judged(bottom.add_subplot(maps[0, 0]), views[-1].output, next(iter(critic_maps.values()), None))
    for k, (region, values) in enumerate(critic_maps.items(), start=1):
        _critic(bottom.add_subplot(maps[0, k]), _CRITICS[region], values)
    curves = grid[1].subgridspec(1, 2)
    joined = np.concatenate([np.asarray(h) for h in history])
    ends = np.cumsum([len(h) for h in history])
    distances = [k for k, term in enumerate(terms) if term.startswith("distance_")]
    left, right = bottom.add_subplot(curves[0, 0]), bottom.add_subplot(curves[0, 1])
    _losses(left, joined, ends, {_CRITICS[terms[k].removeprefix("distance_")]: k for k in distances})
    left.set_title("E[D(x)] - E[D(y)] of each critic", fontsize=8)
    _losses(right, joined, ends, {"L_REC": list(terms).index("reconstruction")})
    right.set_title("$L_{REC}$: reconstruction of the real pair, $|y^{rec} - x|^2$", fontsize=8)
    return figure


def _pyramid(figure, views: Sequence[ScaleView]) -> None:
    axes = figure.subplots(len(views), 4, squeeze=False)
    for n, view in enumerate(views):
        # Noise shrinks with the scale (its amplitude is printed): shown in units of its own spread.
        spread = float(view.noise.std())
        noise = np.clip(0.5 + view.noise / (6 * max(spread, 1e-9)), 0, 1)
        for axis, picture in zip(axes[n], (view.mask, noise, view.output, view.real), strict=True):
            axis.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        axes[n, 0].set_ylabel(f"n = {n}: {view.mask.shape[0]} px", fontsize=8)
        axes[n, 1].set_xlabel(f"amplitude {spread:.2g}", fontsize=7)
    for axis, name in zip(axes[0], _COLUMNS, strict=True):
        axis.set_title(name, fontsize=9)


def _judged(axis: Axes, painted: np.ndarray, judged: np.ndarray | None) -> None:
    """Show what of the painted image the critics judge, who lose a border to their convolutions."""
    if judged is not None:
        border = (painted.shape[0] - judged.shape[0]) // 2
        painted = painted[border : painted.shape[0] - border, border : painted.shape[1] - border]
    axis.imshow(painted, interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.set_title("what they judge", fontsize=8)


def _critic(axis: Axes, title: str, values: np.ndarray) -> None:
    axis.set_facecolor("0.85")  # where the critic does not look
    seen = values[np.isfinite(values)]
    low, high = np.percentile(seen, (2, 98)) if seen.size else (0.0, 1.0)
    shown = axis.imshow(values, cmap="viridis", vmin=low, vmax=max(high, low + 1e-9), interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=8)
    bar = axis.figure.colorbar(shown, ax=axis, shrink=0.85)
    bar.ax.tick_params(labelsize=6)


def _losses(axis: Axes, losses: np.ndarray, ends: np.ndarray, lines: Mapping[str, int]) -> None:
    width = max(1, len(losses) // 100)
    kernel = np.ones(width) / width
    for k, (name, column) in enumerate(lines.items()):
        colour = f"C{k}"
        axis.plot(losses[:, column], color=colour, alpha=0.2, linewidth=0.6)
        smooth = np.convolve(losses[:, column], kernel, mode="valid")
        axis.plot(np.arange(len(smooth)) + (width - 1) / 2, smooth, color=colour, linewidth=1.1, label=name)
    for end in ends[:-1]:
        axis.axvline(end, color="0.6", linewidth=0.7, linestyle=":")
    axis.set_xlabel("step (dotted: next scale)", fontsize=8)
    axis.tick_params(labelsize=7)
    if len(lines) > 1:
        axis.set_ymargin(0.25)  # room for the legend above the curves
        axis.legend(fontsize=7, frameon=False, loc="upper left", ncols=len(lines))
