"""From outlined patches to a segmenter."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nucseg import models
from nucseg.augment import AugmentConfig
from nucseg.checkpoints import Checkpoint
from nucseg.code_version import code_version
from nucseg.config import from_mapping, to_plain
from nucseg.data import Dataset, Sample
from nucseg.data.folder import training_sets
from nucseg.devices import pick_device
from nucseg.files import whole, write_text
from nucseg.mean_teacher import MeanTeacher
from nucseg.models.base import Segmenter
from nucseg.profiles import Profile
from nucseg.progress import task
from nucseg.selection.content import shows_tissue
from nucseg.stages import MODEL_CODE
from nucseg.training import TrainingConfig, TrainingResult, train
from nucseg.workflow.base import (
    MODEL_FILE,
    WorkflowError,
    new_folder,
    open_images,
    read_json,
    reader,
    stamp,
    training_images,
)

Pair = tuple[np.ndarray, np.ndarray]  # image (H, W, 3) uint8, label map (H, W) int32
UNLABELLED_PIXELS = 64_000_000  # of all images without outlines: half a gigabyte with their place for labels
TISSUE = 0.5  # least share of tissue in a window of a large image, as far as one is found


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

    What was stopped goes on where it was, by the same call: once a minute the state of the training is written to
    ``out``, and removed at the end. Anything else asked for, other outlines, a changed file of an image without
    them, or a newer nucseg begin anew.

    Parameters
    ----------
    dataset
        What `import_annotations` wrote, a folder of several of these, or any folder with ``images/`` and ``labels/``.
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
        Where `out` holds a model already, without any nucleus to learn from, or where no mean teacher can teach the
        segmenter.
    """
    if unlabelled and not models.teachable(segmenter):
        can = ", ".join(name for name in models.REGISTRY if models.teachable(name))
        raise WorkflowError(f"{segmenter} cannot learn from images without outlines, only {can} can")
    out = Path(out).expanduser()
    if (out / MODEL_FILE).exists():
        raise WorkflowError(f"{out} holds a model already; name another folder, or remove this one first")
    data = open_images(dataset)
    _warn_of_other_sets(dataset, data)
    others = training_images(open_images(unlabelled)) if unlabelled else []
    pairs = _labelled_pairs(data, dataset)
    config, encoder = profile.segmenter(segmenter), profile.segmenter_encoder
    schedule, where = profile.training_of(segmenter), pick_device(device)
    if segmenter not in profile.training:
        warnings.warn(
            f"profile {profile.name} has no schedule for {segmenter}: {schedule.iterations:,} iterations of "
            f"{schedule.batch} crops of {schedule.crop} px; for another one add `training: {{{segmenter}: "
            "{iterations: ...}}` to a profile of your own",
            stacklevel=2,
        )
    record = _record(segmenter, profile, data, len(pairs), others, seed)
    new_folder(out)
    views = unlabelled_views(others, UNLABELLED_PIXELS, seed)  # a damaged image is noticed before the first training
    begun = _Begun(out, [record, to_plain(profile.augment), where.type, *(stamp(sample) for sample in others)])
    torch.manual_seed(seed)
    model = models.build(segmenter, encoder, config, profile.weights.get(models.encoder_of(segmenter, encoder)))
    learn = partial(_learn, model, pairs, profile.augment, where)
    title = f"training {segmenter} on {len(pairs)} images"
    if not others:
        result = learn(title, schedule, seed, begun.checkpoint("labelled"))
    else:
        if not begun.restore(model):
            learn(title, schedule, seed, begun.checkpoint("labelled"))
            begun.keep(model)
        views = [model.prepare(view) for view in views]
        teacher = MeanTeacher(views, profile.pseudo.teacher, schedule.batch, schedule.crop, profile.augment, where)
        title = f"learning from {len(others)} images without outlines"
        longer = replace(schedule, ema=profile.pseudo.teacher.decay)
        result = learn(title, longer, seed + 1, begun.checkpoint("unlabelled"), teacher)
    _write_weights(model, out / "model.safetensors")
    write_text(out / MODEL_FILE, json.dumps(record, indent=1))
    begun.forget()
    return result


def _warn_of_other_sets(place: str | Path, data: Dataset) -> None:
    """Say which training sets a folder holds that are not among its images, because there are others beside them."""
    folder = Path(place).expanduser()
    if not folder.is_dir():
        return
    opened = [sample.source.image_path for sample in data.samples]
    sets = [path for path in training_sets(folder) if not any(image.is_relative_to(path) for image in opened)]
    if sets:
        said = ", ".join(path.relative_to(folder).as_posix() for path in sets)
        warnings.warn(
            f"{place}: imported patches are left out, as other images lie beside them: {said}. To train on these, name "
            "one of them, or put them into a folder that holds nothing else and name that",
            stacklevel=3,
        )


