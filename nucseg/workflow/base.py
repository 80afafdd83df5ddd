"""What the steps of the workflow share."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from nucseg.data import NAMES, DataError, Dataset, Sample, check_depths, check_pixel_sizes, load_dataset, load_folder
from nucseg.data.folder import IMAGE_FOLDERS
from nucseg.devices import pick_device
from nucseg.patches import Patch

SELECTION_FILE, MODEL_FILE = "selection.json", "model.json"
PROBE = 2**20  # bytes that a disk must have room for before any work whose result it is to hold


class WorkflowError(RuntimeError):
    """A step's input is missing or does not fit the step before it."""


def default_profile(device: str = "") -> str:
    """Return the profile for a training on one's own patches on a device."""
    return "slides" if pick_device(device).type == "cuda" else "slides-cpu"


def open_images(place: str | Path) -> Dataset:
    """Open a folder of images; one that is there wins over a public dataset of its name.

    Raises
    ------
    WorkflowError
        If it is neither.
    """
    path = Path(place).expanduser()
    if path.is_dir():
        dataset = load_folder(path)
        check_pixel_sizes(dataset.samples)
        check_depths(dataset.samples)
        return dataset
    if str(place) not in NAMES:
        kind = "is a file: name the folder that holds it" if path.is_file() else "no such folder"
        raise WorkflowError(f"{place}: {kind}")
    return load_dataset(str(place))


def training_images(dataset: Dataset) -> list[Sample]:
    """Return the images that may be chosen from or learned from; those of val/ and test/ are held out, with a warning.

    Raises
    ------
    WorkflowError
        If no others are there.
    """
    chosen = list(dataset.train)
    if not chosen:
        raise WorkflowError(
            f"{dataset.name}: all of its images are in val/ or test/, which are held out; name a folder of others"
        )
    if held_out := len(dataset.samples) - len(chosen):
        warnings.warn(
            f"{dataset.name}: {held_out} images of val/ and test/ are left out, to be tested on", stacklevel=3
        )
    return chosen


def large_enough(samples: Iterable[Sample], side: int) -> tuple[list[Sample], dict[str, str]]:
    """Return the samples of at least `side` pixels by their headers, and by id why the others are not among them."""
    good, bad = [], {}
    for sample in samples:
        try:
            height, width = sample.shape
        except DataError as error:
            bad[sample.id] = str(error)
            continue
        if min(height, width) < side:
            bad[sample.id] = f"{sample.id}: at least {side} pixels a side, got {height} x {width}"
        else:
            good.append(sample)
    return good, bad


def keep_apart(out: Path, images: str | Path, samples: Iterable[Sample]) -> None:
    """Raise where what is written to `out` would be taken for images or their labels when `images` is opened next.

    A folder of its own among the images is fine: it is left out by the file that says what wrote it.
    """
    root = Path(images).expanduser()
    if not root.is_dir():  # a public dataset's name
        return
    files = [getattr(sample.source, name) for sample in samples for name in ("image_path", "label_path")]
    inside = [root.resolve() / path.relative_to(root) for path in files if path is not None]
    root, out = root.resolve(), out.resolve()
    beside = root.parent if root.name.lower() in IMAGE_FOLDERS else root  # where labels/ would be these images' labels
    if out in (root, beside) or (out.is_relative_to(root) and any(path.is_relative_to(out) for path in inside)):
        raise WorkflowError(
            f"{out} holds the images or their labels, and what is written there would be taken for some of them; "
            f"name another --out, such as {out / 'nucseg'}"
        )


def new_folder(path: Path) -> Path:
    """Make a folder to write to, before the work whose result it is for.

    Raises
    ------
    WorkflowError
        If that cannot be.
    """
    check_writable(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error
    return path


def check_writable(folder: Path) -> None:
    """Raise unless files can be written to a folder, or to the one that it will be made in; nothing is left there."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(PROBE))
            file.flush()
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(path: Path, error: OSError) -> WorkflowError:
    return WorkflowError(f"{path}: cannot be written to ({error.strerror}); name another --out")


def reader(sample: Sample) -> Callable[[int, int, int, int], np.ndarray]:
    """Return a function that cuts rectangles (row, column, height, width) out of an image, decoding nothing twice."""
    if sample.source.by_region:
        return sample.region
    image = sample.image
    return lambda row, col, height, width: image[row : row + height, col : col + width].copy()


def stamp(sample: Sample) -> list:
    """Return what tells, without decoding, whether an image is still the same file, as JSON gives it back."""
    return json.loads(json.dumps([sample.id, *sample.source.stamp()]))


def read_json(path: Path, advice: str, keys: Iterable[str] = ()) -> dict:
    """Read what an earlier step wrote, with these keys at least, or say which step that is."""
    if not path.is_file():
        raise WorkflowError(f"no {path}: {advice}")
    again = advice.replace("first", "again")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WorkflowError(f"{path}: not complete JSON ({error}); {again}") from error
    if missing := [key for key in keys if not isinstance(found, dict) or key not in found]:
        raise WorkflowError(f"{path}: not what nucseg writes, it lacks {missing[0]!r}; {again}")
    return found


def unique_names(image_ids: Iterable[str]) -> dict[str, str]:
    """Return the name of each image's files: its own, and where several folders hold one of that name, with these."""
    image_ids = list(image_ids)
    count = Counter(Path(image_id).name for image_id in image_ids)
    return {i: Path(i).name if count[Path(i).name] == 1 else i for i in image_ids}


def patch_file(rank: int, patch: Patch, names: Mapping[str, str]) -> str:
    """Return the name of a chosen patch's picture, which its training image has too; `names` are those of images."""
    return f"{rank:02d}_{names[patch.image_id].replace('/', '_')}_r{patch.row}_c{patch.col}.png"
