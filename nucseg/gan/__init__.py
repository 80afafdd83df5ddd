"""Generators of H&E images from label maps: CSinGAN (Sec. III-B) and the rivals of Table II, behind one interface.

A synthesiser is a file with a `Synthesizer` and its frozen configuration, named in `REGISTRY`; using one imports none
of the others.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import torch

from nucseg.config import nearest
from nucseg.gan.base import Synthesizer
from nucseg.gan.divergence import Divergence, DivergenceError, DivergenceWarning

# name of Table II's row -> (module, synthesiser, configuration, settings that the row fixes)
REGISTRY: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "csingan": ("nucseg.gan.csingan", "CSinGAN", "CSinGANConfig", {}),
    "csingan-no-cwd": ("nucseg.gan.csingan", "CSinGAN", "CSinGANConfig", {"gamma": 0.0, "delta": 0.0}),
    "singan": ("nucseg.gan.singan", "SinGAN", "SinGANConfig", {}),
    "pix2pix": ("nucseg.gan.pix2pix", "Pix2Pix", "Pix2PixConfig", {}),
    "cyclegan": ("nucseg.gan.cyclegan", "CycleGAN", "CycleGANConfig", {}),
}


def config_class(name: str) -> type:
    """Return the frozen configuration of the synthesiser `name`."""
    module, _, config, _ = _entry(name)
    return getattr(importlib.import_module(module), config)


def build(name: str, config: Any = None, device: str | torch.device | None = None) -> Synthesizer:
    """Make an untrained synthesiser.

    Parameters
    ----------
    name
        A name of `REGISTRY`: ``"csingan"``, ``"csingan-no-cwd"`` (D_g alone, gamma = delta = 0), ``"singan"``,
        ``"pix2pix"``, ``"cyclegan"``.
    config
        Its configuration (an instance of `config_class(name)`); None for the defaults. What the name fixes wins.
    device
        Where to train; None for the first CUDA device, or the CPU where there is none.

    Raises
    ------
    ValueError
        For an unknown name, with the nearest valid one.
    TypeError
        If `config` is the configuration of another synthesiser.
    """
    module, synthesiser, _, fixed = _entry(name)
    wanted = config_class(name)
    config = wanted() if config is None else config
    if not isinstance(config, wanted):
        raise TypeError(f"{name}: expected a {wanted.__name__}, got {type(config).__name__}")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    config = dataclasses.replace(config, **fixed)
    return getattr(importlib.import_module(module), synthesiser)(config, torch.device(device))


def _entry(name: str) -> tuple[str, str, str, dict[str, Any]]:
    if name not in REGISTRY:
        raise ValueError(f"unknown synthesiser {name!r}; {nearest(str(name), REGISTRY)}")
    return REGISTRY[name]


__all__ = ["REGISTRY", "Divergence", "DivergenceError", "DivergenceWarning", "Synthesizer", "build", "config_class"]
