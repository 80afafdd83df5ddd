"""Results on disk: every stage's result is a folder named by all that it depends on, so a run can always go on.

A stage's key is the hash of its resolved configuration, of the keys of the results it was made from, and of the code
that made it. A result is written beside its place and moved there when it is complete: a killed run loses the stage
in hand and nothing else, a second run repeats nothing, and changed parameters never meet an old model. What another
profile has made already, from the same of everything, is taken from there.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import functools
import hashlib
import json
import math
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nucseg.code_version import code_version
from nucseg.config import to_plain
from nucseg.files import umask, write_text


def home() -> Path:
    """Return the folder that holds ``notebooks/``, ``runs/``, ``tables/`` and ``figures/``.

    It is ``NUCSEG_HOME`` where that is set, else the checkout that nucseg is installed from, else the current folder.
    """
    if folder := os.environ.get("NUCSEG_HOME"):
        return Path(folder).expanduser().resolve()
    checkout = Path(__file__).resolve().parent.parent
    return checkout if (checkout / "notebooks").is_dir() else Path.cwd()


def published(kind: str, profile: str) -> Path:
    """Return the folder of a profile's ``"tables"`` or ``"figures"``, which are kept under version control."""
    return home() / kind / profile


@dataclass(frozen=True)
class Result:
    """One stage's finished result.

    Attributes
    ----------
    path
        Its folder.
    key
        The hash that names it; the first eight digits are the run id that tables and figures print.
    meta
        What made it: configuration, inputs, versions, hardware, seconds.
    """

    path: Path
    key: str
    meta: dict[str, Any]

    @property
    def run_id(self) -> str:
        return self.key[:8]


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copy2(source, target)


class OutOfTime(Exception):
    """The time is up and a stage would have to be made or finished; what was made is kept, the next start goes on."""


