"""Two profiles side by side, row by row: the same question with other settings, or against one row of the other.

A claim about selection or synthesis should hold for two segmenters, a stronger use of unlabelled pixels should beat the
weaker one: such comparisons cross the border between profiles, which no table of one profile does.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from nucseg.files import write_text
from nucseg.paper import TABLES, rows
from nucseg.profiles import load_profile
from nucseg.results import ResultsError, read_results, read_runs
from nucseg.stats import holm, paired_tests
from nucseg.store import published
from nucseg.tables import formats, strategies
from nucseg.tables.notes import OVER_SEEDS, data_of, of_patients
from nucseg.tables.table import Measured, measure, named, over_seeds, paired

READING = (
    "AJI: the mean over all test images for each seed, then mean ± standard deviation over the seeds that both have "
    "(all where they share none). Reference: the second. Differences are paired by test image, seeds averaged first; "
    "95 % bootstrap interval over images; p of the paired t-test and of Wilcoxon's, uncorrected."
)


def compare(first: str, second: str, dataset: str, reference: str = "") -> pd.DataFrame:
    """Compare every row of Tables I to VI and S, and Table B's full supervision, that two profiles have results for.

    Parameters
    ----------
    first, second
        Names of profiles, or paths of their YAML files; results are read from ``tables/<profile>/results.csv``.
    dataset
        Name of the dataset, or its folder.
    reference
        Id of a row, such as ``"III.full"``: then every row of the first is compared with this row of the second.

    Returns
    -------
    DataFrame
        One line per distinct arm of the first: row, id, against, both AJI with their spread over seeds, the difference
        with its interval and tests over images, its interval and P over seeds (uncorrected and by Holm's method),
        images, seeds.

    Raises
    ------
    ResultsError
        If there are no results, the profiles' data differ, or no row is in both.
    """
    dataset = Path(dataset).name  # as results.csv has it
    mine, theirs = (measured_of(profile, dataset) for profile in (first, second))
    my_data, their_data = (_lines_of(found)["fingerprint"].iloc[0] for found in (mine, theirs))
    if my_data != their_data:
        raise ResultsError(f"{dataset}: {first} has data version {my_data}, {second} has {their_data}: not comparable")
    if reference and reference not in theirs:
        raise ResultsError(f"{second}, {dataset}: no results for row {reference!r}, only for {', '.join(theirs)}")
    lines, seen = [], set()
    for name, one in mine.items():
        other = theirs.get(reference or name)
        if other is None or one.found in seen or set(one.lines["run_id"]) == set(other.lines["run_id"]):
            continue
        seen.add(one.found)
        lines.append(_line(one, other))
    if not lines:
        raise ResultsError(f"{dataset}: {first} and {second} have results for no common row")
    frame = pd.DataFrame(lines)
    return frame.assign(**{"seeds p Holm": holm(frame["seeds p"])})


def measured_of(profile: str, dataset: str) -> dict[str, Measured]:
    """Return what a profile has results for, by row id.

    Raises
    ------
    ResultsError
        If there are none.
    """
    settings = load_profile(profile)
    path = published("tables", settings.name) / "results.csv"
    lines = read_results(path) if path.is_file() else pd.DataFrame({"dataset": []})
    lines = lines[lines["dataset"] == dataset]
    if not len(lines):
        raise ResultsError(f"{path}: no results on {dataset!r}; nucseg run --profile {profile} --dataset {dataset}")
    runs = read_runs(path.with_name("runs.csv")) if path.with_name("runs.csv").is_file() else None
    found = {one.row.id: one for table in TABLES for one in measure(rows(table), lines, dataset, settings.grid, runs)}
    found |= {one.row.id: one for one in strategies.measured(lines, dataset, settings.grid, runs)}
    return {name: one for name, one in found.items() if one.found}


def _lines_of(found: dict[str, Measured]) -> pd.DataFrame:
    return pd.concat([one.lines for one in found.values()]).drop_duplicates()


def _line(one: Measured, other: Measured) -> dict[str, object]:
    common = {e.seed for e in one.found} & {e.seed for e in other.found}
    one, other = (of_seeds(each, common) for each in (one, other)) if common else (one, other)
    tests, seeds = paired_tests(*paired(one, other)), over_seeds(one, other)
    line: dict[str, object] = {"row": one.label, "id": one.row.id, "against": other.label}
    for place, each in (("first", one), ("second", other)):
        line[f"{place} AJI"], line[f"{place} AJI sd"] = each.mean("aji")
    line |= {"mean difference": tests.mean_difference, "CI low": tests.ci_low, "CI high": tests.ci_high}
    line |= {"paired t": tests.t_p, "Wilcoxon": tests.wilcoxon_p}
    line |= dict(zip(("seeds CI low", "seeds CI high", "seeds p"), seeds[1:], strict=True))
    return line | {"images": tests.n, "seeds": len(common) or np.nan}


def of_seeds(one: Measured, seeds: set[int]) -> Measured:
    """Return what was measured with these seeds alone."""
    found = tuple(e for e in one.found if e.seed in seeds)
    return replace(one, found=found, lines=one.lines[one.lines["seed"].isin(seeds)])


def write(first: str, second: str, dataset: str, reference: str = "") -> tuple[Path, ...]:
    """Call `compare`; write ``against_<second>_<dataset>`` as CSV and Markdown beside the first profile's tables."""
    dataset = Path(dataset).name
    frame = compare(first, second, dataset, reference)
    names = [load_profile(name).name for name in (first, second)]
    folder, file = published("tables", names[0]), f"against_{names[1]}_{dataset}"
    file += f"_{reference.replace('.', '-')}" if reference else ""
    caption = f"{names[0]} (first) and {names[1]} (second) on {named(dataset)}"
    paths = folder / f"{file}.csv", folder / f"{file}.md"
    write_text(paths[0], frame.to_csv(index=False, float_format="%.6g"))
    shown = frame if (frame["row"] != frame["against"]).any() else frame.drop(columns="against")
    used = dict(zip(names, (first, second), strict=True))  # one line where a profile is compared with itself
    about = [f"{name}: {data_of(_lines_of(measured_of(profile, dataset)))}." for name, profile in used.items()]
    patients = of_patients(dataset, _lines_of(measured_of(first, dataset))["image_id"])
    notes = (*about, READING, *filter(None, [patients]), *[OVER_SEEDS] * bool(frame["seeds p"].notna().any()))
    write_text(paths[1], formats.markdown(caption, *formats.cells(shown), notes))
    return paths
