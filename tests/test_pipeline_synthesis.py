"""The synthesis stage: a killed training goes on at its last finished scale, and a diverged one is on record."""

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nucseg.gan import DivergenceWarning, scale_training
from nucseg.gan.pyramid import PyramidSynthesizer
from nucseg.pipeline import Pipeline
from nucseg.profiles import load_profile


@pytest.fixture
def run(tmp_path):
    profile = load_profile(Path(__file__).parent / "tiny.yaml")
    config = replace(profile.synthesiser("csingan"), scales=2, min_size=32)
    made = Pipeline(replace(profile, synthesisers={"csingan": config}), device="cpu", results=tmp_path)
    # Selection needs an encoder's features; which patches are painted does not matter here.
    return made, replace(made.experiment(), selection="random-crop", seed=21)


def test_a_killed_training_goes_on_at_its_last_finished_scale(run, monkeypatch):
    pipeline, experiment = run
    trained, original = [], PyramidSynthesizer._train_scale

    def killed_once(self, n, data, progress):
        trained.append(n)
        if trained == [0, 1]:
            raise KeyboardInterrupt
        original(self, n, data, progress)

    monkeypatch.setattr(PyramidSynthesizer, "_train_scale", killed_once)
    with pytest.raises(KeyboardInterrupt):
        pipeline.synthesised(experiment)
    result = pipeline.synthesised(experiment)
    assert trained == [0, 1, 1]
    assert result.meta["divergences"] == []
    assert sorted(path.name for path in result.path.parent.iterdir() if path.name.endswith("scales")) == []
    monkeypatch.undo()
    again = Pipeline(pipeline.profile, pipeline.dataset, device="cpu", results=pipeline.store.root / "again")
    for (image, _), (other, _) in zip(pipeline.synthetic(experiment), again.synthetic(experiment), strict=True):
        np.testing.assert_array_equal(image, other)


def test_a_patch_whose_training_diverged_has_no_pairs_and_is_on_record(run, monkeypatch):
    pipeline, experiment = run
    original = scale_training.ScaleTraining.step

    def poisoned(self):
        original(self)
        if self.i == 0:
            with torch.no_grad():
                next(self.generator.parameters())[0] = float("nan")

    monkeypatch.setattr(scale_training.ScaleTraining, "step", poisoned)
    assert len(pipeline.sources(experiment)) >= 2, "one patch alone could not show that the others go on"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DivergenceWarning)
        result = pipeline.synthesised(experiment)
    assert sum(issubclass(each.category, DivergenceWarning) for each in caught) == 2
    assert result.meta["left_out"] == [0]
    assert "patch 0, scale 0" in result.meta["divergences"][0]
    pairs, count = pipeline.synthetic(experiment), pipeline.profile.mask_count
    assert len(pairs) == count * (len(pipeline.sources(experiment)) - 1)
    assert all(image.any() for image, _ in pairs)
