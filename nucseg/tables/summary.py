"""What was run, from the files alone: all arms that have results for docs/runs.md, the telling ones for README.md.

    python -m nucseg.tables.summary README.md docs/runs.md     # or: make readme

All arms are those of Tables I to VI, then what only Tables S and B have. The README has those at the paper's patch size
on real images, one line for each row of the paper: with its segmenter where that was run, else with ours.

A number of the paper stands beside ours only where it was printed for the same data, and a difference only where it was
measured with the same segmenter.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import pandas as pd

from nucseg.experiments import Experiment, GridSettings
from nucseg.paper import TABLES, Row, rows
from nucseg.profiles import load_profile
from nucseg.profiles import names as profile_names
from nucseg.results import read_results, read_runs
from nucseg.results.settings import teachers
from nucseg.store import published
from nucseg.tables import DATASET_NAMES, Measured, measure
from nucseg.tables.pages import rewrite
from nucseg.tables.strategies import budget_frame
from nucseg.tables.words import arm_in_words

HEADER = (
    *("profile", "data", "arm", "labelled pixels", "seeds", "AJI", "paper's row", "its AJI", "difference", "Dice"),
    *("minutes a run", "machine"),
)
NEAREST = ("paper", "h100", "h100-hoverlite")  # profiles with the paper's patch size, the nearest to it first
SEGMENTERS = {"maskrcnn": "Mask R-CNN", "hovernet": "HoVer-Net"}


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
        took = _took(runs)
        for dataset, of_dataset in results.groupby("dataset", sort=False):
            arms: dict[tuple, list[Measured]] = {}
            for table in TABLES:
                for one in measure(rows(table), of_dataset, dataset, settings, runs):
                    if one.found:
                        arms.setdefault(one.planned, []).append(one)
            made = [_line(name, dataset, same, took, settings) for same in arms.values()]
            shown = [set(one.lines["run_id"]) for one, *_ in arms.values()]
            more, known = _beyond(name, dataset, of_dataset, runs, took, shown), {_arm(line) for line in made}
            for line in more:  # Tables I to VI may show some seeds of an arm, and S and B all that were run
                if _arm(line) in known:
                    line["arm"] += " (all seeds)"
            lines += made + more
    return pd.DataFrame(lines)


def _arm(line: dict[str, object]) -> tuple[object, object]:
    return line["arm"], line["segmenter"]


def _beyond(
    profile: str, dataset: str, results: pd.DataFrame, runs: pd.DataFrame, took: pd.DataFrame, shown: list[set[str]]
) -> list[dict[str, object]]:
    """Return the lines of Tables S and B: every strategy and budget, but those whose runs are all in a line `shown`."""
    settings, taught = load_profile(profile).grid, teachers(runs)
    lines = []
    for _, arm in budget_frame(results, dataset, settings).iterrows():
        full = arm["id"] == "B.all"
        of_arm = [run for run in results["run_id"].unique() if run[:8] in arm["runs"].split()]
        if any(set(of_arm) <= runs_of_line for runs_of_line in shown):
            continue
        key, _, k1 = arm["id"].removeprefix("B.").rpartition("-") if not full else ("all", "", "")
        budget = f" (K1 = {k1})" if not full and int(k1) != settings.k1[dataset] else ""
        rounds = settings.full_rounds if full else settings.strategy_rounds
        segmenter = results.loc[results["run_id"].isin(of_arm), "segmenter"].iloc[0]
        lines.append(
            {
                "profile": profile,
                "dataset": dataset,
                "arm": f"{arm_in_words(key, 'naive', rounds, taught.get(of_arm[0], ''))}{budget}",
                "segmenter": segmenter,
                "labelled pixels": arm["ours label share"],
                "seeds": arm["seeds"],
                "first seed": int(results.loc[results["run_id"].isin(of_arm), "seed"].min()),
                "AJI": arm["ours AJI"],
                "AJI sd": arm["ours AJI sd"],
                "paper's row": "",
                "its segmenter": "",
                "its AJI": np.nan,
                "difference": np.nan,
                "Dice": arm["ours Dice"],
                **_of_runs(took, of_arm),
            }
        )
    return lines


def _took(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the minutes and the machine of each run, by its id."""
    shared = [json.loads(config)["shared_seconds"] for config in runs["config"]]
    machine = runs["device"].str.replace(r"^NVIDIA (\w+).*", r"\1", regex=True)
    return pd.DataFrame({"minutes": (runs["seconds"] + shared) / 60, "machine": machine}).set_axis(runs["run_id"])


def _of_runs(took: pd.DataFrame, of_arm: list[str]) -> dict[str, object]:
    mine = took.loc[of_arm]
    return {"minutes a run": mine["minutes"].mean(), "machine": ", ".join(sorted(mine["machine"].unique()))}


def _line(
    profile: str, dataset: str, same: list[Measured], took: pd.DataFrame, settings: GridSettings
) -> dict[str, object]:
    first = same[0]
    e = first.found[0]
    printed = None if first.teacher else _printed(first.row, e.segmenter, dataset)
    words = arm_in_words(e.selection, e.augmentation, e.rounds, first.teacher)
    paper, (aji, spread) = printed.paper[dataset]["aji"] if printed else np.nan, first.mean("aji")
    return {
        "profile": profile,
        "dataset": dataset,
        "arm": f"{words}{_budget(e, settings)}",
        "segmenter": e.segmenter,
        "labelled pixels": first.mean("label_share")[0],
        "seeds": len(first.found),
        "first seed": min(e.seed for e in first.found),
        "AJI": aji,
        "AJI sd": spread,
        "paper's row": "" if first.teacher else (printed or first.row).id,
        "its segmenter": printed.spec.segmenter if printed else "",
        "its AJI": paper,
        "difference": aji - paper if printed and printed.spec.segmenter == e.segmenter else np.nan,
        "Dice": first.mean("dice")[0],
        **_of_runs(took, list(first.lines["run_id"].unique())),
    }


