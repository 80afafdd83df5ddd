"""From a segmenter to label maps: of images in memory, and of whole slides in blocks."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from nucseg import annotations
from nucseg.data import DataError, Sample
from nucseg.files import write_text
from nucseg.inference import merge_tiles, places_of, run_ahead, workers_for
from nucseg.models.base import Instances, Segmenter
from nucseg.progress import Task, task
from nucseg.selection.content import shows_tissue
from nucseg.workflow.base import (
    MODEL_FILE,
    WorkflowError,
    keep_apart,
    large_enough,
    new_folder,
    open_images,
    read_json,
    reader,
    stamp,
)
from nucseg.workflow.segmenter import load_model

# Pixels of an image beyond which it is read in blocks, and its label map lies on the disk. Measured with a narrow
# hoverlite on a CPU: 2.2 GB at most for 36 million pixels and 49,000 nuclei, 2.8 GB for 100 million and 137,000.
LARGE = 100_000_000
RECORD = "predictions.json"  # of which model, and of which state of the images, a folder's predictions are
BLOCK, OVERLAP = 2048, 256  # of a segmenter that has none of its own
SMALLEST = 32  # pixels a side of an image that every segmenter takes
SPECK = 16  # pixels: as wide as a small nucleus; where no square of this side is darker than glass, there is none


def predict_folder(
    model: str | Path, images: str | Path, out: str | Path, device: str = "", large: int = LARGE
) -> pd.DataFrame:
    """Segment every image of a folder: a 16- or 32-bit label map and a QuPath GeoJSON each, in `out`.

    They lie below ``labels/`` and ``geojson/`` as the images lie below their folder, so `evaluate_folders` finds them.
    ``images.csv`` there has one line per image: how many nuclei, and their mean score. What was stopped goes on where
    it was, by the same call, and images that were added later join those that are done. An image that cannot be read,
    or is too small, does not hold up the others.

    Parameters
    ----------
    model
        The folder that `train_folder` wrote.
    images
        A folder of images or slides.
    large
        Pixels of an image beyond which `segment_slide` does it.

    Returns
    -------
    DataFrame
        The lines of these images, those that were done before among them.

    Raises
    ------
    WorkflowError
        Before the first image is segmented: where `out` is the folder of the images or holds predictions of another
        model, or where the disk has no room for a slide's label map. After the last: for those that could not be read
        or are below 32 pixels a side.
    """
    model, out = Path(model).expanduser(), Path(out).expanduser()
    there = open_images(images).samples
    keep_apart(out, images, there)
    segmenter = load_model(model, device)
    done = _Done(new_folder(out), model)
    samples, unfit = large_enough(there, SMALLEST)
    failed = list(unfit.values())
    _check_room(samples, out, large)  # before hours of work end at the last one
    done.write()  # so that a folder among the images is known for predictions even when the first image is stopped
    todo = [sample for sample in samples if not done.has(sample)]
    slides = {sample.id for sample in todo if _area(sample) > large}
    small = [sample for sample in todo if sample.id not in slides]
    # On a GPU the network goes on with the next image while processes separate this one's nuclei.
    found = run_ahead((_begin(segmenter, sample) for sample in small), workers_for(segmenter, len(small)))
    with task("segmenting", len(todo)) as progress:
        for i, sample in enumerate(todo):
            result = _slide(segmenter, sample, out) if sample.id in slides else next(found)
            if isinstance(result, str):
                failed.append(result)
            else:
                annotations.write_labels(out / "labels" / f"{sample.id}.tif", result.labels)
                annotations.write_geojson(out / "geojson" / f"{sample.id}.geojson", result.labels, scores=result.scores)
                done.add(sample, result.scores)
            progress.update(i + 1, sample.id)
            del result  # a slide's label map leaves the disk before the next one needs the room
    if failed:
        raise WorkflowError(f"{len(failed)} of {len(there)} images could not be segmented:\n" + "\n".join(failed))
    return done.table([sample.id for sample in samples])


class _Done:
    """What a folder holds of one model's predictions, so that the next call goes on there."""

    def __init__(self, folder: Path, model: Path):
        self.folder, self.path = folder, folder / RECORD
        parts = [(model / name).read_bytes() for name in (MODEL_FILE, "model.safetensors")]
        self.model, self.images = hashlib.sha256(b"".join(parts)).hexdigest()[:16], {}
        if self.path.is_file():
            record = read_json(self.path, "remove it, and the predictions beside it, first", ("model", "images"))
            if record["images"] and record["model"] != self.model:
                raise WorkflowError(f"{folder} holds predictions of another model; name another folder")
            self.images = record["images"]
        elif (folder / "labels").is_dir() or (folder / "geojson").is_dir():
            raise WorkflowError(f"{folder} holds labels/ or geojson/ of something else; name another folder")

    def has(self, sample: Sample) -> bool:
        files = self.folder / "labels" / f"{sample.id}.tif", self.folder / "geojson" / f"{sample.id}.geojson"
        same = self.images.get(sample.id, {}).get("file") == stamp(sample)[1:]  # the id is the key
        return same and all(path.is_file() for path in files)

    def add(self, sample: Sample, scores: np.ndarray) -> None:
        mean = float(scores.mean()) if len(scores) else 0.0
        self.images[sample.id] = {"file": stamp(sample)[1:], "nuclei": len(scores), "mean_score": mean}
        self.write()
        write_text(self.folder / "images.csv", self.table(self.images).to_csv(index=False))

    def write(self) -> None:
        write_text(self.path, json.dumps({"model": self.model, "images": self.images}, indent=1))

    def table(self, image_ids: Iterable[str]) -> pd.DataFrame:
        keys = ("nuclei", "mean_score")
        return pd.DataFrame([{"image_id": i, **{key: self.images[i][key] for key in keys}} for i in image_ids])


