import json
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from nucseg import runs
from nucseg.data.tissue import generate_tissue
from nucseg.experiments import Experiment
from nucseg.results import RESULT_COLUMNS, read_results
from nucseg.runs import Plan, add_results, run_one

PROFILE = Path(__file__).parent / "tiny.yaml"


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("NUCSEG_HOME", str(tmp_path))
    return tmp_path


def frame(seed=1, aji=0.5, fingerprint="f1", run_id="r1", dataset="tissue"):
    row = dict.fromkeys(RESULT_COLUMNS, 0)
    row |= {"profile": "tiny", "dataset": dataset, "fingerprint": fingerprint, "selection": "cps", "seed": seed}
    row |= {"augmentation": "naive", "segmenter": "hoverlite", "encoder": "e", "supervision": "patches", "best": 1}
    row |= {"image_id": "a", "organ": "o", "aji": aji, "run_id": run_id}
    return pd.DataFrame([row])


def lines(run_id="r1"):
    return pd.DataFrame([{"run_id": run_id, "started": "t", "seconds": 1.0, "device": "d", "versions": "v",
                          "peak_gpu_mb": None, "config": "{}"}])  # fmt: skip


def test_an_experiment_run_again_replaces_its_own_lines_only(place):
    add_results(frame(1, 0.5), lines())
    add_results(frame(2, 0.6), lines("r2"))
    add_results(frame(1, 0.7), lines("r3"))
    kept = read_results(place / "tables" / "tiny" / "results.csv")
    assert dict(zip(kept["seed"], kept["aji"], strict=True)) == {1: 0.7, 2: 0.6}


def test_results_on_other_data_are_put_aside_and_not_lost(place):
    add_results(frame(1, 0.5), lines())
    with pytest.warns(UserWarning, match="data of 'tissue' have changed; 1 older results moved"):
        add_results(frame(2, 0.6, "f2"), lines("r2"))
    folder = place / "tables" / "tiny"
    assert set(read_results(folder / "results.csv")["fingerprint"]) == {"f2"}
    assert set(read_results(folder / "results-tissue-f1.csv")["seed"]) == {1}


def test_a_failed_experiment_keeps_its_traceback_and_waits_to_be_asked_again(place, monkeypatch):
    plan = Plan(PROFILE, device="cpu")
    tried = []

    def broken(self, experiment):
        tried.append(experiment)
        raise RuntimeError("out of luck")

    monkeypatch.setattr("nucseg.pipeline.Pipeline.run", broken)
    assert set(plan.run()) == set(plan.experiments)
    record = json.loads(runs.failure_file(plan.pipeline, plan.experiments[0]).read_text())
    assert "out of luck" in record["traceback"]
    assert "why it failed" in plan.describe()
    count = len(tried)
    plan.run()
    assert len(tried) == count
    plan.run(retry=True)
    assert len(tried) == 2 * count


def test_no_experiment_starts_after_the_time_is_up(place, monkeypatch):
    plan = Plan(PROFILE, device="cpu")
    started = []

    def slow(pipeline, experiment):
        started.append(experiment)
        time.sleep(0.3)
        return True

    monkeypatch.setattr(runs, "run_one", slow)
    plan.run(minutes=0.2 / 60)
    assert len(started) == 1


def test_a_plan_names_rows_whose_model_does_not_exist_yet(place, tmp_path):
    text = PROFILE.read_text().replace("rows: {III: [rndcrop-naive, ours, full]}", "rows: {III: [ours], IV: [dist]}")
    (tmp_path / "more.yaml").write_text(text)
    plan = Plan(tmp_path / "more.yaml", device="cpu")
    assert [e.segmenter for e in plan.without_model] == ["dist"]
    assert "no model" in plan.describe()


def test_a_run_that_is_killed_goes_on_where_it_was(tmp_path, monkeypatch):
    profile, data = tmp_path / "killed.yaml", tmp_path / "tiny"
    profile.write_text(PROFILE.read_text().replace("rows: {III: [rndcrop-naive, ours, full]}", "rows: {III: [ours]}"))
    for split in ("train", "val", "test"):
        image, labels = generate_tissue("glandular", (128, 128), seed=len(split))
        for name in ("images", "labels"):
            (data / split / name).mkdir(parents=True)
        Image.fromarray(image).save(data / split / "images" / f"{split}.png")
        Image.fromarray(labels.astype("uint16")).save(data / split / "labels" / f"{split}.png")
    script = textwrap.dedent(f"""
        from nucseg.runs import Plan
        plan = Plan({str(profile)!r}, {str(data)!r}, device="cpu")
        failed = plan.run()
        assert not failed, plan.describe()
        print("finished")
    """)

    def start(folder):
        environment = {**__import__("os").environ, "NUCSEG_HOME": str(folder), "NUCSEG_QUIET": "1"}
        return subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)

    def stages(folder):
        return {p.parent.name for p in (folder / "runs").glob("*/*/*/meta.json")}

    whole = start(tmp_path / "whole")
    assert whole.communicate(timeout=300)[0] == "finished\n"

    done, killed = set(), 0
    for wanted in (2, 6):  # stages that are finished when the kill comes
        process = start(tmp_path / "cut")
        while process.poll() is None and len(stages(tmp_path / "cut")) < wanted:
            time.sleep(0.01)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed += 1
        process.communicate()
        assert done <= stages(tmp_path / "cut"), "a finished stage was lost"
        done = stages(tmp_path / "cut")
    last = start(tmp_path / "cut")
    assert last.communicate(timeout=300)[0] == "finished\n"
    assert killed, "no run was alive long enough to be killed"
    assert stages(tmp_path / "cut") == stages(tmp_path / "whole")
    assert not list((tmp_path / "cut" / "runs").glob("*/*/*.part"))

    def results(folder):
        frame = read_results(next((folder / "tables").glob("*/results.csv")))
        return frame.sort_values(["selection", "seed", "round", "image_id"]).reset_index(drop=True)

    pd.testing.assert_frame_equal(results(tmp_path / "cut"), results(tmp_path / "whole"))
    shutil.rmtree(tmp_path / "whole")


def test_one_experiment_reports_success(place, monkeypatch):
    plan = Plan(PROFILE, device="cpu")
    monkeypatch.setattr("nucseg.pipeline.Pipeline.run", lambda self, e: frame())
    monkeypatch.setattr("nucseg.pipeline.Pipeline.runs", lambda self, e: lines())
    assert run_one(plan.pipeline, Experiment("tissue", "cps", 1, 1, "naive", "hoverlite", 0, 1))
    assert (place / "tables" / "tiny" / "results.csv").is_file()
