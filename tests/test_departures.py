"""What the notes under the tables say of the trainings: only what their settings say, and what the paper has."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from nucseg.config import to_plain
from nucseg.profiles import load_profile
from nucseg.tables.departures import COMPARED, departures

PAPER = {name: to_plain(load_profile("paper").synthesiser(name)) for name in COMPARED}


@pytest.mark.parametrize("name", COMPARED)
def test_the_papers_own_settings_are_no_departure(name):
    assert said([PAPER[name]], augmentation=name) == ""


def said(synthesis, masks=None, augmentation="csingan"):
    configs = [
        json.dumps(
            {
                "model": {"segmenter": ["hoverlite", {}, "lite0"], "training": [{}, {}, {}]},
                "synthesis": {augmentation: one} if one else None,
                "masks": masks,
            }
        )
        for one in synthesis
    ]
    ids = [f"r{i}" for i in range(len(configs))]
    used = pd.DataFrame({"run_id": ids, "augmentation": augmentation, "rounds": 0})
    return " ".join(departures(used, pd.DataFrame({"run_id": ids, "config": configs})))


def test_settings_that_differ_are_named_with_those_of_the_paper():
    assert said([PAPER["csingan"]]) == ""
    other = PAPER["csingan"] | {"alpha": 30.0, "crop": 40}
    assert said([other]) == (
        "CSinGAN trained otherwise than in profile `paper`, which has the values in brackets: "
        "crop 40 (the whole patch), alpha 30 (10)."
    )
    assert "min_size half a patch (25)" in said([PAPER["singan"] | {"min_size": None}], augmentation="singan")


def test_a_setting_with_several_values_is_left_to_the_note_on_them():
    assert said([PAPER["csingan"] | {"crop": 40}, PAPER["csingan"] | {"crop": 50}]) == ""


def test_runs_that_do_not_tell_are_not_taken_for_the_papers():
    assert "these runs of an older version do not tell" in said([None])


def test_masks_whose_nuclei_touch_are_named():
    margin = {"margin": 22}
    assert "touch as often" in said([PAPER["csingan"]], {**margin, "touch": None})
    assert said([PAPER["csingan"]], {**margin, "touch": 0.0}) == ""
    assert said([PAPER["csingan"]]) == ""
