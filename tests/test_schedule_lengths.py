"""Lengths of schedules: each is a whole training of its own, judged by validation images alone."""

from __future__ import annotations

import pandas as pd
import pytest
from small import TINY, small_data

from nucseg import schedule_lengths
from nucseg.config import ConfigError
from nucseg.pipeline import Pipeline
from nucseg.store import OutOfTime


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("NUCSEG_HOME", str(tmp_path))
    return Pipeline(TINY, str(small_data(tmp_path / "tiny")), device="cpu")


def test_each_length_is_a_training_with_its_own_schedule_and_the_profile_s_own_is_not_repeated(run):
    before = run.trained(run.experiment(selection="all", k1=0, k2=0, augmentation="naive", rounds=0))
    frame = schedule_lengths.measure(run, ["III.full"], [1, 1 / 3, 2])
    assert list(frame["iterations"]) == [1, 3, 6]
    assert list(frame["part"]) == [1 / 3, 1, 2]
    assert frame["validation AJI"].between(0, 1).all()
    assert frame.set_index("part")["run_id"][1] == before.run_id
    assert frame["run_id"].nunique() == 3
    trained = {r.run_id: r.meta["config"]["training"][0]["iterations"] for r in run.store.results("model")}
    assert [trained[run_id] for run_id in frame["run_id"]] == [1, 3, 6]
    assert not list(run.store.results("evaluation")), "test images were looked at"


def test_time_that_is_up_leaves_what_is_there_and_nothing_at_all_is_an_error(run):
    schedule_lengths.measure(run, ["III.full"], [1])
    frame = schedule_lengths.measure(run, ["III.full"], [1, 2], minutes=1e-9)
    assert list(frame["part"]) == [1]
    with pytest.raises(OutOfTime, match="more minutes"):
        schedule_lengths.write(run, ["III.rndcrop-naive"], minutes=1e-9)


def test_table_and_figure_show_every_length(run):
    paths = schedule_lengths.write(run, ["III.full", "III.rndcrop-naive"], [1, 2], seeds=1)
    assert [path.name for path in paths] == ["schedules_tiny.csv", "schedules_tiny.md", "schedules_tiny.png"]
    assert all(path.stat().st_size for path in paths)
    table = schedule_lengths.summary(schedule_lengths.measure(run, ["III.full", "III.rndcrop-naive"], [1, 2]))
    assert list(table["row"]) == ["III.full"] * 2 + ["III.rndcrop-naive"] * 2
    assert table["gain"].isna().tolist() == [True, False] * 2
    assert table["gain"][1] == pytest.approx(table["mean"][1] - table["mean"][0])
    text = paths[1].read_text()
    for words in ("Fully-supervised", "RndCrop + NaiveAug", "No test image was looked at"):
        assert words in text


def test_seeds_are_averaged_and_their_spread_is_shown(run):
    frame = schedule_lengths.measure(run, ["III.full"], [1])
    both = frame.loc[[0, 0]].assign(**{"seed": [1, 2], "validation AJI": [0.2, 0.4]})
    assert "0.3000 ± 0.1414" in schedule_lengths.as_markdown(both, "x")


def test_a_gain_compares_the_same_seeds(run):
    frame = schedule_lengths.measure(run, ["III.full"], [1])
    lines = [(1, 1, 0.2), (1, 2, 0.4), (2, 2, 0.45)]  # that of seed 1 was cut off
    both = pd.concat([frame.assign(part=part, seed=seed, **{"validation AJI": aji}) for part, seed, aji in lines])
    assert schedule_lengths.summary(both)["gain"][1] == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("row", "parts", "message"),
    [("III.full", [], "lengths above 0"), ("III.full", [1, 0], "lengths above 0"), ("III.ful", [1], "mean 'III.full'")],
)
def test_lengths_that_are_none_and_rows_that_are_not_there_are_refused(run, row, parts, message):
    with pytest.raises(ConfigError, match=message):
        schedule_lengths.measure(run, [row], parts)


@pytest.mark.usefixtures("run")
def test_without_validation_images_no_length_can_be_told_from_another(tmp_path):
    for folder in (tmp_path / "tiny" / "val").iterdir():
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    (tmp_path / "tiny" / "val").rmdir()
    other = Pipeline(TINY, str(tmp_path / "tiny"), device="cpu")
    with pytest.raises(ConfigError, match="no validation images"):
        schedule_lengths.measure(other, ["III.full"])
