import itertools

import numpy as np
import pandas as pd
import pytest

from nucseg.beyond import strategy_experiments, strategy_frame, strategy_table
from nucseg.config import to_plain
from nucseg.experiments import GridSettings
from nucseg.results import RESULT_COLUMNS
from nucseg.selection import STRATEGIES
from nucseg.tables import write_table

SETTINGS = GridSettings(k1={"kumar": 9}, substitutes={"maskrcnn": "hoverlite"})


def made_up(gain):
    """Lines of every strategy: `gain` of each over random crops, noise over seeds and images."""
    rng, rows = np.random.default_rng(0), []
    level = rng.uniform(0.4, 0.6, 14)
    for experiment in strategy_experiments("kumar", SETTINGS):
        for image in range(14):
            row = dict.fromkeys(RESULT_COLUMNS, 0) | to_plain(experiment)
            row |= {"profile": "p", "fingerprint": "f", "encoder": "e", "supervision": "patches", "best": 1}
            row |= {"image_id": f"i{image}", "organ": "o", "run_id": "r", "label_share": 0.05}
            row["aji"] = level[image] + gain.get(experiment.selection, 0.0) + rng.normal(0, 0.005)
            rows.append(row)
    return pd.DataFrame(rows)[list(RESULT_COLUMNS)]


def test_every_strategy_runs_over_the_same_four_seeds_and_budget():
    experiments = strategy_experiments("kumar", SETTINGS)
    assert {(e.selection, e.seed) for e in experiments} == set(itertools.product(STRATEGIES, (21, 100, 500, 1000)))
    assert {(e.k1, e.augmentation, e.rounds, e.segmenter) for e in experiments} == {(9, "naive", 0, "hoverlite")}


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


def test_without_results_there_is_an_empty_frame():
    assert strategy_frame(made_up({}).iloc[:0], "kumar", SETTINGS).empty
    assert strategy_table(made_up({}).iloc[:0], "kumar", SETTINGS) is None


def test_table_s_is_written_like_the_others(tmp_path):
    table = strategy_table(made_up({"cps": 0.05}), "kumar", SETTINGS)
    names = [path.name for path in write_table(table, tmp_path)]
    assert names == [f"tableS_kumar.{ending}" for ending in ("csv", "md", "tex", "html")]
    text = (tmp_path / "tableS_kumar.md").read_text()
    assert "cps" in text
    assert "Not in the paper" in text
