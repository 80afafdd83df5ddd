"""Where tensors are computed: a device by its name, checked before the work that is for it."""

from __future__ import annotations

import torch

from nucseg.config import ConfigError


def device_of(name: str = "") -> torch.device:
    """Return the named device, which may be another machine's, or the GPU where there is one here, else the CPU.

    Raises
    ------
    ConfigError
        For another kind of device.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"no device {name!r}; there are cpu and cuda")
    return device


def pick_device(name: str = "") -> torch.device:
    """Return the named device of this machine, or the GPU where there is one, else the CPU.

    Raises
    ------
    ConfigError
        For another kind of device, or a GPU where there is none.
    """
    device = device_of(name)
    if name and device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name!r} is not there: PyTorch sees {torch.cuda.device_count()} GPUs")
    return device
