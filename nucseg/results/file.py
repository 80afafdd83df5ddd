"""Adding an experiment to its profile's ``results.csv`` and ``runs.csv``, whole or not at all.

Lines are ordered by experiment, so the file is the same, byte for byte, in whatever order, by however many processes
and with however many interruptions its experiments were run. Known lines stay text: to parse, check and format them all
again for each new experiment took most of the time that a run spends beside its experiments (bench_runs.py).
"""

from __future__ import annotations

import csv
import functools
import io
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from operator import itemgetter
from pathlib import Path

import pandas as pd

from nucseg.files import write_text
from nucseg.results import (
    EXPERIMENT,
    RESULT_COLUMNS,
    RUN_COLUMNS,
    SCORES,
    check_results,
    read_results,
    read_runs,
)
from nucseg.results.frames import INTEGERS
from nucseg.store import locked, published

_SHARES = (*SCORES, "label_share")
_IDENTITY = itemgetter(*(RESULT_COLUMNS.index(name) for name in ("profile", "encoder", *EXPERIMENT, "round")))
_DATASET, _FINGERPRINT, _RUN = (RESULT_COLUMNS.index(name) for name in ("dataset", "fingerprint", "run_id"))

Line = list[str]


def add_results(frame: pd.DataFrame, runs: pd.DataFrame) -> None:
    """Add an experiment's rows to its profile's results.csv and runs.csv, in place of its older ones.

    A run that no line of results.csv comes from any more leaves runs.csv. Results of another version of the same
    dataset move to a file of their own, with a warning: they cannot stand in one table with the new ones.
    """
    folder = published("tables", frame["profile"].iloc[0])
    new = _lines(_checked(frame))
    with locked(folder / ".results.lock"):
        for left_over in folder.glob(".*.csv.*.part"):  # of a killed run: we hold the lock
            left_over.unlink()
        # runs.csv first: killed between the two, the experiment is still missing, and writes both again.
        path = folder / "runs.csv"
        known, new_runs = _known(path, RUN_COLUMNS, read_runs), _lines(runs[list(RUN_COLUMNS)])
        replaced = {line[0] for line in new_runs}
        all_runs = [line for line in known if line[0] not in replaced] + new_runs
        _write(path, RUN_COLUMNS, sorted(all_runs, key=lambda line: (line[1], line[0])))  # as they were started

        path = folder / "results.csv"
        before = _put_aside(_known(path, RESULT_COLUMNS, read_results), new, path)
        after = _replaced(before, new)
        _write(path, RESULT_COLUMNS, after)

        if gone := {line[_RUN] for line in before} - {line[_RUN] for line in after}:
            path = folder / "runs.csv"
            _write(path, RUN_COLUMNS, [line for line in _known(path, RUN_COLUMNS, read_runs) if line[0] not in gone])


def _checked(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the frame as `check_results` does, which is asked only where a glance finds something unusual."""
    whole, shares = frame[[*INTEGERS]], frame[[*_SHARES]].to_numpy()
    usual = all(dtype.kind == "i" for dtype in whole.dtypes) and shares.dtype.kind == "f"
    if usual and (whole.to_numpy() >= 0).all() and ((shares >= 0) & (shares <= 1)).all() and _no_line_twice(frame):
        return frame[list(RESULT_COLUMNS)]
    return check_results(frame[list(RESULT_COLUMNS)])


def _no_line_twice(frame: pd.DataFrame) -> bool:
    return len(set(zip(frame["round"], frame["image_id"], strict=True))) == len(frame)


def _replaced(known: list[Line], new: list[Line]) -> list[Line]:
    """Return all lines, an experiment's new ones instead of its known ones, ordered by experiment and round."""
    experiments = {_IDENTITY(line)[:-1] for line in new}
    kept = [line for line in known if _IDENTITY(line)[:-1] not in experiments]
    return sorted(kept + new, key=lambda line: _order(_IDENTITY(line)))


@functools.lru_cache(maxsize=10_000)
def _order(identity: tuple[str, ...]) -> tuple[tuple[int, str], ...]:
    """Order numbers as numbers: seed 21 before seed 100."""
    return tuple((int(value) if value.isdigit() else -1, value) for value in identity)


def _put_aside(known: list[Line], new: list[Line], path: Path) -> list[Line]:
    versions = {line[_DATASET]: line[_FINGERPRINT] for line in new}
    kept, other = [], defaultdict(list)
    for line in known:
        dataset, fingerprint = line[_DATASET], line[_FINGERPRINT]
        same = versions.get(dataset, fingerprint) == fingerprint
        (kept if same else other[dataset, fingerprint]).append(line)
    for (dataset, fingerprint), lines in other.items():
        aside = path.with_name(f"results-{dataset}-{fingerprint}.csv")
        _write(aside, RESULT_COLUMNS, _replaced(_known(aside, RESULT_COLUMNS, read_results), lines))
        text = f"the data of {dataset!r} have changed; {len(lines)} older results moved to {aside}"
        warnings.warn(text, stacklevel=3)
    return kept


def _lines(frame: pd.DataFrame) -> list[Line]:
    return list(csv.reader(io.StringIO(frame.to_csv(index=False))))[1:]


def _known(path: Path, columns: Sequence[str], read: Callable[[Path], pd.DataFrame]) -> list[Line]:
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        header, *lines = list(csv.reader(file)) or [[]]
    # Another header is an older file, or a broken one: `read` brings it up to date, or says what is wrong.
    return lines if header == list(columns) else _lines(read(path))


def _write(path: Path, columns: Sequence[str], lines: list[Line]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([list(columns), *lines])
    write_text(path, text.getvalue())