def _labelled_pairs(data: Dataset, place: str | Path) -> list[Pair]:
    """Return the images that have a label map, with it, and say which have none."""
    without = [sample.id for sample in data.train if not sample.labelled]
    pairs = [(sample.image, sample.labels) for sample in data.train if sample.labelled]
    if not pairs:
        raise WorkflowError(f"{place}: no image has a label map; outline some and run 'nucseg import-annotations'")
    if without:
        warnings.warn(
            f"{len(without)} images have no label map and are left out: {', '.join(without[:5])}", stacklevel=3
        )
    if not any(labels.any() for _, labels in pairs):
        raise WorkflowError(f"{place}: no label map holds a nucleus, so there is nothing to learn")
    return pairs


def _record(
    segmenter: str, profile: Profile, data: Dataset, images: int, others: Sequence[Sample], seed: int
) -> dict[str, Any]:
    """Return what ``model.json`` says: all that the model was made from."""
    unlabelled = {"images": [sample.id for sample in others], "teacher": to_plain(profile.pseudo.teacher)}
    return {
        "segmenter": segmenter,
        "encoder": profile.segmenter_encoder,
        "config": to_plain(profile.segmenter(segmenter)),
        "training": to_plain(profile.training_of(segmenter)),
        "data": {"name": data.name, "fingerprint": data.fingerprint, "images": images},
        "unlabelled": unlabelled if others else None,
        "seed": seed,
    }


def _learn(
    model: Segmenter,
    pairs: Sequence[Pair],
    augment: AugmentConfig,
    device: torch.device,
    title: str,
    schedule: TrainingConfig,
    seed: int,
    checkpoint: Checkpoint,
    teacher: MeanTeacher | None = None,
) -> TrainingResult:
    with task(title, schedule.iterations) as progress:
        return train(
            model,
            pairs,
            schedule,
            seed,
            augment=augment,
            device=device,
            progress=progress.measured,
            resume_from=checkpoint.read(),
            checkpoint=checkpoint,
            unlabelled=teacher,
        )


class _Begun:
    """What a training that is not finished has left in its folder, by names that stand for all it depends on."""

    def __init__(self, folder: Path, what: list):
        what = [*what, code_version(*MODEL_CODE, "nucseg.mean_teacher", "nucseg.workflow.segmenter")]
        self.folder = folder
        self.key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]
        self.first = folder / f".{self.key}.first.safetensors"  # the model between the two trainings

    def checkpoint(self, part: str) -> Checkpoint:
        return Checkpoint(self.folder / f".{self.key}.{part}.state", check_time=lambda: None)

    def keep(self, model: Segmenter) -> None:
        _write_weights(model, self.first)

    def restore(self, model: Segmenter) -> bool:
        if self.first.is_file():
            model.load_state_dict(load_file(self.first))
        return self.first.is_file()

    def forget(self) -> None:
        """Remove it all, and what trainings with other settings have left in this folder."""
        for path in self.folder.glob(f".{'[0-9a-f]' * 12}.*"):
            path.unlink(missing_ok=True)


def _write_weights(model: Segmenter, path: Path) -> None:
    with whole(path) as part:
        save_file({k: v.contiguous().cpu() for k, v in model.state_dict().items()}, part)


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
    if not samples:
        return []
    areas = np.array([sample.shape[0] * sample.shape[1] for sample in samples], dtype=float)
    if areas.sum() <= pixels:
        return [sample.image for sample in samples]
    rng = np.random.default_rng(seed)
    views = []
    for sample, area in zip(samples, areas, strict=True):
        height, width = (min(side, length) for length in sample.shape)
        read = reader(sample)
        for _ in range(max(1, round(pixels * area / areas.sum() / (height * width)))):
            for _ in range(10):
                row, col = (int(rng.integers(a - b + 1)) for a, b in zip(sample.shape, (height, width), strict=True))
                view = read(row, col, height, width)
                if shows_tissue(view).mean() >= TISSUE:
                    break
            views.append(view)
    return views


def load_model(folder: str | Path, device: str = "") -> Segmenter:
    """Read a segmenter that `train_folder` wrote."""
    folder = Path(folder).expanduser()
    record = read_json(folder / MODEL_FILE, "run 'nucseg train' first", ("segmenter", "encoder", "config"))
    config = from_mapping(models.config_class(record["segmenter"]), record["config"], f"{folder}: config")
    model = models.build(record["segmenter"], encoder=record["encoder"], config=config, pretrained=False)
    path = folder / "model.safetensors"
    if not path.is_file():
        raise WorkflowError(f"no {path}, the weights that belong to {MODEL_FILE}: put them back, or train again")
    try:
        model.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        raise WorkflowError(f"{path}: damaged, or not of {MODEL_FILE} beside it ({error}); train it again") from error
    return model.to(pick_device(device)).eval()
