"""From results.csv to everything a reader sees, without images. All numbers here are made up."""

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from made_up import lines_of
from PIL import Image

from nucseg.paper import TABLES, rows
from nucseg.plans import experiments
from nucseg.profiles import load_profile
from nucseg.results import read_results
from nucseg.stats import paired_tests
from nucseg.tables.forest import forest_frame
from nucseg.tables.report import make_report

PROFILE = load_profile("sample")
PROFILE = replace(PROFILE, grid=replace(PROFILE.grid, budget_grid=(0.5, 1.0), budget_strategies=("cps", "kmeans")))


def made_up(dataset="tissue", skip=()):
    frames = []
    for number, e in enumerate(experiments((*TABLES, "S", "B"), dataset, PROFILE.grid)):
        if e.selection not in skip and e.segmenter in ("maskrcnn", "hoverlite"):
            score = 0.3 + 0.003 * (number * 7 % 11) + 0.01 * e.k1
            scores = [score, score + 0.1 + 0.001 * (number % 3), score + 0.2, *[score + 0.1] * 3]
            frames.append(lines_of(e, scores, profile="sample", run_id=f"{number:08x}"))
    return pd.concat(frames, ignore_index=True)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("NUCSEG_HOME", str(tmp_path))
    monkeypatch.delenv("NUCSEG_DATA", raising=False)
    folder = tmp_path / "tables" / "sample"
    folder.mkdir(parents=True)
    return folder


def test_everything_is_made_from_the_results_alone(place):
    lines = made_up()
    lines.to_csv(place / "results.csv", index=False)
    run = {"run_id": lines["run_id"].iloc[0], "started": "", "seconds": 90, "device": "1 GPU", "versions": ""}
    other = {**run, "run_id": "elsewhere"}
    pd.DataFrame([{**r, "peak_gpu_mb": None, "config": "{}"} for r in (run, other)]).to_csv(
        place / "runs.csv", index=False
    )
    report = make_report(PROFILE)
    assert set(report.tables) == {*TABLES, "IV of all", "S", "B"}
    assert set(report.figures) == {"forest", "budget", "ranks"}
    assert list(report.runs["run_id"]) == [run["run_id"]]
    assert (report.progress["with results"] == report.progress["experiments"]).all()
    paths = report.write()
    names = {path.relative_to(place.parent.parent).as_posix() for path in paths}
    assert len(names) == 4 * 9 + 3
    assert {"tables/sample/tableB_tissue.md", "tables/sample/table4_all.tex"} <= names
    with Image.open(place.parent.parent / "figures" / "sample" / "forest_tissue.png") as picture:
        assert picture.text["Description"] == report.signature
        assert set(picture.text["Source"].split()) == set(lines["run_id"])
    assert "synthetic" in report.signature


def test_of_ones_own_images_no_more_centre_crops_are_planned_than_there_are_images(place):
    grid = replace(PROFILE.grid, k1={"slides": 6}, budget_strategies=("*",))
    planned = experiments(["B"], "slides", grid, images=4)
    lines = [lines_of(e, [0.3, 0.4], profile="sample", run_id=f"{k:08x}") for k, e in enumerate(planned)]
    lines = pd.concat(lines, ignore_index=True)
    lines.to_csv(place / "results.csv", index=False)
    full = lines.loc[lines["selection"] == "all", "run_id"].iloc[0]
    config = {"experiment": {"dataset": "slides", "selection": "all"}, "pairs": {"real": 4}}
    run = {"run_id": full, "started": "", "seconds": 1, "device": "", "versions": "", "peak_gpu_mb": None}
    pd.DataFrame([{**run, "config": json.dumps(config)}]).to_csv(place / "runs.csv", index=False)
    report = make_report(replace(PROFILE, grid=grid), "slides")
    assert tuple(report.progress.loc["B"]) == (len(planned), len(planned))
    assert f"{len(planned)} of {len(planned)} planned experiments were run." in report.tables["B"].notes


def test_half_a_grid_shows_what_is_there(place):
    made_up(skip=("kmeans", "all", "random-crop")).to_csv(place / "results.csv", index=False)
    report = make_report(PROFILE)
    assert (report.progress["with results"] < report.progress["experiments"]).loc[["III", "S", "B"]].all()
    assert report.progress.loc["I", "with results"] == report.progress.loc["I", "experiments"]
    assert report.runs.empty
    report.write()


