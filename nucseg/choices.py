"""What do the better choices of patches have in common? Each one's patches, described, beside the AJI that it led to.

Table S says which strategy chooses well; this asks why. Every choice of patches, of whatever strategy and seed, has a
handful of properties (how many nuclei, how large, how different from each other), and an AJI of the segmenter that
learnt from it. Correlations over all choices mix the strategies; those within strategies ask whether, of two choices by
one strategy, the one with more of something was the better one. Correlation is no cause: nobody set these properties.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import spearmanr, t
from skimage.color import rgb2hed
from skimage.measure import regionprops_table

from nucseg.experiments import Experiment
from nucseg.figures.choices import figure_choices
from nucseg.masks import touching_share
from nucseg.outcomes import signed
from nucseg.pipeline import Pipeline
from nucseg.plans import strategy_experiments
from nucseg.progress import task
from nucseg.results import EXPERIMENT, ResultsError, read_results
from nucseg.selection import coverage, redundancy
from nucseg.stats import holm
from nucseg.store import published
from nucseg.tables import named
from nucseg.tables.formats import Cell, markdown
from nucseg.tables.publish import publish

MEASURES = {
    "nuclei": "nuclei to outline",
    "nucleus share": "share of their pixels that is nucleus",
    "nucleus area": "median area of a nucleus, px²",
    "area spread": "spread of these areas: quartile distance over median",
    "touching": "share of nuclei that touch another one",
    "images": "different images",
    "stain spread": "spread of haematoxylin between the patches: standard deviation of their means",
    "colour spread": "spread of colour between the patches: standard deviation of their mean RGB, levels",
    "redundancy": "cosine similarity of a patch to its nearest fellow, in features",
    "distance": "distance of the average patch of the pool to the nearest chosen one, in features",
}
NOTES = (
    "ρ: Spearman's rank correlation with the AJI of the segmenter that learnt from the choice, naive augmentation and "
    "{rounds}; over all choices, and within strategies: ranks of what remains when each strategy's mean is "
    "taken away from both. A choice of the same patches with several seeds counts once, with the mean of their AJI: "
    "{distinct} of {all}. P of the latter (t, with one degree of freedom less for each strategy), in brackets after "
    "Holm's correction over the rows of this table.",
    "A choice is one strategy with one seed, which also seeds the training: part of the AJI's spread is not the "
    "patches'. Labels are looked at here to describe choices; no strategy saw them.",
)


def describe(run: Pipeline, experiment: Experiment) -> dict[str, float]:
    """Return the `MEASURES` of the patches that an experiment annotates."""
    patches, pairs = run.selection(experiment).patches, run.annotated(experiment)
    areas = np.concatenate([regionprops_table(labels, properties=("area",))["area"] for _, labels in pairs])
    low, middle, high = np.percentile(areas, (25, 50, 75)) if areas.size else (np.nan,) * 3
    nuclei = {(p.image_id, n) for p, (_, labels) in zip(patches, pairs, strict=True) for n in np.unique(labels) if n}
    haematoxylin = [rgb2hed(image)[..., 0].mean() for image, _ in pairs]
    colours = np.array([image.mean(axis=(0, 1)) for image, _ in pairs])
    pool = run.features()
    rows = pool.rows_of(patches)
    found = (
        len(nuclei),
        np.mean([(labels > 0).mean() for _, labels in pairs]),
        middle,
        (high - low) / middle,
        np.mean([touching_share(labels) for _, labels in pairs if labels.any()]),
        len({patch.image_id for patch in patches}),
        np.std(haematoxylin),
        np.mean(colours.std(axis=0)),
        redundancy(pool.features[rows]) if len(rows) > 1 else np.nan,
        coverage(pool.features, rows),
    )
    # Equal choices are equal in the last digit as well, or noise would break ties between ranks.
    return {name: float(f"{value:.6g}") for name, value in zip(MEASURES, found, strict=True)}


def measure(run: Pipeline) -> pd.DataFrame:
    """Return one line for each choice of patches that has results: strategy, seed, AJI, run_id and the `MEASURES`.

    Raises
    ------
    ResultsError
        With fewer than ten choices by two strategies, or results of other data than those at hand.
    """
    path, name = published("tables", run.profile.name) / "results.csv", Path(run.dataset.name).name
    lines = read_results(path) if path.is_file() else pd.DataFrame(columns=["dataset"])
    lines = lines[lines["dataset"] == name]
    hint = f"nucseg run --profile {run.profile.name} --dataset {name} --table S"
    if len(lines) and set(lines["fingerprint"]) != {run.dataset.fingerprint}:
        raise ResultsError(f"{path}: made from another version of {name} than the one at hand; measure anew: {hint}")
    planned = {e: e for e in strategy_experiments(name, run.profile.grid)}
    keys = lines.groupby(list(EXPERIMENT), sort=False) if len(lines) else ()
    groups = [(planned[e], group) for key, group in keys if (e := Experiment(*key)) in planned]
    groups = [(e, group) for e, group in groups if e.selection != "random-centre-crop"]  # beside the pool's grid
    if len(groups) < 10 or len({e.selection for e, _ in groups}) < 2:
        raise ResultsError(f"{path}: {len(groups)} choices of patches on {name}; ten by two strategies are too few for "
                           f"a correlation, and fewer are none: {hint}")  # fmt: skip
    found = []
    with task("describing choices", len(groups)) as progress:
        for i, (e, group) in enumerate(groups):
            last = group[group["round"] == e.rounds]
            about = {"strategy": e.selection, "seed": e.seed, "AJI": float(f"{last['aji'].mean():.6g}")}
            found.append({**about, **describe(run, e), "run_id": last["run_id"].iloc[0]})
            progress.update(i + 1, f"{e.selection}, seed {e.seed}")
    return pd.DataFrame(found)


def distinct(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the result of `measure` with a line for each strategy and set of patches: seeds averaged, no run_id."""
    same = ["strategy", *MEASURES]  # equal patches are equal in all of them, and others in none
    return frame.groupby(same, sort=False, dropna=False)["AJI"].mean().reset_index()


