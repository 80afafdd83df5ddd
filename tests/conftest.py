"""Shared fixtures: real images when they are at hand, and threads that two test processes can share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two test processes share two cores

# Shapes in the annotations of tensor functions are enforced in tests, and in tests only.
_TYPED = ("nucseg.encoders", "nucseg.augment", "nucseg.inference", "nucseg.gan", "nucseg.models")
_hook = install_import_hook(_TYPED, "beartype.beartype")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Return the folder that holds kumar/ and tnbc/, or skip: the sets may not be redistributed."""
    root = os.environ.get("NUCSEG_DATA")
    if not root or not (Path(root) / "kumar").is_dir():
        pytest.skip("real images are not at hand: set NUCSEG_DATA to the folder with kumar/ and tnbc/")
    return Path(root)
