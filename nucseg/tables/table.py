"""Tables I-VI (Sec. IV) from ``results.csv`` alone: the paper's printed numbers beside ours.

Ours is the mean over the test images for each seed, then mean and standard deviation over seeds (A38). The P-values
compare a row with the row that the paper compares it with, image by image, seeds averaged per image first
(REFERENCE 4.6, A40). Columns headed "paper" hold printed numbers, and no other column does: a row that was not run has
none of ours. CSV, Markdown, LaTeX and HTML are written from the same frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from nucseg.experiments import Experiment, GridSettings, experiments_of
from nucseg.files import write_text
from nucseg.outcomes import NOT_IN_PROFILE, NOT_YET
from nucseg.paper import TABLES, Row, rows
from nucseg.results import (
    COUNTED,
    EXPERIMENT,
    SCORES,
    ResultsError,
    check_results,
)
from nucseg.results.settings import teachers
from nucseg.stats import SeedTest, effect_size, holm, paired_tests, seed_test
from nucseg.tables import formats
from nucseg.tables import notes as table_notes

DATASET_NAMES = {"kumar": "Kumar", "tnbc": "TNBC", "monuseg": "MoNuSeg"}
METRIC_NAMES = {"aji": "AJI", "dice": "Dice", "aji_seen": "AJI-s", "aji_unseen": "AJI-u"}
COMPARISON = (
    *("mean difference", "CI low", "CI high", "t p", "t p Holm", "Wilcoxon p", "Wilcoxon p Holm", "effect size"),
    *("seeds CI low", "seeds CI high", "seeds p", "seeds p Holm"),
)


@dataclass(frozen=True, repr=False)
class Table:
    """A table ready to be written.

    Attributes
    ----------
    number, dataset, profile, title
        ``"I"`` to ``"VI"``, ``"S"`` or ``"B"``; what it was run on, with which profile, and what it shows.
    frame
        One line per row: numbers unrounded, NaN where there is none. Columns headed ``paper`` hold printed numbers,
        those headed ``ours`` what was measured here.
    notes
        The text under the table, one paragraph each.
    """

    number: str
    dataset: str
    profile: str
    title: str
    frame: pd.DataFrame
    notes: tuple[str, ...]

    @property
    def caption(self) -> str:
        """The line above the table."""
        return f"Table {self.number}. {self.title} ({named(self.dataset)}, {self.profile})"

    def brief(self) -> Table:
        """Return the rows that were run, without the columns that fewest read; a note says what was left out."""
        ran = ~self.frame["status"].isin((NOT_YET, NOT_IN_PROFILE))
        if not ran.any():
            return self
        frame = self.frame[ran].reset_index(drop=True).drop(columns=["ours AJI+", "ours F1", "runs"], errors="ignore")
        note = "The columns AJI+, F1 and runs are in the files of this table."
        if not ran.all():
            note = f"{(~ran).sum()} more rows were not run; they and the{note.removeprefix('The')}"
        return replace(self, frame=frame, notes=(*self.notes, note))

    def __repr__(self) -> str:
        return self.caption

    def _repr_html_(self) -> str:
        header, cells = formats.cells(self.frame)
        return formats.html_fragment(self.caption, header, cells, self.notes)


@dataclass(frozen=True)
class Measured:
    """What results.csv holds for one row.

    Attributes
    ----------
    row, label, segmenter
        The printed row, its label with all that was run in another way than the paper's, and its segmenter.
    teacher
        ``"mean teacher"`` or ``"silent teacher"`` where one took the place of the rounds of pseudo labels.
    planned, found
        Its experiments, one per seed, and those with results.
    lines, best
        Their lines: of the last round, and of the round with the best validation AJI.
    status
        ``"run"``, how many seeds were run, or why there is nothing.
    """

    row: Row
    label: str
    segmenter: str
    teacher: str
    planned: tuple[Experiment, ...]
    found: tuple[Experiment, ...]
    lines: pd.DataFrame
    best: pd.DataFrame
    status: str

    def mean(self, metric: str, lines: pd.DataFrame | None = None) -> tuple[float, float]:
        """Return mean and standard deviation over seeds of the mean over images; NaN where there is none."""
        lines = self.lines if lines is None else lines
        if not len(lines) or lines[metric].isna().any():  # nuclei need not have been counted
            return np.nan, np.nan
        seeds = lines.groupby("seed")[metric].mean()
        return float(seeds.mean()), float(seeds.std(ddof=1)) if len(seeds) > 1 else np.nan

    def images(self, metric: str = "aji") -> pd.Series:
        """Return one score per image, averaged over seeds."""
        return self.lines.groupby("image_id")[metric].mean()


def make_table(
    table: str,
    results: pd.DataFrame,
    dataset: str,
    settings: GridSettings,
    *,
    runs: pd.DataFrame | None = None,
) -> Table:
    """Make one table from results.

    Parameters
    ----------
    table
        ``"I"`` to ``"VI"``.
    results
        Lines of one ``results.csv``, as `nucseg.results.read_results` returns them; other datasets' lines are ignored.
    dataset
        What the rows were run on.
    settings
        The profile's grid: it says which experiments stand behind a row, and which rows are not run.
    runs
        Lines of ``runs.csv``, for the time spent, and for what they say of how a row was run.

    Raises
    ------
    ResultsError
        If the results hold several profiles, an experiment twice (two encoders), or with other images than the rest.
    ValueError
        For an unknown table, or a dataset that `settings.k1` does not know.
    """
    results = check_results(results)
    lines = results[results["dataset"] == dataset]
    profile = one_profile(lines)
    measured = measure(rows(table), lines, dataset, settings, runs)
    source = _source(table, dataset)
    if table == "V":
        frame = pd.DataFrame(_organ_columns(measured, dataset, lines))
    else:
        frame = pd.DataFrame([_columns(one, table, dataset, source) for one in measured])
        frame = _with_tests(frame, measured, source, dataset)
    if table == "IV":
        for name in ("AJI", "Dice"):
            frame.insert(list(frame).index(f"ours {name}") + 1, f"ours {name} rank", _ranks(frame[f"ours {name}"]))
    frame["images"] = [one.lines["image_id"].nunique() for one in measured]
    frame["seeds"] = [len(one.found) for one in measured]
    frame["runs"] = [" ".join(sorted({run[:8] for run in one.lines["run_id"]})) for one in measured]
    used = pd.concat([one.lines for one in measured], ignore_index=True) if measured else lines
    notes = table_notes.notes(table, dataset, source, measured, used, runs)
    return Table(table, dataset, profile, table_notes.TITLES[table], frame, notes)


def make_tables(
    results: pd.DataFrame,
    dataset: str,
    settings: GridSettings,
    *,
    runs: pd.DataFrame | None = None,
) -> tuple[Table, ...]:
    """Make all six tables; arguments and errors are those of `make_table`."""
    return tuple(make_table(name, results, dataset, settings, runs=runs) for name in TABLES)


def write_table(table: Table, folder: str | Path, suffix: str = "") -> tuple[Path, ...]:
    """Write a table as CSV (unrounded), Markdown, LaTeX and HTML, each moved into place when it is complete.

    The files are ``table<number>_<dataset><suffix>`` with ``.csv``, ``.md``, ``.tex`` and ``.html``, the number in
    Arabic digits; existing files are replaced.
    """
    header, cells = formats.cells(table.frame)
    texts = {
        "csv": table.frame.to_csv(index=False, float_format="%.6g"),
        "md": formats.markdown(table.caption, header, cells, table.notes),
        "tex": formats.latex(table.caption, header, cells, table.notes),
        "html": formats.html_page(table.caption, header, cells, table.notes),
    }
    number = TABLES.index(table.number) + 1 if table.number in TABLES else table.number
    name = f"table{number}_{Path(table.dataset).name}{suffix}"
    paths = tuple(Path(folder) / f"{name}.{ending}" for ending in texts)
    for path, text in zip(paths, texts.values(), strict=True):
        write_text(path, text)
    return paths


def one_profile(lines: pd.DataFrame) -> str:
    """Return the profile that all lines are of, ``"no results"`` without any; a table never mixes two."""
    profiles = sorted(lines["profile"].unique())
    if len(profiles) > 1:
        raise ResultsError(f"results of several profiles, {', '.join(profiles)}: a table shows one")
    return profiles[0] if profiles else "no results"


def named(dataset: str) -> str:
    """Return a dataset's name as it is printed."""
    return {**DATASET_NAMES, "all": "all datasets"}.get(dataset, dataset)


