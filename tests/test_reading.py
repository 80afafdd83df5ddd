"""The tables of docs/results.md say what results.csv says."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from nucseg.results import read_results
from nucseg.stats import seed_test
from nucseg.store import published
from nucseg.tables.pages import fill
from nucseg.tables.reading import TABLES, choices, elsewhere, nuclei, recipes

PAGE = Path(__file__).parent.parent / "docs" / "results.md"


def scores(profile, selection, rounds):
    lines = read_results(published("tables", profile) / "results.csv")
    lines = lines[(lines["dataset"] == "kumar") & (lines["selection"] == selection) & (lines["rounds"] == rounds)]
    return lines[lines["round"] == rounds].groupby("seed")["aji"].mean()


def printed(mean, low, high):
    return f"{mean:+.3f} ({low:+.3f} to {high:+.3f})".replace("-", "−")


def row(table, name):
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_the_page_is_what_the_committed_results_give():
    changed = subprocess.run(
        ["git", "status", "--porcelain", "--", "tables"], cwd=PAGE.parent.parent, capture_output=True, text=True
    )
    if changed.returncode or changed.stdout:
        pytest.skip("tables/ is not as committed: results were measured anew here (make readme shows them)")
    text = PAGE.read_text(encoding="utf-8")
    assert fill(text, TABLES, every=True) == text, "run: make readme"


def test_the_gain_of_a_choice_is_that_of_its_seeds_and_of_those_that_the_pilot_did_not_have():
    cells = row(choices(), "K-means")
    one, chance = scores("sample-choices", "kmeans", 0), scores("sample-choices", "random-crop", 0)
    assert cells[1] == printed(*seed_test(one, chance)[:3])
    new = [seed for seed in one.index if seed not in (21, 100, 500, 1000)]
    assert cells[2] == printed(*seed_test(one[new], chance[new])[:3])
    assert row(choices(), "random crops")[1].startswith(f"{chance.mean():.3f} ± ")


def test_the_gain_by_the_teacher_is_paired_by_the_patches():
    cells = row(recipes(), "K-means")
    one, alone = scores("sample-recipes", "kmeans", 1), scores("sample-choices", "kmeans", 0)
    assert cells[1].startswith(f"{one.mean():.3f} ± ")
    assert cells[2] == printed(*seed_test(one, alone[one.index], same=True)[:3])
    assert cells[4] == printed(*seed_test(one, scores("sample-recipes", "all", 1))[:3])
    assert row(recipes(), "all labels")[3:5] == ["", ""]


def test_another_segmenter_and_larger_patches_stand_beside_the_first():
    cells = row(elsewhere(), "k-center")
    first, rcnn, large = (
        (scores(profile, "k-center", 0), scores(profile, "random-crop", 0))
        for profile in ("sample-choices", "sample-choices-rcnn", "nine-cpu-choices")
    )
    same = [seed for seed in rcnn[0].index if seed not in (21, 100, 500, 1000)]
    rcnn = tuple(each[same] for each in rcnn)
    assert cells[1] == printed(*seed_test(*(each[same] for each in first))[:3])
    assert cells[2] == f"{rcnn[0].mean():.3f} ± {rcnn[0].std():.3f}"
    assert cells[3] == printed(*seed_test(*rcnn)[:3])
    assert cells[6] == printed(*seed_test(*large)[:3])
    assert row(elsewhere(), "random crops")[1] == row(elsewhere(), "random crops")[6] == ""


def test_what_leaving_out_patches_without_nuclei_gains_is_no_pair_since_other_patches_are_chosen():
    one, alone = scores("sample-nuclei", "cps", 0), scores("sample-choices", "cps", 0)
    cells = row(nuclei(), "CPS")
    assert cells[1] == f"{one.mean():.3f} ± {one.std():.3f}"
    assert cells[2] == printed(*seed_test(one, alone[one.index], same=False)[:3])
    assert row(nuclei(), "random crops")[2].startswith("+0.026 (")
