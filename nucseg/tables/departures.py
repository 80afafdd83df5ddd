"""In what the trainings behind a table differ from the paper's by choice, told by their settings in ``runs.csv``."""

from __future__ import annotations

import json
from typing import Any

import pandas as pd

from nucseg.profiles import load_profile
from nucseg.results.settings import settings_of

_PYRAMID = (
    *("scales", "min_size", "channels", "steps", "masks_per_step", "crop", "d_steps", "g_steps", "lr", "alpha"),
    *("penalty_every", "coarse_noise", "reconstruction_noise"),
)
_TRANSLATION = ("epochs", "decay_epochs", "channels", "critic_channels")
# The settings that are compared with those of profile `paper`: what the paper prints or, where it is silent, its
# released code or a rival's authors have, but for CSinGAN's steps (in the code 25,000 of one mask).
COMPARED = {
    "csingan": ("CSinGAN", _PYRAMID),
    "csingan-no-cwd": ("CSinGAN without component-wise critics", _PYRAMID),
    "singan": ("SinGAN", _PYRAMID),
    "pix2pix": ("pix2pix", (*_TRANSLATION, "depth")),
    "cyclegan": ("cycleGAN", (*_TRANSLATION, "blocks")),
}
WHOLE = {"min_size": "half a patch", "crop": "the whole patch"}  # what None means


def departures(used: pd.DataFrame, runs: pd.DataFrame | None) -> list[str]:
    """Return a paragraph for each choice that the paper does not name or has otherwise.

    Parameters
    ----------
    used
        The lines of results.csv behind a table.
    runs
        Lines of runs.csv; None, or a run that it lacks: nothing is said.
    """
    if runs is None:
        return []
    settings = [settings_of(config) for config in runs.loc[runs["run_id"].isin(set(used["run_id"])), "config"]]
    known = {name: {each[name] for each in settings if name in each} for each in settings for name in each}
    value = {name: json.loads(next(iter(values))) for name, values in known.items() if len(values) == 1}
    painters = [name for name in COMPARED if name in set(used["augmentation"])]
    return _augmentation(value) + _mixture(value, used, painters) + _synthesis(value, painters, set(known) - set(value))


def _augmentation(value: dict[str, Any]) -> list[str]:
    angle, (low, high) = value.get("augment.rotate", 0), value.get("augment.scale", (1, 1))
    if not angle and low == high:
        return []
    return [
        f"Naive augmentation, which all rows but those without any have, also turns by up to {angle:g}° and scales "
        f"by {low:g} to {high:g} here. The paper names neither."
    ]


def _mixture(value: dict[str, Any], used: pd.DataFrame, painters: list[str]) -> list[str]:
    shares = [value.get(f"mix.{kind}") for kind in ("real", "synthetic", "pseudo")]
    if None in shares or not (painters or (used["rounds"] > 0).any()):
        return []
    return [
        "Annotated, synthetic and pseudo-labelled pairs, those that a row has, are drawn as "
        f"{' : '.join(f'{share:g}' for share in shares)}, whatever their number. The paper says nothing of it; by "
        "their number a handful of annotated pairs would be drawn once in fifty times."
    ]


def _synthesis(value: dict[str, Any], painters: list[str], several: set[str]) -> list[str]:
    """Say which synthesisers were trained otherwise than printed, and of which it is not known.

    Settings with `several` values are not compared: another note tells them.
    """
    said: dict[str, list[str]] = {}
    unknown, paper = [], load_profile("paper")
    for painter in painters:
        label, names = COMPARED[painter]
        own = {name.rpartition(".")[2]: one for name, one in value.items() if name.startswith(f"synthesis.{painter}.")}
        if not own:
            unknown.append(label)
            continue
        printed = {name: getattr(paper.synthesiser(painter), name) for name in names}
        others = [
            f"{name} {_shown(own.get(name), name)} ({_shown(default, name)})"
            for name, default in printed.items()
            if own.get(name) != default and f"synthesis.{painter}.{name}" not in several
        ]
        if others:
            said.setdefault(", ".join(others), []).append(label)
    found = [
        f"{' and '.join(labels)} trained otherwise than in profile `paper`, which has the values in brackets: {others}."
        for others, labels in said.items()
    ]
    if unknown:
        found.append(f"With which settings {', '.join(unknown)} trained, these runs of an older version do not tell.")
    if "masks.margin" in value and "masks.touch" not in value and "masks.touch" not in several:  # None is not kept
        found.append(
            "Nuclei of synthetic masks touch as often as in the annotated patch; in the paper (Sec. III-B) none."
        )
    return found


def _shown(value: float | None, name: str) -> str:
    return WHOLE[name] if value is None else f"{value:g}"
