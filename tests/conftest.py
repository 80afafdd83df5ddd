"""Shared fixtures: real images when they are at hand, a GPU where there is one, threads for two test processes."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

os.environ.setdefault("NUCSEG_QUIET", "1")  # no progress bars
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two test processes share two cores; torch reads it when imported

import pytest
import torch
from jaxtyping import install_import_hook

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it is imported, which torchvision does

# Shapes in the annotations of tensor functions are enforced in tests, and in tests only. Not in nucseg.kernels: Triton
# reads its functions' source, and nothing else of the module.
_TYPED = (
    *("nucseg.encoders", "nucseg.augment", "nucseg.inference", "nucseg.gan", "nucseg.models", "nucseg.crops"),
    *("nucseg.selection.kmeans", "nucseg.norm_act", "nucseg.figures.csingan", "nucseg.stain"),
)
if importlib.util.find_spec("beartype"):  # machines with a GPU and no network may lack it
    _hook = install_import_hook(_TYPED, "beartype.beartype")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked ``gpu`` on a machine without one; ``pytest -m gpu`` runs nothing else."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Return the folder that holds kumar/ and tnbc/, or skip: the sets may not be redistributed."""
    root = os.environ.get("NUCSEG_DATA")
    if not root or not (Path(root) / "kumar").is_dir():
        pytest.skip("real images are not at hand: set NUCSEG_DATA to the folder with kumar/ and tnbc/")
    return Path(root)
