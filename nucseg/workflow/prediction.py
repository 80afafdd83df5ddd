"""From a segmenter to label maps: of images in memory, and of whole slides in blocks."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from nucseg import annotations
from nucseg.data import Sample, load_dataset
from nucseg.inference import merge_tiles, places_of, run_ahead, workers_for
from nucseg.models.base import Instances, Segmenter
from nucseg.progress import Task, task
from nucseg.selection.content import shows_tissue
from nucseg.workflow.base import WorkflowError, unique_names
from nucseg.workflow.segmenter import load_model

LARGE = 100_000_000  # pixels of an image beyond which it is read in blocks, and its label map lies on the disk
BLOCK, OVERLAP = 2048, 256  # of a segmenter that has none of its own
SPECK = 16  # pixels: as wide as a small nucleus; where no square of this side is darker than glass, there is none


def predict_folder(
    model: str | Path, images: str | Path, out: str | Path, device: str = "", large: int = LARGE
) -> pd.DataFrame:
    """Segment every image of a folder: a 16- or 32-bit label map and a QuPath GeoJSON each, in `out`.

    ``images.csv`` there has one line per image: how many nuclei, and their mean score.

    Parameters
    ----------
    model
        The folder that `train_folder` wrote.
    images
        A folder of images or slides.
    large
        Pixels of an image beyond which `segment_slide` does it.

    Raises
    ------
    WorkflowError
        For an image below 32 pixels a side, or where the disk has no room for a slide's label map; before the first
        image is segmented.
    """
    segmenter = load_model(model, device)
    samples, out = list(load_dataset(str(images)).samples), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    _check(samples, out, large)  # before hours of work end at the last one
    rows, names = [], unique_names([sample.id for sample in samples])
    small = [sample for sample in samples if _area(sample) <= large]
    # On a GPU the network goes on with the next image while processes separate this one's nuclei.
    found = run_ahead((segmenter.begin(sample.image) for sample in small), workers_for(segmenter, len(small)))
    with task("segmenting", len(samples)) as progress, tempfile.TemporaryDirectory(prefix=".nucseg.", dir=out) as place:
        for i, sample in enumerate(samples):
            stem = names[sample.id]
            if _area(sample) <= large:
                labels, scores = next(found)
            else:
                canvas = np.memmap(Path(place) / str(i), np.int32, "w+", shape=sample.shape)
                labels, scores = segment_slide(segmenter, sample, canvas)
            annotations.write_labels(out / "labels" / f"{stem}.tif", labels)
            annotations.write_geojson(out / "geojson" / f"{stem}.geojson", labels, scores=scores)
            mean = float(scores.mean()) if len(scores) else 0.0
            rows.append({"image_id": sample.id, "nuclei": len(scores), "mean_score": mean})
            progress.update(i + 1, stem)
            (Path(place) / str(i)).unlink(missing_ok=True)
    table = pd.DataFrame(rows)
    table.to_csv(out / "images.csv", index=False)
    return table


def segment_slide(segmenter: Segmenter, sample: Sample, canvas: np.ndarray) -> Instances:
    """Segment an image of any size in memory that does not grow with it, but by about 1 kB a nucleus.

    It is cut into the blocks that the segmenter itself cuts large images into, so the nuclei are the same as if it were
    in memory, but that blocks of bare glass are left out, and that stains are normalised, where the segmenter does
    that, block by block.

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
        begun = _begun(segmenter, _reader(sample), sample.shape, block, places, done, progress)
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


def _reader(sample: Sample) -> Callable[[int, int, int, int], np.ndarray]:
    if sample.source.by_region:
        return sample.region
    image = sample.image  # decoded once, and not again for every block
    return lambda row, col, height, width: image[row : row + height, col : col + width].copy()


def shows_something(block: np.ndarray) -> bool:
    """Return whether any `SPECK` of a block, (H, W, 3) uint8, is darker than glass on average: noise is not."""
    whole = np.pad(block, [(0, -side % SPECK) for side in block.shape[:2]] + [(0, 0)], mode="edge")
    height, width = (side // SPECK for side in whole.shape[:2])
    specks = whole.reshape(height, SPECK, width, SPECK, 3).mean(axis=(1, 3))
    return bool(shows_tissue(specks).any())


def _area(sample: Sample) -> int:
    return sample.shape[0] * sample.shape[1]


def _check(samples: list[Sample], out: Path, large: int) -> None:
    free = shutil.disk_usage(out).free
    for sample in samples:
        if min(sample.shape) < 32:
            raise WorkflowError(f"{sample.id}: at least 32 pixels a side, got {sample.shape[0]} x {sample.shape[1]}")
        if _area(sample) > large and 4 * _area(sample) > free:
            raise WorkflowError(
                f"{sample.id}: {out} has room for {free / 1e9:.1f} GB, and its label map may take "
                f"{4 * _area(sample) / 1e9:.1f} GB while it is made; write to another disk"
            )
