"""The README's table of what was run: one line per arm of Tables I to VI that has results, from the files alone.

    python -m nucseg.tables.summary README.md     # or: make readme

A number of the paper stands beside ours only where it was printed for the same data; the paper's row says with which
segmenter.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from nucseg.paper import TABLES, Row, rows
from nucseg.profiles import load_profile
from nucseg.profiles import names as profile_names
from nucseg.results import read_results, read_runs
from nucseg.store import published
from nucseg.tables import DATASET_NAMES, Measured, measure

BEGIN, END = "<!-- runs -->", "<!-- end of runs -->"
HEADER = (
    *("profile", "data", "arm", "labelled pixels", "seeds", "AJI", "paper's row", "its AJI", "difference", "Dice"),
    "minutes a run",
)
WORDS = {
    "cps": "CPS",
    "kmeans": "K-means",
    "random-crop": "RndCrop",
    "random-centre-crop": "RndCenCrop",
    "all": "all labels",
}
WORDS |= {
    "none": "no augmentation",
    "naive": "NaiveAug",
    "csingan": "CSinGAN",
    "singan": "SinGAN",
    "cyclegan": "CycleGAN",
}


def summary() -> pd.DataFrame:
    """Return one line per profile, dataset and arm with results, in the order of the tables.

    An arm that several tables show is there once, under its first row's name. ``minutes a run`` is its own training and
    test and what it shares with others (selection, synthesis), the mean over seeds.
    """
    lines: list[dict[str, object]] = []
    for name in profile_names():
        folder = published("tables", name)
        if not (folder / "results.csv").is_file():
            continue
        settings = load_profile(name).grid
        results, runs = read_results(folder / "results.csv"), read_runs(folder / "runs.csv")
        minutes = _minutes(runs)
        for dataset, of_dataset in results.groupby("dataset", sort=False):
            arms: dict[tuple, list[Measured]] = {}
            for table in TABLES:
                for one in measure(rows(table), of_dataset, dataset, settings, runs):
                    if one.found:
                        arms.setdefault(one.planned, []).append(one)
            for same in arms.values():
                lines.append(_line(name, dataset, same, minutes))
    return pd.DataFrame(lines)


def _minutes(runs: pd.DataFrame) -> dict[str, float]:
    shared = [json.loads(config)["shared_seconds"] for config in runs["config"]]
    return dict(zip(runs["run_id"], (runs["seconds"] + shared) / 60, strict=True))


def _line(profile: str, dataset: str, same: list[Measured], minutes: dict[str, float]) -> dict[str, object]:
    first = same[0]
    e = first.found[0]
    printed = None if first.teacher else _printed(first.row, e.segmenter, dataset)
    paper, (aji, spread) = printed.paper[dataset]["aji"] if printed else np.nan, first.mean("aji")
    parts = [WORDS.get(name, name) for name in (e.selection, e.augmentation)]
    parts += [first.teacher or f"{e.rounds} round{'s' * (e.rounds > 1)}"] * bool(e.rounds)
    return {
        "profile": profile,
        "dataset": dataset,
        "arm": f"{' + '.join(parts)}, {e.segmenter}",
        "labelled pixels": first.mean("label_share")[0],
        "seeds": len(first.found),
        "AJI": aji,
        "AJI sd": spread,
        "paper's row": "" if first.teacher else (printed or first.row).id,
        "its AJI": paper,
        "difference": aji - paper,
        "Dice": first.mean("dice")[0],
        "minutes a run": float(np.mean([minutes[run] for run in first.lines["run_id"].unique()])),
    }


def _printed(row: Row, segmenter: str, dataset: str) -> Row | None:
    """Return the paper's row of the same arm: with the same segmenter where there is one, else with Mask R-CNN."""
    arm = replace(row.spec, segmenter="")
    same = [r for table in TABLES for r in rows(table) if replace(r.spec, segmenter="") == arm]
    same = [r for r in same if "aji" in r.paper.get(dataset, {})]
    order = (segmenter, "maskrcnn")
    return next((r for name in order for r in same if r.spec.segmenter == name), next(iter(same), None))


def markdown(frame: pd.DataFrame) -> str:
    """Return the summary as a Markdown table; what repeats the line above is left empty."""
    lines = [f"| {' | '.join(HEADER)} |", f"|{'---|' * 3}{'---:|' * 3}---|{'---:|' * 4}"]
    above = ("", "")
    for _, one in frame.iterrows():
        spread = "" if np.isnan(one["AJI sd"]) else f" ± {one['AJI sd']:.3f}"
        paper = ("", "") if np.isnan(one["its AJI"]) else (f"{one['its AJI']:.3f}", f"{one['difference']:+.3f}")
        here = (f"`{one['profile']}`", DATASET_NAMES.get(one["dataset"], "built-in tissue"))
        cells = (
            *("" if here == above or (i == 0 and here[0] == above[0]) else text for i, text in enumerate(here)),
            one["arm"],
            f"{one['labelled pixels']:.1%}",
            str(one["seeds"]),
            f"{one['AJI']:.3f}{spread}",
            one["paper's row"],
            *paper,
            f"{one['Dice']:.3f}",
            f"{one['minutes a run']:.1f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
        above = here
    return "\n".join(lines)


def with_summary(text: str) -> str:
    """Return a README with the table between its two marks made anew.

    Raises
    ------
    ValueError
        If a mark is missing.
    """
    if BEGIN not in text or END not in text:
        raise ValueError(f"the README lacks the line {BEGIN!r} or {END!r}, between which the table of runs stands")
    before, rest = text.split(BEGIN, 1)
    return f"{before}{BEGIN}\n{markdown(summary())}\n{END}{rest.split(END, 1)[1]}"


if __name__ == "__main__":
    readme = Path(sys.argv[1])
    readme.write_text(with_summary(readme.read_text(encoding="utf-8")), encoding="utf-8")
