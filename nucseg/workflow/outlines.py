"""How the outlines of chosen patches come back as a training set."""

from __future__ import annotations

import re
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from nucseg import annotations
from nucseg.annotations import SparseLabels
from nucseg.config import to_plain
from nucseg.data import DataError, Sample, read_image
from nucseg.patches import Patch
from nucseg.selection import Selection
from nucseg.workflow.base import (
    SELECTION_FILE,
    WorkflowError,
    check_writable,
    keep_apart,
    open_images,
    patch_file,
    read_json,
    unique_names,
)

OUTLINES = (".geojson", ".json", ".xml", ".png", ".tif", ".tiff", ".npy")
# What annotation tools add to the name of the image, with or without its own suffix.
_OUTLINE_FILE = re.compile(
    r"^(?P<stem>.+?)(?P<suffix_of_image>\.(png|jpe?g|jfif|tiff?|webp|bmp|svs|ndpi|scn|mrxs))?"
    r"(_labels?|_masks?|_cp_masks|_seg|)\.(?P<suffix>geojson|json|xml|png|tiff?|npy)$",
    re.IGNORECASE,
)
HINT = "outlines count on the whole image, not on the PNG of a patch"
ANOTHER = 8.0  # grey levels by which a patch differs on average from its picture where the image is another one
ODD = 0.25  # of a patch: a nucleus that large is remarkable
LARGEST = 0.6  # of a patch: no nucleus is that large, a region of tissue or a rectangle is


def import_annotations(
    selection: str | Path,
    outlines: str | Path,
    out: str | Path,
    partial: bool = False,
    empty: bool = False,
    images: str | Path = "",
) -> pd.DataFrame:
    """Cut the outlined patches out as a training set: ``images/``, ``labels/`` and ``patches.csv`` in `out`.

    Parameters
    ----------
    selection
        The folder that `select_patches` wrote.
    outlines
        A folder with one file per image, by the image's name: QuPath ``.geojson``, MoNuSeg ``.xml``, or a label map.
    partial
        Whether to leave out the patches of images that have no file there yet, and those without an outline.
    empty
        Whether a patch without an outline holds no nucleus, so that all of it is background.
    images
        Where the images are now; by default where they were when the patches were selected.

    Returns
    -------
    DataFrame
        One line per patch: its file and how many nuclei were outlined in it.

    Raises
    ------
    WorkflowError
        If outlines are missing, are too large for nuclei or seem to lie in the wrong place, or `out` holds a training
        set already or the images. Nothing is written then.
    """
    out, selection, outlines = (Path(path).expanduser() for path in (out, selection, outlines))
    if (out / "patches.csv").exists():
        raise WorkflowError(f"{out} holds imported patches already; name another folder, or remove this one first")
    for folder in (out / "images", out / "labels"):
        if folder.is_dir() and any(folder.iterdir()):
            raise WorkflowError(
                f"{folder} holds files already, which the patches would be mixed with; name a new folder"
            )
    check_writable(out)
    record = read_json(selection / SELECTION_FILE, "run 'nucseg select' first", ("images", "strategy", "patches"))
    chosen = Selection.from_dict({k: v for k, v in record.items() if k not in ("images", "names", "left_out")})
    place = str(images or record["images"])
    try:
        samples = {sample.id: sample for sample in open_images(place).samples}
    except (DataError, WorkflowError) as error:
        where = "" if images else f" (so says {selection / SELECTION_FILE}; --images names another place)"
        raise WorkflowError(f"{error}{where}") from error
    keep_apart(out, place, samples.values())
    wanted = list(dict.fromkeys(patch.image_id for patch in chosen.patches))
    if lost := [image_id for image_id in wanted if image_id not in samples]:
        raise WorkflowError(f"image {lost[0]!r} is no longer in {place}; put it back")
    names = record.get("names") or unique_names(samples)  # older selections have none
    _check_images(chosen.patches, samples, {p: selection / "patches" / patch_file(rank, p, names) for rank, p in
                                            enumerate(chosen.patches, 1)})  # fmt: skip
    files = _outline_files(outlines, {image_id: names[image_id] for image_id in wanted}, partial)
    _check_rectangles(files, chosen.patches)
    labels_of = {image_id: _read_outlines(path, samples[image_id]) for image_id, path in files.items()}
    patches = [(rank, p) for rank, p in enumerate(chosen.patches, 1) if p.image_id in files]
    labels_in = {rank: labels_of[p.image_id].crop(p.row, p.col, p.size, p.size) for rank, p in patches}
    counts = [_count(labels_in[rank]) for rank, _ in patches]
    _check_sizes(patches, labels_in, labels_of, files)
    left_out = _check_places(patches, labels_in, labels_of, outlines, partial, empty)

    rows = []
    for name in ("images", "labels"):
        (out / name).mkdir(parents=True, exist_ok=True)
    for (rank, patch), nuclei in zip(patches, counts, strict=True):
        if rank in left_out:
            continue
        sample, labels = samples[patch.image_id], labels_in[rank]
        _, inverse = np.unique(np.append(0, labels), return_inverse=True)  # ids of whole slides may exceed 16 bits
        labels = inverse[1:].reshape(labels.shape)
        name = patch_file(rank, patch, names)
        Image.fromarray(sample.region(patch.row, patch.col, patch.size, patch.size)).save(out / "images" / name)
        annotations.write_labels(out / "labels" / name, labels)
        rows.append({"rank": rank, **to_plain(patch), "file": name, "nuclei": nuclei})
    table = pd.DataFrame(rows)
    table.to_csv(out / "patches.csv", index=False)
    return table


