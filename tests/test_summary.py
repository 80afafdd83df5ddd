"""The README's table of runs says what results.csv says, and nothing else."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

from nucseg.results import read_results
from nucseg.store import published
from nucseg.tables.summary import markdown, summary, with_summary

README = Path(__file__).parent.parent / "README.md"


def test_the_table_in_the_readme_is_what_the_committed_results_give():
    changed = subprocess.run(
        ["git", "status", "--porcelain", "--", "tables", "README.md"], cwd=README.parent, capture_output=True, text=True
    )
    if changed.returncode or changed.stdout:
        pytest.skip("tables/ is not as committed: results were measured anew here (make readme shows them)")
    text = README.read_text(encoding="utf-8")
    assert with_summary(text) == text, "run: make readme"


def test_an_arm_is_there_once_with_its_mean_over_images_and_then_seeds():
    frame = summary()
    assert len(frame)
    assert not frame.duplicated(["profile", "dataset", "arm"]).any()
    one = frame[(frame["profile"] == "h100-hoverlite") & (frame["arm"] == "RndCrop + NaiveAug, hoverlite")].iloc[0]
    lines = read_results(published("tables", "h100-hoverlite") / "results.csv")
    lines = lines[(lines["selection"] == "random-crop") & (lines["augmentation"] == "naive") & (lines["k1"] == 9)]
    lines = lines[(lines["rounds"] == 0) & (lines["segmenter"] == "hoverlite") & (lines["dataset"] == "kumar")]
    by_hand = [lines.loc[lines["seed"] == seed, "aji"].mean() for seed in lines["seed"].unique()]
    assert one["seeds"] == len(by_hand)
    assert one["AJI"] == pytest.approx(np.mean(by_hand))
    assert one["AJI sd"] == pytest.approx(np.std(by_hand, ddof=1))


def test_of_a_profile_without_the_papers_tables_the_strategies_are_listed():
    frame = summary()
    one = frame[(frame["profile"] == "sample-choices") & (frame["arm"] == "K-means + NaiveAug, hoverlite")]
    one = one[one["dataset"] == "kumar"].iloc[0]
    lines = read_results(published("tables", "sample-choices") / "results.csv")
    lines = lines[(lines["selection"] == "kmeans") & (lines["dataset"] == "kumar")]
    assert one["AJI"] == pytest.approx(lines.groupby("seed")["aji"].mean().mean())
    assert one["paper's row"] == ""
    assert "K-means + NaiveAug, hoverlite" not in set(frame.loc[frame["profile"] == "sample-seeds", "arm"])


def test_arms_with_one_seed_are_folded_away():
    frame = summary()
    shown, folded = markdown(frame).split("<details>")
    assert shown.count("\n| ") == (frame["seeds"] > 1).sum()
    assert f"{(frame['seeds'] == 1).sum()} more arms" in folded
    assert markdown(frame[frame["seeds"] == 1]).startswith("<details>")
    assert "<details>" not in markdown(frame[frame["seeds"] > 1])


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
    for (dataset, arm), lines in frame.groupby(["dataset", "arm"]):
        assert lines["its AJI"].nunique(dropna=False) == 1, (dataset, arm)
        if arm.endswith("hoverlite"):
            assert not lines["its AJI"].notna().any() or not set(lines["paper's row"]) & set(own)


def test_a_readme_without_the_marks_is_an_error():
    with pytest.raises(ValueError, match="<!-- runs -->"):
        with_summary("# nucseg")