def _source(table: str, dataset: str) -> str:
    """Return the dataset whose printed numbers stand beside ours: only Table IV is printed for all three."""
    return dataset if table == "IV" and dataset in DATASET_NAMES else "kumar"


def _paper(source: str, dataset: str) -> str:
    """Return the heading of printed numbers, which names their data when ours are other data."""
    return "paper" if source == dataset else f"paper ({DATASET_NAMES[source]})"


def measure(
    table: tuple[Row, ...],
    lines: pd.DataFrame,
    dataset: str,
    settings: GridSettings,
    runs: pd.DataFrame | None = None,
    plans: Sequence[tuple[Experiment, ...]] | None = None,
) -> list[Measured]:
    """Find what was measured for each row among the lines of one dataset; errors are those of `make_table`.

    `plans` are the experiments of each row, where they are others than the profile's settings say.
    """
    taught = {} if runs is None else teachers(runs)
    plans = [experiments_of(row, dataset, settings) for row in table] if plans is None else plans
    wanted = {experiment for plan in plans for experiment in plan}
    places = lines.groupby(list(EXPERIMENT), sort=False).indices if len(lines) else {}
    results = {Experiment(*key): lines.iloc[at] for key, at in places.items() if Experiment(*key) in wanted}
    images = set(lines["image_id"])
    made = []
    for row, planned in zip(table, plans, strict=True):
        last = {e: results[e][results[e]["round"] == e.rounds] for e in planned if e in results}
        last = {e: group for e, group in last.items() if len(group)}
        for experiment, group in last.items():
            if group["image_id"].duplicated().any():
                encoders = ", ".join(sorted(group["encoder"].unique()))
                raise ResultsError(f"{experiment}: results twice, with the encoders {encoders}; a table shows one")
            if set(group["image_id"]) != images:
                lack = sorted(images - set(group["image_id"]))
                raise ResultsError(f"{experiment}: no result for image(s) {', '.join(lack[:3])}; run it to its end")
        found = tuple(last)
        best = [results[e][results[e]["best"] == 1] for e in found]
        segmenter = settings.segmenter(row)
        words = {taught.get(run, "") for group in last.values() for run in group["run_id"]}
        if len(words) > 1:
            raise ResultsError(f"{row.id}: some seeds were run with a mean teacher, some without: nucseg run --again")
        teacher = words.pop() if words else ""
        label = f"{row.label} [run with {segmenter}]" if found and segmenter != row.spec.segmenter else row.label
        label += f" [{teacher}]" if teacher else ""
        if not found:
            status = NOT_YET if settings.runs(row) else NOT_IN_PROFILE
        else:
            status = "run" if len(found) == len(planned) else f"{len(found)} of {len(planned)} seeds"
        none = lines.iloc[:0]
        made.append(
            Measured(
                row,
                label,
                segmenter,
                teacher,
                planned,
                found,
                pd.concat(last.values(), ignore_index=True) if found else none,
                pd.concat(best, ignore_index=True) if found else none,
                status,
            )
        )
    return made


