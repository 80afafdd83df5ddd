"""One progress helper that knows where it runs.

In a terminal it is a bar. Under ``nucseg reproduce`` the notebook's kernel reports to the file that
``NUCSEG_PROGRESS`` names, and the bar is the parent's. In a notebook it is one line, rewritten in place, which is
also readable in static HTML. Where standard error is a file or a pipe, each finished task is one line with its
seconds, and one that fails or is stopped leaves none. With ``NUCSEG_QUIET`` set it is silent. A
training's learning curve grows in a notebook, and elsewhere each of its validations is a line.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from tqdm import tqdm

from nucseg.files import write_text

_stack: list[Task] = []


class Task:
    """A piece of work in `total` steps; tasks nest, and the outer one moves on by what the inner one has done."""

    def __init__(self, text: str, total: int):
        self.text, self.total, self.done, self.detail = text, max(1, total), 0.0, ""
        self.started = time.monotonic()
        self.curve: list[Mapping[str, float]] = []
        self.display: Any = None  # of the curve, in a notebook

    def update(self, done: float, detail: str = "") -> None:
        """Say how many of the steps are done, and in a few words what is being done."""
        self.done, self.detail = min(done, self.total), detail
        _show()

    def measured(self, row: Mapping[str, float]) -> None:
        """Report a row of a learning curve: ``iteration``, the loss ``total``, and ``val`` where it was validated.

        A notebook shows the curve as it grows; elsewhere each validation is a line.
        """
        self.curve.append(row)
        words = f"loss {row['total']:.3f}" + (f", validation AJI {row['val']:.3f}" if "val" in row else "")
        self.update(row["iteration"], words)
        if os.environ.get("NUCSEG_PROGRESS") or _quiet():
            return
        if _in_notebook():
            _draw(self)
        elif "val" in row:
            say(f"{self.text}: iteration {row['iteration']:,.0f}, {words}")

    def __call__(self, done: float, total: float, detail: str = "") -> None:
        """Report in the form in which the stages do: so many done of so many."""
        self.update(self.total * done / max(total, 1), detail)


@contextlib.contextmanager
def task(text: str, total: int = 1) -> Iterator[Task]:
    """Open a task, show its progress while the block runs, and close it."""
    new = Task(text, total)
    _stack.append(new)
    _show()
    failed = True
    try:
        yield new
        failed = False
        _log(new)
    finally:
        _stack.remove(new)
        _show(finished=not _stack, failed=failed)


def say(text: str) -> None:
    """Write a line that stays above the bar."""
    if not os.environ.get("NUCSEG_PROGRESS") and not _quiet():
        tqdm.write(text, file=sys.stderr)


def fraction() -> float:
    """Return how much of the outermost open task is done, in 0..1."""
    inner = 0.0
    for each in reversed(_stack):
        inner = min(1.0, (each.done + inner) / each.total)
    return inner


def describe() -> str:
    """Return the open tasks, outermost first, in one line."""
    parts = [each.text for each in _stack]
    if _stack and _stack[-1].detail:
        parts.append(_stack[-1].detail)
    return " · ".join(parts)


_last = 0.0
_bar: tqdm | None = None


def _show(finished: bool = False, failed: bool = False) -> None:
    global _last, _bar
    now = time.monotonic()
    if not finished and now - _last < 0.2:
        return
    _last = now
    if path := os.environ.get("NUCSEG_PROGRESS"):
        write_text(path, json.dumps({"fraction": fraction(), "text": describe()}))
    elif _quiet():
        return
    elif _in_notebook():
        end = "\n" if finished else ""
        # The line of a task that failed stays at the share that was done.
        line = "" if failed else f"\r{100 if finished else 100 * fraction():3.0f} %  {describe():<90.90}"
        print(line, end=end, flush=True)
    elif sys.stderr.isatty():
        if _bar is None:
            _bar = tqdm(total=100, bar_format="{l_bar}{bar:30}| {elapsed}<{remaining} {desc}", leave=False)
        _bar.n = 100 * fraction()
        _bar.set_description_str(describe()[:80])
        if finished:
            _bar.close()
            _bar = None


def _draw(shown: Task) -> None:
    """Show a task's learning curve in a notebook, in the place where it was drawn before."""
    last = len(shown.curve) == 1 or shown.done >= shown.total
    if not last and time.monotonic() - getattr(shown.display, "drawn", 0.0) < 2.0:
        return
    from IPython.display import display
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.0, 2.2), layout="constrained")
    axis = figure.subplots()
    axis.plot([row["iteration"] for row in shown.curve], [row["total"] for row in shown.curve], label="loss")
    axis.set(xlabel="iteration", ylabel="loss", title=shown.text)
    if validated := [row for row in shown.curve if "val" in row]:
        other = axis.twinx()
        other.plot([row["iteration"] for row in validated], [row["val"] for row in validated], "o-", color="C1")
        other.set_ylabel("validation AJI", color="C1")
    if shown.display is None:
        shown.display = display(figure, display_id=True)
    else:
        shown.display.update(figure)
    if shown.display is not None:
        shown.display.drawn = time.monotonic()


def _in_notebook() -> bool:
    return "ipykernel" in sys.modules


def _quiet() -> bool:
    return bool(os.environ.get("NUCSEG_QUIET"))


def _log(closed: Task) -> None:
    """Write a finished task to a log: one line, not a bar of control characters."""
    if os.environ.get("NUCSEG_PROGRESS") or _quiet() or _in_notebook() or sys.stderr.isatty():
        return
    seconds = time.monotonic() - closed.started
    print(f"{time.strftime('%H:%M:%S')} {describe()} ({seconds:.1f} s)", file=sys.stderr, flush=True)