def of_the_weights(frame: pd.DataFrame) -> tuple[float, int]:
    """Return how far the AJI of equal choices differs: pooled standard deviation (NaN if none are equal), degrees."""
    choices = frame.groupby(["strategy", *MEASURES], sort=False, dropna=False)["AJI"]
    squares, degrees = ((frame["AJI"] - choices.transform("mean")) ** 2).sum(), len(frame) - choices.ngroups
    return float(np.sqrt(squares / degrees)) if degrees else float("nan"), degrees


def correlations(frame: pd.DataFrame) -> pd.DataFrame:
    """Return, for each of the `MEASURES`, its rank correlation with AJI over all choices and within strategies.

    Columns: measure, rho, rho within, P within, P within Holm; strongest within first. A measure that does not vary has
    NaN. Seeds that chose the same patches are one choice (`distinct`).
    """
    frame, rows = distinct(frame), []
    groups = frame.groupby("strategy")
    freedom = len(frame) - len(groups) - 1  # a mean was taken away from each strategy
    for name in MEASURES:
        inside = [(frame[column] - groups[column].transform("mean")).round(9) for column in (name, "AJI")]
        if min(frame[name].nunique(), inside[0].nunique()) < 2:
            rows.append({"measure": name, "rho": np.nan, "rho within": np.nan, "P within": np.nan})
            continue
        within = spearmanr(*inside).statistic
        rho = spearmanr(frame[name], frame["AJI"]).statistic
        p = 2 * t.sf(abs(within) * np.sqrt(freedom / max(1 - within**2, 1e-12)), freedom)
        rows.append({"measure": name, "rho": rho, "rho within": within, "P within": p})
    table = pd.DataFrame(rows)
    table["P within Holm"] = holm(table["P within"])
    order = table["rho within"].abs().sort_values(ascending=False, kind="stable", na_position="last").index
    return table.loc[order].reset_index(drop=True)


def as_markdown(frame: pd.DataFrame, caption: str, rounds: int = 0) -> str:
    """Return the correlations as Markdown, with the mean of each measure by strategy beside them.

    `rounds` on unlabelled images lie between a choice and its AJI.
    """
    table, means = correlations(frame), frame.groupby("strategy")[["AJI", *MEASURES]].mean()
    means = means.sort_values("AJI", ascending=False)
    header = ["property of the patches", "ρ", "ρ within strategies", "P", *(f"mean of {name}" for name in means.index)]
    body = [[Cell("AJI"), Cell(""), Cell(""), Cell(""), *(Cell(f"{value:.3f}") for value in means["AJI"])]]
    for line in table.to_dict("records"):
        name = line["measure"]
        numbers = [signed(line["rho"], 2), signed(line["rho within"], 2)]
        p = "" if np.isnan(line["P within"]) else f"{line['P within']:.2g} ({line['P within Holm']:.2g})"
        body.append([Cell(text) for text in (MEASURES[name], *numbers, p, *(f"{v:.3g}" for v in means[name]))])
    after = f"{rounds} round{'s' * (rounds > 1)} on unlabelled images" if rounds else "no pseudo labels"
    told = {"distinct": len(distinct(frame)), "all": len(frame), "rounds": after}
    notes = [note.format(**told) for note in NOTES]
    spread, degrees = of_the_weights(frame)
    if degrees:
        notes.append(
            f"Of equal choices, trained with other seeds, AJI differs by {spread:.3f} (standard deviation, pooled, "
            f"{degrees} degrees of freedom): so much is the weights' alone."
        )
    return markdown(caption, header, body, notes)


def write(run: Pipeline) -> tuple[Path, ...]:
    """Write ``choices_<dataset>.csv`` and ``.md`` beside the tables, and a figure with the best and worst choice."""
    frame, name = measure(run), Path(run.dataset.name).name
    n = f"{len(frame)} choices of {run.profile.ours(run.dataset.name).k1} patches"
    caption = f"What the better choices of patches have in common ({named(name)}, {run.profile.name}, {n})"
    shown = {}
    for title, index in (("best", frame["AJI"].idxmax()), ("worst", frame["AJI"].idxmin())):
        line = frame.loc[index]
        experiment = run.experiment(selection=line["strategy"], augmentation="naive", rounds=0, seed=int(line["seed"]))
        shown[f"{title}: {line['strategy']}, AJI {line['AJI']:.3f}"] = [image for image, _ in run.annotated(experiment)]
    drawn = figure_choices(frame, correlations(frame), MEASURES, shown)
    return publish(run, "choices", frame, as_markdown(frame, caption, run.profile.grid.strategy_rounds), drawn)
