"""Tables S and B, beyond the paper: every selection strategy on the same footing, on one budget and on several.

"Does it matter which patches are annotated?" on its own: nothing is painted, and every strategy runs over the same
seeds (`nucseg.plans`). Table B asks it for several budgets, counted in pixels and in nuclei, because a patch full of
nuclei costs a pathologist more than an empty one.
"""

from __future__ import annotations

from dataclasses import astuple

import numpy as np
import pandas as pd

from nucseg.data.tissue import SYNTHETIC_NOTE
from nucseg.experiments import Experiment, GridSettings
from nucseg.outcomes import REFERENCE, BudgetCurve
from nucseg.paper import Row, Spec
from nucseg.plans import BUDGET, TABLE, budget_experiments, full_experiments, own_k1, strategy_experiments
from nucseg.results import COUNTED, EXPERIMENT, ResultsError, check_results
from nucseg.selection import STRATEGIES
from nucseg.stats import RankTest, friedman_nemenyi, holm, paired_tests, seed_test
from nucseg.tables.notes import OVER_SEEDS, data_of, of_patients
from nucseg.tables.table import Measured, Table, measure, one_profile

FEWEST_IMAGES = 6  # fewer cannot tell three systems apart
_ARM = ["selection", "k1"]


def measured(
    lines: pd.DataFrame, dataset: str, settings: GridSettings, runs: pd.DataFrame | None = None
) -> list[Measured]:
    """Find what was measured for the rows of Table S and for Table B's full supervision, ``"S.cps"`` to ``"B.all"``."""
    plans: dict[str, list[Experiment]] = {}
    for e in strategy_experiments(dataset, settings):
        plans.setdefault(f"{TABLE}.{e.selection}", []).append(e)
    plans[f"{BUDGET}.all"] = full_experiments(dataset, settings)
    rows = []
    for name, (first, *_) in plans.items():
        table, key = name.split(".")
        spec = Spec(first.selection, first.augmentation, first.segmenter, plabel=first.rounds > 0)
        rows.append(Row(table, key, "all labels" if table == BUDGET else key, spec, {}))
    return measure(tuple(rows), lines, dataset, settings, runs, [tuple(plan) for plan in plans.values()])


def _lines(results: pd.DataFrame, dataset: str, settings: GridSettings) -> pd.DataFrame:
    """Return the lines of all strategies and of full supervision, naive augmentation, last round, any seed."""
    lines = check_results(results)
    lines = lines[lines["dataset"] == dataset]
    one_profile(lines)
    images = set(lines["image_id"])
    sought = strategy_experiments(dataset, settings)[0]
    for column, value in {"augmentation": "naive", "segmenter": sought.segmenter}.items():
        lines = lines[lines[column] == value]
    lines = lines[lines["round"] == lines["rounds"]]
    chosen = lines["selection"].isin(STRATEGIES) & (lines["k2"] == settings.k2)
    chosen &= lines["rounds"] == settings.strategy_rounds
    full = (lines["selection"] == "all") & (lines["rounds"] == settings.full_rounds)
    lines = lines[chosen | full]
    for (selection, k1, seed), group in lines.groupby([*_ARM, "seed"]):
        what = f"{selection}, K1 = {k1}, seed {seed}"
        if group["image_id"].duplicated().any():
            encoders = ", ".join(sorted(group["encoder"].unique()))
            raise ResultsError(f"{what}: results twice, with the encoders {encoders}; a table shows one")
        if lack := sorted(images - set(group["image_id"])):
            raise ResultsError(f"{what}: no result for image(s) {', '.join(lack[:3])}; run it to its end")
    return lines


