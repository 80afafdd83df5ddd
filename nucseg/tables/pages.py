"""Pages whose tables stand between marks, ``<!-- name -->`` and ``<!-- end of name -->``, and are made anew there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from nucseg.files import write_text

Makers = Mapping[str, Callable[[], str]]


def fill(text: str, makers: Makers, every: bool = False) -> str:
    """Return a page with the tables between their marks made anew.

    Parameters
    ----------
    text
        The page.
    makers
        What makes each table, by the name in its marks.
    every
        The page must have all of them, not just one.

    Raises
    ------
    ValueError
        If a mark is missing: half of a pair, any with `every`, or all.
    """
    found = False
    for name, make in makers.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        if (begin in text) != (end in text) or (every and begin not in text):
            raise ValueError(f"the page lacks the line {begin!r} or {end!r}, between which a table stands")
        if begin in text:
            before, rest = text.split(begin, 1)
            text, found = f"{before}{begin}\n{make()}\n{end}{rest.split(end, 1)[1]}", True
    if not found:
        raise ValueError(f"the page has no mark of a table: {', '.join(f'<!-- {name} -->' for name in makers)}")
    return text


def rewrite(paths: Iterable[str | Path], makers: Makers, every: bool = False) -> None:
    """Do as `fill` with files, each whole or not at all."""
    for path in map(Path, paths):
        write_text(path, fill(path.read_text(encoding="utf-8"), makers, every))
