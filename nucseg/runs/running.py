"""Running one experiment: in the process of the plan, in one beside it, or on another machine of a cluster.

A process holds a file while it runs an experiment. Others leave that experiment to it, `nucseg status` shows it, and
the file falls with its holder.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import math
import os
import socket
import sys
import threading
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch
from threadpoolctl import threadpool_limits

from nucseg import __version__, gan
from nucseg.config import ConfigError, to_plain
from nucseg.data import DataError
from nucseg.experiments import Experiment
from nucseg.files import write_text
from nucseg.pipeline import Pipeline
from nucseg.results import read_runs
from nucseg.results.file import add_results
from nucseg.runs import gpu_memory
from nucseg.runs.backends import BackendError
from nucseg.store import OutOfTime, claimed, home, published


def run_one(pipeline: Pipeline, experiment: Experiment, since: float = math.inf) -> str:
    """Run one experiment, add its rows to results.csv, and return its state.

    Returns
    -------
    str
        ``"done"``; ``"failed"``, its traceback kept, also if it has failed elsewhere after the time `since`;
        ``"running"`` in another process, which adds its rows; ``"missing"`` because the time was up.
    """
    failure = failure_file(pipeline, experiment)
    me = {"host": socket.gethostname(), "pid": os.getpid(), "since": _now()}
    with claimed(running_file(pipeline, experiment), json.dumps(me)) as ours:
        if not ours:
            return "running"
        if failure.is_file() and failure.stat().st_mtime > since:
            return "failed"
        try:
            frame, runs = _measure(pipeline, experiment)
        except OutOfTime:
            return "missing"
        except Exception:
            write_text(failure, json.dumps({**asdict(experiment), "traceback": traceback.format_exc()}, indent=1))
            if pipeline.device.type == "cuda" and not gpu_memory.usable(pipeline.device):
                raise BackendError(
                    f"an experiment failed and took this process's GPU with it; {failure} says how. Everything else "
                    "is kept: start again, and the experiments after it are run"
                ) from None
            return "failed"
        failure.unlink(missing_ok=True)
        add_results(frame, runs)
        return "done"


def _measure(pipeline: Pipeline, experiment: Experiment) -> tuple[pd.DataFrame, pd.DataFrame]:
    def work() -> tuple[pd.DataFrame, pd.DataFrame]:
        return pipeline.run(experiment), pipeline.runs(experiment)

    if pipeline.device.type != "cuda":
        return work()
    path = published("tables", pipeline.profile.name) / "runs.csv"
    need = gpu_memory.needed(read_runs(path) if path.is_file() else None, experiment.segmenter)
    if experiment.augmentation in gan.REGISTRY:
        profile = pipeline.profile
        painter = profile.synthesiser(experiment.augmentation)
        need = max(need, gpu_memory.of_synthesis(painter, experiment.k1, profile.selection.size))
    return gpu_memory.run(work, need, gpu_memory.gpu(pipeline.device, home() / "runs" / ".gpu"))


def failure_file(pipeline: Pipeline, experiment: Experiment) -> Path:
    """Return where the traceback of a failed experiment is kept."""
    return pipeline.store.root / "failed" / f"{_name(experiment)}.json"


def running_file(pipeline: Pipeline, experiment: Experiment) -> Path:
    """Return the file that a process holds while it runs an experiment."""
    return pipeline.store.root / "running" / f"{_name(experiment)}.json"


def _name(experiment: Experiment) -> str:
    return hashlib.sha256(json.dumps(to_plain(experiment), sort_keys=True).encode()).hexdigest()[:12]


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


# -- in the processes of a backend -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Ticket:
    """All that another process needs to take part: it may be on another machine."""

    arguments: tuple[str, str, str, str]
    home: str
    token: str
    fingerprint: str
    threads: int
    stop: float
    started: float
    version: str = __version__


_one_at_a_time = threading.Lock()  # random states are the process's: a worker's second thread has to wait


def work_on(ticket: Ticket, experiment: Experiment) -> str:
    """Run one experiment of somebody else's plan, as `run_one`."""
    with _one_at_a_time:
        pipeline = _open(ticket)
        with pipeline.store.until(ticket.stop):
            return run_one(pipeline, experiment, ticket.started)


@functools.lru_cache(maxsize=1)
def _open(ticket: Ticket) -> Pipeline:
    """Open profile and data, once per process, and make sure that they are the same as where the run was started."""
    host = socket.gethostname()
    if not Path(ticket.token).is_file():
        raise BackendError(
            f"{host} does not see the results folder {ticket.home}. All workers write there: where the run is started, "
            "set NUCSEG_HOME to a folder on a file system that every machine mounts at the same path"
        )
    if __version__ != ticket.version:
        raise BackendError(
            f"{host} has nucseg {__version__}, the run was started by {ticket.version}: install the same"
        )
    os.environ["NUCSEG_HOME"] = ticket.home
    if sys.stderr.isatty():
        os.environ["NUCSEG_QUIET"] = "1"  # bars of several processes would overwrite each other
    torch.set_num_threads(ticket.threads)  # sums on a CPU depend on it in their last digits, here and in scikit-learn
    threadpool_limits(ticket.threads)
    pipeline = Pipeline(*ticket.arguments)
    if pipeline.dataset.fingerprint != ticket.fingerprint:
        raise BackendError(
            f"{host} has another version of the data in {ticket.arguments[2]}: fingerprint "
            f"{pipeline.dataset.fingerprint}, and {ticket.fingerprint} where the run was started"
        )
    return pipeline


def probe(ticket: Ticket) -> str:
    """Return why this process cannot take part, or nothing."""
    try:
        _open(ticket)
    except (ConfigError, DataError) as error:
        return str(error)
    return ""
