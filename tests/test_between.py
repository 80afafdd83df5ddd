"""Comparisons of two profiles: which rows meet, over which seeds, and what a wrong question is told."""

import numpy as np
import pandas as pd
import pytest
from test_tables import lines_of

from nucseg.experiments import experiments_of
from nucseg.paper import row
from nucseg.plans import budget_experiments
from nucseg.profiles import load_profile
from nucseg.results import ResultsError
from nucseg.stats import paired_tests, seed_test
from nucseg.tables.between import compare, write

ROWS = ("III.rndcrop-naive", "III.ours", "III.full")


def results_of(profile, seeds=4, gain=0.0, noise=0, **changes):
    """Made-up results of a profile's rows, one image's score apart from the next."""
    rng = np.random.default_rng(noise)
    frames = []
    for place, name in enumerate(ROWS):
        for experiment in experiments_of(row(name), "kumar", load_profile(profile).grid)[:seeds]:
            scores = 0.3 + 0.05 * place + gain + rng.normal(0, 0.01, 6)
            run = f"{profile} {name} {experiment.seed}"
            frames.append(lines_of(experiment, scores, **{"profile": profile, "run_id": run, **changes}))
    return pd.concat(frames, ignore_index=True)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A home with results of two profiles, and a function that writes others."""
    monkeypatch.setenv("NUCSEG_HOME", str(tmp_path))

    def put(profile, frame):
        folder = tmp_path / "tables" / profile
        folder.mkdir(parents=True, exist_ok=True)
        frame.to_csv(folder / "results.csv", index=False)

    put("sample-seeds", results_of("sample-seeds", noise=1))
    put("sample-teacher", results_of("sample-teacher", gain=0.04, noise=2))
    return put


def test_rows_meet_by_their_name_and_differences_are_those_of_the_tests_by_hand(place):
    frame = compare("sample-teacher", "sample-seeds", "kumar").set_index("id")
    assert set(frame.index) == {"III.rndcrop-naive", "I.cps-plabel", "III.full"}  # the first name of each arm
    mine, theirs = (
        lines[lines["selection"] == "all"]
        for lines in (results_of("sample-teacher", gain=0.04, noise=2), results_of("sample-seeds", noise=1))
    )
    full = frame.loc["III.full"]
    a, b = (lines.groupby("image_id")["aji"].mean() for lines in (mine, theirs))
    tests = paired_tests(a.to_numpy(), b.to_numpy())
    assert full["mean difference"] == pytest.approx(0.04, abs=0.01)
    expected = (tests.mean_difference, tests.ci_low, tests.ci_high, tests.t_p, tests.wilcoxon_p)
    found = full[["mean difference", "CI low", "CI high", "paired t", "Wilcoxon"]].to_numpy(float)
    np.testing.assert_allclose(found, expected)
    seeds = seed_test(*(lines.groupby("seed")["aji"].mean() for lines in (mine, theirs)), same=True)
    np.testing.assert_allclose(full[["seeds CI low", "seeds CI high", "seeds p"]].to_numpy(float), seeds[1:])
    assert (full["images"], full["seeds"]) == (6, 4)


def test_only_seeds_that_both_have_are_compared(place):
    place("sample-teacher", results_of("sample-teacher", seeds=2, gain=0.04, noise=2))
    full = compare("sample-teacher", "sample-seeds", "kumar").set_index("id").loc["III.full"]
    theirs = results_of("sample-seeds", noise=1)
    theirs = theirs[(theirs["selection"] == "all") & theirs["seed"].isin([21, 100])]
    assert full["seeds"] == 2
    assert full["second AJI"] == pytest.approx(theirs["aji"].mean())


def test_strategies_meet_too_and_all_labels_may_be_the_reference(place):
    for profile, gain in (("sample-choices", 0.0), ("sample-recipes", 0.03)):
        settings = load_profile(profile).grid
        plan = [e for e in budget_experiments("kumar", settings) if e.seed in (21, 100)]
        lines = [lines_of(e, np.full(6, 0.4 + gain + 0.1 * (e.selection == "all") + e.seed / 1e4)) for e in plan]
        place(profile, pd.concat(lines, ignore_index=True).assign(profile=profile, run_id=profile))
    frame = compare("sample-recipes", "sample-choices", "kumar").set_index("id")
    assert set(frame.index) == {"S.cps", "S.random-crop", "B.all"}
    np.testing.assert_allclose(frame["mean difference"], 0.03)
    frame = compare("sample-recipes", "sample-choices", "kumar", "B.all").set_index("id")
    assert frame.loc["S.cps", "mean difference"] == pytest.approx(-0.07)
    assert frame.loc["S.cps", "against"] == "all labels"


def test_every_row_may_be_compared_with_one_row_of_the_other(place):
    frame = compare("sample-teacher", "sample-seeds", "kumar", "III.full").set_index("id")
    assert frame["second AJI"].nunique() == 1
    assert set(frame["against"].str.partition(" [")[0]) == {"Fully-supervised Mask-RCNN"}
    with pytest.raises(ResultsError, match=r"no results for row 'IV.dist', only for .*III\.full"):
        compare("sample-teacher", "sample-seeds", "kumar", "IV.dist")


def test_a_profile_may_be_compared_with_a_row_of_its_own_but_no_row_with_itself(place):
    frame = compare("sample-seeds", "sample-seeds", "kumar", "III.full")
    assert set(frame["id"]) == {"III.rndcrop-naive", "I.cps-plabel"}


def test_what_cannot_be_compared_is_said(place):
    with pytest.raises(ResultsError, match="no results on 'tnbc'; nucseg run --profile sample-teacher"):
        compare("sample-teacher", "sample-seeds", "tnbc")
    with pytest.raises(ResultsError, match="no results on 'kumar'"):
        compare("sample-seeds", "h100", "kumar")
    place("sample-teacher", results_of("sample-teacher", fingerprint="beef"))
    with pytest.raises(ResultsError, match="data version beef, sample-seeds has f00d: not comparable"):
        compare("sample-teacher", "sample-seeds", "kumar")


def test_the_table_names_the_other_row_only_where_it_is_another(place):
    csv, plain = write("sample-teacher", "sample-seeds", "kumar")
    assert csv.name == "against_sample-seeds_kumar.csv"
    assert len(pd.read_csv(csv)) == 3
    assert "| against |" not in plain.read_text()
    _, other = write("sample-teacher", "sample-seeds", "kumar", "III.full")
    assert other.name == "against_sample-seeds_kumar_III-full.md"
    assert "| against |" in other.read_text()


def test_a_folder_of_images_is_found_by_its_name(place, tmp_path):
    expected, _ = write("sample-teacher", "sample-seeds", "kumar")
    text = expected.read_bytes()
    for folder in ("./kumar", tmp_path / "kumar", "somewhere/kumar/"):
        found, _ = write("sample-teacher", "sample-seeds", str(folder))
        assert (found, found.read_bytes()) == (expected, text)
