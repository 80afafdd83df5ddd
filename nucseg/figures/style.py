"""How every figure is signed and saved: what made it is printed on it and kept in the file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

import nucseg


def sign(figure: Figure, text: str) -> Figure:
    """Print one small line under a figure: profile, dataset, run ids, and that a tissue is synthetic."""
    figure.text(0.005, 0.002, text, fontsize=6, color="0.35", ha="left", va="bottom")
    return figure


def save(figure: Figure, path: str | Path, signature: str, run_ids: Sequence[str], dpi: int = 100) -> Path:
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
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sign(figure, signature)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    metadata = {"Software": f"nucseg {nucseg.__version__}", "Description": signature, "Source": " ".join(run_ids)}
    figure.savefig(part, format="png", dpi=dpi, metadata=metadata, bbox_inches="tight")
    os.replace(part, path)
    return path
