"""The settings that results were made with, as ``runs.csv`` keeps them, and where those of two runs differ.

A result stays when its profile is changed, or comes from a machine with another version of it. Nothing is wrong with
either, but one table must not hold both kinds without a word.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pandas as pd


def settings_of(config: str) -> dict[str, str]:
    """Return the settings in one cell ``config`` of runs.csv by name, for example ``"hoverlite.training.lr"``.

    Those of another segmenter or synthesiser have other names. What tells arms apart, as the seed or the selection
    strategy, is none; a part that the arm has not (an augmentation) or that an older file lacks, is left out.
    """
    try:
        known = json.loads(config)
        model = known.get("model", {})
        name, segmenter, encoder = model["segmenter"]
        training, augment, mix = model["training"]
    except (ValueError, AttributeError, KeyError, TypeError):
        return {}
    parts = {
        name: {"segmenter": segmenter, "encoder": encoder, "training": training, "teacher": model.get("teacher")},
        "augment": augment,
        "mix": mix,
        "selection": known.get("selection"),
        "masks": known.get("masks"),
        "synthesis": known.get("synthesis"),
    }
    return dict(_flat(parts, ""))


def experiment_of(config: str) -> dict[str, Any] | None:
    """Return the experiment in one cell ``config`` of runs.csv, as names and plain values; None where there is none."""
    try:
        return dict(json.loads(config)["experiment"])
    except (ValueError, KeyError, TypeError):
        return None


def teachers(runs: pd.DataFrame) -> dict[str, str]:
    """Return which runs of runs.csv learnt from unlabelled pixels by a mean teacher, by run id.

    ``"mean teacher"``, or ``"silent teacher"`` where its word weighed nothing (a control). Others are left out.
    """
    found = {}
    for run_id, config in zip(runs["run_id"], runs["config"], strict=True):
        try:
            teacher = json.loads(config)["model"]["teacher"]
        except (ValueError, KeyError, TypeError):
            continue
        found[run_id] = "mean teacher" if teacher["weight"] else "silent teacher"
    return found


def training_images(runs: pd.DataFrame, dataset: str) -> int | None:
    """Return on how many images of a dataset full supervision learnt; None where runs.csv has no such run."""
    for config in runs["config"]:
        experiment = experiment_of(config) or {}
        if (experiment.get("dataset"), experiment.get("selection")) == (dataset, "all"):
            return json.loads(config).get("pairs", {}).get("real")
    return None


def _flat(value: Any, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif value is not None:
        yield name, json.dumps(value)


def differences(configs: Iterable[str]) -> list[str]:
    """Return a line for each setting that has several values in these cells of runs.csv, with the runs of each."""
    found: dict[str, dict[str, int]] = {}
    for config in configs:
        for name, value in settings_of(config).items():
            counts = found.setdefault(name, {})
            counts[value] = counts.get(value, 0) + 1
    return [
        f"{name} {', '.join(f'{value} in {count} run(s)' for value, count in counts.items())}"
        for name, counts in sorted(found.items())
        if len(counts) > 1
    ]


def changed(config: str, now: str) -> list[str]:
    """Return a line for each setting that was another one in `config` than it is in `now`."""
    before, after = settings_of(config), settings_of(now)
    return [
        f"{name} {before[name]}, now {after[name]}"
        for name in sorted(before)
        if before[name] != after.get(name, before[name])
    ]
