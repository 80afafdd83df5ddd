"""Where images and their annotations lie: the split table of the package, and the folder layouts people unzip."""

from __future__ import annotations

import csv
import functools
import os
import re
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from nucseg.data.dataset import SPLITS, Sample
from nucseg.data.images import IMAGE_SUFFIXES

DEPTH = 4  # folders below the root that are searched: archives are often unzipped into a folder of their own name
TCGA = re.compile(r"^TCGA-\w{2}-\w{4}", re.IGNORECASE)
TNBC = re.compile(r"^\d{2}_\d{1,2}$")


class Row(NamedTuple):
    """One line of splits.csv; `nuclei` counts the current release."""

    dataset: str
    id: str
    patient: str
    organ: str
    split: str
    seen: bool
    nuclei: int


@functools.cache
def rows(dataset: str) -> tuple[Row, ...]:
    """The images of a dataset with split, organ, patient, seen and nuclei, from the package's ``splits.csv``."""
    with resources.files("nucseg.data").joinpath("splits.csv").open(encoding="utf-8", newline="") as file:
        return tuple(
            Row(**{**line, "seen": line["seen"] == "1", "nuclei": int(line["nuclei"])})
            for line in csv.DictReader(file)
            if line["dataset"] == dataset
        )


def splits_from(table: Sequence[Row], samples: dict[str, Sample]) -> dict[str, tuple[Sample, ...]]:
    """Sort the samples at hand into train, val and test, in the table's order."""
    return {
        split: tuple(samples[row.id] for row in table if row.split == split and row.id in samples) for split in SPLITS
    }


def searched(root: Path) -> str:
    """Say where was looked, and that the folder does not exist if so."""
    return f"under {root}" if root.is_dir() else f"because there is no folder {root}"


def walk(root: Path, depth: int = DEPTH, left_out: list[Path] | None = None) -> Iterator[tuple[Path, list[str]]]:
    """Yield folders and their file names, not deeper than `depth`, hidden folders left out, in sorted order.

    Folders that lie deeper, or are links, are added to `left_out`.
    """
    for folder, subfolders, files in os.walk(root):
        here = Path(folder)
        level = len(here.relative_to(root).parts)
        seen = sorted(name for name in subfolders if not name.startswith((".", "__MACOSX")))
        subfolders[:] = [name for name in seen if level < depth and not (here / name).is_symlink()]
        if left_out is not None:
            left_out += [here / name for name in seen if name not in subfolders]
        yield here, sorted(name for name in files if not name.startswith("."))


def find_tcga_pairs(root: Path, patients: set[str]) -> dict[str, tuple[Path, Path]]:
    """Find image and annotation of each patient in the packed or the official layout.

    Images are files named by TCGA barcode in any folder but one called labels; annotations are ``.xml`` anywhere, or
    ``labels/*.png`` beside ``images/``. Where both forms are at hand the packed one is taken, and an image and its
    annotation always come from the same form.
    """
    packed: dict[str, dict[str, Path]] = {"image": {}, "labels": {}}
    official: dict[str, dict[str, Path]] = {"image": {}, "labels": {}}
    converted: dict[str, Path] = {}  # PNG copies of the official TIFFs; or pictures of masks, so TIFFs come first
    for folder, names in walk(root):
        for name in names:
            match = TCGA.match(name)
            patient = match.group().upper() if match else None
            if patient not in patients:
                continue
            path = folder / name
            suffix = path.suffix.lower()
            if suffix == ".xml":
                official["labels"].setdefault(patient, path)
            elif folder.name == "labels" and suffix == ".png":
                packed["labels"].setdefault(patient, path)
            elif folder.name == "images" and (folder.parent / "labels").is_dir() and suffix in IMAGE_SUFFIXES:
                packed["image"].setdefault(patient, path)
            elif suffix in (".tif", ".tiff", ".svs"):
                official["image"].setdefault(patient, path)
            elif suffix == ".png" and "mask" not in folder.name.lower():
                converted.setdefault(patient, path)
    official["image"] = converted | official["image"]
    pairs = {}
    for form in (official, packed):
        pairs.update({p: (form["image"][p], form["labels"][p]) for p in form["image"] if p in form["labels"]})
    return pairs


def find_tnbc_pairs(root: Path, ids: set[str]) -> dict[str, tuple[Path, Path, bool]]:
    """Find image and mask of each TNBC image, and whether the mask is binary; packed form first."""
    found: dict[tuple[str, str], Path] = {}
    for folder, names in walk(root):
        lower = folder.name.lower()
        for name in names:
            stem, suffix = os.path.splitext(name)
            if stem not in ids or not TNBC.match(stem) or suffix.lower() not in IMAGE_SUFFIXES:
                continue
            kind = "slide" if lower.startswith("slide_") else "gt" if lower.startswith("gt_") else lower
            if kind in ("slide", "gt", "images", "labels"):
                found.setdefault((kind, stem), folder / name)
    pairs = {}
    for image, mask, binary in (("slide", "gt", True), ("images", "labels", False)):
        for id in ids:
            if (image, id) in found and (mask, id) in found:
                pairs[id] = (found[image, id], found[mask, id], binary)
    return pairs