def _begin(segmenter: Segmenter, sample: Sample) -> Callable[[], Instances | str]:
    try:
        return segmenter.begin(sample.image)
    except DataError as error:
        return partial(str, error)


def _slide(segmenter: Segmenter, sample: Sample, folder: Path) -> Instances | str:
    with tempfile.TemporaryFile(dir=folder) as file:  # without a name: gone with the process, even a killed one
        try:
            canvas = np.memmap(file, np.int32, "w+", shape=sample.shape)
            return segment_slide(segmenter, sample, canvas)
        except DataError as error:
            return str(error)


def segment_slide(segmenter: Segmenter, sample: Sample, canvas: np.ndarray) -> Instances:
    """Segment an image of any size in memory that does not grow with it, but by about 1 kB a nucleus.

    It is cut into the blocks that the segmenter itself cuts large images into, so the nuclei are the same as if it were
    in memory, but that blocks of bare glass are left out, and that stains are normalised, where the segmenter does
    that, block by block: there the nuclei may differ slightly.

    Parameters
    ----------
    sample
        Of a TIFF or a slide only the blocks are read; other formats are decoded whole.
    canvas
        (H, W) int32 zeros for the label map, in memory or on the disk.
    """
    config = getattr(segmenter, "inference", None)
    block, overlap = (config.block, config.overlap) if config else (BLOCK, OVERLAP)
    places = places_of(sample.shape, block, overlap)
    done: list[tuple[int, int]] = []
    with task(f"blocks of {sample.id}", len(places)) as progress:
        begun = _begun(segmenter, reader(sample), sample.shape, block, places, done, progress)
        finished = run_ahead(begun, workers_for(segmenter, len(places)))
        return merge_tiles(((*done.pop(0), found) for found in finished), sample.shape, canvas)


def _begun(
    segmenter: Segmenter,
    read: Callable[[int, int, int, int], np.ndarray],
    shape: tuple[int, int],
    block: int,
    places: list[tuple[int, int]],
    done: list[tuple[int, int]],
    progress: Task,
) -> Iterator[Callable[[], Instances]]:
    for i, (row, col) in enumerate(places):
        pixels = read(row, col, min(block, shape[0] - row), min(block, shape[1] - col))
        if shows_something(pixels):
            done.append((row, col))
            yield segmenter.begin(pixels)
        progress.update(i + 1)


def shows_something(block: np.ndarray) -> bool:
    """Return whether any `SPECK` of a block, (H, W, 3) uint8, is darker than glass on average: noise is not."""
    whole = np.pad(block, [(0, -side % SPECK) for side in block.shape[:2]] + [(0, 0)], mode="edge")
    height, width = (side // SPECK for side in whole.shape[:2])
    specks = whole.reshape(height, SPECK, width, SPECK, 3).mean(axis=(1, 3))
    return bool(shows_tissue(specks).any())


def _area(sample: Sample) -> int:
    return sample.shape[0] * sample.shape[1]


def _check_room(samples: list[Sample], out: Path, large: int) -> None:
    free = shutil.disk_usage(out).free
    for sample in samples:
        if _area(sample) > large and 4 * _area(sample) > free:
            raise WorkflowError(
                f"{sample.id}: {out} has room for {free / 1e9:.1f} GB, and its label map may take "
                f"{4 * _area(sample) / 1e9:.1f} GB while it is made; write to another disk"
            )
