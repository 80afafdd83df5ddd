"""The tables of docs/results.md: what the choice of patches is worth, and what is gained by leaving out those with
hardly a nucleus, and by unlabelled pixels.

    python -m nucseg.tables.reading docs/results.md     # or: make readme

Intervals are over seeds, as in the tables of `nucseg tables` and `nucseg compare`, unless a column says that they are
over seeds and images; here two sets stand side by side.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from nucseg.outcomes import REFERENCE, signed
from nucseg.profiles import load_profile
from nucseg.stats import crossed_bootstrap
from nucseg.tables.between import measured_of, of_seeds
from nucseg.tables.pages import rewrite
from nucseg.tables.table import DATASET_NAMES, Measured, over_seeds
from nucseg.tables.words import WORDS

DATASETS = ("kumar", "tnbc")
CHOICES, NUCLEI, RECIPES, PILOT = "sample-choices", "sample-nuclei", "sample-recipes", "sample-seeds"
RCNN, LARGE = "sample-choices-rcnn", "nine-cpu-choices"
FULL = "B.all"


def choices() -> str:
    """Return each strategy's gain over random crops, over all seeds and over those that the pilot did not have."""
    pilot = set(load_profile(PILOT).grid.random_seeds)
    header, found = ["patches"], {}
    for dataset in DATASETS:
        found[dataset] = measured_of(CHOICES, dataset)
        seeds = {e.seed for e in found[dataset][f"S.{REFERENCE}"].found}
        name = DATASET_NAMES[dataset]
        header += [f"{name}, {len(seeds)} seeds", f"the {len(seeds - pilot)} that the pilot did not have"]
        header += ["these over seeds and images", "nuclei"]
    lines = []
    for row in _by_score(found):
        cells = [_word(row)]
        for dataset in DATASETS:
            one, chance = found[dataset][row], found[dataset][f"S.{REFERENCE}"]
            new = {e.seed for e in one.found} - pilot
            if row == f"S.{REFERENCE}":
                cells += [_mean(one), "", ""]
            else:
                pair = of_seeds(one, new), of_seeds(chance, new)
                cells += [_difference(one, chance), _difference(*pair), _over_both(*pair)]
            cells.append(f"{one.mean('label_nuclei')[0]:.1f}")
        lines.append(cells)
    return _markdown(header, lines)


def recipes() -> str:
    """Return each strategy's AJI with a mean teacher, its gain by it, and how far it is from chance and all labels."""
    header, found, before, full = ["patches"], {}, {}, {}
    for dataset in DATASETS:
        found[dataset] = measured_of(RECIPES, dataset)
        before[dataset], full[dataset] = measured_of(CHOICES, dataset), measured_of(PILOT, dataset)[FULL]
        header += [f"{DATASET_NAMES[dataset]}, AJI", "gain by the teacher", "over random crops", "to all labels"]
    lines = []
    for row in [*_by_score(found), FULL]:
        cells = [_word(row)]
        for dataset in DATASETS:
            one, chance, top = (found[dataset][name] for name in (row, f"S.{REFERENCE}", FULL))
            alone = full[dataset] if row == FULL else before[dataset][row]
            common = {e.seed for e in one.found} & {e.seed for e in alone.found}
            cells += [_mean(one), _difference(of_seeds(one, common), of_seeds(alone, common))]
            cells += ["" if row in (FULL, f"S.{REFERENCE}") else _difference(one, chance)]
            cells += ["" if row == FULL else _difference(one, top)]
        lines.append(cells)
    return _markdown(header, lines)


def nuclei() -> str:
    """Return each strategy's AJI where windows with least nuclear content are left out, its gain by it, and nuclei."""
    header, found, before = ["patches"], {}, {}
    for dataset in DATASETS:
        found[dataset], before[dataset] = measured_of(NUCLEI, dataset), measured_of(CHOICES, dataset)
        name = DATASET_NAMES[dataset]
        header += [f"{name}, AJI, {len(load_profile(NUCLEI).grid.seeds)} seeds", "gain", "nuclei", "were"]
    lines = []
    for row in _by_score(found):
        cells = [_word(row)]
        for dataset in DATASETS:
            one = found[dataset][row]
            alone = of_seeds(before[dataset][row], {e.seed for e in one.found})
            outlined = [f"{each.mean('label_nuclei')[0]:.0f}" for each in (one, alone)]
            cells += [_mean(one), _difference(one, alone), *outlined]
        lines.append(cells)
    return _markdown(header, lines)


def elsewhere(dataset: str = "kumar") -> str:
    """Return each strategy's gain over random crops with another segmenter, and with larger patches."""
    first, rcnn, large = (measured_of(profile, dataset) for profile in (CHOICES, RCNN, LARGE))
    chance = f"S.{REFERENCE}"
    seeds = {e.seed for e in rcnn[chance].found}
    header = ["patches", f"hoverlite, 128 px, {len(seeds)} seeds", "Mask R-CNN, 128 px, the same seeds: AJI", "gain"]
    header += [
        "gain over seeds and images",
        f"hoverlite, 256 px, {len(large[chance].found)} seeds: AJI",
        "gain",
        "nuclei",
    ]
    lines = []
    for row in _by_score({dataset: rcnn}):
        before, other, both, larger = "", "", "", ""
        if row != chance:
            before = _difference(of_seeds(first[row], seeds), of_seeds(first[chance], seeds))
            other, larger = (_difference(each[row], each[chance]) for each in (rcnn, large))
            both = _over_both(rcnn[row], rcnn[chance])
        outlined = f"{large[row].mean('label_nuclei')[0]:.0f}"
        lines.append([_word(row), before, _mean(rcnn[row]), other, both, _mean(large[row]), larger, outlined])
    return _markdown(header, lines)


TABLES = {"choices": choices, "elsewhere": elsewhere, "nuclei": nuclei, "recipes": recipes}


def _by_score(found: dict[str, dict[str, Measured]]) -> list[str]:
    """Return the rows of Table S that every dataset has, best on the first one first, the reference last."""
    first = next(iter(found.values()))
    rows = [name for name in first if name.startswith("S.") and all(name in rows for rows in found.values())]
    return sorted(rows, key=lambda name: (name == f"S.{REFERENCE}", -first[name].mean("aji")[0]))


def _word(row: str) -> str:
    key = row.split(".")[1]
    return {REFERENCE: "random crops", "probcover": "ProbCover"}.get(key, WORDS.get(key, key))


def _mean(one: Measured) -> str:
    mean, spread = one.mean("aji")
    return f"{mean:.3f} ± {spread:.3f}"


def _difference(one: Measured, other: Measured) -> str:
    test = over_seeds(one, other)
    difference, low, high = (signed(value, 3, "n/a") for value in test[:3])
    return f"{difference} ({low} to {high})"


def _over_both(one: Measured, other: Measured) -> str:
    scores = [each.lines.pivot(index="seed", columns="image_id", values="aji") for each in (one, other)]
    low, high = (signed(value, 3, "n/a") for value in crossed_bootstrap(*scores)[1:])
    return f"{low} to {high}"


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *lines])


if __name__ == "__main__":
    rewrite(sys.argv[1:], TABLES, every=True)
