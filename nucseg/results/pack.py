"""Results that go home from another machine, packed into one small file; `nucseg.results.add` adds them there.

A file holds, for every profile, ``results.csv`` and ``runs.csv``; of every reported run the ``meta.json`` of each stage
behind it (configuration, code, seconds, hardware), its learning curve and chosen patches; tracebacks of what failed;
and of the worst, the median and the best test image the predicted label maps, with a crop of the image and of its
truth. No image travels whole.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import stat
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from nucseg.annotations.errors import DataError
from nucseg.data import Dataset, data_root, load_dataset
from nucseg.files import write_bytes
from nucseg.results import KEY, ResultsError, empty_results, read_results, read_runs
from nucseg.store import Store, home, published

MB = 1_000_000
PLAIN = (
    r"(?a:\w[\w .+=-]*)"  # no separator, no leading dot; letters of ASCII alone, as zip programs differ about others
)
MEMBER = re.compile(
    rf"{PLAIN}/(results\.csv|runs\.csv|failed/{PLAIN}\.json|stages/{PLAIN}/{PLAIN}\.json"
    rf"|examples/{PLAIN}/{PLAIN}/{PLAIN}\.png)"
)
CROP = 256  # side of what is shown of an image, in pixels
EXPERIMENT_KEY = [name for name in KEY if name not in ("round", "image_id")]


class NothingToPack(ResultsError):
    """No experiment has run, or none of those that were asked for."""


@dataclass(frozen=True)
class Packed:
    """What was packed: the file, its size in bytes, and counts."""

    path: Path
    size: int
    experiments: int
    failed: int
    examples: int
    left_out: int

    def describe(self) -> str:
        """Return one line for the reader."""
        less = f" ({self.left_out} label maps left out for size)" if self.left_out else ""
        return (
            f"{self.path}: {self.size / MB:.2f} MB, {self.experiments} experiments, {self.failed} failures, "
            f"{self.examples} pictures{less}"
        )


def pack(
    path: str | Path,
    profile: str = "",
    dataset: str = "",
    root: str | Path = "",
    limit_mb: float = 10.0,
    numbers_only: bool = False,
) -> Packed:
    """Pack the results of this machine into one file.

    Parameters
    ----------
    path
        The new ``.zip``.
    profile, dataset
        Only these; all when empty.
    root
        Where data lie, ``NUCSEG_DATA`` when empty; without them there are label maps, but no crops.
    limit_mb
        Largest size, in 10^6 bytes. Pictures are left out first.
    numbers_only
        Pack results.csv and runs.csv and nothing else.

    Raises
    ------
    ResultsError
        When there is nothing to pack, or the numbers alone are too large.
    """
    path, limit = Path(path), int(limit_mb * MB)
    profile = Path(profile).stem if profile.endswith((".yaml", ".yml")) else profile
    profiles = sorted({p.parent.name for p in (home() / "tables").glob("*/results.csv")} | _with_failures())
    buffer, counts = io.BytesIO(), {"experiments": 0, "failed": 0, "examples": 0, "left_out": 0}
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as zipped:
        pictures = []
        for name in profiles if not profile else [profile]:
            results, runs = _mine(name, dataset)
            store = Store(home() / "runs" / name)
            failures = [] if numbers_only else _failures(store, dataset)
            if len(results):
                _put(zipped, f"{name}/results.csv", results.to_csv(index=False).encode())
                _put(zipped, f"{name}/runs.csv", runs.to_csv(index=False).encode())
            counts["experiments"] += len(results[EXPERIMENT_KEY].drop_duplicates())
            counts["failed"] += len(failures)
            if numbers_only:
                continue
            for failure in failures:
                _put(zipped, f"{name}/failed/{failure.name}", failure.read_bytes())
            for member, content in sorted(_stages(store, runs["run_id"])):
                _put(zipped, f"{name}/stages/{member}", content)
            pictures += [(f"{name}/examples/{m}", make) for m, make in _examples(store, results, root)]
        if not counts["experiments"] and not counts["failed"]:
            asked = " ".join(word for word in (profile, dataset) if word)
            raise NothingToPack(f"nothing to pack in {home()}{f' for {asked}' if asked else ''}: no experiment has run")
        for member, make in pictures:
            content = make()
            # A member costs its data, and its name and about 100 bytes twice: here and in the list at the end.
            after = len(buffer.getbuffer()) + 150 * (len(zipped.namelist()) + 2) + len(content)
            counts["examples" if after <= limit else "left_out"] += 1
            if after <= limit:
                _put(zipped, member, content)
    if len(buffer.getbuffer()) > limit:
        raise ResultsError(
            f"the numbers alone take {len(buffer.getbuffer()) / MB:.1f} MB, more than {limit_mb:g} MB; pack one "
            "profile or dataset at a time, or raise --limit-mb"
        )
    write_bytes(path, buffer.getvalue())
    return Packed(path, len(buffer.getbuffer()), **counts)


def _mine(profile: str, dataset: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    folder = published("tables", profile)
    if not (folder / "results.csv").is_file():
        return empty_results(), pd.DataFrame({"run_id": []})
    results, runs = read_results(folder / "results.csv"), read_runs(folder / "runs.csv")
    results = results[results["dataset"] == dataset] if dataset else results
    return results, runs[runs["run_id"].isin(set(results["run_id"]))]


def _with_failures() -> set[str]:
    return {path.parent.parent.name for path in (home() / "runs").glob("*/failed/*.json")}


def _failures(store: Store, dataset: str) -> list[Path]:
    found = sorted((store.root / "failed").glob("*.json"))
    return [path for path in found if not dataset or json.loads(path.read_text()).get("dataset") == dataset]


def _stages(store: Store, run_ids: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    """Yield the meta data of everything that the runs were made from, learning curves and chosen patches; each once."""
    stages = sorted(path.name for path in store.root.glob("*") if path.is_dir())
    known = {result.key: result for stage in stages for result in store.results(stage)}
    reported = set(run_ids)
    open_keys = [result.key for result in store.results("evaluation") if result.run_id in reported]
    seen: set[str] = set()
    while open_keys:
        key = open_keys.pop()
        if key in seen or key not in known:  # inputs are also fingerprints of data
            continue
        seen.add(key)
        result = known[key]
        open_keys += result.meta.get("inputs", [])
        for name in ("meta.json", "curve.json", "selection.json"):
            if (result.path / name).is_file():
                yield f"{result.path.parent.name}/{key}.{name}", (result.path / name).read_bytes()


def _examples(store: Store, results: pd.DataFrame, root: str | Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Yield names and makers of pictures: crops first, then label maps, the worst image of every run first."""
    evaluations = {result.run_id: result for result in store.results("evaluation")}
    for name, rows in results.groupby("dataset"):
        runs = [run_id for run_id in dict.fromkeys(rows["run_id"]) if run_id in evaluations]
        if not runs:  # all were made elsewhere
            continue
        order = rows.groupby("image_id")["aji"].mean().sort_values(kind="stable").index
        chosen = list(dict.fromkeys(order[[0, -1, len(order) // 2]]))
        opened = _opened(name, rows["fingerprint"].iloc[0], root)
        for image_id in chosen:
            folder = f"{slug(name)}/{slug(image_id)}"
            if opened is not None:
                yield f"{folder}/image.png", lambda i=image_id, d=opened: _png(centre(d.sample(i).image))
                yield f"{folder}/truth.png", lambda i=image_id, d=opened: _png(centre(d.sample(i).labels))
        for image_id in chosen:
            for run_id in runs:
                folder, file = f"{slug(name)}/{slug(image_id)}", evaluations[run_id].path / "predictions.npz"
                yield f"{folder}/{slug(run_id)}.png", lambda i=image_id, f=file: _png(_prediction(f, i))


def _opened(name: str, fingerprint: str, root: str | Path) -> Dataset | None:
    """Return the dataset if it is at hand in the version of the results."""
    for place in (name, data_root(root or None) / name):
        try:
            dataset = load_dataset(place, root or None)
        except (DataError, ValueError):
            continue
        if dataset.fingerprint == fingerprint:
            return dataset
    return None


def _prediction(file: Path, image_id: str) -> np.ndarray:
    with np.load(file, allow_pickle=False) as arrays:
        return arrays[f"labels{list(arrays['ids']).index(image_id)}"]


def centre(array: np.ndarray) -> np.ndarray:
    """Return the middle: at most `CROP` pixels and half of each side, so that no image travels whole."""
    sides = [max(1, min(CROP, length // 2)) for length in array.shape[:2]]
    corner = [(length - side) // 2 for length, side in zip(array.shape[:2], sides, strict=True)]
    return array[corner[0] : corner[0] + sides[0], corner[1] : corner[1] + sides[1]]


def _png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array if array.ndim == 3 else array.astype(np.uint16)).save(buffer, "png", optimize=True)
    return buffer.getvalue()


def slug(name: str) -> str:
    """Return a name that is safe as part of a path; two names never give the same."""
    safe = re.sub(r"[^A-Za-z0-9.-]+", "_", name).lstrip(".-") or "_"
    return safe if safe == name else f"{safe}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def _put(zipped: zipfile.ZipFile, member: str, content: bytes) -> None:
    if not MEMBER.fullmatch(member):
        profile = member.partition("/")[0]
        raise ResultsError(
            f"{profile}: the name of a profile whose results are packed holds letters, digits, spaces and . + = - _ "
            "alone; rename its file and its folders in tables/ and runs/"
        )
    # One time for all, and the permissions of an ordinary file: the same results give the same file.
    about = zipfile.ZipInfo(member, (2000, 1, 1, 0, 0, 0))
    about.external_attr, about.compress_type = (stat.S_IFREG | 0o644) << 16, zipfile.ZIP_DEFLATED
    zipped.writestr(about, content)
