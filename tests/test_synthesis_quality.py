"""The comparison of Table II's systems: fair patches to compare with, every system measured, nothing passed over."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from nucseg import synthesis_quality
from nucseg.figures.synthesis import figure_systems
from nucseg.patches import Patch
from nucseg.profiles import load_profile


@pytest.fixture
def slide():
    rng = np.random.default_rng(0)
    labels = np.zeros((96, 128), np.int32)
    for k in range(1, 40):
        r, c = rng.integers(2, 90), rng.integers(2, 120)
        labels[r : r + 4, c : c + 4] = k
    return rng.integers(0, 255, (96, 128, 3)).astype(np.uint8), labels


def test_held_out_patches_overlap_neither_the_annotated_one_nor_each_other(slide):
    image, labels = slide
    seen = np.zeros(labels.shape, int)
    seen[20:52, 30:62] += 1
    marked = np.where(seen[..., None] > 0, 255, image // 2)  # the annotated pixels are the only ones above 127
    position = np.arange(labels.size).reshape(labels.shape)
    free = synthesis_quality.held_out_patches(marked, labels, [Patch("x", 20, 30, 32)], 32, 4, seed=1)
    assert len(free) >= 3
    for patch, _ in free:
        assert patch.shape == (32, 32, 3)
        assert patch.max() <= 127
    again = synthesis_quality.held_out_patches(position[..., None], labels, [Patch("x", 20, 30, 32)], 32, 4, seed=1)
    pixels = np.concatenate([patch.ravel() for patch, _ in again])
    assert len(np.unique(pixels)) == len(pixels)


def test_held_out_patches_hold_nuclei_or_are_not_there(slide):
    image, labels = slide
    free = synthesis_quality.held_out_patches(image, labels, [], 32, 20, seed=0)
    assert all(each.any() for _, each in free)
    assert synthesis_quality.held_out_patches(image, labels * 0, [], 32, 4, seed=0) == []


@pytest.fixture
def frame():
    names = list(synthesis_quality.MEASURES)
    lines = []
    for k, system in enumerate(synthesis_quality.SYSTEMS):
        for patch in range(2):
            lines.append({"system": system, "patch": patch, **dict.fromkeys(names, k + patch)})
    return pd.DataFrame(lines)


def test_the_summary_averages_over_patches_in_the_order_of_table_ii(frame):
    table = synthesis_quality.summary(frame)
    assert list(table.index) == ["real", "naive", "pix2pix", "cyclegan", "singan", "csingan-no-cwd", "csingan"]
    assert table.loc["pix2pix", "adherence"] == pytest.approx(2.5)


def test_the_markdown_marks_the_best_synthesiser_and_neither_reference(frame):
    lines = synthesis_quality.as_markdown(frame, "caption").splitlines()
    real = next(line for line in lines if line.startswith("| real patches"))
    best_low = next(line for line in lines if line.startswith("| pix2pix"))
    best_high = next(line for line in lines if line.startswith("| CSinGAN |"))
    assert "**" not in real
    colour, adherence = (list(synthesis_quality.MEASURES).index(m) + 2 for m in ("colour_nuclei", "adherence"))
    assert best_low.split("|")[colour].strip() == "**2.50**"
    assert best_high.split("|")[adherence].strip() == "**6.50**"


def test_the_figure_shows_every_system_and_says_where_there_is_none():
    patch = np.zeros((16, 16, 3), np.uint8), np.eye(16, dtype=int)
    figure = figure_systems([patch, patch], {"a": [patch, None], "b": [patch, patch]})
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles == ["annotated patch", "a", "b"]
    assert [text.get_text() for axis in figure.axes for text in axis.texts] == ["none"]
    assert sum(bool(axis.images) for axis in figure.axes) == 10


def test_a_system_with_too_few_pictures_is_refused():
    patch = np.zeros((16, 16, 3), np.uint8), np.eye(16, dtype=int)
    with pytest.raises(ValueError, match="a: 1 pictures for 2 annotated patches"):
        figure_systems([patch, patch], {"a": [patch]})


def test_every_system_is_measured_on_the_smallest_profile(tmp_path, monkeypatch):
    from pathlib import Path

    from nucseg.gan.cyclegan import CycleGANConfig
    from nucseg.gan.pix2pix import Pix2PixConfig
    from nucseg.gan.singan import SinGANConfig
    from nucseg.pipeline import Pipeline

    class Colours(torch.nn.Module):  # instead of an encoder: thousands of windows go through it
        def __init__(self, name, weights):
            super().__init__()

        def forward(self, windows):
            return torch.cat([windows.mean((2, 3)), windows.std((2, 3))], 1)

    monkeypatch.setattr(synthesis_quality, "Encoder", Colours)
    monkeypatch.setenv("NUCSEG_HOME", str(tmp_path))
    profile = load_profile(Path(__file__).parent / "tiny.yaml")
    small = {
        "csingan": profile.synthesiser("csingan"),
        "pix2pix": Pix2PixConfig(epochs=1, decay_epochs=0, channels=2, critic_channels=2, depth=3),
        "cyclegan": CycleGANConfig(epochs=1, decay_epochs=0, channels=2, critic_channels=2, blocks=1),
        "singan": SinGANConfig(scales=2, min_size=32, channels=4, steps=2, d_steps=1, g_steps=1, calibration_steps=1),
    }
    run = Pipeline(replace(profile, synthesisers=small), device="cpu", results=tmp_path / "runs")
    csv, page, picture = synthesis_quality.write(run)
    frame = pd.read_csv(csv)
    assert set(frame["system"]) == set(synthesis_quality.SYSTEMS)
    assert frame.groupby("system")["patch"].nunique().eq(len(run.sources(run.experiment()))).all()
    assert frame[["colour_nuclei", "adherence", "memorisation"]].notna().all().all()
    # real patches are nearer to each other than what two steps of a GAN have painted
    table = synthesis_quality.summary(frame)
    assert table.loc["real", "colour_background"] < table.loc["csingan", "colour_background"]
    assert "CSinGAN(w/o CwD)" in page.read_text()
    assert picture.stat().st_size > 10_000


def test_what_decides_which_patches_hold_nuclei_is_part_of_the_key():
    def key(min_area):
        profile = load_profile("sample")
        stored = SimpleNamespace(key="k")
        run = SimpleNamespace(
            profile=replace(profile, masks=replace(profile.masks, min_area=min_area)),
            dataset=SimpleNamespace(name="tissue"),
            device=torch.device("cpu"),
            experiment=lambda **changes: replace(profile.ours("tissue"), **changes),
            selected=lambda _: stored,
            trained=lambda _: stored,
            store=SimpleNamespace(get=lambda stage, what, make, inputs, code: (what, inputs)),
        )
        return synthesis_quality.measured(run, "real")

    assert key(10) == key(10) != key(11)
