"""Whether a training step is just now recorded as a CUDA graph, or run as it will be recorded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

_active = False


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Record inside, or warm up for it: no shape may follow from values, and launches cost the host nothing later."""
    global _active
    before, _active = _active, True
    try:
        yield
    finally:
        _active = before


def is_recording() -> bool:
    """Is this inside `recording`?"""
    return _active
