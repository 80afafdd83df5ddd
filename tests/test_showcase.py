"""Figure 7 from pictures that came with another machine's results."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from nucseg.profiles import load_profile
from nucseg.results import read_results, read_runs
from nucseg.results.examples import read_examples
from nucseg.store import published
from nucseg.tables.showcase import showcase
from nucseg.tables.words import arm_in_words

WHOLE, SIDE = 600, 256  # an image, and the crop of it that travels


@pytest.fixture
def h100():
    """Committed results of a GPU: five runs."""
    folder, settings = published("tables", "h100"), load_profile("h100").grid
    results = read_results(folder / "results.csv")
    return results[results["dataset"] == "kumar"], settings, read_runs(folder / "runs.csv")


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("NUCSEG_HOME", str(tmp_path))
    return tmp_path


def receive(home, image_id, run_ids, package="a", corner=0):
    """Write what `nucseg results add` keeps: crops, and whole label maps."""
    folder = home / "runs" / "h100" / "received" / package / "examples" / "kumar" / image_id
    folder.mkdir(parents=True)
    labels = np.zeros((WHOLE, WHOLE), np.uint16)
    labels[290 + corner : 310, 290:310] = 1
    middle = slice((WHOLE - SIDE) // 2, (WHOLE + SIDE) // 2)
    Image.fromarray(np.full((SIDE, SIDE, 3), 200, np.uint8)).save(folder / "image.png")
    Image.fromarray(labels[middle, middle]).save(folder / "truth.png")
    for run_id in run_ids:
        Image.fromarray(labels).save(folder / f"{run_id}.png")
    return labels[middle, middle]


def test_predictions_are_cut_to_the_crop_and_several_packages_are_joined(home):
    labels = receive(home, "A", ["r1", "r2"])
    receive(home, "A", ["r3"], package="b")
    receive(home, "B", [])
    (example,) = read_examples("h100", "kumar", ["B", "A", "unknown"])
    assert example.image_id == "A"
    assert example.image.shape == (SIDE, SIDE, 3)
    assert set(example.predictions) == {"r1", "r2", "r3"}
    for found in (example.labels, *example.predictions.values()):
        assert np.array_equal(found, labels)


def test_the_papers_systems_come_first_by_their_names_and_other_arms_by_theirs(h100, home):
    results, settings, runs = h100
    order = list(results.groupby("image_id")["aji"].mean().sort_values().index)
    for image_id in (order[0], order[-1]):
        receive(home, image_id, results["run_id"].unique())
    figure = showcase(results, "kumar", settings, runs)
    first, second = np.array(figure.axes).reshape(2, -1)
    titles = [axis.get_title() for axis in first]
    assert titles[:2] == ["MRCNN + Ours", "MRCNN"]
    assert {"CPS + CSinGAN", "CPS + NaiveAug"} <= set(titles)
    assert first[0].get_ylabel().endswith("worst by AJI")
    assert second[0].get_ylabel().endswith("best by AJI")
    full = results[(results["selection"] == "all") & (results["image_id"] == order[0])]["aji"].iloc[0]
    assert first[1].get_xlabel() == f"AJI {full:.3f}"
    assert "not run in this profile: HoVer-Net + Ours, HoVer-Net" in figure.get_supxlabel()


def test_a_segmenter_that_stands_in_for_another_is_named(h100, home):
    results, settings, runs = h100
    settings = replace(settings, substitutes={"maskrcnn": "hoverlite"})
    receive(home, results["image_id"].iloc[0], results["run_id"].unique())
    figure = showcase(results.assign(segmenter="hoverlite"), "kumar", settings, runs)
    assert all("[hoverlite]" in axis.get_title() for axis in figure.axes)


def test_without_pictures_of_two_systems_there_is_no_figure(h100, home):
    results, settings, runs = h100
    assert showcase(results, "kumar", settings, runs) is None
    receive(home, results["image_id"].iloc[0], results["run_id"].unique()[:1])
    assert showcase(results, "kumar", settings, runs) is None


def test_a_run_whose_lines_stand_in_two_experiments_is_drawn_once(h100, home):
    results, settings, runs = h100
    receive(home, results["image_id"].iloc[0], results["run_id"].unique())
    twice = pd.concat([results, results[results["run_id"] == results["run_id"].iloc[0]].assign(rounds=2)])
    figure = showcase(twice, "kumar", settings, runs)
    titles = [axis.get_title() for axis in figure.axes]
    assert len(titles) == len(set(titles))


def test_arms_in_words():
    assert arm_in_words("cps", "csingan", 2) == "CPS + CSinGAN + 2 rounds"
    assert arm_in_words("k-center", "naive", 1, "mean teacher") == "k-center + NaiveAug + mean teacher"
    assert arm_in_words("all", "none", 0) == "all labels + no augmentation"
