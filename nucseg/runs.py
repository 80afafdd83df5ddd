"""Many experiments: what is done, what is missing, and running it, one after another or several at a time.

Every experiment's rows land in ``tables/<profile>/results.csv`` as soon as it is finished. What failed is kept with its
traceback and tried again only on request.
"""

from __future__ import annotations

import hashlib
import json
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd

from nucseg import beyond, metrics
from nucseg.config import to_plain
from nucseg.experiments import FIGURE_7, TABLES, Experiment, experiments_of, row
from nucseg.figures.segmentation import Row
from nucseg.models import REGISTRY
from nucseg.pipeline import Pipeline
from nucseg.progress import task
from nucseg.results import EXPERIMENT, RESULT_COLUMNS, RUN_COLUMNS, check_results, read_results, read_runs
from nucseg.store import locked, published, write_text

IDENTITY = ["profile", "encoder", *EXPERIMENT]


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
        wanted = beyond.experiments(tables, name, settings, len(self.pipeline.dataset.train))
        self.without_model = tuple(e for e in wanted if e.segmenter not in REGISTRY)
        self.experiments = tuple(e for e in wanted if e.segmenter in REGISTRY)

    @property
    def results_file(self) -> Path:
        return published("tables", self.pipeline.profile.name) / "results.csv"

    def states(self) -> dict[Experiment, str]:
        """Return ``"done"``, ``"failed"`` or ``"missing"`` of each experiment.

        Done means that its rows are in results.csv and were made from the data at hand.
        """
        known = read_results(self.results_file) if self.results_file.is_file() else pd.DataFrame(columns=IDENTITY)
        if len(known):
            known = known[
                (known["profile"] == self.pipeline.profile.name)
                & (known["fingerprint"] == self.pipeline.dataset.fingerprint)
            ]
        done = {tuple(row) for row in known[list(EXPERIMENT)].itertuples(index=False)}
        return {
            e: "done" if tuple(asdict(e).values()) in done else ("failed" if self._failure(e).is_file() else "missing")
            for e in self.experiments
        }

    def run(self, jobs: int = 1, minutes: float = 0.0, retry: bool = False) -> list[Experiment]:
        """Run what is missing, and return the experiments that failed.

        Parameters
        ----------
        jobs
            Processes; experiments that share a stage wait for each other there and make it once.
        minutes
            Start no further experiment after so many minutes; 0 for no limit.
        retry
            Run failed ones once more.
        """
        stop = time.monotonic() + 60 * minutes if minutes else float("inf")
        wanted = {"missing", "failed"} if retry else {"missing"}
        todo = [e for e, state in self.states().items() if state in wanted]
        if jobs == 1:
            with task("experiments", len(todo)) as progress:
                for i, experiment in enumerate(todo):
                    progress.update(i)
                    if time.monotonic() < stop:
                        run_one(self.pipeline, experiment)
        elif todo:
            from joblib import Parallel, delayed

            # Processes by loky, which survives a dying worker; each opens the data for itself.
            list(Parallel(n_jobs=jobs)(delayed(_in_process)(self.arguments, experiment, stop) for experiment in todo))
        return [e for e, state in self.states().items() if state == "failed"]

    def _failure(self, experiment: Experiment) -> Path:
        return failure_file(self.pipeline, experiment)

    def systems(self) -> dict[str, Experiment | None]:
        """Return the columns of Fig. 7 with their experiments, None for those that this profile does not run.

        A column whose segmenter the profile replaces says so. Of several seeds the first is shown.
        """
        settings, dataset = self.pipeline.profile.grid, self.pipeline.dataset.name
        columns: dict[str, Experiment | None] = {}
        for name, row_id in FIGURE_7.items():
            shown = row(row_id)
            experiment = experiments_of(shown, dataset, settings)[0]
            replaced = experiment.segmenter != shown.spec.segmenter
            title = f"{name}\n[{experiment.segmenter}]" if replaced else name
            columns[title] = experiment if settings.runs(shown) and experiment in self.experiments else None
        return columns

    def showcase(self, size: int = 256) -> tuple[list[Row], dict[str, list[float]]]:
        """Return what Fig. 7 shows: a crop of the worst and of the best test image, and each system's AJI on the image.

        Worst and best are by the mean AJI of all systems that were run. The crop, at most `size` pixels, is central.
        """
        test = self.pipeline.dataset.test
        predicted = {
            name: self.pipeline.predictions(e, e.rounds) for name, e in self.systems().items() if e is not None
        }
        aji = {name: [metrics.aji(s.labels, maps[s.id]) for s in test] for name, maps in predicted.items()}
        mean = np.mean(list(aji.values()), axis=0)
        rows, scores = [], {name: [] for name in aji}
        for title, index in (("worst", int(mean.argmin())), ("best", int(mean.argmax()))):
            sample = test[index]
            side = [min(size, length) for length in sample.shape]
            cut = tuple(slice((h - s) // 2, (h - s) // 2 + s) for h, s in zip(sample.shape, side, strict=True))
            maps = {name: maps[sample.id][cut] for name, maps in predicted.items()}
            rows.append(Row(sample.image[cut], sample.labels[cut], maps, f"{title}: {sample.organ}\n{sample.id[:20]}"))
            for name, values in aji.items():
                scores[name].append(values[index])
        return rows, scores

    def describe(self) -> str:
        """Return one line per experiment with its state, and a line that sums up."""
        states = self.states()
        lines = [
            f"{state:8} {e.selection:18} k1={e.k1:<3} k2={e.k2} {e.augmentation:15} {e.segmenter:10} "
            f"rounds={e.rounds} seed={e.seed}"
            for e, state in states.items()
        ]
        lines += [f"no model {e.selection:18} {e.segmenter}" for e in self.without_model]
        count = {name: list(states.values()).count(name) for name in ("done", "failed", "missing")}
        spent = 0.0
        runs_file = self.results_file.with_name("runs.csv")
        if runs_file.is_file():
            spent = read_runs(runs_file)["seconds"].sum() / 60
        lines.append(
            f"{self.pipeline.profile.name}, {self.pipeline.dataset.name}: {count['done']} done, "
            f"{count['failed']} failed, {count['missing']} missing; {spent:.1f} minutes spent in this profile"
        )
        lines += [f"  why it failed: {self._failure(e)}" for e, state in states.items() if state == "failed"]
        return "\n".join(lines)


def run_one(pipeline: Pipeline, experiment: Experiment) -> bool:
    """Run one experiment and add its rows to results.csv; keep the traceback where it fails, and return False."""
    failure = failure_file(pipeline, experiment)
    try:
        frame = pipeline.run(experiment)
    except Exception:
        write_text(failure, json.dumps({**asdict(experiment), "traceback": traceback.format_exc()}, indent=1))
        return False
    failure.unlink(missing_ok=True)
    add_results(frame, pipeline.runs(experiment))
    return True


def failure_file(pipeline: Pipeline, experiment: Experiment) -> Path:
    """Return where the traceback of a failed experiment is kept."""
    name = hashlib.sha256(json.dumps(to_plain(experiment), sort_keys=True).encode()).hexdigest()[:12]
    return pipeline.store.root / "failed" / f"{name}.json"


def _in_process(arguments: tuple[str, str, str, str], experiment: Experiment, stop: float) -> None:
    if time.monotonic() < stop:
        run_one(Pipeline(*arguments), experiment)


def add_results(frame: pd.DataFrame, runs: pd.DataFrame) -> None:
    """Add an experiment's rows to its profile's results.csv and runs.csv, in place of its older ones."""
    folder = published("tables", frame["profile"].iloc[0])
    frame = check_results(frame[list(RESULT_COLUMNS)])
    with locked(folder / ".results.lock"):
        path = folder / "results.csv"
        if path.is_file():
            old = _same_data(read_results(path), frame, path)
            new = set(map(tuple, frame[IDENTITY].drop_duplicates().itertuples(index=False)))
            replaced = pd.Series([tuple(row) in new for row in old[IDENTITY].itertuples(index=False)], index=old.index)
            frame = pd.concat([old[~replaced], frame], ignore_index=True)
        write_text(path, frame.to_csv(index=False))
        path = folder / "runs.csv"
        if path.is_file():
            old = read_runs(path)
            runs = pd.concat([old[~old["run_id"].isin(runs["run_id"])], runs], ignore_index=True)
        write_text(path, runs[list(RUN_COLUMNS)].to_csv(index=False))


def _same_data(old: pd.DataFrame, new: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Put results of another version of the dataset aside: they cannot stand in one table with the new ones."""
    dataset, version = new["dataset"].iloc[0], new["fingerprint"].iloc[0]
    other = (old["dataset"] == dataset) & (old["fingerprint"] != version)
    for fingerprint, rows in old[other].groupby("fingerprint"):
        aside = path.with_name(f"results-{dataset}-{fingerprint}.csv")
        write_text(aside, rows.to_csv(index=False))
        warnings.warn(f"the data of {dataset!r} have changed; {len(rows)} older results moved to {aside}", stacklevel=3)
    return old[~other]
