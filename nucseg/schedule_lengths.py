"""How long must a segmenter train? Validation AJI after shorter and longer schedules than a profile's.

A point on one training's curve does not answer this: its learning rate has not fallen yet. So every length is a
training of its own, with the whole schedule squeezed into it. Validation images decide, test images are not looked at;
a length that a row of the tables has trained already is not trained again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from nucseg import paper
from nucseg.config import ConfigError, nearest
from nucseg.experiments import Experiment, experiments_of
from nucseg.figures.schedules import schedule_plot
from nucseg.outcomes import signed
from nucseg.paper import TABLES, row
from nucseg.pipeline import Pipeline
from nucseg.progress import task
from nucseg.store import OutOfTime
from nucseg.tables import named
from nucseg.tables.formats import Cell, markdown
from nucseg.tables.publish import publish

ROWS = ("III.rndcrop-naive", "III.full")  # little to learn from, and much
PARTS = (0.25, 0.5, 1.0, 2.0)
COLUMNS = ("row", "segmenter", "part", "iterations", "seed", "validation AJI", "seconds", "run_id")
NOTES = (
    "Each length is a training of its own with the whole schedule, by the row's settings; AJI is the mean over the "
    "validation images, then mean ± standard deviation over seeds. No test image was looked at.",
    "Gain: over the next shorter length, by the seeds that both have. A schedule is long enough where doubling it "
    "gains less than seeds differ.",
)


def measure(
    run: Pipeline,
    rows: Sequence[str] = ROWS,
    parts: Sequence[float] = PARTS,
    seeds: int = 1,
    minutes: float = 0.0,
) -> pd.DataFrame:
    """Train rows for several lengths and return their validation AJI.

    Parameters
    ----------
    run
        The profile, whose lengths are 1, and the dataset.
    rows
        Names of rows among all tables, for example ``"III.full"``; of a row with pseudo-labelling the training before
        it is measured.
    parts
        Lengths, in parts of the profile's.
    seeds
        How many of each row's seeds.
    minutes
        Begin no further training after so many minutes, 0 for no limit. What is there by then is returned, and the
        next call goes on.

    Returns
    -------
    DataFrame
        One line for each row, length and seed: row, segmenter, part, iterations, seed, validation AJI, seconds of
        training (validation included), run_id.

    Raises
    ------
    ConfigError
        Without validation images, for a length of 0 or less, or an unknown row.
    """
    if not len(run.dataset.val):
        raise ConfigError(f"{run.dataset.name}: no validation images, so no length can be told from another")
    if not parts or min(parts) <= 0:
        raise ConfigError(f"parts: expected lengths above 0, got {list(parts)}")
    known = [each.id for table in TABLES for each in paper.rows(table)]
    if unknown := [name for name in rows if name not in known]:
        raise ConfigError(f"row: unknown name {unknown[0]!r}; {nearest(unknown[0], known)}")
    planned = [
        (name, part, experiment)
        for part in sorted(set(parts))  # the short ones first: they say most for their time
        for name in rows
        for experiment in experiments_of(row(name), run.dataset.name, run.profile.grid)[:seeds]
    ]
    stop = time.time() + 60 * minutes if minutes else math.inf
    lines = []
    with task("schedule lengths", len(planned)) as progress:
        for k, (name, part, experiment) in enumerate(planned):
            try:
                lines.append((name, *_trained(run, experiment, part, stop)))
            except OutOfTime:
                break
            progress.update(k + 1)
    return pd.DataFrame(lines, columns=list(COLUMNS))


def _trained(run: Pipeline, experiment: Experiment, part: float, stop: float) -> tuple:
    name = experiment.segmenter
    schedule = run.profile.training_of(name)
    schedule = replace(schedule, iterations=max(1, round(schedule.iterations * part)))
    profile = replace(run.profile, training={**run.profile.training, name: schedule})
    other = Pipeline(profile, run.dataset, device=str(run.device), results=run.store.root)
    with other.store.until(stop):
        result = other.trained(experiment)
    meta = result.meta
    numbers = (meta["validation_aji"], meta["seconds"], result.run_id)
    return name, part, schedule.iterations, experiment.seed, *numbers


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Average over seeds: row, segmenter, part, iterations, mean, sd (NaN for one seed), seeds, seconds, gain.

    The gain is over the next shorter length, by the seeds that were trained for both.
    """
    groups = frame.groupby(["row", "segmenter", "part", "iterations"], sort=False, as_index=False)
    table = groups.agg(
        mean=("validation AJI", "mean"),
        sd=("validation AJI", "std"),
        seeds=("seed", "nunique"),
        seconds=("seconds", "mean"),
    ).sort_values(["row", "part"], kind="stable", ignore_index=True)
    seeds = frame.pivot_table(index=["row", "part"], columns="seed", values="validation AJI").sort_index()
    gains = seeds.groupby("row").diff().mean(axis="columns")  # over the seeds that both lengths have
    return table.assign(gain=gains.loc[pd.MultiIndex.from_frame(table[["row", "part"]])].to_numpy())


def as_markdown(frame: pd.DataFrame, caption: str) -> str:
    """Return the table of `summary` as Markdown."""
    body = []
    for line in summary(frame).to_dict("records"):
        spread = "" if np.isnan(line["sd"]) else f" ± {line['sd']:.4f}"
        texts = [_title(line["row"], line["segmenter"]), f"{line['part']:g}", f"{line['iterations']:,}"]
        texts += [f"{line['mean']:.4f}{spread}", signed(line["gain"], 4), str(line["seeds"]), f"{line['seconds']:.0f}"]
        body.append([Cell(text) for text in texts])
    header = ["row", "length", "iterations", "validation AJI", "gain", "seeds", "seconds a training"]
    return markdown(caption, header, body, NOTES)


def _title(name: str, segmenter: str) -> str:
    """Return what the tables call a row."""
    own = row(name)
    return own.label if segmenter == own.spec.segmenter else f"{own.label} [run with {segmenter}]"


def write(run: Pipeline, *arguments, **more) -> tuple[Path, ...]:
    """Call `measure`; write ``schedules_<dataset>.csv`` and ``.md`` beside the tables, and the figure.

    Raises
    ------
    OutOfTime
        If the time was too short for a single training.
    """
    frame, name = measure(run, *arguments, **more), Path(run.dataset.name).name
    if not len(frame):
        raise OutOfTime("not a single training was finished in this time: give it more minutes")
    caption = f"Length of the schedules ({named(name)}, {run.profile.name})"
    drawn = schedule_plot(frame.assign(row=list(map(_title, frame["row"], frame["segmenter"]))))
    return publish(run, "schedules", frame, as_markdown(frame, caption), drawn)
