"""The README's table of what was run: one line per arm that has results, from the files alone.

Of a profile that runs some of Tables I to VI it is their arms, of others those of Tables S and B. Arms with several
seeds come first; those with one are folded away.

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

from nucseg import beyond
from nucseg.paper import TABLES, Row, rows
from nucseg.profiles import load_profile
from nucseg.profiles import names as profile_names
from nucseg.results import read_results, read_runs
from nucseg.results.settings import teachers
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
            made = [_line(name, dataset, same, minutes) for same in arms.values()]
            if not any(settings.rows.values()):
                known = {line["arm"] for line in made}
                made += [line for line in _beyond(name, dataset, of_dataset, runs, minutes) if line["arm"] not in known]
            lines += made
    return pd.DataFrame(lines)


def _beyond(
    profile: str, dataset: str, results: pd.DataFrame, runs: pd.DataFrame, minutes: dict[str, float]
) -> list[dict[str, object]]:
    """Return the lines of Table S, and of full supervision as Table B has it."""
    settings, taught = load_profile(profile).grid, teachers(runs)
    frames = [beyond.strategy_frame(results, dataset, settings), beyond.budget_frame(results, dataset, settings)]
    arms = pd.concat([frames[0][frames[0]["id"] != "S.all"], frames[1][frames[1]["id"] == "B.all"]])
    lines = []
    for _, arm in arms.iterrows():
        key, full = arm["id"].split(".")[1], arm["id"] == "B.all"
        of_arm = [run for run in results["run_id"].unique() if run[:8] in arm["runs"].split()]
        rounds = settings.full_rounds if full else settings.strategy_rounds
        segmenter = results.loc[results["run_id"].isin(of_arm), "segmenter"].iloc[0]
        lines.append(
            {
                "profile": profile,
                "dataset": dataset,
                "arm": _arm(key, "naive", rounds, taught.get(of_arm[0], ""), segmenter),
                "labelled pixels": arm["ours label share"],
                "seeds": arm["seeds"],
                "AJI": arm["ours AJI"],
                "AJI sd": arm["ours AJI sd"],
                "paper's row": "",
                "its AJI": np.nan,
                "difference": np.nan,
                "Dice": arm["ours Dice"],
                "minutes a run": float(np.mean([minutes[run] for run in of_arm])),
            }
        )
    return lines


def _arm(selection: str, augmentation: str, rounds: int, teacher: str, segmenter: str) -> str:
    parts = [WORDS.get(name, name) for name in (selection, augmentation)]
    parts += [teacher or f"{rounds} round{'s' * (rounds > 1)}"] * bool(rounds)
    return f"{' + '.join(parts)}, {segmenter}"


def _minutes(runs: pd.DataFrame) -> dict[str, float]:
    shared = [json.loads(config)["shared_seconds"] for config in runs["config"]]
    return dict(zip(runs["run_id"], (runs["seconds"] + shared) / 60, strict=True))


def _line(profile: str, dataset: str, same: list[Measured], minutes: dict[str, float]) -> dict[str, object]:
    first = same[0]
    e = first.found[0]
    printed = None if first.teacher else _printed(first.row, e.segmenter, dataset)
    paper, (aji, spread) = printed.paper[dataset]["aji"] if printed else np.nan, first.mean("aji")
    return {
        "profile": profile,
        "dataset": dataset,
        "arm": _arm(e.selection, e.augmentation, e.rounds, first.teacher, e.segmenter),
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
    """Return the summary in Markdown: the arms with several seeds, and folded away those with one."""
    several = frame["seeds"] > 1
    parts = [_table(frame[several])] if several.any() else []
    if (~several).any():
        parts.append(
            f"<details>\n<summary>One seed each: {(~several).sum()} more arms</summary>\n\n{_table(frame[~several])}\n"
            "\n</details>"
        )
    return "\n\n".join(parts)


def _table(frame: pd.DataFrame) -> str:
    """Return lines of the summary as a Markdown table; what repeats the line above is left empty."""
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
