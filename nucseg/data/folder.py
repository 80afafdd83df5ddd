"""Any folder of images, with or without label maps: opened by listing names, nothing is decoded until it is used.

Layouts: ``images/`` beside ``labels/`` (or masks, annotations) with the same stems; the official ``Tissue Images/``
beside ``Annotations/``; or label files side by side with the images: ``<stem>_labels.png|tif|npy``, ``<stem>.xml``,
``<stem>.geojson``, ``<stem>_seg.npy``. Sub-folders ``train``, ``val`` and ``test`` become splits; otherwise all
is train.

What else lies there and might have been meant is left out with a warning: images beside the splits, label files without
an image, kinds that cannot be read, links to folders and folders too deep. Folders that nucseg wrote into this one
(patches to outline, training sets, predictions) are no images of it and are left out without one; but where there are
no other images, the training sets of several rounds of outlining are opened together.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from nucseg.annotations.errors import DataError
from nucseg.data.dataset import SPLITS, Dataset, MissingData, Sample
from nucseg.data.images import IMAGE_SUFFIXES, ImageWarning
from nucseg.data.layouts import walk
from nucseg.data.sources import FileSource

IMAGE_FOLDERS = ("images", "image", "tissue images", "img")
LABEL_FOLDERS = ("labels", "label", "masks", "annotations", "label_maps")
LABEL_FILE = re.compile(
    r"^(?P<stem>.+?)(?P<kind>_labels?|_masks?|_cp_masks|_seg|)\.(?P<suffix>png|tiff?|npy|xml|geojson)$",
    re.IGNORECASE,
)
UNREAD = (".gif", ".jp2", ".j2k", ".dcm", ".czi", ".lif", ".vsi", ".bif", ".heic", ".avif")  # images all the same
OWN = ("selection.json", "predictions.json", "patches.csv")  # a folder that holds one is the output of a command
TRAINING_SET = "patches.csv"  # alone; a selection has one too
DEPTH = 3
PREFERENCE = (".geojson", ".xml", ".npy", ".tif", ".tiff", ".png")  # drawn outlines before rasters, where both exist


def load(folder: str | Path) -> Dataset:
    """Open a folder of images.

    Parameters
    ----------
    folder
        The folder.

    Returns
    -------
    Dataset
        Named like the folder; ids are paths below the folder (or the split's folder) without suffix.

    Raises
    ------
    MissingData
        When the folder does not exist or holds no image.
    DataError
        When two images differ only by suffix.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise MissingData(f"{folder}: no such folder; give the folder that holds the images")
    named = {path.name.lower(): path for path in sorted(folder.iterdir()) if path.is_dir()}
    if any(split in named for split in SPLITS):
        samples = {split: _samples(named[split], f"{split}/") if split in named else () for split in SPLITS}
        inside = [named[split] for split in SPLITS if split in named]
        files = (place / name for place, names in _folders(folder) for name in names)
        beside = [
            path
            for path in files
            if path.suffix.lower() in IMAGE_SUFFIXES and not any(split in path.parents for split in inside)
        ]
        _say(folder, f"beside the splits {', '.join(path.name for path in inside)}", beside)
    else:
        samples = {"train": _samples(folder)}
    if not any(samples.values()):
        own = _names(folder, [place for place, names in walk(folder, DEPTH) if place != folder and _of(names)])
        raise MissingData(
            f"{folder}: no image found in it or {DEPTH} folders below; images are {', '.join(IMAGE_SUFFIXES)}, "
            "label files (*_labels.png, labels/, *.xml, *.geojson, *_seg.npy) do not count"
            + (f", nor what nucseg wrote without outlines: {own}" if own else "")
        )
    return Dataset(name=folder.resolve().name, **samples, licence="the user's own", fingerprint_of="file bytes")


def training_sets(folder: str | Path) -> list[Path]:
    """Return the folders below this one that `nucseg import-annotations` wrote, whether or not `load` opens them."""
    return [place for place, names in walk(Path(folder), DEPTH) if place != Path(folder) and _of(names) == TRAINING_SET]


def _samples(root: Path, prefix: str = "") -> tuple[Sample, ...]:
    """Return the images below a folder; where there are none, those of the training sets below it."""
    return _found(root, prefix, OWN) or _found(root, prefix, tuple(name for name in OWN if name != TRAINING_SET))


def _found(root: Path, prefix: str, skipped: Collection[str]) -> tuple[Sample, ...]:
    images: dict[tuple[Path, str], Path] = {}
    labels: dict[tuple[Path, str], Path] = {}
    unread: list[Path] = []
    unseen: list[Path] = []
    for folder, names in _folders(root, unseen, skipped):
        kind = folder.name.lower()
        home = folder.parent if kind in IMAGE_FOLDERS + LABEL_FOLDERS and folder != root else folder
        if kind.startswith(("slide_", "gt_")):  # TNBC as it unzips
            home, kind = folder.parent, "labels" if kind.startswith("gt_") else "images"
        for name in names:
            path = folder / name
            match = LABEL_FILE.match(name)
            if match and (
                kind in LABEL_FOLDERS or match["kind"] or match["suffix"].lower() in ("xml", "geojson", "npy")
            ):
                key = (home, match["stem"])
                if key not in labels or _rank(path) < _rank(labels[key]):
                    labels[key] = path
            elif path.suffix.lower() in IMAGE_SUFFIXES and kind not in LABEL_FOLDERS:
                key = (home, path.stem)
                if key in images:
                    raise DataError(f"{images[key]} and {path} are two images of one name; rename or remove one")
                images[key] = path
            elif path.suffix.lower() in UNREAD and kind not in LABEL_FOLDERS:
                unread.append(path)
    if images:
        pictures = [path for key, path in labels.items() if key not in images and path.suffix.lower() in IMAGE_SUFFIXES]
        _say(root, "of a kind that cannot be read here", unread)
        _say(root, "label maps by their names or their folder's, but there are no images of these names", pictures)
        _say(root, f"folders that are links, or more than {DEPTH} deep", unseen)
    samples = []
    for (home, stem), path in sorted(images.items()):
        below = home.relative_to(root)
        samples.append(Sample(prefix + (below / stem).as_posix(), FileSource(path, labels.get((home, stem)))))
    return tuple(samples)


def _of(names: Iterable[str]) -> str:
    """Return the file, one of `OWN`, by which a folder with these files is known as a command's output, or nothing."""
    return next((name for name in OWN if name in names), "")


def _folders(
    root: Path, left_out: list[Path] | None = None, skipped: Collection[str] = OWN
) -> Iterator[tuple[Path, list[str]]]:
    """Yield folders and their file names, but those that a command has written into this one."""
    own: list[Path] = []
    for folder, names in walk(root, DEPTH, left_out):
        if folder != root and _of(names) in skipped:
            own.append(folder)
        if not any(folder.is_relative_to(other) for other in own):
            yield folder, names


def _say(root: Path, why: str, paths: list[Path]) -> None:
    if paths:
        warnings.warn(f"{root}: left out, {why}: {_names(root, paths)}", ImageWarning, stacklevel=5)


def _names(root: Path, paths: list[Path]) -> str:
    said = ", ".join(path.relative_to(root).as_posix() for path in paths[:5])
    return said + (f" and {len(paths) - 5} more" if len(paths) > 5 else "")


def _rank(path: Path) -> int:
    return PREFERENCE.index(path.suffix.lower())
