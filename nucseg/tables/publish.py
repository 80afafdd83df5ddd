"""What a measurement beside the tables leaves: its lines as CSV, its table as Markdown, and its figure."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from nucseg import figures
from nucseg.files import write_text
from nucseg.pipeline import Pipeline


def publish(
    run: Pipeline, name: str, frame: pd.DataFrame, text: str, figure: Figure, **drawing: int
) -> tuple[Path, Path, Path]:
    """Write ``<name>_<dataset>.csv`` and ``.md`` beside the tables, and the figure, signed with all runs of the frame.

    Parameters
    ----------
    run
        Whose profile and dataset name the files.
    name
        What they begin with.
    frame
        Lines with a column ``run_id``.
    text, figure
        The Markdown page, and what to draw; `drawing` are more arguments of `nucseg.figures.save`.

    Returns
    -------
    tuple
        The paths of the three.
    """
    lines, picture = run.table_path(name), run.figure_path(name)
    page = lines.with_suffix(".md")
    write_text(lines, frame.to_csv(index=False, float_format="%.6g"))
    write_text(page, text)
    figures.save(figure, picture, run.signature(), sorted(set(frame["run_id"])), **drawing)
    return lines, page, picture
