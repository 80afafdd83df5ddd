"""Which experiments each table runs."""

import dataclasses
import itertools

import pytest

from nucseg import plans
from nucseg.data import load_dataset
from nucseg.experiments import GridSettings, grid
from nucseg.paper import TABLES
from nucseg.plans import budget_experiments, experiments, strategy_experiments
from nucseg.selection import STRATEGIES

SETTINGS = GridSettings(k1={"kumar": 9}, substitutes={"maskrcnn": "hoverlite"})
SMALL = dataclasses.replace(
    SETTINGS, budget_strategies=("cps",), budget_grid=(1 / 3, 1.0), random_seeds=(21, 100), seeds=(1,)
)


def test_every_strategy_runs_over_the_same_four_seeds_and_budget():
    found = strategy_experiments("kumar", SETTINGS)
    assert {(e.selection, e.seed) for e in found} == set(itertools.product(STRATEGIES, (21, 100, 500, 1000)))
    assert {(e.k1, e.augmentation, e.rounds, e.segmenter) for e in found} == {(9, "naive", 0, "hoverlite")}


def test_a_profile_may_name_the_strategies_of_table_s():
    some = dataclasses.replace(SETTINGS, strategies=("k-center", "cps"))
    assert {e.selection for e in strategy_experiments("kumar", some)} == {"cps", "k-center", "random-crop"}
    with pytest.raises(ValueError, match="strategies: unknown name 'k-centre'; did you mean 'k-center'"):
        strategy_experiments("kumar", dataclasses.replace(SETTINGS, strategies=("k-centre",)))


def test_the_budgets_are_parts_of_the_datasets_own_and_hold_table_s():
    found = budget_experiments("kumar", SETTINGS)
    assert {e.k1 for e in found} == {3, 6, 9, 12, 18, 0}
    assert set(strategy_experiments("kumar", SETTINGS)) <= set(found)
    assert [e for e in found if e.selection == "all"] == [e for e in grid("kumar", SETTINGS, ["III"]) if not e.k1]
    assert len(found) == len(set(found)) == 10 * 5 * 4 - 4 + 3  # Kumar has no 18 images to take a centre crop of each


def test_small_budgets_that_round_to_the_same_number_of_patches_run_once():
    settings = dataclasses.replace(SMALL, k1={"kumar": 1})
    assert [e.k1 for e in budget_experiments("kumar", settings) if e.selection == "cps"] == [1, 1]  # two seeds


def test_a_profile_chooses_strategies_and_random_crops_are_always_among_them():
    assert {e.selection for e in budget_experiments("kumar", SMALL)} == {"cps", "random-crop", "all"}
    with pytest.raises(ValueError, match="budget_strategies: unknown name 'kmean'; did you mean 'kmeans'"):
        budget_experiments("kumar", dataclasses.replace(SMALL, budget_strategies=("kmean",)))
    with pytest.raises(ValueError, match=r"budget_grid: expected positive parts of K1, got \(0.0,\)"):
        dataclasses.replace(SMALL, budget_grid=(0.0,))


def test_there_are_no_more_centre_crops_than_images():
    settings = dataclasses.replace(SETTINGS, k1=dict.fromkeys(("kumar", "tissue", "elsewhere"), 9))
    for dataset, images, most in (("kumar", None, 12), ("kumar", 6, 6), ("tissue", None, 6), ("elsewhere", None, 18)):
        found = budget_experiments(dataset, settings, images)
        assert max(e.k1 for e in found if e.selection == "random-centre-crop") == most
        assert max(e.k1 for e in found if e.selection == "random-crop") == 18


def test_the_number_of_training_images_is_known_without_them(real_data):
    for name in ("kumar", "tnbc", "tissue"):
        assert plans.training_images(name) == len(load_dataset(name, real_data).train)


def test_experiments_of_several_tables_are_there_once():
    both = experiments((*TABLES, "S", "B"), "kumar", SETTINGS)
    assert len(both) == len(set(both))
    assert set(both) == {*grid("kumar", SETTINGS), *budget_experiments("kumar", SETTINGS)}
    assert experiments(["II"], "kumar", SETTINGS) == grid("kumar", SETTINGS, ["II"])
    with pytest.raises(ValueError, match="table: unknown name 'VII'"):
        experiments(["VII"], "kumar", SETTINGS)
    with pytest.raises(ValueError, match="no K1 for dataset 'elsewhere'"):
        experiments(["B"], "elsewhere", SETTINGS)
