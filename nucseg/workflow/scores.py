"""How far label maps agree with the truth."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import ndimage

from nucseg import annotations, metrics
from nucseg.data import DataError
from nucseg.files import write_text
from nucseg.workflow.base import WorkflowError, new_folder, open_images


def evaluate_folders(truth: str | Path, predicted: str | Path, out: str | Path = "") -> pd.DataFrame:
    """Compare label maps of two folders, one line of metrics per image and a last line with the mean.

    Parameters
    ----------
    truth
        A folder as one trains from: images with outlines or label maps in any layout of `nucseg.data.folder`; or bare
        label maps, without images.
    predicted
        What `predict_folder` wrote for such a folder, or bare label maps. They belong to the true ones by the ids of
        the images, which are their paths below the folder without suffix.
    out
        A CSV file to write the table to as well.

    Raises
    ------
    WorkflowError
        If an image with a truth has no prediction, with its name, or two files differ by their suffix alone; and at
        once where `out` cannot be written to.
    """
    if out:
        out = Path(out).expanduser()
        if out.is_dir():
            raise WorkflowError(f"{out} is a folder; name a file for the table, such as {out / 'scores.csv'}")
        new_folder(out.parent)
    true, predicted_files = _truth(truth), _label_files(predicted)
    if missing := sorted(set(true) - set(predicted_files)):
        raise WorkflowError(f"{predicted}: no prediction for {', '.join(missing[:5])} ({len(missing)} in all)")
    if extra := sorted(set(predicted_files) - set(true)):
        warnings.warn(f"no truth for {len(extra)} predictions, left out: {', '.join(extra[:5])}", stacklevel=2)
    rows = []
    for name, read in true.items():
        pair = read(), annotations.read_labels(predicted_files[name], binary=False)
        _warn_of_a_mask(predicted_files[name], pair[1])
        if pair[0].shape != pair[1].shape:
            raise WorkflowError(f"the truth of {name} is {pair[0].shape}, but {predicted_files[name]} {pair[1].shape}")
        rows.append({"image_id": name, **metrics.evaluate(*pair)})
    table = pd.DataFrame(rows)
    mean = table.drop(columns="image_id").mean()
    table = pd.concat([table, pd.DataFrame([{"image_id": "mean", **mean}])], ignore_index=True)
    if out:
        write_text(out, table.to_csv(index=False))
    return table


def _truth(place: str | Path) -> dict[str, Callable[[], np.ndarray]]:
    """Return how to read the true label map of each image, by its id; of bare label maps, by their names."""
    with warnings.catch_warnings(record=True) as said:  # a folder of bare label maps looks like one of odd images
        warnings.simplefilter("always")
        try:
            labelled = [sample for sample in open_images(place).samples if sample.labelled]
        except DataError:
            if not Path(place).expanduser().is_dir():
                raise
            labelled = []  # none has an image, or two of one name would be two images
    if not labelled:
        return {name: partial(annotations.read_labels, path) for name, path in _label_files(place).items()}
    for warning in said:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return {sample.id: partial(getattr, sample, "labels") for sample in labelled}


def _warn_of_a_mask(path: Path, labels: np.ndarray) -> None:
    ids = np.unique(labels[labels > 0])
    pieces = ndimage.label(labels > 0)[1] if ids.size == 1 else 0
    if pieces > 1:
        warnings.warn(
            f"{path}: one id, {ids[0]}, in {pieces} pieces: counts as one nucleus; is it a mask and no label map?",
            stacklevel=3,
        )


def _label_files(folder: str | Path) -> dict[str, Path]:
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise WorkflowError(f"{folder}: no such folder; give one with label maps")
    folder = folder / "labels" if (folder / "labels").is_dir() else folder
    files: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in {".png", ".tif", ".tiff", ".npy"} or path.name.startswith("."):
            continue
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in files:
            raise WorkflowError(f"{files[name]} and {path} are two label maps of one name; rename or remove one")
        files[name] = path
    if not files:
        raise WorkflowError(f"no label maps (.png, .tif, .npy) in {folder}; outlines need their images beside them")
    return files
