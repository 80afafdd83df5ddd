"""How every figure is signed and saved: what made it is printed on it and kept in the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from skimage.segmentation import mark_boundaries

import nucseg
from nucseg.files import whole

# Okabe and Ito's colours, which colour-blind readers tell apart, by how a strategy's name begins.
STRATEGY_COLOURS = {
    "cps": "#0072B2",
    "kmeans": "#009E73",
    "k-center": "#E69F00",
    "probcover": "#CC79A7",
    "typiclust": "#56B4E9",
    "random": "#444444",
}


def colour_of(strategy: str) -> str:
    """Return a strategy's colour, the same in every figure; brown for one that is not known here."""
    return next((colour for name, colour in STRATEGY_COLOURS.items() if strategy.startswith(name)), "#8c564b")


def sign(figure: Figure, text: str) -> Figure:
    """Print one small line under a figure: profile, dataset, run ids, and that a tissue is synthetic."""
    figure.text(0.005, -0.005, text, fontsize=6, color="0.35", ha="left", va="top")
    return figure


def save(
    figure: Figure, path: str | Path, signature: str, run_ids: Sequence[str], dpi: int = 100, colours: int = 0
) -> Path:
    """Sign a figure and write it as PNG, with the run ids in the file's metadata.

    Parameters
    ----------
    figure
        As one of the figure functions returns it.
    path
        Where to write it; folders are made.
    signature
        The line that `sign` prints.
    run_ids
        Of every result that the figure shows.
    dpi
        Pixels per inch.
    colours
        Keep only so many (at most 256), for a figure of many photographs: a third of the size. 0 keeps all.
    """
    path = Path(path)
    sign(figure, signature)
    metadata = {"Software": f"nucseg {nucseg.__version__}", "Description": signature, "Source": " ".join(run_ids)}
    with whole(path) as part:
        figure.savefig(part, format="png", dpi=dpi, metadata=metadata, bbox_inches="tight")
        if colours:
            text = PngInfo()
            for key, value in metadata.items():
                text.add_text(key, value)
            with Image.open(part) as picture:
                picture.convert("RGB").quantize(colours).save(part, format="png", optimize=True, pnginfo=text)
    return path


def panels(pictures: Sequence[np.ndarray], titles: Sequence[str], columns: int = 0, side: float = 2.0) -> Figure:
    """Show pictures side by side.

    Parameters
    ----------
    pictures
        Images (H, W, 3) uint8 or float in 0..1, or single-channel arrays (H, W).
    titles
        One for each.
    columns
        Pictures in a row; 0 for all in one row.
    side
        Inches of a picture.
    """
    columns = columns or len(pictures)
    rows = -(-len(pictures) // columns)
    figure = Figure(figsize=(side * columns, (side + 0.25) * rows), layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, picture, title in zip(axes, pictures, titles, strict=False):
        axis.imshow(picture, cmap="magma", interpolation="nearest")
        axis.set_title(title, fontsize=8)
    return figure


def signed(values: np.ndarray) -> np.ndarray:
    """Paint numbers from -1 to 1, (H, W), blue below 0, white at 0 and red above; (H, W, 3) float in 0..1."""
    return colormaps["RdBu_r"]((np.clip(values, -1, 1) + 1) / 2)[..., :3]


def outline(image: np.ndarray, labels: np.ndarray, colour: tuple[float, float, float] = (1.0, 0.85, 0.0)) -> np.ndarray:
    """Draw the nuclei of a label map (H, W) as outlines on an image (H, W, 3) uint8; (H, W, 3) float in 0..1."""
    return mark_boundaries(image, labels, color=colour, mode="inner")


def curves(lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], x: str, y: str) -> Figure:
    """Plot named lines, each given by its x and y values, on one pair of axes."""
    figure = Figure(figsize=(5.0, 2.6), layout="constrained")
    axis = figure.subplots()
    for name, (values_x, values_y) in lines.items():
        axis.plot(values_x, values_y, label=name, linewidth=1.2)
    axis.set(xlabel=x, ylabel=y)
    axis.legend(fontsize=8, frameon=False)
    return figure
