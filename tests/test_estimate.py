"""Minutes to go come from measured seconds. All numbers here are made up."""

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from nucseg.config import to_plain
from nucseg.experiments import Experiment
from nucseg.profiles import load_profile
from nucseg.results import RUN_COLUMNS
from nucseg.runs import estimate as module
from nucseg.runs.estimate import Estimate, ToGo, estimate, other_machines, shared_key, spent_minutes

TINY = load_profile(Path(__file__).parent / "tiny.yaml")
H100 = load_profile("h100")
GPU = "NVIDIA H100 80GB HBM3"
OURS = Experiment("kumar", "cps", 9, 4, "csingan", "maskrcnn", 2, 42)
NAIVE = replace(OURS, augmentation="naive", segmenter="hoverlite", rounds=0)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("NUCSEG_HOME", str(tmp_path))
    on(monkeypatch, GPU)
    return tmp_path


def on(monkeypatch, device):
    monkeypatch.setattr(module, "environment", lambda *_: {"device": device})


def line(experiment, seconds, shared=0.0, profile=H100, device=GPU, iterations=0, **model):
    training = to_plain(profile.training_of(experiment.segmenter))
    training["iterations"] = iterations or training["iterations"]
    name = experiment.segmenter
    model = {
        "segmenter": to_plain((name, profile.segmenter(name), profile.segmenter_encoder)),
        "training": [training, None, {}],
        **model,
    }
    config = {"experiment": to_plain(experiment), "model": model, "shared_seconds": shared}
    return dict(zip(RUN_COLUMNS, ["r", "t", seconds, device, "v", None, json.dumps(config)], strict=True))


def write(place, name, *lines):
    folder = place / "tables" / name
    folder.mkdir(parents=True)
    pd.DataFrame(lines).to_csv(folder / "runs.csv", index=False)


def trainings(*experiments, taught=False):
    return ToGo(tuple((e, taught) for e in experiments), ())


def test_what_was_never_measured_has_no_estimate(place):
    found = estimate(ToGo(((OURS, False), (NAIVE, False)), (OURS, NAIVE)), H100)
    assert found == Estimate(0, ("maskrcnn", "hoverlite", "csingan", "selection by cps"), "")
    assert str(found) == ("no estimate for maskrcnn, hoverlite, csingan, selection by cps (never measured here)")


def test_it_is_the_median_of_this_profile_s_runs_and_the_rest_is_named(place):
    write(place, "h100", *(line(NAIVE, seconds) for seconds in (30, 60, 600)))
    assert estimate(trainings(NAIVE, NAIVE), H100) == Estimate(120, (), "h100")
    found = estimate(trainings(NAIVE, OURS), H100)
    assert str(found) == (
        "at least 1.0 minutes to go, one after another (by the runs of h100); "
        "no estimate for maskrcnn (never measured here)"
    )


def test_a_schedule_of_other_length_is_estimated_by_its_iterations_and_other_settings_not_at_all(place):
    write(place, "h100", line(NAIVE, 60, iterations=600))  # 1200 in the profile
    assert estimate(trainings(NAIVE), H100).seconds == pytest.approx(120)
    other = replace(H100, training={"hoverlite": replace(H100.training["hoverlite"], batch=8)})
    assert estimate(trainings(NAIVE), other).unknown == ("hoverlite",)
    other = replace(H100, segmenter_encoder="resnet50")
    assert estimate(trainings(NAIVE), other).unknown == ("hoverlite",)


def test_a_setting_that_came_later_does_not_make_old_measurements_worthless(place):
    old = line(NAIVE, 60)
    config = json.loads(old["config"])
    del config["model"]["segmenter"][1]["widths"]
    write(place, "h100", old | {"config": json.dumps(config)})
    assert estimate(trainings(NAIVE), H100).seconds == 60


def test_a_training_with_a_mean_teacher_is_another_measurement(place):
    write(place, "h100", line(NAIVE, 60), line(NAIVE, 200, teacher={}))
    assert estimate(trainings(NAIVE), H100).seconds == 60
    assert estimate(trainings(NAIVE, taught=True), H100).seconds == 200


def test_another_machine_says_nothing_about_this_one(place, monkeypatch):
    write(place, "h100", line(NAIVE, 60))
    assert other_machines(H100) == []
    on(monkeypatch, "2 CPU cores")
    assert estimate(trainings(NAIVE), H100).unknown == ("hoverlite",)
    assert other_machines(H100) == [GPU]
    assert estimate(trainings(NAIVE), H100, GPU) == Estimate(60, (), "h100")


def test_another_profile_on_the_same_kind_of_machine_stands_in_where_its_settings_are_the_same(place):
    lite = load_profile("h100-hoverlite")
    write(place, "h100-hoverlite", line(NAIVE, 60, shared=7, profile=lite), line(replace(NAIVE, seed=1), 60, 9, lite))
    write(place, "unknown", line(NAIVE, 1, shared=1))
    found = estimate(ToGo(((NAIVE, False),), (NAIVE,)), H100)
    assert found == Estimate(68, (), "h100-hoverlite")
    slower = replace(H100, selection=replace(H100.selection, step=5))
    assert estimate(ToGo((), (NAIVE,)), slower).unknown == ("selection by cps",)


def test_time_spent_counts_a_shared_synthesis_once():
    runs = pd.DataFrame([line(OURS, 60, 30), line(replace(OURS, rounds=0), 60, 30), line(NAIVE, 60, 12)])
    assert spent_minutes(runs) == pytest.approx((3 * 60 + 30 + 12) / 60)
    assert spent_minutes(None) == 0
    assert shared_key(OURS) == shared_key(replace(OURS, rounds=0, segmenter="hovernet"))
    assert shared_key(OURS) != shared_key(NAIVE)
