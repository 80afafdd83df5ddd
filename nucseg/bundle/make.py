"""One folder that runs the paper on a machine without a network: code, notebooks, data, weights, wheels and a start.

The folder is laid out like a checkout, so ``runs/``, ``tables/`` and ``figures/`` grow inside it:

    start.sh      bash start.sh --minutes 8 | notebooks | any other nucseg command
    nucseg/       the package          notebooks/  the five notebooks, without outputs
    data/         the images and label maps, pixel for pixel, in the layout that `nucseg.data` calls packed
    weights/      encoders             wheels/     packages that such a machine lacks; unpacked into site/ at the start
    so-far.zip    results so far, added to tables/ at the start so that nothing is run twice

The same inputs give the same bytes, and nothing inside names the machine that made it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nucseg
from nucseg import models, profiles
from nucseg.bundle import wheels as wheel_files
from nucseg.bundle.parts import BundleError, pack_data, pack_notebooks, pack_package, pack_weights, portable, write
from nucseg.code_version import code_version
from nucseg.data import Dataset, load_dataset
from nucseg.results.pack import NothingToPack, pack

PARTS = ("package", "notebooks", "data", "weights", "wheels", "results", "start")
OWN = (
    "nucseg",
    "notebooks",
    "data",
    "weights",
    "wheels",
    "profiles",
    "site",
)  # replaced by a new bundle; the rest stays
MANIFEST, SO_FAR = "bundle.json", "so-far.zip"
MB = 1_000_000


@dataclass(frozen=True)
class Bundle:
    """What was made.

    Attributes
    ----------
    folder
        Where it lies.
    sizes
        Bytes of each of `PARTS`.
    fingerprint
        Of the dataset, the same inside and outside.
    """

    folder: Path
    sizes: dict[str, int]
    fingerprint: str

    def describe(self) -> str:
        """Return one line per part with its size in MB (10^6 bytes), and their sum."""
        return _describe(self.sizes)


def make_bundle(
    folder: str | Path,
    profile: str | Path = "h100",
    dataset: str = "",
    data_root: str | Path = "",
    wheels: Sequence[str] = wheel_files.DEFAULT,
    python: str = "3.12",
    limit_mb: float = 60.0,
    fresh: bool = False,
    exact: bool = False,
) -> Bundle:
    """Write a bundle; an older one in its place is replaced, and keeps what it has run.

    Parameters
    ----------
    folder
        New, empty, or an older bundle.
    profile, dataset, data_root
        As for `nucseg.pipeline.Pipeline`. Every profile of the package travels; this one is what ``start.sh`` runs, and
        its encoders are those whose weights travel.
    wheels
        Packages or wheel files, see `nucseg.bundle.wheels.fetch`.
    python
        Python of the other machine, for wheels with compiled code.
    limit_mb
        Largest size, in 10^6 bytes.
    fresh
        Leave the results so far at home; all is run again then.
    exact
        Weights in full precision, see `pack_weights`.

    Raises
    ------
    BundleError
        If it is too large (with the size of each part), the folder holds other things, or the data changed in packing.
    nucseg.bundle.wheels.WheelError, nucseg.data.DataError, nucseg.encoders.EncoderError
        If a part cannot be had.
    """
    folder, profile = Path(folder).expanduser().resolve(), Path(profile).expanduser()
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise BundleError(f"{folder} holds other things than a bundle; name a new or an empty folder")
    settings = profiles.load_profile(profile)
    name = dataset or settings.dataset
    opened = load_dataset(name, data_root or None)
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
    try:
        place = pack_data(opened, name, part / "data")
        _write_package(part, profile, place, python)
        starts = {models.encoder_of(segmenter, settings.segmenter_encoder) for segmenter in models.REGISTRY}
        for encoder in sorted({settings.encoder, settings.segmenter_encoder, *(starts & set(settings.weights))}):
            pack_weights(encoder, part / "weights", settings.weights.get(encoder), exact)
        wheel_files.fetch(wheels, part / "wheels", python)
        if not fresh:
            with contextlib.suppress(NothingToPack):
                pack(part / SO_FAR, dataset=opened.name, limit_mb=limit_mb, numbers_only=True)
        write(part / "LICENCES.txt", _licences(opened))
        sizes = _seal(part, settings.name, opened, python, limit_mb)
        _move(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return Bundle(folder, sizes, opened.fingerprint)


def _write_package(part: Path, profile: Path, dataset: str, python: str) -> None:
    """Write the code, and the start that runs a profile, the user's own included, with a dataset."""
    pack_package(part)
    pack_notebooks(part / "notebooks")
    named = str(profile)
    if named not in profiles.names():
        named = f"profiles/{profile.name}"
        write(part / named, portable(profile.read_text(encoding="utf-8")))
    write(part / "start.sh", _start(named, dataset, python), 0o755)
    write(part / ".gitignore", "*\n")  # the images may not be published


