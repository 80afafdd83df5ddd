"""What the steps of the workflow share."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch

SELECTION_FILE, MODEL_FILE = "selection.json", "model.json"


class WorkflowError(RuntimeError):
    """A step's input is missing or does not fit the step before it."""


def pick_device(name: str = "") -> torch.device:
    """Return the named device, or the GPU where there is one, else the CPU.

    Raises
    ------
    WorkflowError
        For another kind of device, or a GPU where there is none.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise WorkflowError(f"no device {name!r}; there are cpu and cuda")
    if name and device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise WorkflowError(f"device {name!r} is not there: PyTorch sees {torch.cuda.device_count()} GPUs")
    return device


def default_profile(device: str = "") -> str:
    """Return the profile for a training on one's own patches on a device."""
    return "slides" if pick_device(device).type == "cuda" else "slides-cpu"


def read_json(path: Path, advice: str) -> dict:
    """Read what an earlier step wrote, or say which step that is."""
    if not path.is_file():
        raise WorkflowError(f"no {path}: {advice}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WorkflowError(f"{path}: not complete JSON ({error}); {advice.replace('first', 'again')}") from error


def unique_names(image_ids: Iterable[str]) -> dict[str, str]:
    """Return the name of each image's files: its own, and where several folders hold one of that name, with these."""
    image_ids = list(image_ids)
    count = Counter(Path(image_id).name for image_id in image_ids)
    return {i: Path(i).name if count[Path(i).name] == 1 else i for i in image_ids}
