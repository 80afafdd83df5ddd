"""The tables of README.md and docs/runs.md say what results.csv says, and nothing else."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

from nucseg.results import read_results
from nucseg.store import published
from nucseg.tables.pages import fill
from nucseg.tables.summary import MARKED, headline, headline_markdown, markdown, summary

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("page", ["README.md", "docs/runs.md"])
def test_the_table_on_a_page_is_what_the_committed_results_give(page):
    changed = subprocess.run(["git", "status", "--porcelain", "--", "tables"], cwd=ROOT, capture_output=True, text=True)
    if changed.returncode or changed.stdout:
        pytest.skip("tables/ is not as committed: results were measured anew here (make readme shows them)")
    text = (ROOT / page).read_text(encoding="utf-8")
    assert fill(text, MARKED) == text, "run: make readme"


def test_an_arm_is_there_once_with_its_mean_over_images_and_then_seeds():
    frame = summary()
    assert len(frame)
    assert not frame.duplicated(["profile", "dataset", "arm", "segmenter"]).any()
    one = frame[(frame["profile"] == "h100-hoverlite") & (frame["arm"] == "RndCrop + NaiveAug")]
    one = one[one["segmenter"] == "hoverlite"].iloc[0]
    lines = read_results(published("tables", "h100-hoverlite") / "results.csv")
    lines = lines[(lines["selection"] == "random-crop") & (lines["augmentation"] == "naive") & (lines["k1"] == 9)]
    lines = lines[(lines["rounds"] == 0) & (lines["segmenter"] == "hoverlite") & (lines["dataset"] == "kumar")]
    by_hand = [lines.loc[lines["seed"] == seed, "aji"].mean() for seed in lines["seed"].unique()]
    assert one["seeds"] == len(by_hand)
    assert one["AJI"] == pytest.approx(np.mean(by_hand))
    assert one["AJI sd"] == pytest.approx(np.std(by_hand, ddof=1))


def test_of_a_profile_without_the_papers_tables_the_strategies_are_listed():
    frame = summary()
    one = frame[(frame["profile"] == "sample-choices") & (frame["arm"] == "K-means + NaiveAug")]
    one = one[one["dataset"] == "kumar"].iloc[0]
    lines = read_results(published("tables", "sample-choices") / "results.csv")
    lines = lines[(lines["selection"] == "kmeans") & (lines["dataset"] == "kumar")]
    assert one["AJI"] == pytest.approx(lines.groupby("seed")["aji"].mean().mean())
    assert one["paper's row"] == ""
    # of one with them too, and with every budget, but what its tables show already
    seeds = frame[(frame["profile"] == "sample-seeds") & (frame["dataset"] == "kumar")]["arm"].tolist()
    assert seeds.count("K-means + NaiveAug") == seeds.count("CPS + NaiveAug") == 1
    assert "RndCrop + NaiveAug (K1 = 12)" in set(frame.loc[frame["profile"] == "sample", "arm"])


def test_arms_with_several_seeds_come_first():
    frame = summary()
    several, single = markdown(frame).split("## One seed")
    assert several.count("\n| ") - 1 == (frame["seeds"] > 1).sum()
    assert single.count("\n| ") - 1 == (frame["seeds"] == 1).sum()
    assert markdown(frame[frame["seeds"] == 1]).startswith("## One seed")
    assert "## One seed" not in markdown(frame[frame["seeds"] > 1])


def test_the_readme_shows_each_row_of_the_paper_once_with_the_papers_segmenter_where_that_was_run():
    frame = summary()
    shown = headline(frame)
    assert not shown.duplicated(["dataset", "paper's row"]).any()
    assert set(shown["profile"]) <= {"paper", "h100", "h100-hoverlite"}
    own = frame[(frame["profile"] == "h100") & frame["its AJI"].notna()]
    assert len(own)
    for _, one in own.iterrows():
        there = shown[(shown["dataset"] == one["dataset"]) & (shown["paper's row"] == one["paper's row"])]
        assert list(there["profile"]) == ["h100"]  # "paper" would win, but has no results yet
        assert f"| {one['AJI']:.3f} |" in headline_markdown(there)
    assert "nan" not in headline_markdown(shown)


def test_a_difference_stands_only_where_the_paper_had_the_same_segmenter():
    frame = summary()
    for _, one in frame.iterrows():
        same = one["segmenter"] == one["its segmenter"]
        assert np.isnan(one["difference"]) == (not same or np.isnan(one["its AJI"]))
        if same:
            assert one["difference"] == pytest.approx(one["AJI"] - one["its AJI"], nan_ok=True)
    assert frame["difference"].notna().any()
    assert "(Mask R-CNN)" in markdown(frame[frame["its segmenter"].eq("maskrcnn") & frame["difference"].isna()])


def test_a_printed_number_stands_only_beside_results_on_the_same_data():
    frame = summary()
    assert frame.loc[frame["dataset"] == "tissue", "its AJI"].isna().all()
    full = frame[(frame["dataset"] == "kumar") & (frame["paper's row"] == "III.full")]
    assert (full["its AJI"] == 0.5364).all()
    assert len(full)
    assert "nan" not in markdown(frame)


def test_one_arm_stands_beside_the_same_row_of_the_paper_in_every_profile():
    frame = summary()
    own = [f"IV.{name}" for name in ("hovernet", "hovernet-ours", "dist", "micronet", "mdcnet", "dpmsff", "pffnet")]
    for (dataset, arm, segmenter), lines in frame.groupby(["dataset", "arm", "segmenter"]):
        assert lines["its AJI"].nunique(dropna=False) == 1, (dataset, arm, segmenter)
        if segmenter == "hoverlite":
            assert not lines["its AJI"].notna().any() or not set(lines["paper's row"]) & set(own)