def _budget(e: Experiment, settings: GridSettings) -> str:
    """Say K1 and K2 of an arm where they are not those of its profile."""
    if e.supervision == "full":
        return ""
    own = {"K1": settings.k1[e.dataset], "K2": settings.k2}
    other = [f"{name} = {here}" for name, here in (("K1", e.k1), ("K2", e.k2)) if here != own[name]]
    return f" ({' and '.join(other)})" if other else ""


def _printed(row: Row, segmenter: str, dataset: str) -> Row | None:
    """Return the paper's row of the same arm: with the same segmenter where there is one, else with Mask R-CNN."""
    arm = replace(row.spec, segmenter="")
    same = [r for table in TABLES for r in rows(table) if replace(r.spec, segmenter="") == arm]
    same = [r for r in same if "aji" in r.paper.get(dataset, {})]
    order = (segmenter, "maskrcnn")
    return next((r for name in order for r in same if r.spec.segmenter == name), next(iter(same), None))


def headline(frame: pd.DataFrame) -> pd.DataFrame:
    """Return, of a `summary`, the line nearest to each row of the paper: at its patch size, on real images."""
    lines = frame[frame["profile"].isin(NEAREST) & frame["its AJI"].notna()]
    order = lines["profile"].map(NEAREST.index)
    nearest = lines.assign(order=order).sort_values("order", kind="stable")
    nearest = nearest.drop_duplicates(["dataset", "paper's row"])
    # Those with the paper's segmenter first: an order by AJI alone would read as a ladder, and compare segmenters.
    other = nearest["difference"].isna()
    return nearest.assign(other=other).sort_values(["dataset", "other", "AJI"], kind="stable").drop(columns="other")


def headline_markdown(frame: pd.DataFrame) -> str:
    """Return these lines in Markdown, in words."""
    head = ("data", "what the segmenter saw", "segmenter", "labelled", "seeds", "AJI", "the paper's", "difference")
    head = (*head, "Dice", "minutes a run")
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * 3}{'---:|' * 7}"]
    for _, one in frame.iterrows():
        segmenter = one["segmenter"]
        cells = (
            DATASET_NAMES[one["dataset"]],
            _plain(one["arm"]),
            SEGMENTERS.get(segmenter, segmenter),
            f"{one['labelled pixels']:.1%}",
            str(one["seeds"]),
            _with_spread(one),
            _printed_cell(one),
            _difference(one),
            f"{one['Dice']:.3f}",
            f"{one['minutes a run']:.1f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


PLAIN = {
    " + NaiveAug": "",  # every arm has it
    "CPS": "CPS's patches",
    "K-means": "K-means' patches",
    "RndCrop": "random crops",
    "RndCenCrop": "centres of random images",
    " + CSinGAN": ", CSinGAN's images",
    " rounds": " rounds of pseudo labels",
    " 1 round": " 1 round of pseudo labels",
    " + ": ", ",
}


def _plain(arm: str) -> str:
    """Return an arm in words that need no glossary."""
    for short, plain in PLAIN.items():
        arm = arm.replace(short, plain)
    return arm


def _with_spread(one: pd.Series) -> str:
    return f"{one['AJI']:.3f}" + ("" if np.isnan(one["AJI sd"]) else f" ± {one['AJI sd']:.3f}")


def _difference(one: pd.Series) -> str:
    return "" if np.isnan(one["difference"]) else f"{one['difference']:+.3f}"


def _printed_cell(one: pd.Series) -> str:
    """Return the paper's AJI, with its segmenter where that is another one."""
    if np.isnan(one["its AJI"]):
        return ""
    its = one["its segmenter"]
    return f"{one['its AJI']:.3f}" + ("" if its == one["segmenter"] else f" ({SEGMENTERS.get(its, its)})")


def markdown(frame: pd.DataFrame) -> str:
    """Return the summary in Markdown: the arms with several seeds, and after them those with one."""
    several = frame["seeds"] > 1
    parts = [f"## Several seeds\n\n{_table(frame[several], 'seeds')}"] * bool(several.any())
    parts += [f"## One seed\n\n{_table(frame[~several], 'first seed')}"] * bool((~several).any())
    return "\n\n".join(parts)


def _table(frame: pd.DataFrame, seeds: str) -> str:
    """Return lines as a Markdown table, with this column of seeds; what repeats the line above is left empty."""
    header = ["seed" if name == "seeds" != seeds else name for name in HEADER]
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * 3}{'---:|' * 3}---|{'---:|' * 4}---|"]
    above = ("", "")
    for _, one in frame.iterrows():
        here = (f"`{one['profile']}`", DATASET_NAMES.get(one["dataset"], "built-in tissue"))
        cells = (
            *("" if here == above or (i == 0 and here[0] == above[0]) else text for i, text in enumerate(here)),
            f"{one['arm']}, {one['segmenter']}",
            f"{one['labelled pixels']:.1%}",
            str(one[seeds]),
            _with_spread(one),
            one["paper's row"],
            _printed_cell(one),
            _difference(one),
            f"{one['Dice']:.3f}",
            f"{one['minutes a run']:.1f}",
            one["machine"],
        )
        lines.append(f"| {' | '.join(cells)} |")
        above = here
    return "\n".join(lines)


# ``headline`` stands in README, ``runs`` in docs/runs.md.
MARKED = {"headline": lambda: headline_markdown(headline(summary())), "runs": lambda: markdown(summary())}


if __name__ == "__main__":
    rewrite(sys.argv[1:], MARKED)