def _frame(lines: pd.DataFrame, table: str, settings: GridSettings) -> pd.DataFrame:
    """Return one line per strategy and budget, compared with random crops of the same budget, image by image."""
    lines = lines.assign(nuclei=lines[COUNTED].astype(float))
    by_image = {arm: group.groupby("image_id")["aji"].mean() for arm, group in lines.groupby(_ARM)}
    by_seed = {arm: group.groupby("seed")["aji"].mean() for arm, group in lines.groupby(_ARM)}
    rows = []
    for (name, k1), group in lines.groupby(_ARM):
        seeds = group.groupby("seed")[["aji", "aji_plus", "dice", "pq", "f1", "label_share", "nuclei"]].mean()
        planned = settings.seeds if name == "all" else settings.random_seeds
        if table == TABLE:
            title, key = name, name
        else:
            title = "all labels" if name == "all" else f"{name}, K1 = {k1}"
            key = name if name == "all" else f"{name}-{k1}"
        row = {
            "row": title,
            "id": f"{table}.{key}",
            "status": "run" if len(seeds) >= len(planned) else f"{len(seeds)} seed(s)",
            "ours AJI": seeds["aji"].mean(),
            "ours AJI sd": seeds["aji"].std() if len(seeds) > 1 else np.nan,
            "ours AJI+": seeds["aji_plus"].mean(),
            "ours Dice": seeds["dice"].mean(),
            "ours PQ": seeds["pq"].mean(),
            "ours F1": seeds["f1"].mean(),
            "ours label share": seeds["label_share"].mean(),
            "ours label nuclei": seeds["nuclei"].mean() if seeds["nuclei"].notna().all() else np.nan,
            "images": group["image_id"].nunique(),
            "seeds": len(seeds),
            "runs": " ".join(sorted({run[:8] for run in group["run_id"]})),
        }
        if name not in (REFERENCE, "all") and (REFERENCE, k1) in by_image:
            a, b = by_image[name, k1], by_image[REFERENCE, k1]
            tests = paired_tests(a.to_numpy(), b.to_numpy(), list(a.index), list(b.index))
            row |= {"mean difference": tests.mean_difference, "CI low": tests.ci_low, "CI high": tests.ci_high}
            row |= {"t p": tests.t_p, "Wilcoxon p": tests.wilcoxon_p}
            over_seeds = seed_test(seeds["aji"], by_seed[REFERENCE, k1])
            row |= dict(zip(("seeds CI low", "seeds CI high", "seeds p"), over_seeds[1:], strict=True))
        rows.append(row)
    frame = pd.DataFrame(rows, columns=None if rows else ["row", "id", "status", "runs"])
    for column in ("t p", "Wilcoxon p", "seeds p"):
        if column in frame:
            frame[f"{column} Holm"] = holm(frame[column])
    return frame


def strategy_frame(results: pd.DataFrame, dataset: str, settings: GridSettings) -> pd.DataFrame:
    """Compare the strategies that have been run with random crops, image by image.

    Parameters
    ----------
    results
        Lines of one ``results.csv``; every seed with the profile's budget and naive augmentation counts.
    dataset, settings
        What was run, and the profile's grid.

    Returns
    -------
    DataFrame
        One line per strategy, best first, with the columns of the other tables: scores are means over images, then
        seeds; the mean difference is to random crops, with a 95 % bootstrap interval over images, paired t and
        Wilcoxon P, and these corrected by Holm's method. Seeds are averaged per image before testing.

    Raises
    ------
    ResultsError
        If the results hold several profiles, an experiment twice (two encoders), or with other images than the rest.
    """
    lines = _lines(results, dataset, settings)
    frame = _frame(lines[lines["k1"] == own_k1(dataset, settings)], TABLE, settings)
    return frame.sort_values("ours AJI", ascending=False, ignore_index=True) if len(frame) else frame


def budget_frame(results: pd.DataFrame, dataset: str, settings: GridSettings) -> pd.DataFrame:
    """Compare the strategies with random crops of the same budget, for every budget that has been run.

    One line per strategy and K1, strategies in the order of their best AJI, then full supervision; columns and errors
    are those of `strategy_frame`, and P-values are corrected over the whole table.
    """
    lines = _lines(results, dataset, settings)
    frame = _frame(lines, BUDGET, settings)
    if not len(frame):
        return frame
    arms = pd.DataFrame(list(lines.groupby(_ARM).groups), columns=_ARM)
    best = -frame["ours AJI"].groupby(arms["selection"]).transform("max")
    order = pd.DataFrame({"last": arms["selection"] == "all", "best": best, **arms}).sort_values(
        ["last", "best", *_ARM]
    )
    return frame.loc[order.index].reset_index(drop=True)


