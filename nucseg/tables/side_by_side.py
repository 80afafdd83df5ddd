"""Table IV as it is printed: AJI, Dice and P of every dataset side by side, from one profile's ``results.csv``."""

from __future__ import annotations

import numpy as np
import pandas as pd

from nucseg.experiments import GridSettings
from nucseg.results import check_results
from nucseg.tables import DATASET_NAMES, Table, make_table, named, one_profile
from nucseg.tables import notes as table_notes


def table_4_of_all(results: pd.DataFrame, settings: GridSettings, runs: pd.DataFrame | None = None) -> Table | None:
    """Make Table IV with all datasets, the best and the second best of each marked.

    The paper's three datasets stand first, with or without results, then others that have some. None where
    `settings.k1` knows none of the datasets that have results. Arguments and errors are those of `make_table`.
    """
    results = check_results(results)
    found = set(results["dataset"]) & set(settings.k1)
    if not found:
        return None
    datasets = [name for name in DATASET_NAMES if name in settings.k1]
    datasets += sorted(found - set(datasets))
    frame = pd.DataFrame()
    for dataset in datasets:
        one, name = make_table("IV", results, dataset, settings, runs=runs).frame, named(dataset)
        if frame.empty:
            frame = one[["row", "id", "status"]].copy()
        frame["row"] = frame["row"].where(one["seeds"] == 0, one["row"])  # which says what was run in another way
        frame[f"{name} status"] = one["status"]
        frame["status"] = frame["status"].where(one["status"] != "run", "run")  # of any dataset
        for metric in ("AJI", "Dice"):
            if dataset in DATASET_NAMES:
                frame[f"paper {name} {metric}"] = one[f"paper {metric}"]
            for column in ("", " sd", " rank"):
                frame[f"ours {name} {metric}{column}"] = one[f"ours {metric}{column}"]
        if dataset in DATASET_NAMES:
            frame[f"paper {name} P"] = one["paper P"]
        for column in ("Wilcoxon p", "Wilcoxon p Holm"):
            frame[f"{name} {column}"] = one.get(column, np.nan)
        frame[f"{name} seeds"] = one["seeds"].where(one["seeds"] > 0)
    missing = [named(dataset) for dataset in datasets if dataset not in found]
    notes = table_notes.notes_of_all(results, sorted(found), missing, named)
    return Table("IV", "all", one_profile(results), table_notes.TITLES["IV"], frame, notes)
