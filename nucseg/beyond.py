"""Beyond the paper, "Table S": every selection strategy on the same budget, the same augmentation, several seeds.

The paper compares selections with CSinGAN behind them and one seed each. Here nothing stands between the choice and the
segmenter but the naive augmentation, and every strategy, the random ones included, runs over the same four seeds: the
question "does it matter which patches are annotated?" on its own.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from nucseg.data.tissue import SYNTHETIC_NOTE
from nucseg.experiments import Experiment, GridSettings
from nucseg.results import check_results
from nucseg.selection import STRATEGIES
from nucseg.stats import holm, paired_tests
from nucseg.tables import Table

TABLE = "S"
REFERENCE = "random-crop"


def strategy_experiments(dataset: str, settings: GridSettings) -> tuple[Experiment, ...]:
    """Return one experiment per strategy and seed of the random baselines, without pseudo labels."""
    segmenter = settings.substitutes.get("maskrcnn", "maskrcnn")
    k1, k2 = settings.k1[dataset], settings.k2
    return tuple(
        Experiment(dataset, strategy, k1, k2, "naive", segmenter, 0, seed)
        for strategy in STRATEGIES
        for seed in settings.random_seeds
    )


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
    """
    sought = strategy_experiments(dataset, settings)[0]
    same = {"dataset": dataset, "k1": sought.k1, "augmentation": "naive", "segmenter": sought.segmenter, "rounds": 0}
    lines = check_results(results)
    for column, value in same.items():
        lines = lines[lines[column] == value]
    lines = lines[lines["selection"].isin(STRATEGIES) & (lines["k2"] == sought.k2)]
    by_image = {name: group.groupby("image_id")["aji"].mean() for name, group in lines.groupby("selection")}
    rows = []
    for name, group in lines.groupby("selection"):
        seeds = group.groupby("seed")[["aji", "dice", "pq", "label_share"]].mean()
        row = {
            "row": name,
            "id": f"{TABLE}.{name}",
            "status": "run" if len(seeds) >= len(settings.random_seeds) else f"{len(seeds)} seed(s)",
            "ours AJI": seeds["aji"].mean(),
            "ours AJI sd": seeds["aji"].std() if len(seeds) > 1 else np.nan,
            "ours Dice": seeds["dice"].mean(),
            "ours PQ": seeds["pq"].mean(),
            "ours label share": seeds["label_share"].mean(),
            "images": group["image_id"].nunique(),
            "seeds": len(seeds),
        }
        if name != REFERENCE and REFERENCE in by_image:
            a, b = by_image[name].align(by_image[REFERENCE], join="inner")
            tests = paired_tests(a.to_numpy(), b.to_numpy())
            row |= {"mean difference": tests.mean_difference, "CI low": tests.ci_low, "CI high": tests.ci_high}
            row |= {"t p": tests.t_p, "Wilcoxon p": tests.wilcoxon_p}
        rows.append(row)
    frame = pd.DataFrame(rows)
    if not len(frame):
        return frame
    for column in ("t p", "Wilcoxon p"):
        if column in frame:
            frame[f"{column} Holm"] = holm(frame[column])
    return frame.sort_values("ours AJI", ascending=False, ignore_index=True)


def strategy_table(results: pd.DataFrame, dataset: str, settings: GridSettings) -> Table | None:
    """Return Table S, or None where no strategy has been run."""
    frame = strategy_frame(results, dataset, settings)
    if frame.empty:
        return None
    used = results[results["dataset"] == dataset]
    notes = [
        f"Profile {used['profile'].iloc[0]}; data version {used['fingerprint'].iloc[0]}; encoder "
        f"{used['encoder'].iloc[0]}; segmenter {strategy_experiments(dataset, settings)[0].segmenter}, naive "
        "augmentation, no synthesis and no pseudo labels. Not in the paper.",
        "Difference to random crops, paired by test image, seeds averaged first; a row with fewer seeds than the "
        "others says less than its P suggests, because the choice of patches varies more between seeds than images do.",
    ]
    if dataset == "tissue":
        notes.insert(0, f"SYNTHETIC DATA. {SYNTHETIC_NOTE}")
    title = "Every selection strategy on the same budget, naive augmentation"
    return Table(TABLE, dataset, used["profile"].iloc[0], title, frame, tuple(notes))
