"""Figure 7 from received results: what there is of the paper's six systems, then other arms, on the same crops."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from nucseg.experiments import GridSettings
from nucseg.figures.segmentation import Row, figure7
from nucseg.paper import FIGURE_7, TABLES, rows
from nucseg.results.examples import Example, read_examples
from nucseg.tables.table import Measured, measure
from nucseg.tables.words import arm_in_words

COLUMNS = 7  # at most; more would be too small to see


def showcase(
    results: pd.DataFrame, dataset: str, settings: GridSettings, runs: pd.DataFrame | None = None
) -> Figure | None:
    """Draw the crops that came with a profile's results, one column for each of its systems.

    Parameters
    ----------
    results, runs
        Lines of one profile and one dataset.
    dataset, settings
        The dataset's name, the profile's grid.

    Returns
    -------
    Figure or None
        None where no pictures of two systems were received. Each panel tells the AJI of the whole image.
    """
    order = results.groupby("image_id")["aji"].mean().sort_values(kind="stable").index
    examples = read_examples(str(results["profile"].iloc[0]), dataset, list(order))
    if not examples:
        return None
    measured = [one for table in TABLES for one in measure(rows(table), results, dataset, settings, runs) if one.found]
    systems = _systems(measured, {run for example in examples for run in example.predictions})
    if len(systems) < 2:
        return None
    aji = results.drop_duplicates(["run_id", "image_id"]).set_index(["run_id", "image_id"])["aji"]
    lines = [
        Row(e.image, e.labels, {name: e.predictions[run] for name, run in systems.items() if run in e.predictions},
            _title(e, results, order)) for e in examples
    ]  # fmt: skip
    scores = {name: [aji.get((run, e.image_id), np.nan) for e in examples] for name, run in systems.items()}
    absent = [name for name in FIGURE_7 if name not in {title.splitlines()[0] for title in systems}]
    return figure7(lines, [*systems, *absent], scores)


def _systems(measured: list[Measured], drawn: set[str]) -> dict[str, str]:
    """Return the columns and their runs: the paper's names first, then other arms by theirs; each run once."""
    systems: dict[str, str] = {}
    names = {row_id: name for name, row_id in FIGURE_7.items()}
    order = [*names, *(one.row.id for one in measured)]
    for one in sorted(measured, key=lambda one: order.index(one.row.id)):
        run = next((run for run in dict.fromkeys(one.lines["run_id"]) if run in drawn), None)
        if run is None or run in systems.values() or len(systems) == COLUMNS:
            continue
        e = one.found[0]
        name = names.get(one.row.id) or arm_in_words(e.selection, e.augmentation, e.rounds, one.teacher)
        systems.setdefault(f"{name}\n[{e.segmenter}]" if e.segmenter != one.row.spec.segmenter else name, run)
    return systems


def _title(example: Example, results: pd.DataFrame, order: pd.Index) -> str:
    organ = results.loc[results["image_id"] == example.image_id, "organ"].iloc[0]
    place = {order[0]: ", worst by AJI", order[-1]: ", best by AJI"}.get(example.image_id, "")
    return f"{example.image_id.removeprefix('TCGA-')[:7]}, {organ}{place}"
