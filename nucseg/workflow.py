"""From unlabelled slides to label maps: `nucseg select`, `import-annotations`, `train`, `predict`, `evaluate`.

    select -> a pathologist outlines the nuclei of a few patches -> import_annotations -> train -> predict

Each step reads and writes one folder, so each can be looked at, corrected and repeated.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from nucseg import annotations, metrics, models
from nucseg.config import from_mapping, to_plain
from nucseg.data import Sample, load_dataset
from nucseg.encoders import Encoder
from nucseg.inference import run_ahead, workers_for
from nucseg.models.base import Segmenter
from nucseg.profiles import Profile
from nucseg.progress import task
from nucseg.selection import Selection, select
from nucseg.store import write_text
from nucseg.training import TrainingResult, train

SELECTION_FILE, MODEL_FILE = "selection.json", "model.json"


class WorkflowError(RuntimeError):
    """A step's input is missing or does not fit the step before it."""


def pick_device(name: str = "") -> torch.device:
    """Return the named device, or the GPU where there is one, else the CPU."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def select_patches(
    images: str | Path, out: str | Path, k1: int, strategy: str, profile: Profile, seed: int = 0, device: str = ""
) -> Selection:
    """Choose `k1` patches of a folder of images and write what a pathologist needs to outline them.

    Written to `out`: ``selection.json``; ``patches.csv``, one line per patch in order; ``patches/``, each patch as PNG;
    ``geojson/``, per image the patches as rectangles that QuPath opens on the image.
    """
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
    out = Path(out)
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


def import_annotations(selection: str | Path, outlines: str | Path, out: str | Path) -> pd.DataFrame:
    """Cut the outlined patches out as a training set: ``images/``, ``labels/`` and ``patches.csv`` in `out`.

    Parameters
    ----------
    selection
        The folder that `select_patches` wrote.
    outlines
        A folder with one file per image, by the image's name: QuPath ``.geojson``, MoNuSeg ``.xml``, or a label map.
        Outlines outside the chosen patches are ignored and counted.

    Returns
    -------
    DataFrame
        One line per patch: its file and how many nuclei were outlined in it.

    Raises
    ------
    WorkflowError
        If an image's outlines are missing, or no nucleus was outlined in any patch.
    """
    record = _read_json(Path(selection) / SELECTION_FILE, "run 'nucseg select' first")
    chosen = Selection.from_dict({k: v for k, v in record.items() if k != "images"})
    samples = {sample.id: sample for sample in load_dataset(record["images"]).samples}
    out = Path(out)
    for name in ("images", "labels"):
        (out / name).mkdir(parents=True, exist_ok=True)
    rows, labels_of = [], {}
    for rank, patch in enumerate(chosen.patches, 1):
        sample = samples.get(patch.image_id)
        if sample is None:
            raise WorkflowError(f"image {patch.image_id!r} is no longer in {record['images']}; put it back")
        if patch.image_id not in labels_of:
            labels_of[patch.image_id] = _read_outlines(Path(outlines), sample)
        labels = labels_of[patch.image_id][patch.slices]
        name = f"{rank:02d}_{Path(patch.image_id).name}_r{patch.row}_c{patch.col}.png"
        Image.fromarray(sample.region(patch.row, patch.col, patch.size, patch.size)).save(out / "images" / name)
        Image.fromarray(labels.astype(np.uint16)).save(out / "labels" / name)
        rows.append({"rank": rank, **to_plain(patch), "file": name, "nuclei": int(np.unique(labels[labels > 0]).size)})
    table = pd.DataFrame(rows)
    if not table["nuclei"].any():
        raise WorkflowError(f"no nucleus is outlined inside any chosen patch: are {outlines} of these images?")
    for row in table[table["nuclei"] == 0].itertuples():
        warnings.warn(f"patch {row.rank} of {row.image_id} has no nucleus outlined in it", stacklevel=2)
    table.to_csv(out / "patches.csv", index=False)
    return table


def _read_outlines(folder: Path, sample: Sample) -> np.ndarray:
    stem = Path(sample.id).name
    candidates = [folder / f"{stem}{suffix}" for suffix in (".geojson", ".json", ".xml", ".png", ".tif", ".npy")]
    for path in candidates:
        if path.is_file():
            if path.suffix in {".geojson", ".json"}:
                return annotations.read_geojson(path, sample.shape)
            if path.suffix == ".xml":
                return annotations.read_xml(path, sample.shape)
            labels = annotations.read_labels(path)
            if labels.shape != sample.shape:
                raise WorkflowError(f"{path}: label map of {labels.shape}, but image {sample.id} is {sample.shape}")
            return labels
    raise WorkflowError(f"no outlines of image {stem!r} in {folder}: expected {candidates[0].name} (QuPath) or .xml")


def train_folder(
    dataset: str | Path, out: str | Path, segmenter: str, profile: Profile, seed: int = 0, device: str = ""
) -> TrainingResult:
    """Train a segmenter on a folder of images with label maps, and write ``model.safetensors`` and ``model.json``."""
    data = load_dataset(str(dataset))
    pairs = [(sample.image, sample.labels) for sample in data.train if sample.labels is not None]
    if not pairs:
        raise WorkflowError(f"{dataset}: no image has a label map; outline some and run 'nucseg import-annotations'")
    torch.manual_seed(seed)
    config, encoder = profile.segmenter(segmenter), profile.segmenter_encoder
    model = models.build(segmenter, encoder, config, profile.weights.get(models.encoder_of(segmenter, encoder)))
    schedule = profile.training_of(segmenter)
    with task(f"training {segmenter} on {len(pairs)} images", schedule.iterations) as progress:
        result = train(
            model,
            pairs,
            schedule,
            seed,
            augment=profile.augment,
            device=pick_device(device),
            progress=lambda row: progress.update(row["iteration"], f"loss {row['total']:.3f}"),
        )
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous().cpu() for k, v in model.state_dict().items()}, out / "model.safetensors")
    record = {
        "segmenter": segmenter,
        "encoder": encoder,
        "config": to_plain(config),
        "training": to_plain(schedule),
        "data": {"name": data.name, "fingerprint": data.fingerprint, "images": len(pairs)},
        "seed": seed,
    }
    write_text(out / MODEL_FILE, json.dumps(record, indent=1))
    return result


def load_model(folder: str | Path, device: str = "") -> Segmenter:
    """Read a segmenter that `train_folder` wrote."""
    record = _read_json(Path(folder) / MODEL_FILE, "run 'nucseg train' first")
    config = from_mapping(models.config_class(record["segmenter"]), record["config"], f"{folder}: config")
    model = models.build(record["segmenter"], encoder=record["encoder"], config=config, pretrained=False)
    model.load_state_dict(load_file(Path(folder) / "model.safetensors"))
    return model.to(pick_device(device)).eval()


def predict_folder(model: str | Path, images: str | Path, out: str | Path, device: str = "") -> pd.DataFrame:
    """Segment every image of a folder: a 16- or 32-bit label map and a QuPath GeoJSON each, in `out`."""
    segmenter = load_model(model, device)
    samples = list(load_dataset(str(images)).samples)
    out = Path(out)
    for name in ("labels", "geojson"):
        (out / name).mkdir(parents=True, exist_ok=True)
    rows = []
    with task("segmenting", len(samples)) as progress:
        # On a GPU the network goes on with the next image while processes separate this one's nuclei.
        found = run_ahead((segmenter.begin(sample.image) for sample in samples), workers_for(segmenter, len(samples)))
        for i, (sample, (labels, scores)) in enumerate(zip(samples, found, strict=True)):
            stem = Path(sample.id).name
            annotations.write_labels(out / "labels" / f"{stem}.tif", labels)
            annotations.write_geojson(out / "geojson" / f"{stem}.geojson", labels)
            rows.append(
                {
                    "image_id": sample.id,
                    "nuclei": len(scores),
                    "mean_score": float(scores.mean()) if len(scores) else 0.0,
                }
            )
            progress.update(i + 1, stem)
    table = pd.DataFrame(rows)
    table.to_csv(out / "nuclei.csv", index=False)
    return table


def evaluate_folders(truth: str | Path, predicted: str | Path) -> pd.DataFrame:
    """Compare label maps of two folders by file name, one line of metrics per image and a last line with the mean.

    Raises
    ------
    WorkflowError
        If a true label map has no prediction, with its name.
    """
    true_files, predicted_files = _label_files(truth), _label_files(predicted)
    if missing := sorted(set(true_files) - set(predicted_files)):
        raise WorkflowError(f"{predicted}: no prediction for {', '.join(missing[:5])} ({len(missing)} in all)")
    rows = []
    for name, path in true_files.items():
        pair = annotations.read_labels(path), annotations.read_labels(predicted_files[name], binary=False)
        if pair[0].shape != pair[1].shape:
            raise WorkflowError(f"{path} is {pair[0].shape}, but {predicted_files[name]} is {pair[1].shape}")
        rows.append({"image_id": name, **metrics.evaluate(*pair)})
    table = pd.DataFrame(rows)
    mean = table.drop(columns="image_id").mean()
    return pd.concat([table, pd.DataFrame([{"image_id": "mean", **mean}])], ignore_index=True)


def _label_files(folder: str | Path) -> dict[str, Path]:
    folder = Path(folder)
    folder = folder / "labels" if (folder / "labels").is_dir() else folder
    files = {p.stem: p for p in sorted(folder.glob("*")) if p.suffix.lower() in {".png", ".tif", ".tiff", ".npy"}}
    if not files:
        raise WorkflowError(f"no label maps (.png, .tif, .npy) in {folder}")
    return files


def _read_json(path: Path, advice: str) -> dict:
    if not path.is_file():
        raise WorkflowError(f"no {path}: {advice}")
    return json.loads(path.read_text())


__all__: Sequence[str] = [
    "WorkflowError",
    "evaluate_folders",
    "import_annotations",
    "load_model",
    "predict_folder",
    "select_patches",
    "train_folder",
]
