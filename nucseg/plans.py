"""Which experiments each table runs: those of the paper's rows, and ours beyond them.

Beyond the paper every selection strategy stands on the same footing, on one budget (Table S) and on several (Table B).
The paper compares selections with CSinGAN behind them and one seed each. Here nothing stands between the choice and the
segmenter but the naive augmentation (where a profile says so, rounds on unlabelled images too), and every strategy,
the random ones included, runs over the same seeds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from nucseg.config import nearest
from nucseg.data.layouts import rows
from nucseg.data.tissue import splits
from nucseg.experiments import Experiment, GridSettings, grid
from nucseg.outcomes import REFERENCE
from nucseg.paper import BEYOND
from nucseg.selection import STRATEGIES

TABLE, BUDGET = BEYOND


def experiments(
    tables: Iterable[str], dataset: str, settings: GridSettings, images: int | None = None
) -> tuple[Experiment, ...]:
    """Return the distinct experiments of tables ``"I"`` to ``"VI"``, ``"S"`` and ``"B"``, each once.

    `images` is the number of training images, where it is known: as `budget_experiments`.
    """
    tables = list(tables)
    wanted = list(grid(dataset, settings, [table for table in tables if table not in BEYOND]))
    wanted += strategy_experiments(dataset, settings) if TABLE in tables else ()
    wanted += budget_experiments(dataset, settings, images) if BUDGET in tables else ()
    return tuple(dict.fromkeys(wanted))


def strategy_experiments(dataset: str, settings: GridSettings) -> tuple[Experiment, ...]:
    """Return one experiment per strategy and seed of the random baselines (Table S).

    Raises
    ------
    ValueError
        For an unknown strategy, or a dataset that `settings.k1` does not know.
    """
    return _arms(dataset, settings, _strategies(settings, "strategies"), [own_k1(dataset, settings)])


def budget_experiments(dataset: str, settings: GridSettings, images: int | None = None) -> tuple[Experiment, ...]:
    """Return the experiments of the label-budget curve: strategies, budgets and seeds, and full supervision.

    Parameters
    ----------
    dataset, settings
        What to run on, and the profile's grid with `budget_grid` and `budget_strategies`.
    images
        Number of training images: a centre crop is one per image, so larger budgets of ``random-centre-crop`` cannot
        be, and are left out. None: known for the datasets that come with the package; of others nothing is left out.

    Raises
    ------
    ValueError
        For an unknown strategy, or a dataset that `settings.k1` does not know.
    """
    k1 = own_k1(dataset, settings)
    budgets = sorted({max(1, int(k1 * part + 0.5)) for part in settings.budget_grid})
    planned = _arms(dataset, settings, _strategies(settings, "budget_strategies"), budgets)
    most = images or training_images(dataset) or np.inf
    planned = tuple(e for e in planned if e.selection != "random-centre-crop" or e.k1 <= most)
    return (*planned, *full_experiments(dataset, settings))


def full_experiments(dataset: str, settings: GridSettings) -> list[Experiment]:
    """Return full supervision, one experiment per seed, with the rounds that Table B gives it."""
    segmenter = settings.substitutes.get("maskrcnn", "maskrcnn")
    return [Experiment(dataset, "all", 0, 0, "naive", segmenter, settings.full_rounds, seed) for seed in settings.seeds]


def _arms(
    dataset: str, settings: GridSettings, strategies: Iterable[str], budgets: Sequence[int]
) -> tuple[Experiment, ...]:
    segmenter = settings.substitutes.get("maskrcnn", "maskrcnn")
    return tuple(
        Experiment(dataset, strategy, k1, settings.k2, "naive", segmenter, settings.strategy_rounds, seed)
        for strategy in strategies
        for k1 in budgets
        for seed in settings.random_seeds
    )


def training_images(dataset: str) -> int:
    """Return how many training images a known dataset has, without reading one; 0 for others."""
    return sum(image.split == "train" for image in (splits() if dataset == "tissue" else rows(dataset)))


def own_k1(dataset: str, settings: GridSettings) -> int:
    """Return the dataset's own K1, or raise a ValueError that says what to add."""
    if dataset not in settings.k1:
        raise ValueError(
            f"k1: no K1 for dataset {dataset!r}, only for {', '.join(sorted(settings.k1))}; "
            f"add `grid: {{k1: {{{dataset}: 9}}}}` to the profile"
        )
    return settings.k1[dataset]


def _strategies(settings: GridSettings, field: str) -> tuple[str, ...]:
    """Return the strategies that a field of the settings names, random crops among them."""
    wanted = getattr(settings, field)
    if "*" in wanted:
        return tuple(STRATEGIES)
    for name in wanted:
        if name not in STRATEGIES:
            raise ValueError(f"{field}: unknown name {name!r}; {nearest(name, STRATEGIES)}")
    return tuple(name for name in STRATEGIES if name in wanted or name == REFERENCE)