def _outline_files(folder: Path, names: Mapping[str, str], partial: bool) -> dict[str, Path]:
    """Return the file with the outlines of each image, and say which images have none and which files no image."""
    if not folder.is_dir():
        raise WorkflowError(f"{folder}: no such folder; give the one with the outlines")
    there: dict[str, list[Path]] = {}
    whole = {_plain(name) for name in names.values()}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")):
        if match := _OUTLINE_FILE.match(path.name):
            # An image may itself be called slide.svs or core_label: its whole name comes first.
            stem = path.stem if _plain(path.relative_to(folder).with_suffix("").as_posix()) in whole else match["stem"]
            there.setdefault(_plain((path.parent / stem).relative_to(folder).as_posix()), []).append(path)
    found = {}
    for image_id, name in names.items():
        keys = (_plain(name), _plain(name.removesuffix(".ome")))
        if paths := next((there.pop(key) for key in keys if key in there), None):
            found[image_id], *others = sorted(paths, key=lambda path: OUTLINES.index(path.suffix.lower()))
            if others:
                said = ", ".join(path.name for path in others)
                warnings.warn(f"{name}: outlines are taken from {found[image_id].name}, not from {said}", stacklevel=3)
    missing = [name for image_id, name in names.items() if image_id not in found]
    if not missing:
        return found
    message = f"{len(missing)} of {len(names)} images have no outlines in {folder}: {', '.join(missing)}"
    strangers = [path.relative_to(folder).as_posix() for paths in there.values() for path in paths]
    unused = f"; of no chosen image are {', '.join(strangers)}" if strangers else ""
    if partial and found:
        warnings.warn(f"{message}; their patches are left out{unused}", stacklevel=3)
        return found
    message += f". A file is named like its image: {missing[0]}.geojson (QuPath), .xml or a label map{unused}"
    raise WorkflowError(message + ("; --partial goes on without them" if found else ""))


def _check_rectangles(files: Mapping[str, Path], patches: Sequence[Patch]) -> None:
    """Raise where a file's rectangles are not those that were chosen: what was outlined lies elsewhere then.

    Rectangles that are gone say nothing, and other formats have none.
    """
    for image_id, path in files.items():
        if path.suffix.lower() not in (".geojson", ".json"):
            continue
        places = {(p.row, p.col, p.size) for p in patches if p.image_id == image_id}
        for p in annotations.read_geojson_patches(path, image_id, strict=False):
            if (p.row, p.col, p.size) not in places:
                raise WorkflowError(
                    f"{path}: the rectangle of class Patch at row {p.row}, column {p.col} ({p.size} px) is none of the "
                    f"patches that were chosen in image {image_id}. It was moved or resized, or belongs to another "
                    "selection: outline the chosen rectangles, or delete this one if what it holds is outlined in them"
                )


def _plain(name: str) -> str:
    """Return a file's name as one compares it: some systems take ä apart, and others do not tell b from B."""
    return unicodedata.normalize("NFC", name).casefold()


def _read_outlines(path: Path, sample: Sample) -> SparseLabels:
    geojson = annotations.read_geojson_sparse
    readers = {".xml": annotations.read_xml_sparse, ".geojson": geojson, ".json": geojson}
    if read := readers.get(path.suffix.lower()):
        labels, report = read(path, sample.shape)
        report.warn()
        return labels
    labels = annotations.read_labels(path)
    if labels.shape != sample.shape:
        why = annotations.another_size(sample.shape, labels.shape)
        raise WorkflowError(
            f"{path}: label map of {labels.shape}, but image {sample.id} is {sample.shape}; {HINT}. By its size {why}"
        )
    return SparseLabels.of(labels)


