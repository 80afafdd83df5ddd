"""The two files that hold what was measured: ``results.csv`` and ``runs.csv``, and how they are read and merged.

``results.csv`` has one line per experiment, pseudo-labelling round and test image; ``round`` is the round that the
model comes from. The last round is the reported one; the one with the best validation AJI has ``best`` = 1, and may be
the same (A34). ``runs.csv`` has one line per run: what it took, on what machine, with which configuration.

``label_share`` and ``label_nuclei`` are what had to be outlined: the part of the training pixels, and the nuclei that
the patches touch. Files written before nuclei were counted lack the second; it is empty there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from nucseg.config import nearest
from nucseg.experiments import Experiment

EXPERIMENT = tuple(f.name for f in dataclasses.fields(Experiment))
SCORES = ("dice", "aji", "aji_plus", "dq", "sq", "pq", "f1")
COUNTED = "label_nuclei"  # the only number that may be missing
INTEGERS = ("k1", "k2", "rounds", "seed", "round", "best", "seen", "n_true", "n_pred")

RESULT_COLUMNS = (
    *("profile", "dataset", "fingerprint", "selection", "k1", "k2", "augmentation", "segmenter", "encoder"),
    *("rounds", "supervision", "seed", "round", "best", "image_id", "organ", "seen", "label_share", COUNTED),
    *SCORES,
    *("n_true", "n_pred", "run_id"),
)
TEXT = tuple(name for name in RESULT_COLUMNS if name not in (*INTEGERS, *SCORES, "label_share", COUNTED))
RUN_COLUMNS = ("run_id", "started", "seconds", "device", "versions", "peak_gpu_mb", "config")
KEY = ("profile", "encoder", *EXPERIMENT, "round", "image_id")  # what must be there only once


class ResultsError(ValueError):
    """A results file is not what it should be; the message says where."""


def read_results(path: str | Path) -> pd.DataFrame:
    """Read a ``results.csv``, checked.

    Raises
    ------
    FileNotFoundError
        If it is not there.
    ResultsError
        For a file that is no table, missing or unknown columns (``label_nuclei`` may be missing, and then is empty),
        scores out of range, lines that occur twice, or one dataset in two versions.
    """
    # Names such as "01" and "NA" are text, and stay so.
    frame = _table(path, dtype=dict.fromkeys(TEXT, str), keep_default_na=False)
    return check_results(frame, str(path))


def read_runs(path: str | Path) -> pd.DataFrame:
    """Read a ``runs.csv``: run_id, started, seconds, device, versions, peak_gpu_mb (empty on a CPU), config as JSON.

    Raises
    ------
    FileNotFoundError
        If it is not there.
    ResultsError
        For a file that is no table, or missing or unknown columns.
    """
    frame = _table(path, dtype={name: str for name in RUN_COLUMNS if name not in ("seconds", "peak_gpu_mb")})
    return _columns(frame, RUN_COLUMNS, str(path))


def _table(path: str | Path, **options) -> pd.DataFrame:
    try:
        return pd.read_csv(path, **options)
    except ValueError as error:  # pandas' own, and of the text's encoding: neither names the file
        raise ResultsError(f"{path}: not a table ({error}); copy it again") from error


def merge_results(frames: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """Put the results of several machines together: concatenation, checked.

    Raises
    ------
    ResultsError
        If a line occurs twice (it names the experiments), or the frames saw different versions of one dataset.
    """
    checked = [check_results(frame, f"results {number}") for number, frame in enumerate(frames, start=1)]
    filled = [frame for frame in checked if len(frame)]
    return check_results(pd.concat(filled, ignore_index=True), "merged results") if filled else empty_results()


def empty_results() -> pd.DataFrame:
    """Return a results frame without lines: what there is before the first run."""
    return pd.DataFrame(columns=list(RESULT_COLUMNS))


def check_results(frame: pd.DataFrame, where: str = "results") -> pd.DataFrame:
    """Return a results frame with its columns in order, or raise a `ResultsError` that says what is wrong where."""
    if COUNTED not in frame:
        frame = frame.assign(**{COUNTED: None})
    frame = _columns(frame, RESULT_COLUMNS, where)
    frame[COUNTED] = _counts(frame, where)
    for name in (*INTEGERS, *SCORES, "label_share"):
        values = pd.to_numeric(frame[name], errors="coerce").astype(float)
        bad = values.isna() | ((values < 0) if name in INTEGERS else ~values.between(0, 1 + 1e-9))
        if name in INTEGERS:
            bad |= values != values.round()
        if bad.any():
            line = frame.loc[bad].iloc[0]
            raise ResultsError(f"{where}: {name} is {line[name]} for image {line['image_id']}, run {line['run_id']}")
        frame[name] = values.astype("int64" if name in INTEGERS else "float64")
    for name in TEXT:
        frame[name] = frame[name].fillna("").astype(str)
    versions = frame.groupby("dataset")["fingerprint"].unique()
    for dataset, prints in versions.items():
        if len(prints) > 1:
            raise ResultsError(
                f"{where}: {dataset} in different versions, fingerprints {', '.join(sorted(prints))}; "
                "results on different data cannot stand in one table: keep one version, or run the other again"
            )
    twice = frame.loc[frame.duplicated(list(KEY), keep=False), list(KEY)]
    if len(twice):
        named = twice[[name for name in KEY if name != "image_id"]].drop_duplicates()
        first = "; ".join(", ".join(f"{k}={v}" for k, v in line.items()) for line in named.head(3).to_dict("records"))
        raise ResultsError(f"{where}: {len(named)} result(s) occur more than once: {first}; keep one of each")
    return frame


def _counts(frame: pd.DataFrame, where: str) -> pd.Series:
    """Return the annotated nuclei as whole numbers, <NA> where they were not counted."""
    given = frame[COUNTED].notna() & (frame[COUNTED].astype(str) != "")
    values = pd.to_numeric(frame[COUNTED], errors="coerce").astype(float)
    bad = given & (values.isna() | (values < 0) | (values != values.round()))
    if bad.any():
        line = frame.loc[bad].iloc[0]
        raise ResultsError(f"{where}: {COUNTED} is {line[COUNTED]} for image {line['image_id']}, run {line['run_id']}")
    return values.astype("Int64")  # which has a missing value, and is written without a decimal point


def _columns(frame: pd.DataFrame, expected: tuple[str, ...], where: str) -> pd.DataFrame:
    missing = [name for name in expected if name not in frame.columns]
    unknown = [name for name in frame.columns if name not in expected]
    if missing:
        raise ResultsError(f"{where}: missing column(s) {', '.join(missing)}")
    if unknown:
        raise ResultsError(f"{where}: unknown column {unknown[0]!r}; {nearest(str(unknown[0]), expected)}")
    return frame[list(expected)].copy()
