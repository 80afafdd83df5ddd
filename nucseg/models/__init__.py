"""Segmenters by name (Table IV); a model's file is imported when it is first built."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, NamedTuple

from nucseg.config import nearest
from nucseg.models.base import Instances, Segmenter

__all__ = ["REGISTRY", "Entry", "Instances", "Segmenter", "build", "config_class", "encoder_of", "teachable"]


class Entry(NamedTuple):
    """Where a segmenter lives: module, class, and class of its configuration.

    Attributes
    ----------
    own_encoder
        Of an architecture that is its own encoder, whose class takes no `encoder`; "" takes any encoder by name.
    teachable
        Whether a mean teacher can teach it, as `nucseg.models.hover.HoverSegmenter` says.
    """

    module: str
    model: str
    config: str
    own_encoder: str = ""
    teachable: bool = False


REGISTRY = {
    "maskrcnn": Entry("nucseg.models.maskrcnn", "MaskRCNN", "MaskRCNNConfig"),
    "hoverlite": Entry("nucseg.models.hoverlite", "HoverLite", "HoverLiteConfig", teachable=True),
    "hovernet": Entry("nucseg.models.hovernet", "HoverNet", "HoverNetConfig", "preact-resnet50", teachable=True),
    "dist": Entry("nucseg.models.dist", "Dist", "DistConfig", "unet"),
    "micronet": Entry("nucseg.models.micronet", "MicroNet", "MicroNetConfig", "micronet"),
    "mdcnet": Entry("nucseg.models.mdcnet", "MDCNet", "MDCNetConfig"),
    "dpmsff": Entry("nucseg.models.pffnet", "PFFNet", "DPMSFFConfig"),
    "pffnet": Entry("nucseg.models.pffnet", "PFFNet", "PFFNetConfig"),
}


def build(
    name: str,
    encoder: str | None = None,
    config: Any = None,
    weights: str | Path | None = None,
    pretrained: bool = True,
) -> Segmenter:
    """Build a segmenter.

    Parameters
    ----------
    name
        A key of `REGISTRY`.
    encoder
        Name of a pretrained encoder of `nucseg.encoders`; None = the model's own default. Segmenters with an
        `Entry.own_encoder` leave this aside, so that one profile can name an encoder for all its segmenters.
    config
        An instance of ``config_class(name)``; None = its defaults.
    weights
        File of the encoder's weights, for those that cannot be downloaded here.
    pretrained
        False starts from random weights, for ablations and tests.

    Raises
    ------
    ValueError
        For an unknown name, with the nearest known one.
    """
    entry = _entry(name)
    model = getattr(importlib.import_module(entry.module), entry.model)
    expected = config_class(name)
    if config is not None and not isinstance(config, expected):
        raise TypeError(f"config: {name} takes a {expected.__name__}, got {type(config).__name__}")
    chosen = {"encoder": encoder} if encoder is not None and not entry.own_encoder else {}
    return model(**chosen, config=config or expected(), weights=weights, pretrained=pretrained)


def encoder_of(name: str, encoder: str) -> str:
    """Return the encoder that a segmenter starts from when it is offered `encoder`: its own, or the offered one."""
    return _entry(name).own_encoder or encoder


def teachable(name: str) -> bool:
    """Return whether a mean teacher can teach a segmenter."""
    return _entry(name).teachable


def config_class(name: str) -> type:
    """Return the frozen dataclass of a segmenter's settings, for `nucseg.config.from_mapping`."""
    return getattr(importlib.import_module(_entry(name).module), _entry(name).config)


def _entry(name: str) -> Entry:
    if name not in REGISTRY:
        raise ValueError(f"unknown segmenter {name!r}: {nearest(name, REGISTRY)}")
    return REGISTRY[name]
