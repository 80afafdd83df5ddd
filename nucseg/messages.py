"""Which errors and warnings of the ``nucseg`` command are one line for its user, and no traceback."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path

from nucseg.config import ConfigError


def is_expected(error: Exception) -> bool:
    """Say whether an error's message alone tells the user what to do: it was raised on purpose."""
    return isinstance(error, _expected()) or _of_a_value(error)


def _of_a_value(error: Exception) -> bool:
    """Say whether a ``raise`` of ours made a ValueError: our code checks what it is given, and says what is wrong.

    One that NumPy's compiled code or a built-in made has our line as its last one too, but there it is a fault of ours.
    """
    if not isinstance(error, ValueError):
        return False
    last = traceback.extract_tb(error.__traceback__)[-1]
    return Path(__file__).parent in Path(last.filename).parents and (last.line or "").startswith("raise ")


def one_line(usual: Callable[..., str]) -> Callable[..., str]:
    """Return a ``warnings.formatwarning`` that prints our own warnings as one line and leaves others to `usual`."""

    def shown(message: Warning | str, category: type[Warning], filename: str, *more: object) -> str:
        ours = Path(__file__).parent in Path(filename).parents
        return f"nucseg: {message}\n" if ours else usual(message, category, filename, *more)

    return shown


def _expected() -> tuple[type[Exception], ...]:
    # Imported when something has gone wrong: a command that trains nothing need not load torch.
    from nucseg.bundle.parts import BundleError
    from nucseg.bundle.wheels import WheelError
    from nucseg.data import DataError
    from nucseg.encoders import EncoderError
    from nucseg.gan import DivergenceError
    from nucseg.notebooks import NotebookFailed, ParameterError
    from nucseg.results import ResultsError
    from nucseg.steps import TrainingDivergedError
    from nucseg.store import OutOfTime
    from nucseg.workflow import WorkflowError

    errors = (ConfigError, DataError, EncoderError, NotebookFailed, ParameterError, WorkflowError, OSError)
    return (
        *errors,
        BundleError,
        DivergenceError,
        OutOfTime,
        ResultsError,
        TrainingDivergedError,
        WheelError,
    )
