"""The strict notebook runner: papermill, without its silences.

papermill ignores a misspelt parameter, and runs parallel kernels over TCP ports that clash. Here an unknown or
ill-typed parameter is refused with the nearest valid name, the parameters cell holds literals only, kernels talk over
IPC under a unique path, and a failed notebook stops the run with the cell, the error and the command to go on with.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import queue
import re
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nucseg.config import check_name, nearest
from nucseg.store import home

NOTEBOOKS = ("01_cps", "02_mask_synthesis", "03_csingan", "04_segmentation", "05_tables")


class ParameterError(ValueError):
    """A notebook was given a parameter that it does not have, or a value of another type."""


class NotebookFailed(RuntimeError):
    """A cell of a notebook raised an error."""


def find(name: str) -> Path:
    """Return the path of a notebook by its name, ``"01_cps"``, or unambiguous beginning, ``"01"``."""
    folder = home() / "notebooks"
    found = [folder / f"{stem}.ipynb" for stem in NOTEBOOKS if stem.startswith(name)]
    if len(found) != 1:
        raise FileNotFoundError(f"no single notebook {name!r}; {nearest(name, NOTEBOOKS)}")
    if not found[0].is_file():
        raise FileNotFoundError(
            f"no notebook {found[0]}: the notebooks come with the repository, not with the package; "
            "run inside a clone, or set NUCSEG_HOME to one"
        )
    return found[0]


def parameters_of(path: Path) -> dict[str, Any]:
    """Return the parameters of a notebook and their defaults, read from its one cell tagged ``parameters``.

    Raises
    ------
    ParameterError
        If there is not exactly one such cell, or it holds anything but ``name = literal``: a value computed from
        another one would keep its old value when that one is replaced.
    """
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if "parameters" in cell["metadata"].get("tags", [])]
    if len(cells) != 1:
        raise ParameterError(f"{path.name}: expected one cell tagged 'parameters', found {len(cells)}")
    values: dict[str, Any] = {}
    for node in ast.parse("".join(cells[0]["source"])).body:
        if not (isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)):
            raise ParameterError(f"{path.name}: the parameters cell holds only lines 'name = literal'")
        try:
            values[node.targets[0].id] = ast.literal_eval(node.value)
        except ValueError:
            raise ParameterError(
                f"{path.name}: parameter {node.targets[0].id!r} is computed; write its value out"
            ) from None
    return values


def check_parameters(path: Path, given: Mapping[str, Any]) -> None:
    """Refuse parameters that the notebook does not have or whose type differs from the default's.

    An int is accepted where the default is a float. A default of None accepts anything.
    """
    defaults = parameters_of(path)
    for name, value in given.items():
        if name not in defaults:
            raise ParameterError(f"{path.name}: unknown parameter {name!r}; {nearest(name, defaults)}")
        expected = type(defaults[name])
        if expected is type(None) or type(value) is expected or (expected is float and type(value) is int):
            continue
        raise ParameterError(
            f"{path.name}: parameter {name!r} must be {expected.__name__} like its default {defaults[name]!r}, "
            f"got {type(value).__name__} {value!r}"
        )


def execute(
    path: Path,
    parameters: Mapping[str, Any],
    folder: Path,
    on_progress: Callable[[float, str], None] | None = None,
    resume: str = "",
) -> Path:
    """Run one notebook with papermill and write the executed notebook and its HTML page.

    Parameters
    ----------
    path
        The notebook.
    parameters
        Values for its parameters cell, checked first.
    folder
        Where ``<name>.ipynb`` and ``<name>.html`` go.
    on_progress
        Called about twice a second with the done fraction of the notebook's current task and a line of text.
    resume
        The command that goes on from here, for the message of a failure.

    Returns
    -------
    Path
        The HTML page.

    Raises
    ------
    NotebookFailed
        With the cell (its place in the executed notebook), the error and `resume`; what has run is written.
    """
    import nbformat
    import papermill
    from papermill.exceptions import PapermillExecutionError

    check_parameters(path, parameters)
    for name in ("NUCSEG_HOME", "NUCSEG_DATA", "NUCSEG_WEIGHTS"):  # the kernel works in a folder of its own
        if os.environ.get(name):
            os.environ[name] = str(Path(os.environ[name]).expanduser().resolve())
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / path.name
    _register_engine()
    with tempfile.TemporaryDirectory(prefix="nucseg-") as scratch, _watch(Path(scratch) / "progress", on_progress):
        try:
            papermill.execute_notebook(
                str(path), str(output), dict(parameters), engine_name="nucseg-ipc", progress_bar=False, cwd=scratch
            )
        except PapermillExecutionError as error:
            message = re.sub(r"\x1b\[[0-9;]*m", "", f"{error.ename}: {error.evalue}")
            raise NotebookFailed(_said(f"{path.name}, cell {error.cell_index}: {message}", output, resume)) from error
        except RuntimeError as error:  # nbclient's word for a kernel that is gone
            hint = "if its memory ran out, close other programs or take a smaller profile"
            message = f"{path.name}: {error}; {hint}"
            raise NotebookFailed(_said(message, output, resume)) from error
    from nbconvert import HTMLExporter

    notebook = nbformat.read(output, as_version=4)
    html = output.with_suffix(".html")
    html.write_text(HTMLExporter().from_notebook_node(notebook)[0], encoding="utf-8")
    return html


def _said(message: str, output: Path, resume: str) -> str:
    then = f"\nWhen it is mended, go on with: {resume}" if resume else ""
    return f"{message}\nThe notebook as far as it came: {output}{then}"


@contextlib.contextmanager
def _watch(path: Path, on_progress: Callable[[float, str], None] | None) -> Iterator[None]:
    """Read what the kernel reports through NUCSEG_PROGRESS, and pass it on until the block ends."""
    ended = threading.Event()

    def pass_on() -> None:
        while not ended.wait(0.5):
            try:
                state = json.loads(path.read_text(encoding="utf-8"))
            except FileNotFoundError:
                state = {"fraction": 0.0, "text": "starting the kernel"}
            if on_progress:
                on_progress(state["fraction"], state["text"])

    thread = threading.Thread(target=pass_on, daemon=True)
    os.environ["NUCSEG_PROGRESS"] = str(path)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        del os.environ["NUCSEG_PROGRESS"]


def _register_engine() -> None:
    """Give papermill an engine whose kernels talk over IPC sockets under a path of their own, and are heard."""
    from jupyter_client.asynchronous import AsyncKernelClient
    from jupyter_client.channels import AsyncZMQSocketChannel
    from jupyter_client.manager import AsyncKernelManager
    from papermill.clientwrap import PapermillNotebookClient
    from papermill.engines import NBClientEngine, papermill_engines

    class ListeningChannel(AsyncZMQSocketChannel):
        # nbclient answers output widgets on the channel on which it waits for the kernel's reply. ZeroMQ says only once
        # that a message is there, the sending swallows that at times, and the wait would last forever.
        async def get_msg(self, timeout: float | None = None) -> dict[str, Any]:
            while timeout is None:
                with contextlib.suppress(queue.Empty):
                    return await super().get_msg(1)
            return await super().get_msg(timeout)

    class ListeningClient(AsyncKernelClient):
        shell_channel_class = ListeningChannel

    class IPCKernelManager(AsyncKernelManager):
        def __init__(self, **options: Any):
            # A socket's path may have about 100 characters, so it is short, and its name makes it unique.
            prefix = os.path.join(tempfile.gettempdir(), f"nucseg-{uuid.uuid4().hex[:12]}")
            super().__init__(transport="ipc", ip=prefix, client_factory=ListeningClient, **options)

    class IPCEngine(NBClientEngine):
        @classmethod
        def execute_managed_notebook(cls, nb_man, kernel_name, **options: Any) -> None:
            for attempt in (1, 2):
                client = PapermillNotebookClient(
                    nb_man, kernel_manager_class=IPCKernelManager, kernel_name="python3", startup_timeout=120
                )
                try:
                    client.execute()
                    return
                except RuntimeError:  # the kernel did not start; once more, unless a cell has already run
                    if attempt == 2 or any(cell.get("execution_count") for cell in nb_man.nb.cells):
                        raise

    papermill_engines.register("nucseg-ipc", IPCEngine)


def reproduce(
    parameters: Mapping[str, Any],
    folder: Path,
    minutes: Mapping[str, float],
    names: Sequence[str] = NOTEBOOKS,
    resume: str = "",
) -> list[Path]:
    """Run notebooks one after the other under one progress bar, and return their HTML pages.

    Parameters
    ----------
    parameters
        Parameters for every notebook, each of which must have them.
    folder
        Where the executed notebooks go.
    minutes
        Those expected of each notebook, which the bar's lengths follow; a name of none is a ValueError.
    names
        The notebooks to run, in this order.
    resume
        The command that goes on after a failure.
    """
    from tqdm import tqdm

    for name in minutes:
        check_name("minutes", name, NOTEBOOKS)
    paths = [find(name) for name in names]
    for path in paths:  # a bad parameter is found before the first minute is spent
        check_parameters(path, parameters)
    total = sum(minutes.get(path.stem, 1.0) for path in paths)
    pages, before = [], 0.0
    bar_format = "{percentage:3.0f} %|{bar:24}| {elapsed} {desc}"
    interval = 0.5 if sys.stderr.isatty() else 30.0  # a log file is not for watching
    with tqdm(total=total, bar_format=bar_format, mininterval=interval, miniters=0, dynamic_ncols=True) as bar:
        for number, path in enumerate(paths, 1):
            share = minutes.get(path.stem, 1.0)
            label = f"{number}/{len(paths)} {path.stem}"

            def show(done: float, text: str, label: str = label, start: float = before, share: float = share) -> None:
                bar.set_description_str(f"{label}: {text}", refresh=False)
                bar.update(max(0.0, start + share * done - bar.n))

            show(0.0, "starting the kernel")
            pages.append(execute(path, parameters, folder, show, resume))
            before += share
            bar.n = before
            bar.refresh()  # one line for each notebook at least
        bar.set_description_str("done")
    return pages
