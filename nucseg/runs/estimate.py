"""How long it took and how long it will take, from measured seconds only; what was never measured has no estimate."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from statistics import median
from typing import Any

import pandas as pd

from nucseg import gan, models
from nucseg.config import to_plain
from nucseg.experiments import Experiment
from nucseg.profiles import Profile, load_profile, names
from nucseg.results import read_runs
from nucseg.store import environment, published


@dataclass(frozen=True)
class ToGo:
    """What would still have to be made: the estimate is made from this list.

    Attributes
    ----------
    trainings
        Experiment of each, and whether a mean teacher takes part; one that two experiments share stands here once.
    shared
        One experiment for each selection, or synthesis with the selection before it.
    """

    trainings: tuple[tuple[Experiment, bool], ...]
    shared: tuple[Experiment, ...]


@dataclass(frozen=True)
class Estimate:
    """Seconds of work, one experiment after another.

    Attributes
    ----------
    seconds
        Of all that was measured before.
    unknown
        Segmenters, synthesisers and selections that were not.
    source
        The profiles whose runs were measured.
    """

    seconds: float
    unknown: tuple[str, ...]
    source: str

    def __str__(self) -> str:
        gap = f"no estimate for {', '.join(self.unknown)} (never measured here)" if self.unknown else ""
        if not self.seconds and gap:
            return gap
        least = "at least " if gap else "about "
        text = f"{least}{self.seconds / 60:.1f} minutes to go, one after another"
        return "; ".join([text + (f" (by the runs of {self.source})" if self.source else "")] + [gap] * bool(gap))


def shared_key(experiment: Experiment) -> tuple:
    """Return what tells two shared stages apart: selection, and synthesis where there is one."""
    e = experiment
    painted = e.augmentation if e.augmentation in gan.REGISTRY else ""
    return (e.dataset, e.selection, e.k1, e.k2, e.seed, painted)


def spent_minutes(runs: pd.DataFrame | None) -> float:
    """Return the minutes of all runs, and of each selection and synthesis that they share once."""
    if runs is None:
        return 0.0
    shared = {shared_key(line.experiment): line.shared for line in _lines(runs)}
    return (runs["seconds"].sum() + sum(shared.values())) / 60


def this_machine(device: str = "") -> str:
    """Return the kind of machine that work runs on here: its GPU's name, or ``"CPU"`` without one or for ``"cpu"``."""
    return _machine(environment(device)["device"])


def estimate(to_go: ToGo, profile: Profile, machine: str = "") -> Estimate:
    """Estimate the time of what is to go from this profile's ``runs.csv``.

    What it has not measured is taken from other profiles: trainings of the same segmenter with the same settings, by
    seconds per iteration; selection and synthesis where their settings are the same.

    Parameters
    ----------
    machine
        A GPU's name, or ``"CPU"``: only what was measured on such a machine counts. One like this when empty.
    """
    known = _known(profile, machine or this_machine())
    wanted = [_training_kind(e, taught) for e, taught in to_go.trainings] + [_shared_kind(e) for e in to_go.shared]
    used = [known[kind] for kind in wanted if kind in known]
    unknown = tuple(dict.fromkeys(kind for kind in wanted if kind not in known))
    return Estimate(sum(s for s, _ in used), unknown, ", ".join(dict.fromkeys(name for _, name in used)))


def other_machines(profile: Profile, machine: str = "") -> list[str]:
    """Name the kinds of machine, other than one (this one when empty), on which runs of a profile were measured."""
    return sorted({line.machine for line in _lines(_runs_of(profile.name))} - {machine or this_machine()})


def _known(profile: Profile, machine: str) -> dict[str, tuple[float, str]]:
    """Return the median seconds of a training by segmenter, and of selections and syntheses, with whose they are."""
    known: dict[str, tuple[float, str]] = {}
    others = {path.parent.name for path in published("tables", profile.name).parent.glob("*/runs.csv")}
    for name in [profile.name, *sorted(others - {profile.name})]:
        values = defaultdict(list)
        there = [line for line in _lines(_runs_of(name)) if line.machine == machine]
        for line in there:
            segmenter = line.experiment.segmenter
            if _agree(line.training, _training_of(profile, segmenter)):
                seconds = line.seconds / line.iterations * profile.training_of(segmenter).iterations
                values[_training_kind(line.experiment, line.taught)].append(seconds)
        for line in {shared_key(line.experiment): line for line in there}.values():
            if name == profile.name or _same_shared_settings(profile, name, line.experiment):
                values[_shared_kind(line.experiment)].append(line.shared)
        for kind, seconds in values.items():
            known.setdefault(kind, (median(seconds), name))
    return known


@dataclass(frozen=True)
class _Line:
    """One line of runs.csv, as far as it matters here."""

    experiment: Experiment
    seconds: float
    shared: float
    machine: str
    training: list
    iterations: int
    taught: bool


def _lines(runs: pd.DataFrame | None) -> list[_Line]:
    lines = []
    for line in () if runs is None else runs.itertuples():
        config = json.loads(line.config)
        if not {"experiment", "model"} <= config.keys() or config["experiment"]["segmenter"] not in models.REGISTRY:
            continue  # a line that says too little, or a segmenter that is no longer there
        training = config["model"]["training"][0]
        lines.append(
            _Line(
                Experiment(**config["experiment"]),
                float(line.seconds),
                float(config.get("shared_seconds", 0)),
                _machine(line.device),
                _without_length(config["model"]["segmenter"], training),
                training["iterations"],
                "teacher" in config["model"],
            )
        )
    return lines


def _training_of(profile: Profile, segmenter: str) -> list:
    what = (segmenter, profile.segmenter(segmenter), profile.segmenter_encoder)
    return _without_length(to_plain(what), to_plain(profile.training_of(segmenter)))


def _without_length(segmenter: list, training: dict) -> list:
    """Return all that decides the seconds of one iteration."""
    return [*segmenter, {name: training[name] for name in ("batch", "crop", "precision", "validate_every")}]


def _agree(recorded: Any, present: Any) -> bool:
    """Say whether two settings are the same; one that came into being after the record changes nothing by default."""
    if isinstance(recorded, dict) and isinstance(present, dict):
        return all(_agree(recorded[name], present[name]) for name in recorded.keys() & present.keys())
    if isinstance(recorded, list) and isinstance(present, list) and len(recorded) == len(present):
        return all(map(_agree, recorded, present))
    return recorded == present


def _machine(device: str) -> str:
    """Return the kind of machine: the GPU's name, or that there is none."""
    return "CPU" if device.endswith("CPU cores") else device


def _training_kind(experiment: Experiment, taught: bool) -> str:
    return f"{experiment.segmenter} with a mean teacher" if taught else experiment.segmenter


def _shared_kind(experiment: Experiment) -> str:
    return shared_key(experiment)[-1] or f"selection by {experiment.selection}"


def _same_shared_settings(profile: Profile, other: str, experiment: Experiment) -> bool:
    if other not in names():  # a YAML file somewhere: unknown settings are not the same
        return False

    def settings(of: Profile) -> tuple:
        what = (of.encoder, of.selection)
        painted = shared_key(experiment)[-1]
        return (*what, of.masks, of.mask_count, of.synthesiser(painted)) if painted else what

    return settings(profile) == settings(_shipped(other))


@cache
def _shipped(profile: str) -> Profile:
    """Read a profile once, however many of its runs are asked about."""
    return load_profile(profile)


def _runs_of(profile: str) -> pd.DataFrame | None:
    path = published("tables", profile) / "runs.csv"
    return read_runs(path) if path.is_file() else None
