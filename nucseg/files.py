"""Files that are either whole or not there: written beside their place, and moved there when they are done."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """Give a path to write a file to, which is moved to `path` at the end of the block, with its folder made.

    So no reader ever sees half of it, and an older file stays as it is until then. After an error in the block nothing
    is left; a process that is killed inside it leaves a hidden ``.<name>.<process id>.part``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name.lstrip('.')}.{os.getpid()}.part")
    try:
        yield part
        part.chmod(0o666 & ~umask())  # some writers keep their files to themselves
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def umask() -> int:
    """Return the permissions that the user takes from new files."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, in UTF-8, whole or not at all."""
    with whole(path) as part:
        part.write_text(text, encoding="utf-8")


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    with whole(path) as part:
        part.write_bytes(content)
