"""Many experiments: what is done, what is missing, and running it, one after another or several at a time.

Every experiment's rows land in ``tables/<profile>/results.csv`` as soon as it is finished. What failed is kept with its
traceback and tried again only on request. A process holds a file while it runs an experiment, so several runs over one
results folder share the work, and one that is killed leaves nothing to clear away.
"""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from nucseg.experiments import Experiment
from nucseg.files import write_text
from nucseg.paper import TABLES
from nucseg.pipeline import Pipeline
from nucseg.plans import experiments
from nucseg.profiles import absolute_arguments
from nucseg.progress import task
from nucseg.results import EXPERIMENT, read_results, read_runs
from nucseg.results.settings import changed, experiment_of
from nucseg.runs import backends
from nucseg.runs.estimate import Estimate, ToGo, estimate, other_machines, shared_key, spent_minutes, this_machine
from nucseg.runs.running import Ticket, failure_file, probe, run_one, running_file, work_on
from nucseg.store import OutOfTime, holder, home, published

STATES = ("done", "running", "failed", "missing")


class Plan:
    """The experiments of some tables of a profile on one dataset.

    Parameters
    ----------
    profile, dataset, data_root, device
        As for `nucseg.pipeline.Pipeline`.
    tables
        ``"I"`` to ``"VI"``, all of these by default, and ``"S"`` and ``"B"``: every selection strategy on one budget,
        and on several.
    """

    def __init__(
        self,
        profile: str | Path = "sample",
        dataset: str = "",
        data_root: str = "",
        tables: Sequence[str] = TABLES,
        device: str = "",
    ):
        self.arguments = (str(profile), dataset, data_root, device)
        self.pipeline = Pipeline(*self.arguments)
        name, settings = self.pipeline.dataset.name, self.pipeline.profile.grid
        self.experiments = experiments(tables, name, settings, len(self.pipeline.dataset.train))

    @property
    def results_file(self) -> Path:
        return published("tables", self.pipeline.profile.name) / "results.csv"

    def states(self) -> dict[Experiment, str]:
        """Return ``"done"``, ``"running"``, ``"failed"`` or ``"missing"`` of each experiment.

        Done means that its rows are in results.csv and were made from the data at hand; running, that a living process
        holds it.
        """
        done: set[tuple] = set()
        if self.results_file.is_file():
            known = read_results(self.results_file)
            mine = known["profile"] == self.pipeline.profile.name
            mine &= known["fingerprint"] == self.pipeline.dataset.fingerprint
            done = set(known.loc[mine, list(EXPERIMENT)].itertuples(index=False, name=None))

        def state(experiment: Experiment) -> str:
            if tuple(asdict(experiment).values()) in done:
                return "done"
            if holder(running_file(self.pipeline, experiment)) is not None:
                return "running"
            return "failed" if failure_file(self.pipeline, experiment).is_file() else "missing"

        return {e: state(e) for e in self.experiments}

    def run(
        self,
        jobs: int = 0,
        minutes: float = 0.0,
        retry: bool = False,
        backend: str = "loky",
        address: str = "",
        again: bool = False,
    ) -> list[Experiment]:
        """Run what is missing, and return the experiments that failed.

        Parameters
        ----------
        jobs
            Processes; experiments that share a stage wait for each other there and make it once. 0: one, or as many as
            the cluster has workers.
        minutes
            Begin no further stage after so many minutes, and stop the training in hand; 0 for no limit. All that was
            made is kept, and the next start goes on inside that training.
        retry
            Run failed ones once more.
        backend, address
            As for `nucseg.runs.backends.run_all`. The workers of a cluster need the same packages, data and results
            folder.
        again
            Measure those with results anew, in place of what older code or another machine measured. Stages that this
            folder of results holds are not repeated.

        Raises
        ------
        BackendError
            If the cluster cannot be used; the message says why.
        nucseg.data.MissingData
            If training or test images, or their labels, are not at hand: before the first minute is spent.
        """
        backends.check(backend, address, jobs)
        self.pipeline.dataset.check_experiments()
        stop = time.time() + 60 * minutes if minutes else math.inf
        wanted = {"missing", *["failed"] * retry, *["done"] * again}
        todo = [e for e, state in self.states().items() if state in wanted]
        started = time.time()
        if backend == "loky" and jobs <= 1:
            with task("experiments", len(todo)) as progress, self.pipeline.store.until(stop):
                for i, experiment in enumerate(todo):
                    progress.update(i)
                    run_one(self.pipeline, experiment, started)
        elif todo:
            with self._ticket(stop, started, jobs) as ticket:
                cuda = self.pipeline.device.type == "cuda"
                work, look = partial(work_on, ticket), partial(probe, ticket)
                backends.run_all(work, todo, jobs, backend, address, look, cuda)
        return [e for e, state in self.states().items() if state == "failed" or self._failed_since(e, started)]

    def _failed_since(self, experiment: Experiment, started: float) -> bool:
        """Say whether an experiment failed in this run, also where older results of it stand."""
        failure = failure_file(self.pipeline, experiment)
        return failure.is_file() and failure.stat().st_mtime >= started - 1  # file systems round times

    @contextmanager
    def _ticket(self, stop: float, started: float, jobs: int) -> Iterator[Ticket]:
        threads = torch.get_num_threads()
        if self.pipeline.device.type == "cuda":  # on a CPU last digits depend on the number of threads
            threads = max(1, threads // max(1, jobs))
        profile, dataset, root, _ = self.arguments
        token = self.pipeline.store.root / f".shared-{uuid.uuid4().hex}"
        write_text(token, "Is seen by every worker of a cluster, or its results would go astray.")
        try:
            # Workers start in another folder and with another environment: every path is absolute.
            yield Ticket(
                (
                    *absolute_arguments(profile, dataset or self.pipeline.profile.dataset, root),
                    str(self.pipeline.device),
                ),
                str(home()),
                str(token),
                self.pipeline.dataset.fingerprint,
                threads,
                stop,
                started,
            )
        finally:
            token.unlink(missing_ok=True)

    def to_go(self) -> ToGo:
        """Return the trainings, selections and syntheses that no process has made yet."""
        trainings: dict[tuple, tuple[Experiment, bool]] = {}
        shared: dict[tuple, Experiment] = {}
        states = self.states()
        with self.pipeline.store.until(-math.inf):  # look only
            for e in (e for e in self.experiments if states[e] != "done"):
                for after in range(e.rounds + 1):
                    if not _there(self.pipeline.trained, e, after):
                        same = (*shared_key(e), e.augmentation, e.segmenter, after)
                        taught = after > 0 and self.pipeline.pseudo_config(e).method == "mean-teacher"
                        trainings.setdefault(same, (e, taught))
                painted = bool(shared_key(e)[-1])
                if e.supervision == "patches" and not _there(
                    self.pipeline.synthesised if painted else self.pipeline.selected, e
                ):
                    shared.setdefault(shared_key(e), e)
        # Seconds of a synthesis include those of the selection before it.
        painted = {key[:-1] for key in shared if key[-1]}
        once = tuple(e for key, e in shared.items() if key[-1] or key[:-1] not in painted)
        return ToGo(tuple(trainings.values()), once)

    def estimate(self) -> Estimate:
        """Return how long what is to go will take, from measured seconds only."""
        return estimate(self.to_go(), self.pipeline.profile, this_machine(self.pipeline.device.type))

    def describe(self) -> str:
        """Return one line per experiment with its state, and lines that sum up."""
        states = self.states()
        lines = []
        for e, state in states.items():
            line = (
                f"{state:8} {e.selection:18} k1={e.k1:<3} k2={e.k2} {e.augmentation:15} {e.segmenter:10} "
                f"rounds={e.rounds} seed={e.seed}"
            )
            if state == "running":
                line += "  " + _who(holder(running_file(self.pipeline, e)))
            lines.append(line)
        counts = ", ".join(f"{list(states.values()).count(name)} {name}" for name in STATES)
        runs_file = self.results_file.with_name("runs.csv")
        runs = read_runs(runs_file) if runs_file.is_file() else None
        spent = spent_minutes(runs if runs is None else runs[runs["config"].map(self._is_ours)])
        summary = f"{self.pipeline.profile.name}, {self.pipeline.dataset.name}: {counts}"
        lines.append(f"{summary}; {spent:.1f} minutes spent on this dataset")
        if set(states.values()) - {"done"}:
            lines += self._estimates()
        lines += self._outdated(runs, states)
        lines += [f"  why it failed: {path}" for e in states if (path := failure_file(self.pipeline, e)).is_file()]
        return "\n".join(lines)

    def _estimates(self) -> list[str]:
        """Say how long it will take, by the runs of other machines where none like this has made any."""
        to_go, profile, machine = self.to_go(), self.pipeline.profile, this_machine(self.pipeline.device.type)
        here = estimate(to_go, profile, machine)
        others = [] if here.seconds else other_machines(profile, machine)
        return [str(here), *(f"  on {name}: {estimate(to_go, profile, name)}" for name in others)]

    def _is_ours(self, config: str) -> bool:
        made = experiment_of(config)
        return made is None or made.get("dataset") == self.pipeline.dataset.name

    def _outdated(self, runs: pd.DataFrame | None, states: Mapping[Experiment, str]) -> list[str]:
        """Say which results were made with other settings than the profile has now."""
        configs = [] if runs is None else list(runs["config"])
        made = {json.dumps(experiment_of(config), sort_keys=True): config for config in configs}
        other: dict[str, int] = {}
        for experiment, state in states.items():
            config = made.get(json.dumps(asdict(experiment), sort_keys=True), "")
            found = changed(config, json.dumps(self.pipeline.settings(experiment))) if state == "done" else []
            if found:
                other[found[0]] = other.get(found[0], 0) + 1
        return [
            f"  {count} done with other settings ({first}): --again measures them anew"
            for first, count in other.items()
        ]


def _who(text: str | None) -> str:
    """Say who runs an experiment; nothing where it ended while we looked."""
    if not text:
        return ""
    return "on {host}, process {pid}, since {since}".format(**json.loads(text))


def _there(make: Callable, *arguments) -> bool:
    try:
        make(*arguments)
    except OutOfTime:
        return False
    return True