def _check_images(patches: Sequence[Patch], samples: Mapping[str, Sample], pictures: Mapping[Patch, Path]) -> None:
    """Raise where an image is not the one that a patch was chosen from: its picture is there to compare with."""
    for patch in patches:
        if not pictures[patch].is_file():
            continue
        sample = samples[patch.image_id]
        inside = patch.row + patch.size <= sample.shape[0] and patch.col + patch.size <= sample.shape[1]
        then = read_image(pictures[patch]).astype(float)
        # Decoders of JPEG differ by a level or two between machines.
        if not inside or np.abs(then - sample.region(patch.row, patch.col, patch.size, patch.size)).mean() > ANOTHER:
            raise WorkflowError(
                f"image {patch.image_id} is not the one that patches were chosen from: {pictures[patch]} shows "
                f"something else than row {patch.row}, column {patch.col} of it. Put the original back, or name its "
                "folder with --images"
            )


def _count(labels: np.ndarray) -> int:
    return int(np.unique(labels[labels > 0]).size)


def _check_sizes(
    patches: Sequence[tuple[int, Patch]],
    labels_in: Mapping[int, np.ndarray],
    labels_of: Mapping[str, SparseLabels],
    files: Mapping[str, Path],
) -> None:
    """Raise where one outline is as large as a patch: a region of tissue, or a patch's rectangle."""
    for rank, patch in patches:
        ids, pixels = np.unique(labels_in[rank], return_counts=True)
        ids, pixels = ids[ids > 0], pixels[ids > 0]
        if not ids.size:
            continue
        largest, share = ids[pixels.argmax()], pixels.max() / patch.size**2
        rows, cols = labels_of[patch.image_id].box(largest)
        if share > LARGEST or min(rows.stop - rows.start, cols.stop - cols.start) >= patch.size:
            raise WorkflowError(
                f"{files[patch.image_id]}: one outline covers {share:.0%} of patch {rank}, from row {rows.start} to "
                f"{rows.stop} and column {cols.start} to {cols.stop} of the image; no nucleus is that large. Is it a "
                "region of tissue, or the patch's rectangle? Delete it"
            )
        if share > ODD:
            warnings.warn(
                f"{files[patch.image_id]}: one outline covers {share:.0%} of patch {rank}, at row {rows.start} and "
                f"column {cols.start} of the image; it counts as one nucleus. Delete it if it is none",
                stacklevel=3,
            )


def _check_places(
    patches: Sequence[tuple[int, Patch]],
    labels_in: Mapping[int, np.ndarray],
    labels_of: Mapping[str, SparseLabels],
    folder: Path,
    partial: bool,
    empty: bool,
) -> set[int]:
    """Return the ranks of the patches to leave out; raise where patches without an outline are not explained."""
    counts, beyond = [_count(labels_in[rank]) for rank, _ in patches], {}
    for image_id, labels in labels_of.items():
        touched = [labels_in[rank].ravel() for rank, patch in patches if patch.image_id == image_id]
        beyond[image_id] = np.setdiff1d(labels.ids, np.concatenate(touched)).size
    if not any(counts):
        elsewhere = sum(beyond.values())
        why = f"{elsewhere} outlines in {folder} lie elsewhere: {HINT}" if elsewhere else f"{folder} holds no outline"
        raise WorkflowError(f"no nucleus is outlined inside any chosen patch; {why}")
    without = [(rank, patch) for (rank, patch), nuclei in zip(patches, counts, strict=True) if not nuclei]
    if not without:
        return set()
    listed = ", ".join(f"{rank} of {patch.image_id}" for rank, patch in without)
    message = f"no nucleus is outlined in patch {listed}"
    # Whoever outlined an image and met none of its patches did it in other coordinates, whatever the flags say.
    for image_id in dict.fromkeys(patch.image_id for _, patch in without):
        if beyond[image_id] and beyond[image_id] == np.unique(labels_of[image_id].ids).size:
            said = f"all {beyond[image_id]} outlines of {image_id} lie beyond its patches"
            raise WorkflowError(f"{message}: {said}; {HINT}")
    if empty:
        warnings.warn(f"{message}: all of it is taken for background", stacklevel=3)
        return set()
    if partial:
        warnings.warn(f"{message}: left out", stacklevel=3)
        return {rank for rank, _ in without}
    if elsewhere := sum(beyond[image_id] for image_id in {patch.image_id for _, patch in without}):
        message += f", but {elsewhere} outlines of the same images lie beyond the patches: {HINT}"
    raise WorkflowError(f"{message}. --empty says that such a patch holds none, --partial leaves it out for now")
