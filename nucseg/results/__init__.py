"""What was measured: `frames` reads and checks results.csv and runs.csv, `file` writes them.

Results of another machine travel in one small file, made by `pack` there and merged by `add` here.
"""

from nucseg.results.frames import (
    COUNTED,
    EXPERIMENT,
    KEY,
    RESULT_COLUMNS,
    RUN_COLUMNS,
    SCORES,
    TEXT,
    ResultsError,
    check_results,
    empty_results,
    merge_results,
    read_results,
    read_runs,
)

__all__ = [
    "COUNTED",
    "EXPERIMENT",
    "KEY",
    "RESULT_COLUMNS",
    "RUN_COLUMNS",
    "SCORES",
    "TEXT",
    "ResultsError",
    "check_results",
    "empty_results",
    "merge_results",
    "read_results",
    "read_runs",
]
