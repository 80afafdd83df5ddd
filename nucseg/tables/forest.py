"""All rows of Tables I-VI in one view: each row's paired difference to the row that it is compared with.

The tables compare the rows that the paper compares (its P-values). Two tables have none: here Table V's systems are
compared with full supervision of the same segmenter, and Table VI's with the paper's own setting, K1 = 9 (scaled to the
dataset) and K2 = 4 with CSinGAN.
"""

from __future__ import annotations

import re

import numpy as np
import pandas as pd

from nucseg.experiments import GridSettings
from nucseg.outcomes import REFERENCE
from nucseg.paper import TABLES, rows
from nucseg.plans import TABLE
from nucseg.results import check_results
from nucseg.stats import paired_tests
from nucseg.tables import Measured, measure, one_profile, over_seeds, paired, why_not_compared
from nucseg.tables.strategies import strategy_frame

DIFFERENCE = ("mean difference", "CI low", "CI high", "seeds CI low", "seeds CI high")
_FULL = {"mrcnn-ours": "mrcnn", "hovernet-ours": "hovernet"}
_PAPER_SETTING = "k1-9-csingan"


def forest_frame(
    results: pd.DataFrame, dataset: str, settings: GridSettings, runs: pd.DataFrame | None = None
) -> pd.DataFrame:
    """Return every row of Tables I-VI and S with its difference to the row that it is compared with.

    A table that the profile leaves out altogether is left out here too, whatever other tables' runs would fill in it.

    Parameters
    ----------
    results, dataset, settings, runs
        As for `nucseg.tables.make_table`.

    Returns
    -------
    DataFrame
        Columns ``table``, ``row``, ``id``, ``against`` (label of the reference, or nothing), ``mean difference``,
        ``CI low``, ``CI high`` (AJI, row minus reference; 95 % bootstrap interval over images), ``seeds CI low`` and
        ``seeds CI high`` (the same over seeds, NaN with fewer than two), ``images``, ``seeds``, and ``why``:
        ``"reference"``, or why there is no difference; nothing where there is one; ``repeats``: where two rows of an
        earlier table compare the same runs, that table, ``"III reversed"`` where its reference is this row. In the
        tables' order. A label of
        Table VI names the K1 in force, and the printed one where the dataset's K1 is another than the paper's.
    """
    results = check_results(results)
    lines = results[results["dataset"] == dataset]
    one_profile(lines)
    made = []
    compared: dict[tuple, str] = {}
    for table in TABLES:
        if not any(settings.runs(row) for row in rows(table)):
            continue
        measured = measure(rows(table), lines, dataset, settings, runs)
        by_key = {one.row.key: one for one in measured}
        for one in measured:
            other = by_key.get(_reference(one) or "")
            made.append({**_line(table, one, other), "repeats": _repeats(table, one, other, compared)})
    ours = strategy_frame(results, dataset, settings)
    if len(ours) and "mean difference" in ours:
        shown = ours.reindex(columns=["row", "id", *DIFFERENCE, "images", "seeds"])
        shown = shown.assign(table=TABLE, against=REFERENCE, why="", repeats="")
        own = shown["row"] == REFERENCE
        shown.loc[own, ["against", "why"]] = ["", "reference"]
        made += shown.to_dict("records")
    return pd.DataFrame(
        made, columns=["table", "row", "id", "against", *DIFFERENCE, "images", "seeds", "why", "repeats"]
    )


def _reference(one: Measured) -> str | None:
    if one.row.table == "V":
        return _FULL.get(one.row.key)
    if one.row.table == "VI":
        return None if one.row.key == _PAPER_SETTING else _PAPER_SETTING
    return one.row.reference


def _label(one: Measured) -> str:
    """Return a row's label, with the K1 that its patches were chosen with: Table VI's are scaled to the dataset."""
    printed, ours = re.match(r"K1 = (\d+)", one.label), one.planned[0].k1
    if not printed or int(printed[1]) == ours:
        return one.label
    return f"K1 = {ours} (paper: {printed[1]}){one.label[printed.end() :]}"


def _repeats(table: str, one: Measured, other: Measured | None, compared: dict[tuple, str]) -> str:
    """Return the earlier table in which the same runs were compared, and note what this one compares."""
    if other is None or not one.found or one.found == other.found:
        return ""
    before = compared.get((one.found, other.found), "")
    compared.setdefault((one.found, other.found), table)
    compared.setdefault((other.found, one.found), f"{table} reversed")
    return before if before.split()[0:1] != [table] else ""


def _line(table: str, one: Measured, other: Measured | None) -> dict[str, object]:
    line = {
        **{"table": table, "row": _label(one), "id": one.row.id, "against": "" if other is None else _label(other)},
        **dict.fromkeys(DIFFERENCE, np.nan),
        **{"images": one.lines["image_id"].nunique(), "seeds": len(one.found)},
    }
    if other is None:
        return {**line, "why": "reference" if one.found else one.status}
    why = why_not_compared(one, other)
    if not why:
        test, seeds = paired_tests(*paired(one, other)), over_seeds(one, other)
        line |= dict(zip(DIFFERENCE, (*test[:3], seeds.ci_low, seeds.ci_high), strict=True))
    return {**line, "why": why}
