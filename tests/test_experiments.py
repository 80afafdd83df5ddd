"""The distinct experiments behind the rows of the tables, and the settings that lay them out."""

from __future__ import annotations

import dataclasses
import pickle

import pytest

from nucseg.config import ConfigError, from_mapping
from nucseg.experiments import Experiment, GridSettings, experiments_of, grid
from nucseg.paper import TABLES, rows

ROWS = [row for table in TABLES for row in rows(table)]
BY_ID = {row.id: row for row in ROWS}


def test_table_1_is_what_the_paper_says_it_is():
    settings = GridSettings(seeds=(5,), rounds=2)
    first = experiments_of(BY_ID["I.rndcrop"], "kumar", settings)
    assert [e.seed for e in first] == [21, 100, 500, 1000]
    assert first[0] == Experiment("kumar", "random-crop", 9, 4, "csingan", "maskrcnn", 0, 21)
    assert [e.seed for e in experiments_of(BY_ID["I.rndcencrop"], "kumar", settings)] == [21, 100, 500, 1000]
    assert experiments_of(BY_ID["I.cps-plabel"], "kumar", settings) == (
        Experiment("kumar", "cps", 9, 4, "csingan", "maskrcnn", 2, 5),
    )


def test_full_supervision_annotates_everything_and_knows_no_k():
    (experiment,) = experiments_of(BY_ID["IV.dist"], "folder-without-k1", GridSettings(seeds=(0,)))
    assert experiment == Experiment("folder-without-k1", "all", 0, 0, "naive", "dist", 0, 0)
    assert experiment.supervision == "full"


def test_table_6_scales_k1_with_the_dataset_and_takes_k2_as_printed():
    def k(row, dataset):
        experiment = experiments_of(BY_ID[row], dataset, GridSettings(seeds=(0,)))[0]
        return experiment.k1, experiment.k2

    assert [k(f"VI.k1-{n}", "kumar") for n in (6, 9, 12)] == [(6, 4), (9, 4), (12, 4)]
    assert [k(f"VI.k1-{n}", "tnbc") for n in (6, 9, 12)] == [(4, 4), (6, 4), (8, 4)]
    assert [k(f"VI.k2-{n}-csingan", "monuseg") for n in (3, 4, 8)] == [(18, 3), (18, 4), (18, 8)]


def test_a_dataset_without_k1_is_an_error_that_says_what_to_add():
    with pytest.raises(ValueError, match="no K1 for dataset 'tissue', only for kumar, monuseg, tnbc"):
        experiments_of(BY_ID["I.cps"], "tissue", GridSettings())


def test_equal_experiments_of_several_tables_are_one():
    settings = GridSettings(seeds=(1,))
    same = [experiments_of(BY_ID[name], "kumar", settings) for name in ("I.cps", "II.csingan", "VI.k1-9-csingan")]
    assert same[0] == same[1] == same[2]
    found = grid("kumar", settings)
    every = [e for row in ROWS for e in experiments_of(row, "kumar", settings)]
    assert len(found) == len(set(found)) == len(set(every)) < len(every)
    # By hand. Table I: 2 x 4 seeds + 8. II: 5 more. III: 6 x 4 seeds + full. IV: 6 full + HoVer-Net + Ours. V: none.
    # VI: K1 6 and 12 and K2 3 and 8, each with and without; its w/o CSinGAN at 9, 4 is Table II's NaiveAug.
    assert len(found) == 16 + 5 + 25 + 7 + 0 + 8


def test_the_grid_keeps_to_the_tables_and_rows_asked_for():
    settings = GridSettings(seeds=(1,), rows={"I": ("cps", "kmeans"), "II": ("*",)})
    assert [e.selection for e in grid("kumar", settings, tables=["I"])] == ["cps", "kmeans"]
    assert len(grid("kumar", settings)) == 7
    assert grid("kumar", settings, tables=["IV"]) == ()


def test_a_substitute_stands_in_everywhere_but_in_the_rows_that_keep_their_own():
    settings = GridSettings(substitutes={"maskrcnn": "hoverlite"}, keep=("I.cps",), seeds=(1,))
    names = {row.id: settings.segmenter(row) for row in ROWS}
    assert names["I.cps"] == "maskrcnn"
    assert names["I.kmeans"] == names["II.csingan"] == names["IV.mrcnn"] == "hoverlite"
    assert names["IV.hovernet"] == "hovernet"
    assert experiments_of(BY_ID["I.kmeans"], "kumar", settings)[0].segmenter == "hoverlite"


def test_settings_come_from_a_profile_file():
    values = {"k1": {"tissue": 3}, "seeds": [1, 2], "substitutes": {"maskrcnn": "hoverlite"}, "rows": {"I": ["cps"]}}
    settings = from_mapping(GridSettings, values, "profile sample: grid")
    assert settings.seeds == (1, 2)
    assert settings.rows == {"I": ("cps",)}
    with pytest.raises(ConfigError, match="grid: rows: Table I: unknown name 'cpps'; did you mean 'cps'"):
        from_mapping(GridSettings, {"rows": {"I": ["cpps"]}}, "grid")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"k1": {"kumar": 0}}, "k1: expected at least 1 patch for kumar, got 0"),
        ({"k2": 0}, "k2: expected at least 1, got 0"),
        ({"rounds": -1}, "rounds: expected at least 0"),
        ({"seeds": ()}, "seeds: expected at least one seed"),
        ({"random_seeds": (1, 1)}, "random_seeds: expected at least one seed and none twice"),
        ({"substitutes": {"maskrcnn": "hoverlight"}}, "substitutes: unknown name 'hoverlight'; did you mean 'hoverl"),
        ({"keep": ("I.csp",)}, "keep: unknown name 'I.csp'; did you mean 'I.cps'"),
        ({"rows": {"VII": ("*",)}}, "table: unknown name 'VII'"),
        ({"k1_grid": (0.5, 1.0)}, "k1_grid: expected three positive parts"),
    ],
)
def test_impossible_settings_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        GridSettings(**values)


def test_rows_run_in_the_order_in_which_a_profile_names_them():
    settings = GridSettings(rows={"III": ("full", "rndcrop-naive"), "I": ("cps-plabel", "*")}, k1={"kumar": 9})
    assert [row.key for row in settings.chosen("III")] == ["full", "rndcrop-naive"]
    others = [row.key for row in rows("I") if row.key != "cps-plabel"]
    assert [row.key for row in settings.chosen("I")] == ["cps-plabel", *others]
    assert settings.chosen("II") == []
    assert list(dict.fromkeys(each.selection for each in grid("kumar", settings, ["III"]))) == ["all", "random-crop"]


def test_rows_and_experiments_travel_to_other_processes():
    assert pickle.loads(pickle.dumps(ROWS)) == ROWS
    assert len({dataclasses.astuple(e) for e in grid("kumar", GridSettings())}) == len(grid("kumar", GridSettings()))