def _columns(one: Measured, table: str, dataset: str, source: str) -> dict[str, object]:
    paper, printed = _paper(source, dataset), one.row.paper[source]
    columns: dict[str, object] = {"row": one.label, "id": one.row.id, "status": one.status}
    if table == "VI":
        columns |= {"ours K1": one.planned[0].k1, "ours K2": one.planned[0].k2}
        columns[f"{paper} label share"] = printed["label_share"]
        columns["ours label share"] = one.mean("label_share")[0]
        columns["ours label nuclei"] = one.mean(COUNTED)[0]
    metrics = ("aji_seen", "aji_unseen", "aji", "dice") if table == "III" else ("aji", "dice")
    for metric in metrics:
        name = METRIC_NAMES[metric]
        if metric in SCORES:
            mean, spread = one.mean(metric)
        else:
            mean, spread = one.mean("aji", one.lines[one.lines["seen"] == int(metric == "aji_seen")])
        columns[f"{paper} {name}"] = printed.get(metric, np.nan)
        columns[f"ours {name}"], columns[f"ours {name} sd"] = mean, spread
        # A difference between two datasets says nothing, nor one to rounds of pseudo labels that were not run.
        same = source == dataset and not one.teacher
        columns[f"{name} ours - paper"] = mean - columns[f"{paper} {name}"] if same else np.nan
    columns |= {"ours AJI+": one.mean("aji_plus")[0], "ours PQ": one.mean("pq")[0], "ours F1": one.mean("f1")[0]}
    if table != "VI":
        columns["ours AJI best round"] = one.mean("aji", one.best)[0] if one.row.spec.plabel else np.nan
        columns["ours label share"] = one.mean("label_share")[0]
        columns["ours label nuclei"] = one.mean(COUNTED)[0]
    return columns


