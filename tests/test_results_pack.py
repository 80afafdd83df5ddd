"""What travels home: all numbers, how they were made, and pictures that give no image away."""

from __future__ import annotations

import io
import json
import re
import zipfile

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from test_results_add import made_up, runs_of

from nucseg.results import ResultsError
from nucseg.results.add import add
from nucseg.results.pack import CROP, PLAIN, pack, slug
from nucseg.store import Store

SIDE = 600


@pytest.fixture
def data(tmp_path):
    """A folder of three images of noise."""
    rng = np.random.default_rng(0)
    for i in range(3):
        for kind, array in (
            ("images", rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)),
            ("labels", rng.integers(0, 9, (SIDE, SIDE), dtype=np.uint16)),
        ):
            (tmp_path / "data" / "small" / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(tmp_path / "data" / "small" / kind / f"0{i}.png")
    return tmp_path / "data"


@pytest.fixture
def home(tmp_path, data, monkeypatch):
    """A results folder with two runs of one experiment each, and one that failed."""
    from nucseg.data import load_dataset

    monkeypatch.setenv("NUCSEG_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NUCSEG_DATA", str(data))
    dataset = load_dataset(data / "small")
    store = Store(tmp_path / "home" / "runs" / "tiny")
    frames = []
    for seed in (1, 2):

        def train(folder):
            (folder / "curve.json").write_text("[1, 2]")
            (folder / "selection.json").write_text("{}")
            (folder / "model.safetensors").write_bytes(b"large")

        def evaluate(folder, seed=seed):
            maps = {f"labels{i}": np.full(s.shape, seed, np.uint16) for i, s in enumerate(dataset.samples)}
            np.savez_compressed(folder / "predictions.npz", ids=[s.id for s in dataset.samples], **maps)

        model = store.get("model", {"seed": seed}, train, [dataset.fingerprint])
        result = store.get("evaluation", {}, evaluate, [model.key])
        about = {"dataset": "small", "fingerprint": dataset.fingerprint, "run_id": result.run_id}
        frames.append(made_up(seed, aji=(0.9, 0.1, 0.5), **about))
    store.get("evaluation", {"of": "nobody"}, lambda folder: None)  # of no reported run
    tables = tmp_path / "home" / "tables" / "tiny"
    tables.mkdir(parents=True)
    for name, make in (("results.csv", lambda f: f), ("runs.csv", runs_of)):
        pd.concat([make(frame) for frame in frames]).to_csv(tables / name, index=False)
    (store.root / "failed").mkdir()
    (store.root / "failed" / "abc.json").write_text(json.dumps({"dataset": "small", "traceback": "no"}))
    return tmp_path / "home"


def test_numbers_configurations_curves_and_failures_travel_and_models_do_not(home, tmp_path, monkeypatch):
    packed = pack(tmp_path / "out" / "a.zip")
    assert (packed.experiments, packed.failed, packed.left_out) == (2, 1, 0)
    with zipfile.ZipFile(packed.path) as zipped:
        names = zipped.namelist()
        metas = [json.loads(zipped.read(name)) for name in names if name.endswith(".meta.json")]
    stages = [name.split("/")[2] for name in names if "/stages/" in name]
    assert sorted(stages) == ["evaluation"] * 2 + ["model"] * 6  # meta, curve and selection of each
    assert sorted(meta["config"]["seed"] for meta in metas if meta["stage"] == "model") == [1, 2]
    assert "tiny/failed/abc.json" in names
    assert not [name for name in names if "safetensors" in name or name.endswith(".npz")]
    before = (home / "tables" / "tiny" / "results.csv").read_text()
    monkeypatch.setenv("NUCSEG_HOME", str(tmp_path / "elsewhere"))
    [added] = add([packed.path])
    assert added.new == 2
    assert (tmp_path / "elsewhere" / "tables" / "tiny" / "results.csv").read_text() == before


def test_pictures_are_of_the_worst_median_and_best_image_and_no_image_travels_whole(home, data, tmp_path):
    with zipfile.ZipFile(pack(tmp_path / "a.zip").path) as zipped:
        pictures = {
            name.removeprefix("tiny/examples/small/"): np.asarray(Image.open(io.BytesIO(zipped.read(name))))
            for name in zipped.namelist()
            if name.endswith(".png")
        }
    assert len(pictures) == 3 * (2 + 2)  # image, truth and two predictions of each
    assert [name[:2] for name in pictures if name.endswith("image.png")] == ["01", "00", "02"]  # AJI 0.1, 0.9, 0.5
    image = np.asarray(Image.open(data / "small" / "images" / "01.png"))
    truth = np.asarray(Image.open(data / "small" / "labels" / "01.png"))
    corner = (SIDE - CROP) // 2
    middle = (slice(corner, corner + CROP),) * 2
    assert np.array_equal(pictures["01/image.png"], image[middle])
    assert np.array_equal(pictures["01/truth.png"], truth[middle])
    predicted = [array for name, array in pictures.items() if name[:3] == "01/" and array.ndim == 2]
    assert sorted(array.max() for array in predicted if array.shape == (SIDE, SIDE)) == [1, 2]


def test_of_a_small_image_at_most_a_quarter_is_shown(home, data, tmp_path, monkeypatch):
    monkeypatch.setattr("nucseg.results.pack.CROP", 10_000)
    with zipfile.ZipFile(pack(tmp_path / "a.zip").path) as zipped:
        shown = Image.open(io.BytesIO(zipped.read("tiny/examples/small/01/image.png")))
    assert shown.size == (SIDE // 2, SIDE // 2)


def test_without_the_same_data_there_are_no_crops(home, data, tmp_path):
    (data / "small" / "images" / "02.png").write_bytes((data / "small" / "images" / "01.png").read_bytes())
    with zipfile.ZipFile(pack(tmp_path / "a.zip").path) as zipped:
        names = zipped.namelist()
    assert not [name for name in names if name.endswith(("image.png", "truth.png"))]
    assert len([name for name in names if name.endswith(".png")]) == 3 * 2


def test_the_size_is_kept_by_leaving_pictures_out_and_numbers_never(home, tmp_path):
    whole = pack(tmp_path / "a.zip")
    limit = whole.size - 200_000
    packed = pack(tmp_path / "b.zip", limit_mb=limit / 1e6)
    assert packed.path.stat().st_size == packed.size <= limit
    assert packed.examples + packed.left_out == whole.examples
    assert packed.left_out > 0
    assert packed.experiments == 2
    with pytest.raises(ResultsError, match="numbers alone take"):
        pack(tmp_path / "c.zip", limit_mb=0.001)
    assert not (tmp_path / "c.zip").exists()


def test_the_same_results_give_the_same_bytes(home, tmp_path):
    assert pack(tmp_path / "a.zip").path.read_bytes() == pack(tmp_path / "b.zip").path.read_bytes()


def test_names_give_different_safe_names_and_plain_ones_stay():
    names = ["切片一", "切片二", "Schnitt ä", "Schnitt ö", "a b", "a_b", "..", ".", "TCGA-18-5592-01Z"]
    assert len({slug(name) for name in names}) == len(names)
    assert slug("TCGA-18-5592-01Z") == "TCGA-18-5592-01Z"
    assert all(re.fullmatch(PLAIN, slug(name)) for name in names)


def test_a_profile_whose_name_would_be_refused_when_added_is_refused_when_packed(home, tmp_path):
    (home / "tables" / "tiny").rename(home / "tables" / "klein(er)")
    with pytest.raises(ResultsError, match=r"klein\(er\): the name of a profile .* letters, digits"):
        pack(tmp_path / "r.zip", numbers_only=True)


def test_one_profile_one_dataset_or_numbers_only(home, tmp_path):
    with zipfile.ZipFile(pack(tmp_path / "a.zip", numbers_only=True).path) as zipped:
        assert zipped.namelist() == ["tiny/results.csv", "tiny/runs.csv"]
    assert pack(tmp_path / "a.zip", profile="some/where/tiny.yaml", dataset="small").experiments == 2
    for only in ({"profile": "h100"}, {"dataset": "tissue"}):
        with pytest.raises(ResultsError, match=r"nothing to pack .*: no experiment has run"):
            pack(tmp_path / "b.zip", **only)
