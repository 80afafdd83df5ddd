"""Which patches to outline, and how their outlines come back."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from nucseg import annotations
from nucseg.config import to_plain
from nucseg.data import Sample, load_dataset
from nucseg.encoders import Encoder
from nucseg.patches import Patch
from nucseg.profiles import Profile
from nucseg.progress import task
from nucseg.selection import Selection, select
from nucseg.store import write_text
from nucseg.workflow.base import SELECTION_FILE, WorkflowError, pick_device, read_json

OUTLINES = (".geojson", ".json", ".xml", ".png", ".tif", ".npy")


def select_patches(
    images: str | Path, out: str | Path, k1: int, strategy: str, profile: Profile, seed: int = 0, device: str = ""
) -> Selection:
    """Choose `k1` patches of a folder of images and write what a pathologist needs to outline them.

    Written to `out`: ``selection.json``; ``patches.csv``, one line per patch in order; ``patches/``, each patch as PNG;
    ``geojson/``, per image the patches as rectangles that QuPath opens on the image.

    Raises
    ------
    WorkflowError
        If `out` holds a selection already: rectangles of two selections would be outlined as one.
    """
    out = Path(out)
    if (out / SELECTION_FILE).exists():
        raise WorkflowError(f"{out} holds a selection already; name another folder, or remove this one first")
    dataset = load_dataset(str(images))
    samples = list(dataset.samples)
    config, encoder = profile.selection, profile.encoder
    if not strategy.startswith("random"):
        encoder = Encoder(encoder, profile.weights.get(encoder), config.normalise)
    with task(f"choosing {k1} patches of {len(samples)} images"):
        selection = select(
            samples,
            strategy,
            k1,
            profile.grid.k2,
            size=config.size,
            step=config.step,
            encoder=encoder,
            seed=seed,
            config=config,
            device=pick_device(device),
        )
    by_id = {sample.id: sample for sample in samples}
    (out / "patches").mkdir(parents=True, exist_ok=True)
    rows = []
    for rank, patch in enumerate(selection.patches, 1):
        crop = by_id[patch.image_id].region(patch.row, patch.col, patch.size, patch.size)
        name = f"{rank:02d}_{Path(patch.image_id).name}_r{patch.row}_c{patch.col}.png"
        Image.fromarray(crop).save(out / "patches" / name)
        rows.append({"rank": rank, **to_plain(patch), "file": f"patches/{name}"})
    for image_id in dict.fromkeys(patch.image_id for patch in selection.patches):
        mine = [(row["rank"], p) for row, p in zip(rows, selection.patches, strict=True) if p.image_id == image_id]
        path = out / "geojson" / f"{Path(image_id).name}.geojson"
        path.parent.mkdir(exist_ok=True)
        annotations.write_geojson(path, [p for _, p in mine], ranks=[rank for rank, _ in mine])
    pd.DataFrame(rows).to_csv(out / "patches.csv", index=False)
    write_text(out / SELECTION_FILE, json.dumps({"images": str(images), **selection.to_dict()}, indent=1))
    return selection


def import_annotations(
    selection: str | Path, outlines: str | Path, out: str | Path, partial: bool = False, empty: bool = False
) -> pd.DataFrame:
    """Cut the outlined patches out as a training set: ``images/``, ``labels/`` and ``patches.csv`` in `out`.

    Parameters
    ----------
    selection
        The folder that `select_patches` wrote.
    outlines
        A folder with one file per image, by the image's name: QuPath ``.geojson``, MoNuSeg ``.xml``, or a label map.
    partial
        Whether to leave out the patches of images that have no file there yet.
    empty
        Whether a patch without an outline is background although its image has outlines beyond its patches.

    Returns
    -------
    DataFrame
        One line per patch: its file and how many nuclei were outlined in it.

    Raises
    ------
    WorkflowError
        If images' outlines are missing, no nucleus was outlined in any patch, or outlines seem to lie in the wrong
        place. Nothing is written then.
    """
    record = read_json(Path(selection) / SELECTION_FILE, "run 'nucseg select' first")
    chosen = Selection.from_dict({k: v for k, v in record.items() if k != "images"})
    samples = {sample.id: sample for sample in load_dataset(record["images"]).samples}
    wanted = list(dict.fromkeys(patch.image_id for patch in chosen.patches))
    if lost := [image_id for image_id in wanted if image_id not in samples]:
        raise WorkflowError(f"image {lost[0]!r} is no longer in {record['images']}; put it back")
    files = _outline_files(Path(outlines), wanted, partial)
    labels_of = {image_id: _read_outlines(path, samples[image_id]) for image_id, path in files.items()}
    patches = [(rank, p) for rank, p in enumerate(chosen.patches, 1) if p.image_id in files]
    counts = [_count(labels_of[patch.image_id][patch.slices]) for _, patch in patches]
    _check_places(patches, counts, labels_of, Path(outlines), empty)

    out, rows = Path(out), []
    for name in ("images", "labels"):
        (out / name).mkdir(parents=True, exist_ok=True)
    for (rank, patch), nuclei in zip(patches, counts, strict=True):
        sample, labels = samples[patch.image_id], labels_of[patch.image_id][patch.slices]
        name = f"{rank:02d}_{Path(patch.image_id).name}_r{patch.row}_c{patch.col}.png"
        Image.fromarray(sample.region(patch.row, patch.col, patch.size, patch.size)).save(out / "images" / name)
        Image.fromarray(labels.astype(np.uint16)).save(out / "labels" / name)
        rows.append({"rank": rank, **to_plain(patch), "file": name, "nuclei": nuclei})
    table = pd.DataFrame(rows)
    table.to_csv(out / "patches.csv", index=False)
    return table


def _outline_files(folder: Path, image_ids: Sequence[str], partial: bool) -> dict[str, Path]:
    """Return the file with the outlines of each image, and say which images have none and which files no image."""
    there = {path.name: path for path in sorted(folder.glob("*")) if path.suffix.lower() in OUTLINES}
    found = {}
    for image_id in image_ids:
        names = (f"{Path(image_id).name}{suffix}" for suffix in OUTLINES)
        if path := next((there.pop(name) for name in names if name in there), None):
            found[image_id] = path
    missing = [Path(image_id).name for image_id in image_ids if image_id not in found]
    if not missing:
        return found
    message = f"{len(missing)} of {len(image_ids)} images have no outlines in {folder}: {', '.join(missing)}"
    if partial and found:
        warnings.warn(f"{message}; their patches are left out", stacklevel=3)
        return found
    message += f". A file is named like its image: {missing[0]}.geojson (QuPath), .xml or a label map"
    if there:
        message += f"; of no chosen image are {', '.join(there)}"
    raise WorkflowError(message + ("; --partial goes on without them" if found else ""))


def _read_outlines(path: Path, sample: Sample) -> np.ndarray:
    if path.suffix in {".geojson", ".json"}:
        return annotations.read_geojson(path, sample.shape)
    if path.suffix == ".xml":
        return annotations.read_xml(path, sample.shape)
    labels = annotations.read_labels(path)
    if labels.shape != sample.shape:
        raise WorkflowError(f"{path}: label map of {labels.shape}, but image {sample.id} is {sample.shape}")
    return labels


def _count(labels: np.ndarray) -> int:
    return int(np.unique(labels[labels > 0]).size)


def _check_places(
    patches: Sequence[tuple[int, Patch]],
    counts: Sequence[int],
    labels_of: Mapping[str, np.ndarray],
    folder: Path,
    empty: bool,
) -> None:
    """Raise where outlines were drawn, but not in the chosen patches; warn of patches that may be empty."""
    beyond = {}
    for image_id, labels in labels_of.items():
        rest = labels.copy()
        inside = [labels[patch.slices] for _, patch in patches if patch.image_id == image_id]
        touched = np.unique(np.concatenate([part.ravel() for part in inside]))
        rest[np.isin(rest, touched)] = 0
        beyond[image_id] = _count(rest)
    hint = "outlines count on the whole image; were they drawn on the PNG of a patch?"
    if not any(counts):
        elsewhere = sum(beyond.values())
        why = f"{elsewhere} outlines in {folder} lie elsewhere: {hint}" if elsewhere else f"{folder} holds no outline"
        raise WorkflowError(f"no nucleus is outlined inside any chosen patch; {why}")
    for (rank, patch), nuclei in zip(patches, counts, strict=True):
        if nuclei:
            continue
        message = f"patch {rank} of {patch.image_id} has no nucleus outlined in it"
        if beyond[patch.image_id] and not empty:
            raise WorkflowError(
                f"{message}, but {beyond[patch.image_id]} outlines of that image lie beyond its patches: {hint} "
                "If the patch holds no nucleus, --empty says so"
            )
        warnings.warn(f"{message}: all of it is taken for background", stacklevel=3)
