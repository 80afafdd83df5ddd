"""Trainings that are stopped go on where they were."""

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nucseg import stages
from nucseg.checkpoints import Checkpoint
from nucseg.data import Dataset, load_dataset
from nucseg.pipeline import Pipeline
from nucseg.profiles import load_profile
from nucseg.store import OutOfTime


def in_time():
    pass


def test_a_state_is_written_now_and_then_and_the_last_one_is_read(tmp_path):
    hurried, patient = Checkpoint(tmp_path / "a", in_time, seconds=0), Checkpoint(tmp_path / "b", in_time)
    for iteration in (5, 10):
        for checkpoint in (hurried, patient):
            checkpoint(lambda i=iteration: {"iteration": i, "weights": torch.ones(2)})
    assert hurried.read()["iteration"] == 10
    assert patient.read() is None
    hurried.remove()
    assert list(tmp_path.iterdir()) == []


def test_when_the_time_is_up_the_state_is_written_first(tmp_path):
    def late():
        raise OutOfTime("model")

    checkpoint = Checkpoint(tmp_path / "a", late)
    with pytest.raises(OutOfTime):
        checkpoint(lambda: {"iteration": 3})
    assert checkpoint.read() == {"iteration": 3}


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", pickle.dumps(Path("anything but tensors"))])
def test_a_file_that_holds_no_state_is_named(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError, match=r"a: not the state of a training .*; delete it"):
        Checkpoint(tmp_path / "a", in_time).read()


@pytest.fixture
def pipeline(tmp_path):
    tissue = load_dataset("tissue")
    data = Dataset("tiny", tissue.train[:3], tissue.val[:1], tissue.test[:2], synthetic=True, note=tissue.note)
    return lambda name: Pipeline(load_profile(Path(__file__).parent / "tiny.yaml"), data, "", "cpu", tmp_path / name)


def test_a_training_whose_time_is_up_goes_on_in_the_next_start_and_ends_the_same(pipeline, monkeypatch):
    run, unbroken = pipeline("stopped"), pipeline("unbroken")
    full = run.experiment(selection="all", k1=0, k2=0, augmentation="naive", rounds=0)
    asked, check_time = [], run.store.check_time

    def up_after_one_iteration(stage):
        asked.append(stage)
        if asked.count("model") == 3:  # twice before the training begins
            raise OutOfTime(stage)
        check_time(stage)

    monkeypatch.setattr(run.store, "check_time", up_after_one_iteration)
    with pytest.raises(OutOfTime):
        run.trained(full)
    (state,) = (run.store.root / "model").glob(".*.state")
    assert torch.load(state, weights_only=True)["iteration"] == 1

    def slow(*args, **settings):
        assert settings["resume_from"]["iteration"] == 1
        settings["resume_from"]["seconds"] = 1000.0  # as if the first part had taken so long
        return train(*args, **settings)

    train = stages.train
    monkeypatch.setattr(stages, "train", slow)
    result = run.trained(full)
    monkeypatch.setattr(stages, "train", train)
    whole = unbroken.trained(full)
    assert not state.exists()
    assert 1000 < result.meta["seconds"] < 1100
    assert whole.meta["seconds"] < 100
    assert run.curve(full).drop(columns="val").equals(unbroken.curve(full).drop(columns="val"))
    weights, wanted = (load_file(each.path / "model.safetensors") for each in (result, whole))
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)


def test_a_synthesis_whose_time_is_up_stops_behind_a_finished_scale(pipeline, monkeypatch):
    run = pipeline("stopped")
    ours, asked = run.experiment(), []

    def up_after_one_scale(stage):
        asked.append(stage)
        if asked.count("synthesis") == 3:
            raise OutOfTime(stage)

    monkeypatch.setattr(run.store, "check_time", up_after_one_scale)
    with pytest.raises(OutOfTime):
        run.synthesised(ours)
    (finished,) = (run.store.root / "synthesis").glob(".*.scales")
    save_file(load_file(finished), finished, {"seconds": "1000"})  # as if that scale had taken so long
    assert 1000 < run.synthesised(ours).meta["seconds"] < 1900


def test_a_full_disk_leaves_no_half_of_a_state(tmp_path, monkeypatch):
    def full(state, path):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    checkpoint = Checkpoint(tmp_path / "state", lambda: None, seconds=0)
    with pytest.raises(OSError, match="No space left"):
        checkpoint(lambda: {"iteration": 1})
    assert not list(tmp_path.iterdir())
