"""What better choices of patches have in common: known relations are found, and nothing else is."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from made_up import lines_of
from PIL import Image

from nucseg import choices
from nucseg.data import Dataset, load_dataset
from nucseg.figures.choices import figure_choices
from nucseg.pipeline import Pipeline
from nucseg.plans import strategy_experiments
from nucseg.profiles import load_profile
from nucseg.results import ResultsError
from nucseg.store import published


def made_up(seeds=12):
    """Two strategies: one is better and chooses more nuclei; inside each, larger nuclei go with a higher AJI."""
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"strategy": np.repeat(["cps", "k-center"], seeds), "seed": [*range(seeds), *range(seeds)]})
    better = (frame["strategy"] == "cps").to_numpy()
    area = rng.normal(100, 10, 2 * seeds)
    frame["AJI"] = 0.4 + 0.1 * better + 0.0005 * area
    for name in choices.MEASURES:
        frame[name] = rng.normal(0, 1, 2 * seeds)
    frame["nuclei"] = 50 + 100 * better + rng.normal(0, 1, 2 * seeds)
    frame["nucleus area"], frame["images"] = area, 3
    return frame.assign(run_id="x")


def test_what_goes_with_aji_inside_strategies_is_told_from_what_goes_with_the_strategy():
    table = choices.correlations(made_up()).set_index("measure")
    assert table.index[0] == "nucleus area"
    assert table.loc["nucleus area", "rho within"] == pytest.approx(1, abs=0.02)
    assert table.loc["nucleus area", "P within Holm"] < 1e-6
    assert table.loc["nuclei", "rho"] > 0.6
    assert abs(table.loc["nuclei", "rho within"]) < 0.5
    assert table.loc["images"].isna().all()  # it does not vary
    assert (table["P within Holm"].dropna() >= table["P within"].dropna()).all()


def test_seeds_that_chose_the_same_patches_are_one_choice():
    frame = made_up()
    copies = frame.assign(seed=frame["seed"] + 100, AJI=frame["AJI"] + 0.01)
    twice = pd.concat([frame.assign(AJI=frame["AJI"] - 0.01), copies], ignore_index=True)
    pd.testing.assert_frame_equal(choices.correlations(twice), choices.correlations(frame))
    text = choices.as_markdown(twice, "A caption")
    assert "24 of 48" in text
    assert choices.of_the_weights(twice) == (pytest.approx(0.01 * np.sqrt(2)), 24)  # two values, 0.02 apart
    assert "AJI differs by 0.014 (standard deviation, pooled, 24 degrees of freedom)" in text
    assert np.isnan(choices.of_the_weights(frame)[0])
    assert "differs by" not in choices.as_markdown(frame, "A caption")


def test_chance_is_told_from_nothing_as_often_as_the_level_says():
    rng = np.random.default_rng(1)
    p = []
    for _ in range(60):
        frame = pd.DataFrame({"strategy": np.repeat(list("abcde"), 4), "AJI": rng.normal(size=20)})
        p += list(choices.correlations(frame.assign(**{n: rng.normal(size=20) for n in choices.MEASURES}))["P within"])
    assert 0.03 < np.mean(np.array(p) < 0.05) < 0.08  # 0.13 with a degree of freedom for each choice


def test_the_table_names_every_property_and_sorts_strategies_by_aji():
    text = choices.as_markdown(made_up(), "A caption")
    assert text.index("mean of cps") < text.index("mean of k-center")
    assert all(words in text for words in choices.MEASURES.values())
    assert "| different images |  |  |  | 3 | 3 |" in text


def test_the_figure_shows_the_strongest_correlations_and_every_patch():
    frame, patch = made_up(), np.zeros((8, 8, 3), np.uint8)
    shown = {"best": [patch] * 3, "worst": [patch] * 2}
    figure = figure_choices(frame, choices.correlations(frame), choices.MEASURES, shown)
    top, best, worst = figure.subfigs
    assert [sum(bool(axis.images) for axis in row.axes) for row in (best, worst)] == [3, 2]
    assert top.axes[0].get_xlabel() == "median area of a nucleus, px²"
    assert top.axes[0].get_title().endswith("within strategies +1.00")
    figure.canvas.draw()


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("NUCSEG_HOME", str(tmp_path))
    tissue = load_dataset("tissue")
    dataset = Dataset("tissue", tissue.train[:2], tissue.val[:1], tissue.test[:1], synthetic=True)
    profile = load_profile("sample")
    profile = replace(profile, selection=replace(profile.selection, step=128))
    return Pipeline(profile, dataset, device="cpu", results=tmp_path / "runs")


def test_choices_are_described_by_their_own_patches(run):
    experiment = run.experiment(selection="random-crop", k1=3, augmentation="naive", rounds=0, seed=1)
    found = choices.describe(run, experiment)
    pairs = run.annotated(experiment)
    assert found["nucleus share"] == pytest.approx(np.mean([(labels > 0).mean() for _, labels in pairs]), rel=1e-5)
    assert found["nuclei"] <= sum(np.unique(labels[labels > 0]).size for _, labels in pairs)
    assert found["images"] == len({patch.image_id for patch in run.selection(experiment).patches})
    assert found["distance"] > 0
    assert set(found) == set(choices.MEASURES)


def test_too_few_choices_say_what_makes_more(run):
    with pytest.raises(ResultsError, match="nucseg run --profile sample --dataset tissue --table S"):
        choices.measure(run)


@pytest.fixture
def with_results(run, monkeypatch):
    """Results of two strategies and four seeds, and lines that are no choice of Table S; nothing is described."""
    monkeypatch.setattr(choices, "describe", lambda *_: dict.fromkeys(choices.MEASURES, 1.0))
    monkeypatch.setattr(run, "annotated", lambda _: [(np.zeros((8, 8, 3), np.uint8), np.ones((8, 8), np.int32))])
    grid = replace(run.profile.grid, strategies=("cps", "kmeans"), random_seeds=(21, 100, 500, 1000))
    run.profile = replace(run.profile, grid=grid)
    plan = strategy_experiments("tissue", grid)
    others = [replace(plan[0], k2=8), replace(plan[0], segmenter="maskrcnn"), replace(plan[0], seed=1)]
    lines = [lines_of(e, [0.5, 0.7], run_id=f"{e.selection}-{e.seed}") for e in plan]
    lines += [lines_of(e, [0.0, 0.0]) for e in others]
    path = published("tables", run.profile.name) / "results.csv"
    path.parent.mkdir(parents=True)
    changes = {"profile": run.profile.name, "fingerprint": run.dataset.fingerprint}
    pd.concat(lines).assign(**changes).to_csv(path, index=False)
    return run, plan


def test_only_the_experiments_of_table_s_are_choices(with_results):
    run, plan = with_results
    frame = choices.measure(run)
    assert list(zip(frame["strategy"], frame["seed"], strict=True)) == [(e.selection, e.seed) for e in plan]
    assert (frame["AJI"] == 0.6).all()


def test_the_figure_names_every_run_that_it_shows(with_results):
    run, plan = with_results
    csv, _, picture = choices.write(run)
    with Image.open(picture) as opened:
        assert set(opened.text["Source"].split()) == set(pd.read_csv(csv)["run_id"])
    assert len(pd.read_csv(csv)) == len(plan) == 12