def _seal(part: Path, profile: str, dataset: Dataset, python: str, limit_mb: float) -> dict[str, int]:
    """Add what a finished bundle says of itself, and return the size of each of its parts, or refuse one too large."""
    sizes = dict.fromkeys(PARTS, 0)
    for path in sorted(p for p in part.rglob("*") if p.is_file()):
        sizes[_part_of(path.relative_to(part))] += path.stat().st_size
    about = {
        "profile": profile,
        "dataset": dataset.name,
        "fingerprint": dataset.fingerprint,
        "nucseg": nucseg.__version__,
        "code": code_version("nucseg"),
        "python": python,
        "sizes": sizes,
    }
    write(part / MANIFEST, json.dumps(about, indent=1))
    write(part / "SHA256SUMS", _sums(part))
    sizes["start"] += sum((part / name).stat().st_size for name in (MANIFEST, "SHA256SUMS"))
    if sum(sizes.values()) > limit_mb * MB:
        raise BundleError(
            f"the bundle is larger than {limit_mb:g} MB:\n{_describe(sizes)}\nTake less: weights in 16 bits "
            "(no --exact), no packages for notebooks (--wheel none); or allow more: --limit-mb"
        )
    _sane(part)
    return sizes


# -- the start -------------------------------------------------------------------------------------------------

START = Path(__file__).with_name("start.sh")  # with @names@ where a bundle has its own


def _start(profile: str, dataset: str, python: str) -> str:
    values = {"profile": profile, "dataset": dataset, "python": python}
    text = START.read_text(encoding="utf-8")
    for name, value in values.items():
        text = text.replace(f"@{name}@", shlex.quote(value))
    return text


# -- helpers ---------------------------------------------------------------------------------------------------


def _licences(dataset: Dataset) -> str:
    return (
        f"nucseg: MIT, see LICENSE\ndata, {dataset.name}: {dataset.licence}\n"
        "weights: those of the encoders' own releases\nwheels: each holds its own licence\n"
    )


def _part_of(path: Path) -> str:
    names = {"nucseg": "package", "LICENSE": "package", "profiles": "package", SO_FAR: "results"}
    first = path.parts[0]
    return names.get(first, first if first in PARTS else "start")


def _describe(sizes: dict[str, int]) -> str:
    lines = [f"{name:10} {size / MB:7.2f} MB" for name, size in sizes.items()]
    return "\n".join([*lines, f"{'all':10} {sum(sizes.values()) / MB:7.2f} MB"])


def _sums(folder: Path) -> str:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "SHA256SUMS")
    return "".join(f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.relative_to(folder).as_posix()}\n" for p in files)


def _sane(folder: Path) -> None:
    """Let everybody read and only the owner write, whatever the umask and the permissions of the originals."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() or path.name == "start.sh" else 0o644)


def _move(part: Path, folder: Path) -> None:
    """Put the parts in place of an older bundle's; what has been run there stays."""
    folder.mkdir(exist_ok=True)
    for name in OWN:
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / SO_FAR).unlink(missing_ok=True)
    for path in sorted(part.iterdir()):
        os.replace(path, folder / path.name)
