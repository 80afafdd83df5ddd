"""What the steps of the workflow share."""

from __future__ import annotations

import json
from pathlib import Path

import torch

SELECTION_FILE, MODEL_FILE = "selection.json", "model.json"


class WorkflowError(RuntimeError):
    """A step's input is missing or does not fit the step before it."""


def pick_device(name: str = "") -> torch.device:
    """Return the named device, or the GPU where there is one, else the CPU."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def default_profile(device: str = "") -> str:
    """Return the profile for a training on one's own patches on a device."""
    return "slides" if pick_device(device).type == "cuda" else "slides-cpu"


def read_json(path: Path, advice: str) -> dict:
    """Read what an earlier step wrote, or say which step that is."""
    if not path.is_file():
        raise WorkflowError(f"no {path}: {advice}")
    return json.loads(path.read_text())
