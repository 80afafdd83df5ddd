"""Stain normalisation: what was stained otherwise comes out alike, and nothing else happens to an image."""

import inspect

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nucseg import stain
from nucseg.augment import AugmentConfig
from nucseg.data import load_dataset
from nucseg.inference import InferenceConfig
from nucseg.models.hover import HoverConfig
from nucseg.models.hoverlite import HoverLite, HoverLiteConfig
from nucseg.schedule import TrainingConfig
from nucseg.training import train


def stained(amounts, colours, white=(245, 240, 250)):
    """Make an image of given amounts (h, w, 2) of stains of given colours, as columns, in optical density."""
    colours = np.asarray(colours) / np.linalg.norm(colours, axis=0)
    return np.rint(np.exp(-amounts @ colours.T) * white).astype(np.uint8)


def tissue(seed=0, side=96):
    """Amounts of a glass border, eosin everywhere else, and haematoxylin in some places."""
    rng = np.random.default_rng(seed)
    amounts = np.zeros((side, side, 2))
    amounts[8:, :, 1] = rng.uniform(0.1, 0.8, (side - 8, side))
    blue = rng.random((side, side)) < 0.3
    blue[:8] = False
    amounts[blue] = np.stack((rng.uniform(0.5, 1.5, blue.sum()), rng.uniform(0, 0.05, blue.sum())), axis=1)
    return amounts


HE = np.array([[0.65, 0.1], [0.70, 0.95], [0.29, 0.2]])


def test_two_stainings_of_one_tissue_come_out_alike():
    amounts = tissue()
    other = np.array([[0.55, 0.2], [0.75, 0.85], [0.40, 0.45]])
    a, b = stained(amounts, HE), stained(0.6 * amounts, other, white=(225, 225, 225))
    apart = np.abs(a.astype(int) - b).mean()
    normal = [stain.normalise(image).astype(int) for image in (a, b)]
    assert apart > 20
    assert np.abs(normal[0] - normal[1]).mean() < 3
    blue = amounts[..., 0] > 0.5
    assert (normal[0][blue][:, 2] > normal[0][blue][:, 0]).all()  # still blue
    assert (normal[0][:8] > 250).all()  # glass is white


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.floats(0.4, 1.6))
def test_the_colours_of_the_stains_are_found(seed, strength):
    density = (strength * tissue(seed)[8:].reshape(-1, 2)) @ (HE / np.linalg.norm(HE, axis=0)).T
    found = stain.stain_colours(density[(density > 0.1).any(axis=1)])
    assert (found * HE / np.linalg.norm(HE, axis=0)).sum(axis=0) == pytest.approx([1, 1], abs=0.01)


def test_an_image_in_bands_is_the_image_at_once(monkeypatch):
    image = stained(tissue(), HE)
    whole = stain.normalise(image)
    monkeypatch.setattr(stain, "BAND", 1000)
    assert (stain.normalise(image) == whole).all()


def test_glass_stays_as_it_is_and_one_stain_alone_is_only_scaled():
    glass = np.full((64, 64, 3), 240, np.uint8)
    assert (stain.normalise(glass) == glass).all()
    amounts = tissue()
    amounts[..., 1] = 0
    image = stained(amounts, HE)
    normal = stain.normalise(image)
    assert np.isfinite(normal).all()
    darker = amounts[..., 0] > 1.2
    assert normal[darker].mean() < normal[~darker].mean()


@pytest.mark.parametrize(("shape", "dtype"), [((40, 40), np.uint8), ((40, 40, 3), float), ((40, 40, 4), np.uint8)])
def test_what_is_no_image_is_refused(shape, dtype):
    with pytest.raises(ValueError, match=r"expected a \(H, W, 3\) uint8 array"):
        inspect.unwrap(stain.normalise)(np.zeros(shape, dtype))  # users have no hook that refuses it first


def test_a_segmenter_normalises_what_it_learns_from_and_what_it_segments():
    sample = load_dataset("tissue").train[0]
    image, labels = sample.image[:96, :96], sample.labels[:96, :96]
    inference = InferenceConfig(tile=64, overlap=16, block=128)
    config = HoverLiteConfig(widths=(16, 8, 8, 8), frozen=5, inference=inference)
    normal = HoverLiteConfig(widths=(16, 8, 8, 8), frozen=5, inference=inference, hover=HoverConfig(stain="macenko"))
    schedule = TrainingConfig(iterations=3, batch=2, crop=64, validate_every=0, log_every=1)
    curves, found = [], []
    for settings_, seen in ((normal, image), (config, stain.normalise(image)), (config, image)):
        torch.manual_seed(0)
        model = HoverLite("efficientnet_lite0", settings_)
        curves.append(train(model, [(seen, labels)], schedule, augment=AugmentConfig()).curve)
        found.append(model.predict_instances(seen).labels)
    assert curves[0] == curves[1] != curves[2]
    assert (found[0] == found[1]).all()


def test_a_large_image_is_normalised_as_a_whole_not_block_by_block(monkeypatch):
    inference = InferenceConfig(tile=64, overlap=16, block=128)
    model = HoverLite(config=HoverLiteConfig(inference=inference, hover=HoverConfig(stain="macenko")), pretrained=False)
    seen = []
    monkeypatch.setattr(stain, "normalise", lambda image: (seen.append(image.shape), image)[1])
    model.predict_instances(np.full((100, 200, 3), 200, np.uint8))
    assert seen == [(100, 200, 3)]
    seen.clear()
    model.begin(np.full((100, 200, 3), 200, np.uint8))()
    assert seen == [(100, 200, 3)]
