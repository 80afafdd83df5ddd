"""Tables S and B, and the label-budget curve. All numbers here are made up."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
from made_up import lines_of
from scipy import stats

from nucseg.experiments import GridSettings
from nucseg.outcomes import REFERENCE
from nucseg.plans import budget_experiments, strategy_experiments
from nucseg.results import ResultsError
from nucseg.selection import STRATEGIES
from nucseg.tables import write_table
from nucseg.tables.strategies import (
    budget_curve,
    budget_frame,
    budget_table,
    strategy_frame,
    strategy_ranks,
    strategy_table,
)

SETTINGS = GridSettings(k1={"kumar": 9}, substitutes={"maskrcnn": "hoverlite"})
SMALL = dataclasses.replace(
    SETTINGS, budget_strategies=("cps",), budget_grid=(1 / 3, 1.0), random_seeds=(21, 100), seeds=(1,)
)


def made_up(gain):
    """Lines of every strategy: `gain` of each over random crops, noise over seeds and images."""
    rng = np.random.default_rng(0)
    level = rng.uniform(0.4, 0.6, 14)
    return pd.concat(
        [
            lines_of(e, level + gain.get(e.selection, 0.0) + rng.normal(0, 0.005, 14))
            for e in strategy_experiments("kumar", SETTINGS)
        ],
        ignore_index=True,
    )


def test_a_profile_may_send_every_strategy_and_full_supervision_through_rounds():
    settings = dataclasses.replace(SMALL, strategies=("cps",), strategy_rounds=1, full_rounds=2)
    found = budget_experiments("kumar", settings)
    assert {(e.selection, e.rounds) for e in found} == {("cps", 1), ("random-crop", 1), ("all", 2)}
    last = pd.concat([lines_of(e, np.full(8, 0.5 + 0.01 * i)) for i, e in enumerate(found)], ignore_index=True)
    earlier = pd.concat([lines_of(e, np.full(8, 0.1), round=0, best=0) for e in found], ignore_index=True)
    other = lines_of(dataclasses.replace(found[0], rounds=0), np.full(8, 0.9))
    for frame in (budget_frame(last, "kumar", settings), strategy_frame(last, "kumar", settings)):
        rest = pd.concat([last, earlier, other], ignore_index=True)
        make = budget_frame if "B.all" in set(frame["id"]) else strategy_frame
        pd.testing.assert_frame_equal(make(rest, "kumar", settings), frame)
    table = strategy_table(last, "kumar", settings)
    assert (
        table.title == "Every selection strategy on the same budget, naive augmentation, 1 round on unlabelled images"
    )
    assert "no pseudo labels" not in " ".join(table.notes)


# -- Table S ---------------------------------------------------------------------------------------------------


def test_a_better_strategy_stands_first_with_its_difference_to_chance():
    frame = strategy_frame(made_up({"cps": 0.05, "k-center": -0.05}), "kumar", SETTINGS).set_index("row")
    assert frame.index[0] == "cps"
    assert frame.index[-1] == "k-center"
    assert frame.loc["cps", "mean difference"] == pytest.approx(0.05, abs=0.005)
    assert frame.loc["cps", "CI low"] < 0.05 < frame.loc["cps", "CI high"] + 0.005
    assert frame.loc["cps", "t p Holm"] < 0.001
    assert frame.loc["kmeans", "t p Holm"] > 0.01
    assert np.isnan(frame.loc["random-crop", "mean difference"])
    assert (frame["seeds"] == 4).all()


def test_other_budgets_and_augmentations_do_not_count():
    lines = made_up({})
    other = lines.assign(augmentation="csingan", aji=0.99)
    smaller = lines.assign(k1=3, aji=0.99)
    both = strategy_frame(pd.concat([lines, other, smaller]), "kumar", SETTINGS)
    pd.testing.assert_frame_equal(both, strategy_frame(lines, "kumar", SETTINGS))


def test_results_that_do_not_fit_together_are_refused():
    lines = made_up({})
    with pytest.raises(ResultsError, match="cps, K1 = 9, seed 21: results twice, with the encoders e, other"):
        strategy_frame(pd.concat([lines, lines.assign(encoder="other")]), "kumar", SETTINGS)
    with pytest.raises(ResultsError, match="several profiles, p, q"):
        strategy_frame(pd.concat([lines, lines.assign(profile="q")]), "kumar", SETTINGS)
    cut = lines.drop(lines[(lines["selection"] == "cps") & (lines["seed"] == 21) & (lines["image_id"] == "i3")].index)
    with pytest.raises(ResultsError, match=r"cps, K1 = 9, seed 21: no result for image\(s\) i3; run it to its end"):
        strategy_frame(cut, "kumar", SETTINGS)


def test_without_results_there_is_an_empty_frame():
    none = made_up({}).iloc[:0]
    assert strategy_frame(none, "kumar", SETTINGS).empty
    assert budget_frame(none, "kumar", SETTINGS).empty
    assert strategy_table(none, "kumar", SETTINGS) is None
    assert budget_table(none, "kumar", SETTINGS) is None
    assert strategy_ranks(none, "kumar", SETTINGS) is None
    assert budget_curve(none, "kumar", SETTINGS).points.empty


def test_table_s_is_written_like_the_others(tmp_path):
    table = strategy_table(made_up({"cps": 0.05}), "kumar", SETTINGS)
    names = [path.name for path in write_table(table, tmp_path)]
    assert names == [f"tableS_kumar.{ending}" for ending in ("csv", "md", "tex", "html")]
    text = (tmp_path / "tableS_kumar.md").read_text()
    assert "cps" in text
    assert "Not in the paper" in text


def test_strategies_are_ranked_image_by_image():
    lines = made_up({"cps": 0.05, "k-center": -0.05})
    found = strategy_ranks(pd.concat([lines, lines.assign(k1=3, aji=0.0)]), "kumar", SETTINGS)
    assert (found.systems[0], found.mean_ranks[0]) == ("cps", 1.0)
    assert (found.systems[-1], found.mean_ranks[-1]) == ("k-center", 10.0)
    assert found.n == 14
    scores = [lines[lines["selection"] == name].groupby("image_id")["aji"].mean() for name in STRATEGIES]
    assert found.friedman_p == pytest.approx(stats.friedmanchisquare(*scores).pvalue)


def test_two_strategies_or_five_images_are_not_ranked():
    lines = made_up({})
    assert strategy_ranks(lines[lines["selection"].isin(["cps", "random-crop"])], "kumar", SETTINGS) is None
    assert strategy_ranks(lines[lines["image_id"].isin([f"i{n}" for n in range(5)])], "kumar", SETTINGS) is None


# -- Table B and the curve -------------------------------------------------------------------------------------


@pytest.fixture
def budgets():
    """CPS gains 0.1 over random crops; seed 100 is 0.02 better than 21; 0.01 per patch; the images are 0.1 apart."""
    frames = []
    for e in budget_experiments("kumar", SMALL):
        score = (
            0.6 if e.selection == "all" else 0.2 + 0.01 * e.k1 + 0.1 * (e.selection == "cps") + 0.02 * (e.seed == 100)
        )
        frames.append(lines_of(e, [score, score + 0.1]))
    return pd.concat(frames, ignore_index=True)


def test_the_curve_has_one_point_per_strategy_and_budget_with_its_band(budgets):
    curve = budget_curve(budgets, "kumar", SMALL)
    points = curve.points.set_index(["selection", "k1"])
    assert len(points) == 4
    cps = points.loc[("cps", 9)]
    assert cps["x"] == pytest.approx(0.045)
    assert (cps["low"], cps["mean"], cps["high"]) == pytest.approx((0.44, 0.45, 0.46))
    assert cps["sd"] == pytest.approx(np.std([0.44, 0.46], ddof=1))
    assert cps["seeds"] == 2
    assert curve.full == pytest.approx((0.65, 0.65, 0.65))
    assert (curve.images, curve.left_out) == (2, 0)


def test_against_nuclei_experiments_that_were_not_counted_are_left_out_and_counted(budgets):
    lines = budgets.astype({"label_nuclei": object})
    old = (lines["selection"] == "cps") & (lines["k1"] == 9) & (lines["seed"] == 100)
    lines.loc[old, "label_nuclei"] = ""
    curve = budget_curve(lines, "kumar", SMALL, "label_nuclei")
    cps = curve.points.set_index(["selection", "k1"]).loc[("cps", 9)]
    assert (cps["x"], cps["mean"], cps["seeds"]) == pytest.approx((360, 0.44, 1))
    assert curve.left_out == 1
    none = budget_curve(budgets.drop(columns="label_nuclei"), "kumar", SMALL, "label_nuclei")
    assert none.points.empty
    assert none.left_out == 8
    assert none.full[0] == pytest.approx(0.65)


def test_table_b_compares_with_random_crops_of_the_same_budget(budgets):
    frame = budget_frame(budgets, "kumar", SMALL).set_index("id")
    assert list(frame.index) == ["B.cps-3", "B.cps-9", "B.random-crop-3", "B.random-crop-9", "B.all"]
    assert frame.loc["B.cps-3", "mean difference"] == pytest.approx(0.1)
    assert frame.loc[["B.random-crop-3", "B.all"], "mean difference"].isna().all()
    assert frame.loc["B.cps-3", "ours AJI"] == pytest.approx(0.39)
    assert frame.loc["B.cps-3", "ours label nuclei"] == 120
    assert set(frame["status"]) == {"run"}


def test_table_b_says_how_much_of_it_was_run(budgets, tmp_path):
    table = budget_table(budgets[budgets["seed"] != 100], "kumar", SMALL)
    assert any(note.startswith("5 of 9 planned experiments were run") for note in table.notes)
    text = write_table(table, tmp_path)[1].read_text()
    assert "cps, K1 = 3" in text
    assert "(1 seed(s))" in text
    assert [path.name for path in tmp_path.glob("*.csv")] == ["tableB_kumar.csv"]


def test_full_supervision_alone_is_no_curve(budgets):
    assert budget_table(budgets[budgets["selection"] == "all"], "kumar", SMALL) is None


def test_both_tables_agree_where_they_show_the_same_experiments(budgets):
    one = strategy_frame(budgets, "kumar", SMALL).set_index("row")
    other = budget_frame(budgets, "kumar", SMALL).set_index("id")
    for name in ("cps", REFERENCE):
        assert one.loc[name, "ours AJI"] == other.loc[f"B.{name}-9", "ours AJI"]
