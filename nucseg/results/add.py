"""Results that come back from another machine: checked, and added to the tables here.

Files are those of `nucseg.results.pack`. Nothing is unpickled, nothing is written outside this project's folders, and
nothing is changed unless all of it is right.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from nucseg.files import write_bytes
from nucseg.results import (
    COUNTED,
    RESULT_COLUMNS,
    SCORES,
    ResultsError,
    empty_results,
    read_results,
    read_runs,
)
from nucseg.results.file import add_results
from nucseg.results.pack import EXPERIMENT_KEY, MB, MEMBER, PLAIN, slug
from nucseg.results.settings import differences
from nucseg.store import home, published

LARGEST = 200 * MB  # unpacked; more than any file of ours, less than what would fill a disk


@dataclass(frozen=True)
class Added:
    """What one file brought to one profile, in experiments: new ones, equal ones (skipped), replaced ones.

    Settings of which the profile's results now hold several values are in `other_settings`.
    """

    source: Path
    profile: str
    new: int = 0
    equal: int = 0
    replaced: int = 0
    other_settings: tuple[str, ...] = ()
    received: Path | None = None

    def describe(self) -> str:
        """Return one line for the reader."""
        counts = f"{self.new} new, {self.equal} equal ones skipped, {self.replaced} replaced"
        text = f"{self.source}: {self.profile}: {counts}" + (f"; pictures: {self.received}" if self.received else "")
        return "\n".join(
            [text, *[f"  not with the settings of the results here: {line}" for line in self.other_settings]]
        )


@dataclass(frozen=True)
class Incoming:
    """One profile's part of a file, read and checked."""

    source: Path
    profile: str
    results: pd.DataFrame
    runs: pd.DataFrame
    more: dict[str, bytes] = field(default_factory=dict)


def add(paths: Sequence[str | Path], replace_other: bool = False) -> list[Added]:
    """Add results of other machines to ``tables/<profile>/``; either all files are added, or nothing is changed.

    An experiment that is here already with the same numbers is skipped. What a file holds beside numbers goes to
    ``runs/<profile>/received/``, which is not under version control.

    Parameters
    ----------
    paths
        Files of `pack`, or folders with ``results.csv`` and ``runs.csv``.
    replace_other
        Take the file's numbers where they differ from those here.

    Raises
    ------
    ResultsError
        If a file is damaged or not one of ours, was made from another version of the data, or has other numbers for an
        experiment that is here; the message names it.
    """
    packages = [package for path in paths for package in read(path)]
    known: dict[str, pd.DataFrame] = {}
    taken, report = [], []
    for package in packages:
        file = published("tables", package.profile) / "results.csv"
        if package.profile not in known:
            known[package.profile] = read_results(file) if file.is_file() else empty_results()
        new, added = compare(known[package.profile], package, replace_other)
        known[package.profile] = _with(known[package.profile], new)
        taken.append(new)
        report.append(added)
    for package, new in zip(packages, taken, strict=True):
        if len(new):
            add_results(new, package.runs[package.runs["run_id"].isin(set(new["run_id"]))])
    return [
        replace(
            added,
            other_settings=tuple(differences(_configs(package.profile))) if len(new) else (),
            received=_keep(package) if package.more else None,
        )
        for package, new, added in zip(packages, taken, report, strict=True)
    ]


def read(path: str | Path) -> list[Incoming]:
    """Read and check a file of `pack`, or a folder with ``results.csv`` and ``runs.csv``; nothing is written.

    Raises
    ------
    FileNotFoundError
        If it is not there.
    ResultsError
        If it is not what it should be.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        results, runs = read_results(path / "results.csv"), read_runs(path / "runs.csv")
        return [_incoming(path, name, rows, runs, {}) for name, rows in results.groupby("profile")]
    if not path.is_file():
        raise FileNotFoundError(f"no file or folder {path}")
    members = _members(path)
    packages = []
    for profile in sorted({name.split("/")[0] for name in members}):
        own = {name.split("/", 1)[1]: content for name, content in members.items() if name.startswith(f"{profile}/")}
        results, runs = _tables(path, own.pop("results.csv", None), own.pop("runs.csv", None))
        packages.append(_incoming(path, profile, results, runs, own))
    return packages


def _members(path: Path) -> dict[str, bytes]:
    """Return a file's members; a name that `pack` would not write is refused before anything is unpacked."""
    members: dict[str, bytes] = {}
    try:
        with zipfile.ZipFile(path) as zipped:
            for about in zipped.infolist():
                kind = stat.S_IFMT(about.external_attr >> 16)
                if not MEMBER.fullmatch(about.filename) or about.filename in members or kind not in (0, stat.S_IFREG):
                    raise ResultsError(f"{path}: not a file of 'nucseg results pack': it holds {about.filename!r}")
                members[about.filename] = b""
            if sum(about.file_size for about in zipped.infolist()) > LARGEST:
                raise ResultsError(f"{path}: would unpack to more than {LARGEST / MB:.0f} MB")
            for about in zipped.infolist():
                members[about.filename] = _checked(about, zipped.read(about), path)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise ResultsError(f"{path}: damaged or not a zip file ({error}); copy it again") from error
    if not members:
        raise ResultsError(f"{path}: empty")
    return members


def _checked(about: zipfile.ZipInfo, content: bytes, path: Path) -> bytes:
    """Return a member's content if it is what its name says."""
    try:
        if about.filename.endswith(".json"):
            json.loads(content)
        elif about.filename.endswith(".png"):
            with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
                image.verify()
    except (ValueError, OSError, SyntaxError) as error:
        raise ResultsError(f"{path}: {about.filename} is damaged ({error})") from error
    return content