class Store:
    """The results folder of one profile.

    Attributes
    ----------
    root
        The folder.
    others
        A folder of such folders, where the same result may have been made for another profile; None: nowhere.
    device
        ``"cpu"`` if its stages leave a GPU that is there alone: results tell what they were made on.
    deadline
        Seconds since the epoch; after it no stage is begun any more, `get` raises `OutOfTime` instead. A stage in hand
        is finished, unless it asks `check_time` itself.
    """

    def __init__(self, root: str | Path, others: str | Path | None = None, device: str = ""):
        self.root = Path(root)
        self.others = Path(others) if others is not None else None
        self.device = device
        self.deadline = math.inf

    @contextlib.contextmanager
    def until(self, deadline: float) -> Iterator[None]:
        """Begin no stage after `deadline` inside this block; with ``-math.inf`` nothing is made, only looked up."""
        before, self.deadline = self.deadline, deadline
        try:
            yield
        finally:
            self.deadline = before

    def get(
        self,
        stage: str,
        config: Any,
        make: Callable[[Path], Mapping[str, Any] | None],
        inputs: Sequence[str] = (),
        code: Sequence[str] = (),
    ) -> Result:
        """Return a stage's result, making it first if it is not there.

        Parameters
        ----------
        stage
            The stage's name, a folder under the root.
        config
            All that the result depends on beside its inputs: dataclasses, mappings and plain values.
        make
            Called with an empty folder to fill; what it returns is kept in the result's ``meta.json``.
        inputs
            Keys of the results (or fingerprints of the data) that `make` reads.
        code
            Names of the modules whose code makes the result.

        Raises
        ------
        OutOfTime
            If it would have to be made and `deadline` has passed.
        """
        record = {"stage": stage, "config": to_plain(config), "inputs": list(inputs), "code": code_version(*code)}
        key = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:20]
        place = self.root / stage / key
        if found := self._read(place):
            return found
        if time.time() > self.deadline and (found := self._elsewhere(place)):
            return found
        if not self._elsewhere(place):
            self.check_time(stage)
        place.parent.mkdir(parents=True, exist_ok=True)
        with locked(place.parent / f".{key}.lock"):
            if found := self._read(place):  # another process made it while this one waited
                return found
            for left_over in place.parent.glob(f".{key}.*.part"):  # of a killed run: we hold the lock
                _remove(left_over)
            _remove(place)  # a result that somebody has begun to delete, or nothing
            if found := self._taken(place):
                return found
            self.check_time(stage)
            part = _part_of(place)
            try:
                started = time.time()
                more = make(part) or {}
                meta = {
                    **record,
                    "key": key,
                    "started": datetime.datetime.fromtimestamp(started, datetime.UTC).isoformat(timespec="seconds"),
                    "seconds": round(time.time() - started, 2),
                    **environment(self.device),
                    **to_plain(more),
                }
                write_text(part / "meta.json", json.dumps(meta, indent=1, sort_keys=True))
                os.replace(part, place)
            except BaseException:
                shutil.rmtree(part, ignore_errors=True)
                raise
        return Result(place, key, meta)

    def check_time(self, stage: str) -> None:
        """Raise `OutOfTime` if the time is up: before a stage, and inside one that can go on from where it stopped."""
        if time.time() > self.deadline:
            raise OutOfTime(stage)

    def _read(self, place: Path) -> Result | None:
        try:
            return Result(place, place.name, json.loads((place / "meta.json").read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None

    def _elsewhere(self, place: Path) -> Result | None:
        """Find the same result among those of other profiles."""
        folders = self.others.glob(f"*/{place.parent.name}/{place.name}") if self.others else ()
        return next((found for folder in sorted(folders) if (found := self._read(folder))), None)

    def _taken(self, place: Path) -> Result | None:
        """Put it here too, as links to its files where the disk can: nobody ever changes them."""
        if not (found := self._elsewhere(place)):
            return None
        part = _part_of(place)
        try:
            shutil.copytree(found.path, part, copy_function=_link, dirs_exist_ok=True)
            os.replace(part, place)
        except FileNotFoundError:  # somebody has just removed it there
            return None
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return self._read(place)

    def results(self, stage: str) -> Iterator[Result]:
        """Yield every finished result of a stage."""
        for meta in sorted((self.root / stage).glob("*/meta.json")):
            if not meta.parent.name.startswith("."):
                yield Result(meta.parent, meta.parent.name, json.loads(meta.read_text(encoding="utf-8")))


def _part_of(place: Path) -> Path:
    """Make a folder beside a result's place; others may read it, as they may the results of a shared folder."""
    part = Path(tempfile.mkdtemp(prefix=f".{place.name}.", suffix=".part", dir=place.parent))
    part.chmod(0o777 & ~umask())
    return part


def _remove(path: Path) -> None:
    """Remove a folder, a file (a checkpoint that was being written), or nothing."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def beside(folder: Path, name: str) -> Path:
    """Return a file for what a stage has so far, beside the folder that `Store.get` gave it.

    The folder is thrown away when the run is killed, the file is not; the stage removes it when it has finished.
    """
    key = folder.name.split(".")[1]
    return folder.parent / f".{key}.{name}"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file; its holder's death drops it, so a killed run never blocks the next one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def claimed(path: Path, text: str) -> Iterator[bool]:
    """Hold a file and write in it who holds it, unless somebody else does; yields whether it is ours.

    As with `locked`, the holder's death drops it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8") as file:  # "w" would erase what another holder wrote
        for attempt in range(4):  # `holder` looks for a moment only: one that looks is not one that holds
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if attempt == 3:
                    yield False
                    return
                time.sleep(0.02)
        file.truncate(0)
        file.write(text)
        file.flush()
        yield True


def holder(path: Path) -> str | None:
    """Return what the holder of a claimed file wrote in it, None if nobody holds it."""
    if not path.is_file():
        return None
    with open(path, encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read()
    return None


@functools.cache
def environment(device: str = "") -> dict[str, str]:
    """Return the versions and the hardware that a result was made with.

    Parameters
    ----------
    device
        ``"cpu"`` where the work was not given to the GPU, though one may be there.
    """
    import torch

    import nucseg

    on_gpu = device != "cpu" and torch.cuda.is_available()
    device = torch.cuda.get_device_name() if on_gpu else f"{os.cpu_count()} CPU cores"
    return {
        "nucseg": nucseg.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": device,
    }