def budget_curve(
    results: pd.DataFrame, dataset: str, settings: GridSettings, against: str = "label_share", metric: str = "aji"
) -> BudgetCurve:
    """Return a score against annotated pixels or nuclei, for every strategy; errors are those of `strategy_frame`."""
    lines = _lines(results, dataset, settings)
    seeds = lines.assign(x=lines[against].astype(float)).groupby([*_ARM, "seed"], as_index=False)
    seeds = seeds.agg(x=("x", "mean"), score=(metric, "mean"))
    full = seeds.loc[seeds["selection"] == "all", "score"]
    chosen = seeds[seeds["selection"] != "all"]
    shown = chosen.dropna(subset="x")
    points = shown.groupby(_ARM, as_index=False).agg(
        x=("x", "mean"),
        mean=("score", "mean"),
        low=("score", "min"),
        high=("score", "max"),
        sd=("score", "std"),
        seeds=("seed", "nunique"),
    )
    return BudgetCurve(
        against, points, (full.mean(), full.min(), full.max()), lines["image_id"].nunique(), len(chosen) - len(shown)
    )


def strategy_ranks(results: pd.DataFrame, dataset: str, settings: GridSettings) -> RankTest | None:
    """Rank the strategies of Table S by their AJI on the same images: Friedman's test and Nemenyi's.

    Seeds are averaged per image first. None with fewer than three strategies or six images. The images are the blocks
    of the test, so it asks whether these trained systems differ on images like these; what other seeds would have
    chosen is not in it.
    """
    lines = _lines(results, dataset, settings)
    lines = lines[lines["k1"] == own_k1(dataset, settings)]
    scores = lines.groupby(["image_id", "selection"])["aji"].mean().unstack()
    if scores.shape[1] < 3 or len(scores) < FEWEST_IMAGES:
        return None
    return friedman_nemenyi(scores.to_numpy(), list(scores.columns), list(scores.index))


# -- tables ----------------------------------------------------------------------------------------------------


def strategy_table(results: pd.DataFrame, dataset: str, settings: GridSettings) -> Table | None:
    """Return Table S, or None where no strategy has been run."""
    frame = strategy_frame(results, dataset, settings)
    title = f"Every selection strategy on the same budget, {_behind(settings)}"
    return _table(TABLE, title, frame, results, dataset, settings)


def budget_table(
    results: pd.DataFrame, dataset: str, settings: GridSettings, images: int | None = None
) -> Table | None:
    """Return Table B, or None where no strategy has been run; `images` is as for `budget_experiments`."""
    frame = budget_frame(results, dataset, settings)
    if not len(frame) or set(frame["id"]) == {f"{BUDGET}.all"}:
        return None
    planned, found = budget_experiments(dataset, settings, images), check_results(results)
    done = set(found[list(EXPERIMENT)].itertuples(index=False, name=None))
    count = sum(astuple(e) in done for e in planned)
    note = f"{count} of {len(planned)} planned experiments were run."
    return _table(BUDGET, "Every selection strategy on several budgets", frame, results, dataset, settings, note)


def _behind(settings: GridSettings) -> str:
    """Say what stands between the choice of patches and the scores."""
    rounds = settings.strategy_rounds
    if not rounds:
        return "naive augmentation"
    return f"naive augmentation, {rounds} round{'s' * (rounds > 1)} on unlabelled images"


def _table(
    number: str,
    title: str,
    frame: pd.DataFrame,
    results: pd.DataFrame,
    dataset: str,
    settings: GridSettings,
    *more: str,
) -> Table | None:
    if not len(frame):
        return None
    used = results[results["dataset"] == dataset]
    notes = [
        f"Profile {used['profile'].iloc[0]}; {data_of(used)}; segmenter "
        f"{strategy_experiments(dataset, settings)[0].segmenter}, "
        f"{_behind(settings)}, no synthesis{'' if settings.strategy_rounds else ' and no pseudo labels'}. Not in the "
        "paper.",
        "Difference to random crops of the same K1, paired by test image, seeds averaged first; a row with fewer seeds "
        "than the others says less than its P suggests, because the choice of patches varies more between seeds than "
        "images do." + (f" {OVER_SEEDS}" if frame.get("seeds p", pd.Series(dtype=float)).notna().any() else ""),
        *filter(None, [of_patients(dataset, used["image_id"])]),
        *more,
    ]
    if dataset == "tissue":
        notes.insert(0, f"SYNTHETIC DATA. {SYNTHETIC_NOTE}")
    return Table(number, dataset, used["profile"].iloc[0], title, frame, tuple(notes))
