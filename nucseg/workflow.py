"""From unlabelled slides to label maps: `nucseg select`, `import-annotations`, `train`, `predict`, `evaluate`.

    select -> a pathologist outlines the nuclei of a few patches -> import_annotations -> train -> predict

Each step reads and writes one folder, so each can be looked at, corrected and repeated.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import replace
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
from nucseg.mean_teacher import MeanTeacher
from nucseg.models.base import Segmenter
from nucseg.profiles import Profile
from nucseg.progress import task
from nucseg.selection import Selection, select
from nucseg.store import write_text
from nucseg.training import TrainingConfig, TrainingResult, train

SELECTION_FILE, MODEL_FILE = "selection.json", "model.json"
UNLABELLED_PIXELS = 64_000_000  # of all images without outlines: half a gigabyte with their place for labels
GLASS = 200  # a window whose darkest twentieth is brighter than this, in its darkest colour, shows no tissue


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
    dataset: str | Path,
    out: str | Path,
    segmenter: str,
    profile: Profile,
    seed: int = 0,
    device: str = "",
    unlabelled: str | Path = "",
) -> TrainingResult:
    """Train a segmenter on a folder of images with label maps, and write ``model.safetensors`` and ``model.json``.

    Parameters
    ----------
    dataset
        What `import_annotations` wrote, or any folder with ``images/`` and ``labels/``.
    segmenter
        A name of `nucseg.models.REGISTRY`.
    profile
        Its schedule, augmentation and, with `unlabelled`, its mean teacher.
    unlabelled
        A folder of images of the same kind that nobody outlined, such as the slides that the patches are from. Then a
        second training, as long as the first, goes on from there with a mean teacher (`nucseg.mean_teacher`).

    Returns
    -------
    TrainingResult
        Of the last training.

    Raises
    ------
    WorkflowError
        Without any label map, or where no mean teacher can teach the segmenter.
    """
    if unlabelled and not models.teachable(segmenter):
        can = ", ".join(name for name in models.REGISTRY if models.teachable(name))
        raise WorkflowError(f"{segmenter} cannot learn from images without outlines, only {can} can")
    data = load_dataset(str(dataset))
    others = list(load_dataset(str(unlabelled)).samples) if unlabelled else []
    pairs = [(sample.image, sample.labels) for sample in data.train if sample.labels is not None]
    if not pairs:
        raise WorkflowError(f"{dataset}: no image has a label map; outline some and run 'nucseg import-annotations'")
    torch.manual_seed(seed)
    config, encoder = profile.segmenter(segmenter), profile.segmenter_encoder
    model = models.build(segmenter, encoder, config, profile.weights.get(models.encoder_of(segmenter, encoder)))
    schedule, where = profile.training_of(segmenter), pick_device(device)
    result = _train(f"training {segmenter} on {len(pairs)} images", model, pairs, schedule, seed, profile, where)
    if others:
        views = unlabelled_views(others, UNLABELLED_PIXELS, seed)
        teacher = MeanTeacher(views, profile.pseudo.teacher, schedule.batch, schedule.crop, profile.augment, where)
        title = f"learning from {len(others)} images without outlines"
        longer = replace(schedule, ema=profile.pseudo.teacher.decay)
        result = _train(title, model, pairs, longer, seed + 1, profile, where, teacher)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous().cpu() for k, v in model.state_dict().items()}, out / "model.safetensors")
    record = {
        "segmenter": segmenter,
        "encoder": encoder,
        "config": to_plain(config),
        "training": to_plain(schedule),
        "data": {"name": data.name, "fingerprint": data.fingerprint, "images": len(pairs)},
        "unlabelled": {"images": [s.id for s in others], "teacher": to_plain(profile.pseudo.teacher)}
        if others
        else None,
        "seed": seed,
    }
    write_text(out / MODEL_FILE, json.dumps(record, indent=1))
    return result


def _train(
    title: str,
    model: Segmenter,
    pairs: Sequence[tuple[np.ndarray, np.ndarray]],
    schedule: TrainingConfig,
    seed: int,
    profile: Profile,
    device: torch.device,
    teacher: MeanTeacher | None = None,
) -> TrainingResult:
    with task(title, schedule.iterations) as progress:
        return train(
            model,
            pairs,
            schedule,
            seed,
            augment=profile.augment,
            device=device,
            progress=lambda row: progress.update(row["iteration"], f"loss {row['total']:.3f}"),
            unlabelled=teacher,
        )


def unlabelled_views(samples: Sequence[Sample], pixels: int, seed: int = 0, side: int = 512) -> list[np.ndarray]:
    """Return what a mean teacher looks at: all images where they are small, else random windows of them.

    Parameters
    ----------
    samples
        Images of any size; of large ones only the windows are read.
    pixels
        Of all views together, about; the training holds them in memory.
    seed, side
        Of the windows, and their side in pixels. An image gives windows by its area, at least one; a window of glass
        is drawn anew, up to ten times.

    Returns
    -------
    list of array
        (H, W, 3) uint8 each.
    """
    areas = np.array([sample.shape[0] * sample.shape[1] for sample in samples], dtype=float)
    if areas.sum() <= pixels:
        return [sample.image for sample in samples]
    rng = np.random.default_rng(seed)
    views = []
    for sample, area in zip(samples, areas, strict=True):
        height, width = (min(side, length) for length in sample.shape)
        for _ in range(max(1, round(pixels * area / areas.sum() / (height * width)))):
            for _ in range(10):
                row, col = (int(rng.integers(a - b + 1)) for a, b in zip(sample.shape, (height, width), strict=True))
                view = sample.region(row, col, height, width)
                if np.quantile(view.min(axis=2), 0.05) < GLASS:
                    break
            views.append(view)
    return views


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
    "unlabelled_views",
]
