"""The state of a training on disk: after a kill, or when the time is up, the next start goes on inside the training."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nucseg.files import whole
from nucseg.store import OutOfTime

SECONDS = 60.0  # between two writings; a state is up to five times as large as the model


class Checkpoint:
    """Keeps the newest state of one training in a file, for `nucseg.training.train`.

    Parameters
    ----------
    path
        The file. Its name must stand for all that the training depends on.
    check_time
        Raises `OutOfTime` when the training should stop.
    seconds
        Least time between two writings.
    """

    def __init__(self, path: Path, check_time: Callable[[], None], seconds: float = SECONDS):
        self.path, self.check_time, self.seconds = path, check_time, seconds
        self.written = time.monotonic()

    def read(self) -> dict[str, Any] | None:
        """Return the state that an earlier run left behind, for `train`'s ``resume_from``, or None.

        Raises
        ------
        ValueError
            If the file holds something else.
        """
        if not self.path.is_file():
            return None
        try:
            return torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch has many words for it
            raise ValueError(
                f"{self.path}: not the state of a training ({error}); delete it to begin this training anew"
            ) from error

    def __call__(self, snapshot: Callable[[], dict[str, Any]]) -> None:
        """Write the state if the last writing is long ago or the time is up, which `OutOfTime` then says."""
        try:
            self.check_time()
        except OutOfTime:
            self._write(snapshot())
            raise
        if time.monotonic() - self.written >= self.seconds:
            self._write(snapshot())
            self.written = time.monotonic()

    def _write(self, state: dict[str, Any]) -> None:
        with whole(self.path) as part:
            torch.save(state, part)

    def remove(self) -> None:
        """Forget the state of a finished training."""
        self.path.unlink(missing_ok=True)