def test_a_table_that_the_profile_leaves_out_altogether_is_not_written(place):
    profile = replace(PROFILE, grid=replace(PROFILE.grid, rows={**PROFILE.grid.rows, "II": (), "VI": ()}))
    lines = made_up()
    lines[lines["k1"].isin([0]) & (lines["selection"] == "all")].to_csv(place / "results.csv", index=False)
    names = {path.name for path in make_report(profile).write()}
    assert not {"table2_tissue.md", "table6_tissue.md"} & names
    assert {
        "table1_tissue.md",
        "table3_tissue.md",
        "table4_tissue.md",
    } <= names  # I is meant


def test_without_results_it_says_what_makes_some(place):
    with pytest.raises(FileNotFoundError, match=r"no results of profile 'sample' on 'tissue' .*nucseg run --pro"):
        make_report(PROFILE)
    made_up("kumar").to_csv(place / "results.csv", index=False)
    with pytest.raises(FileNotFoundError, match=r"\(only on kumar\)"):
        make_report(PROFILE)
    assert make_report(PROFILE, "kumar").dataset == "kumar"


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parent.parent / "tables").glob("*/results.csv")), ids=lambda p: p.parent.name
)
def test_what_this_repository_has_measured_is_shown_without_images(path, tmp_path, monkeypatch):
    monkeypatch.setenv("NUCSEG_HOME", str(tmp_path))
    monkeypatch.setenv("NUCSEG_DATA", str(tmp_path))
    dataset = read_results(path)["dataset"].iloc[0]
    report = make_report(load_profile(path.parent.name), dataset, path.parent)
    assert report.progress["with results"].sum() > 0
    assert all(file.stat().st_size for file in report.write())


def test_the_forest_holds_every_row_of_the_paper_and_says_why_one_has_no_difference():
    lines = made_up(skip=("kmeans", "all"))
    frame = forest_frame(lines, "tissue", PROFILE.grid).set_index("id")
    assert [name for name in frame.index if not name.startswith("S.")] == [r.id for t in TABLES for r in rows(t)]
    assert frame.loc["I.kmeans", "why"] == "not run in this profile"
    assert frame.loc["I.cps", "why"] == "reference"
    assert frame.loc["III.full", "why"] == "not run yet"
    assert frame.loc["V.hovernet-ours", "why"] == "reference: not run yet"
    assert frame.loc["VI.k2-4-csingan", "why"] == "same runs as the reference"
    assert frame.loc["V.mrcnn-ours", "against"] == "MRCNN"
    assert frame.loc["S.random-crop", "why"] == "reference"
    assert (frame["mean difference"].notna() == (frame["why"] == "")).all()
    assert (frame.loc[frame["why"].str.startswith("not run"), "images"] == 0).all()


def test_a_difference_in_the_forest_is_that_of_its_two_rows():
    lines = made_up()
    frame = forest_frame(lines, "tissue", PROFILE.grid).set_index("id")
    same = (lines["k1"] == 6) & (lines["selection"] == "cps") & (lines["rounds"] == 0) & (lines["seed"] == 42)
    scores = {how: lines[same & (lines["augmentation"] == how)]["aji"].to_numpy() for how in ("naive", "csingan")}
    expected = paired_tests(scores["naive"], scores["csingan"])
    for name in ("II.naive", "VI.k1-9"):  # the same comparison, once the paper's and once ours
        found = frame.loc[name, ["mean difference", "CI low", "CI high"]].astype(float)
        assert tuple(found) == pytest.approx(expected[:3])
    assert frame.loc[["II.naive", "VI.k1-9", "VI.k2-4"], "repeats"].tolist() == ["", "II", "II"]
    assert frame.loc[["V.hovernet-ours", "III.full"], "repeats"].tolist() == ["III reversed", ""]
    own = lines[(lines["selection"] == "cps") & (lines["rounds"] == 1) & (lines["segmenter"] == "hoverlite")][
        "aji"
    ].mean()
    full = lines[lines["selection"] == "all"]["aji"].mean()
    assert frame.loc["V.hovernet-ours", "mean difference"] == pytest.approx(own - full)


@pytest.mark.parametrize(
    ("dataset", "label"), [("tissue", "K1 = 6 (paper: 9) w/ CSinGAN"), ("kumar", "K1 = 9 w/ CSinGAN")]
)
def test_the_forest_names_the_k1_in_force_and_the_printed_one_where_it_differs(dataset, label):
    frame = forest_frame(made_up(dataset), dataset, PROFILE.grid).set_index("id")
    assert frame.loc["VI.k1-9-csingan", "row"].startswith(label)
    assert frame.loc["VI.k1-9", "against"] == frame.loc["VI.k1-9-csingan", "row"]
    assert frame.loc["VI.k2-4", "row"].startswith("K2 = 4 w/o CSinGAN")
    assert frame.loc["VI.k1-12", "row"].startswith("K1 = 8 (paper: 12)" if dataset == "tissue" else "K1 = 12 ")