def _tables(path: Path, results: bytes | None, runs: bytes | None) -> tuple[pd.DataFrame, pd.DataFrame]:
    if results is None and runs is None:  # only failures
        return empty_results(), pd.DataFrame({"run_id": []})
    if results is None or runs is None:
        raise ResultsError(f"{path}: results.csv without runs.csv, or the other way round")
    with tempfile.TemporaryDirectory() as scratch:
        for name, content in (("results.csv", results), ("runs.csv", runs)):
            (Path(scratch) / name).write_bytes(content)
        try:
            return read_results(Path(scratch) / "results.csv"), read_runs(Path(scratch) / "runs.csv")
        except ResultsError as error:
            raise ResultsError(f"{path}: {str(error).replace(f'{scratch}{os.sep}', '')}") from error


def _incoming(path: Path, profile: str, results: pd.DataFrame, runs: pd.DataFrame, more: dict[str, bytes]) -> Incoming:
    if not re.fullmatch(PLAIN, profile) or set(results["profile"]) - {profile}:
        raise ResultsError(f"{path}: results of profile(s) {', '.join(sorted(set(results['profile'])))} as {profile!r}")
    if lost := sorted(set(results["run_id"]) - set(runs["run_id"])):
        raise ResultsError(f"{path}: runs.csv does not describe run {lost[0]} of results.csv")
    return Incoming(path, profile, results, runs[runs["run_id"].isin(set(results["run_id"]))], more)


def compare(old: pd.DataFrame, package: Incoming, replace_other: bool = False) -> tuple[pd.DataFrame, Added]:
    """Compare one profile's results with what is known, experiment by experiment.

    Returns
    -------
    tuple
        The lines to add, which may be none, and what happened.

    Raises
    ------
    ResultsError
        As for `add`.
    """
    rows, added = package.results, Added(package.source, package.profile)
    here = old.drop_duplicates("dataset").set_index("dataset")["fingerprint"].to_dict()
    for dataset, fingerprint in rows.drop_duplicates("dataset").set_index("dataset")["fingerprint"].items():
        if here.get(dataset, fingerprint) != fingerprint:
            raise ResultsError(
                f"{package.source}: made from another version of {dataset}: fingerprint {fingerprint}, but "
                f"{here[dataset]} in tables/{package.profile}; results on different data cannot stand in one table"
            )
    groups = dict(list(old.groupby(EXPERIMENT_KEY))) if len(old) else {}
    taken, other = [], []
    for key, new in rows.groupby(EXPERIMENT_KEY, sort=False) if len(rows) else ():
        difference = _difference(groups[key], new) if key in groups else None
        if key in groups and difference is None:
            added = replace(added, equal=added.equal + 1)
            continue
        if difference is None:
            added = replace(added, new=added.new + 1)
        else:
            other.append(f"  {_name(key)}: {difference}")
            added = replace(added, replaced=added.replaced + 1)
        taken.append(new)
    if other and not replace_other:
        named = "\n".join(other[:3])
        raise ResultsError(
            f"{package.source}: {len(other)} experiment(s) of {package.profile} have other numbers here:\n{named}\n"
            "Leave the file out to keep what is here, or take the file's numbers: --replace"
        )
    return pd.concat(taken) if taken else empty_results(), added


def _with(old: pd.DataFrame, new: pd.DataFrame) -> pd.DataFrame:
    """Return the known lines and the new ones, which stand in place of their experiments' older ones."""
    experiments = set(new[EXPERIMENT_KEY].itertuples(index=False, name=None))
    kept = [line not in experiments for line in old[EXPERIMENT_KEY].itertuples(index=False, name=None)]
    frames = [frame for frame in (old[kept], new) if len(frame)]
    return pd.concat(frames, ignore_index=True) if frames else old


def _difference(old: pd.DataFrame, new: pd.DataFrame) -> str | None:
    """Say where two results of one experiment differ; None if they are the same, run ids and missing counts aside."""
    place = ["round", "image_id"]
    old, new = old.set_index(place).sort_index(), new.set_index(place).sort_index()
    if list(old.index) != list(new.index):
        return f"{len(old)} lines here, {len(new)} there, of different rounds or images"
    for name in RESULT_COLUMNS:
        if name in (*place, "run_id"):
            continue
        a, b = old[name], new[name]
        if name in (*SCORES, "label_share"):  # a number may change in its last digit on its way through a text file
            same = np.isclose(a.astype(float), b.astype(float), rtol=0, atol=1e-9)
        elif name == COUNTED:
            same = (a.isna() | b.isna() | (a == b).fillna(False)).to_numpy(bool)
        else:
            same = (a == b).to_numpy()
        if not same.all():
            at = int(np.flatnonzero(~same)[0])
            return f"{name} of {old.index[at][1]}, round {old.index[at][0]}: {a.iloc[at]} here, {b.iloc[at]} there"
    return None


def _name(key: tuple) -> str:
    return ", ".join(f"{name}={value}" for name, value in zip(EXPERIMENT_KEY, key, strict=True) if name != "profile")


def _configs(profile: str) -> list[str]:
    return list(read_runs(published("tables", profile) / "runs.csv")["config"])


def _keep(package: Incoming) -> Path:
    """Write what a file holds beside numbers to a folder of its own, named by the file and its content."""
    digest = hashlib.sha256(package.source.read_bytes()).hexdigest()[:8]
    folder = home() / "runs" / package.profile / "received" / f"{slug(package.source.stem)}-{digest}"
    for name, content in package.more.items():
        write_bytes(folder / name, content)
    return folder