def _organ_columns(measured: list[Measured], dataset: str, lines: pd.DataFrame) -> list[dict[str, object]]:
    """Table V: AJI by organ, the printed organs only where ours are the same (Kumar), and the spread over organs."""
    printed = list(measured[0].row.paper["kumar"]) if dataset == "kumar" else []
    here = sorted(set(lines["organ"]))
    organs = [organ for organ in printed if organ in here or not here] + [o for o in here if o not in printed]
    made = []
    for one in measured:
        columns: dict[str, object] = {"row": one.label, "id": one.row.id, "status": one.status}
        ours = {organ: one.mean("aji", one.lines[one.lines["organ"] == organ]) for organ in organs}
        for organ in organs:
            if dataset == "kumar":
                columns[f"paper {organ}"] = one.row.paper["kumar"].get(organ, np.nan)
            columns[f"ours {organ}"], columns[f"ours {organ} sd"] = ours[organ]
        if dataset == "kumar":
            columns["paper spread"] = np.ptp(list(one.row.paper["kumar"].values()))
        columns["ours spread"] = np.ptp([mean for mean, _ in ours.values()]) if one.found else np.nan
        columns["ours AJI"], columns["ours AJI sd"] = one.mean("aji")
        columns |= {"ours AJI+": one.mean("aji_plus")[0], "ours PQ": one.mean("pq")[0]}
        made.append(columns)
    return made


def _with_tests(frame: pd.DataFrame, measured: list[Measured], source: str, dataset: str) -> pd.DataFrame:
    """Add the comparison of each row with its reference; rows of different segmenters are compared in Table IV only."""
    if not any(one.row.reference for one in measured):
        return frame
    by_key = {one.row.key: one for one in measured}
    tests = pd.DataFrame(np.nan, index=frame.index, columns=list(COMPARISON))
    compared = [""] * len(measured)
    for i, one in enumerate(measured):
        other = by_key.get(one.row.reference or "")
        if other is None or why_not_compared(one, other):
            continue
        pair = paired(one, other)
        test = paired_tests(*pair)
        compared[i] = other.label
        tests.loc[i, ["mean difference", "CI low", "CI high"]] = test[:3]
        tests.loc[i, ["t p", "Wilcoxon p", "effect size"]] = (test.t_p, test.wilcoxon_p, effect_size(*pair))
        tests.loc[i, ["seeds CI low", "seeds CI high", "seeds p"]] = over_seeds(one, other)[1:]
    # Rows that are the same runs, for example with one segmenter in place of two, make one comparison between them.
    first: dict[tuple, int] = {}
    same = [first.setdefault((one.planned, one.row.reference), i) for i, one in enumerate(measured)]
    for name in ("t p", "Wilcoxon p", "seeds p"):
        tests[f"{name} Holm"] = pd.Series(holm(tests[name].where(tests.index == same)))[same].to_numpy()
    frame = frame.assign(**{"compared with": compared})
    for name in COMPARISON:
        frame[name] = tests[name]
    printed = [one.row.paper[source].get("p", np.nan) for one in measured]
    if not np.isnan(printed).all():
        frame[f"{_paper(source, dataset)} P"] = printed
    return frame


def over_seeds(one: Measured, other: Measured) -> SeedTest:
    """Compare two rows by the means of their seeds, as pairs where equal seeds annotate the same patches.

    They do where strategy and budget are the same and, since two profiles may draw from different pools, so are each
    seed's share of the pixels and number of nuclei.
    """
    a, b = (each.lines.groupby("seed")["aji"].mean() for each in (one, other))
    strategies = {(e.selection, e.k1, e.k2) for e in (*one.found, *other.found)}
    shares, others = (each.lines.groupby("seed")[["label_share", COUNTED]].first() for each in (one, other))
    return seed_test(a, b, same=len(strategies) == 1 and shares.equals(others))


def why_not_compared(one: Measured, other: Measured) -> str:
    """Return why a row is not compared with another one, nothing where it is."""
    if not one.found:
        return one.status
    if not other.found:
        return f"reference: {other.status}"
    if one.planned == other.planned:
        return "same runs as the reference"
    if one.row.table != "IV" and one.segmenter != other.segmenter:
        return "reference: another segmenter"
    return ""


def paired(one: Measured, other: Measured) -> tuple[np.ndarray, np.ndarray, list[str], list[str]]:
    """Return two rows' AJI by image, seeds averaged, with the images' names: arguments of `paired_tests`."""
    a, b = one.images(), other.images()
    return a.to_numpy(), b.to_numpy(), list(a.index), list(b.index)


def _ranks(values: pd.Series) -> pd.Series:
    # Dense: where two rows are the same run and share the first place, the next one is still the second best.
    return values.rank(ascending=False, method="dense")
