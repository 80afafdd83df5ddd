"""The settings that results were made with: what counts as one, and where those of several runs differ."""

from __future__ import annotations

import json

import pytest

from nucseg.results.settings import changed, differences, experiment_of, settings_of


def config(iterations=200, segmenter="hoverlite", augment=True, **more):
    """A cell ``config`` of runs.csv, cut down to what has several levels."""
    model = {
        "segmenter": [segmenter, {"widths": [8, 8]}, "efficientnet_lite0"],
        "training": [{"iterations": iterations}, {"flip": True} if augment else None, {"real": 0.4}],
        "seed": 1,
        "device": "cpu",
    }
    return json.dumps({"experiment": {"seed": 1}, "model": model, "validation_aji": 0.5, **more})


def test_settings_have_the_names_of_the_profile_and_nothing_that_tells_arms_apart():
    assert settings_of(config(selection={"size": 128}, synthesis={"csingan": {"steps": 80}})) == {
        "hoverlite.segmenter.widths": "[8, 8]",
        "hoverlite.encoder": '"efficientnet_lite0"',
        "hoverlite.training.iterations": "200",
        "augment.flip": "true",
        "mix.real": "0.4",
        "selection.size": "128",
        "synthesis.csingan.steps": "80",
    }


@pytest.mark.parametrize("cell", ["", "{}", "[]", "3", '{"model": {"segmenter": 1, "training": 2}}', '{"model": null}'])
def test_a_cell_of_strangers_has_no_settings(cell):
    assert settings_of(cell) == {}


@pytest.mark.parametrize("cell", ["", "{}", "[]", "3", '{"experiment": 7}'])
def test_a_cell_of_strangers_describes_no_experiment(cell):
    assert experiment_of(cell) is None
    assert experiment_of(config()) == {"seed": 1}


def test_what_an_arm_lacks_is_no_difference():
    same = [config(), config(augment=False), config(segmenter="maskrcnn", iterations=900), config(selection=None), "{}"]
    assert differences([*same, config(synthesis={"csingan": {"steps": 80}}, selection={"size": 128})]) == []


def test_each_setting_with_several_values_is_named_with_its_runs():
    cells = [config(), config(), config(iterations=400), config(synthesis={"csingan": {"steps": 1}})]
    assert differences(cells) == ["hoverlite.training.iterations 200 in 3 run(s), 400 in 1 run(s)"]


def test_a_change_says_what_was_and_what_is():
    assert changed(config(), config(iterations=400)) == ["hoverlite.training.iterations 200, now 400"]
    assert changed(config(), config()) == changed(config(), config(segmenter="maskrcnn", iterations=9)) == []
