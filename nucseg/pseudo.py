"""Pseudo-labelling (Sec. III-C): crops of the training images, labelled by the segmenter of the round before.

Resolutions of REFERENCE A34: training images only (the caller hands over nothing else), each predicted whole and once;
600 crops a round, equally many per image; nuclei below a confidence of 0.5 or of unlikely size dropped; the annotated
patches keep their true labels. The size is ours, the rest A34's. Every round trains again from the start (A35), on its
own crops in place of those of the round before, which the same images gave to an older model; "added per round"
(REFERENCE 1.5) can also be read as adding them up. Both are the caller's affair.

Deviations from the released code, which adds overlapping masks up (their ids are summed), keeps every size and forgets
the annotations: here a crop's labels are a label map, and a nucleus that a patch's border cuts is completed from the
prediction instead of being doubled.

Beyond the paper: a nucleus that was dropped is not known to be background, so `PseudoConfig.unsure` can mark it as
unknown, and `PseudoConfig.method` can replace the rounds by a mean teacher (`nucseg.mean_teacher`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from scipy import ndimage

from nucseg.labels import IGNORE, check_label_map, relabel
from nucseg.mean_teacher import MeanTeacherConfig
from nucseg.models.base import Instances

Annotation = tuple[int, int, int, np.ndarray]  # row, column, size, label map (size, size) with the truth


@dataclass(frozen=True)
class PseudoConfig:
    """Every number of a pseudo-labelling round.

    Attributes
    ----------
    method
        ``"rounds"`` of fixed pseudo labels, the paper's, or ``"mean-teacher"``: each round is one training with a mean
        teacher from the model of the round before; only `teacher` counts then. Mask R-CNN, which has no targets per
        pixel, gets rounds with ``unsure: ignore`` and a confidence of `MeanTeacherConfig.sure` instead.
    unsure
        What the pixels of dropped nuclei become: ``"background"``, the paper's, or ``"ignore"``: no loss looks there.
    crops
        Pseudo-labelled crops per round, shared equally among the images.
    size
        Side of a crop in pixels; a smaller image gives crops of its own size.
    confidence
        Lowest score of a predicted nucleus that is kept. HoVer heads score a nucleus by the mean probability of its
        pixels, each at least 0.5, and Mask R-CNN reports none below `MaskRCNNConfig.score`, so that the paper's 0.5
        drops nothing; 0.8 to 0.9 does.
    min_area, max_area
        Smallest and largest predicted nucleus that is kept, in pixels; 0 = no upper limit.
    positions
        Positions drawn for each crop, of which the one with the fewest doubtful pixels is taken. 1 is the paper's
        uniform draw. Our stronger variant takes more: a dropped nucleus is background to the student, so crops
        without dropped nuclei mislead it least.
    teacher
        Every number of the mean teacher.
    """

    method: Literal["rounds", "mean-teacher"] = "rounds"
    unsure: Literal["background", "ignore"] = "background"
    crops: int = 600
    size: int = 256
    confidence: float = 0.5
    min_area: int = 20
    max_area: int = 0
    positions: int = 1
    teacher: MeanTeacherConfig = field(default_factory=MeanTeacherConfig)

    def __post_init__(self):
        for name in ("crops", "size", "positions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 <= self.confidence <= 1:
            raise ValueError(f"confidence: expected a value in [0, 1], got {self.confidence}")
        if self.min_area < 0 or self.max_area < 0 or 0 < self.max_area < self.min_area:
            raise ValueError(
                f"min_area, max_area: expected 0 <= min_area <= max_area (or 0 for no upper limit), "
                f"got {self.min_area} and {self.max_area}"
            )


class PseudoLabels(NamedTuple):
    """The crops of one round, and what became of the predicted nuclei of the whole images."""

    pairs: list[tuple[np.ndarray, np.ndarray]]  # (image (s, s, 3) uint8, labels (s, s) int32: ids 1..n, 0, IGNORE)
    positions: list[tuple[int, int, int]]  # image, row, column of each crop
    kept: int  # predicted nuclei that became pseudo labels
    dropped: dict[str, int]  # predicted nuclei by why they did not: "unsure", "small", "large", "annotated"


def pseudo_pairs(
    predict_instances: Callable[[np.ndarray], Instances],
    images: Sequence[np.ndarray],
    annotated: Sequence[Sequence[Annotation]],
    config: PseudoConfig | None = None,
    seed: int = 0,
) -> PseudoLabels:
    """Predict the training images and cut pseudo-labelled crops out of them.

    Parameters
    ----------
    predict_instances
        The segmenter of the round before: (H, W, 3) uint8 to `Instances`.
    images
        Training images, never validation or test ones.
    annotated
        For each image its annotated patches: (row, column, size, label map of the patch).
    seed
        Of the crops' positions.

    Raises
    ------
    ValueError
        If `images` and `annotated` differ in length, or a patch or prediction does not fit its image.
    """
    config = config or PseudoConfig()
    if len(images) != len(annotated) or not images:
        raise ValueError(
            f"annotated: expected a list of patches (possibly empty) for each of {len(images)} images, at least one; "
            f"got {len(annotated)}"
        )
    rng = np.random.default_rng(seed)
    # Equally many crops per image; what does not divide goes to images drawn without replacement.
    counts = np.full(len(images), config.crops // len(images))
    counts[rng.permutation(len(images))[: config.crops % len(images)]] += 1

    pairs, positions = [], []
    kept, dropped = 0, dict.fromkeys(("unsure", "small", "large", "annotated"), 0)
    for number, (image, patches, count) in enumerate(zip(images, annotated, counts, strict=True)):
        if not count:
            continue
        prediction = predict_instances(image)
        if prediction.labels.shape != image.shape[:2]:
            raise ValueError(
                f"images[{number}]: the prediction is {prediction.labels.shape}, the image {image.shape[:2]}"
            )
        sure, doubtful, why = filter_instances(prediction, config)
        labels, replaced = merge_truth(sure, patches, config.min_area)
        for _, _, window in _windows(patches, image.shape[:2]):
            doubtful[window] = False  # there the truth is known
        if config.unsure == "ignore":
            labels[doubtful & (labels == 0)] = IGNORE
        for reason, n in why.items():
            dropped[reason] += n
        dropped["annotated"] += replaced
        kept += len(np.unique(sure[sure > 0])) - replaced
        height, width = (min(config.size, side) for side in image.shape[:2])
        # The number of doubtful pixels in any crop, from one table of sums.
        table = np.pad(doubtful.astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
        for _ in range(count):
            rows = rng.integers(image.shape[0] - height + 1, size=config.positions)
            cols = rng.integers(image.shape[1] - width + 1, size=config.positions)
            low, high = rows + height, cols + width
            doubt = table[low, high] - table[rows, high] - table[low, cols] + table[rows, cols]
            best = int(doubt.argmin())
            row, col = int(rows[best]), int(cols[best])
            window = (slice(row, row + height), slice(col, col + width))
            pairs.append((image[window].copy(), relabel(labels[window])))
            positions.append((number, row, col))
    return PseudoLabels(pairs, positions, kept, dropped)


def filter_instances(prediction: Instances, config: PseudoConfig) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """Drop unsure, small and large nuclei.

    Returns
    -------
    labels, doubtful, dropped
        The label map of what stays (H, W) int32, the pixels of what went (H, W) bool, and counts by reason.
    """
    labels = check_label_map(prediction.labels, "prediction.labels")
    count = len(prediction.scores)
    if labels.size and labels.max() > count:
        raise ValueError(f"prediction: {count} scores for ids up to {labels.max()}")
    area = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    present = area > 0
    unsure = present & (np.asarray(prediction.scores) < config.confidence)
    small = present & ~unsure & (area < config.min_area)
    large = present & ~unsure & (area > config.max_area) if config.max_area else np.zeros(count, dtype=bool)
    keep = np.concatenate(([False], present & ~unsure & ~small & ~large))
    stays = keep[labels]
    dropped = {"unsure": int(unsure.sum()), "small": int(small.sum()), "large": int(large.sum())}
    return np.where(stays, labels, 0).astype(np.int32), (labels > 0) & ~stays, dropped


def merge_truth(predicted: np.ndarray, patches: Sequence[Annotation], min_area: int = 0) -> tuple[np.ndarray, int]:
    """Paste the true labels of annotated patches into a prediction of the whole image.

    Inside the patches the truth stands, pixel by pixel. A predicted nucleus that crosses a patch's border

    - completes the true nucleus that it covers and continues beyond the border, which so stays one nucleus;
    - otherwise keeps its part outside, as a nucleus of its own, if that is the larger part and at least `min_area`
      pixels; else it goes, since the truth denies most of it.

    Patches may overlap: two true nuclei of different patches that agree in more than half of their union where both
    patches look are one.

    Returns
    -------
    labels, replaced
        The label map (H, W) int32 with ids 1..n, and the number of predicted nuclei that went or became part of a
        true one.
    """
    check_label_map(predicted, "predicted")
    truth, inside = _paste_patches(patches, predicted.shape)
    labels = truth.copy()
    next_id = int(truth.max(initial=0)) + 1
    replaced = 0
    for number, box in enumerate(ndimage.find_objects(predicted), start=1):
        if box is None:
            continue
        box = tuple(slice(max(s.start - 1, 0), s.stop + 1) for s in box)  # one pixel of room to see neighbours
        mask = predicted[box] == number
        rest = mask & ~inside[box]
        area, outside = np.count_nonzero(mask), np.count_nonzero(rest)
        target = labels[box]
        if outside == area:
            target[rest] = next_id
            next_id += 1
            continue
        beside = np.unique(truth[box][ndimage.binary_dilation(rest)])
        covered = np.bincount(truth[box][mask & inside[box]], minlength=1)
        candidates = [(covered[t], -t) for t in beside[beside > 0] if t < len(covered) and covered[t] > 0]
        if outside and candidates:
            target[rest] = -max(candidates)[1]
            replaced += 1
        elif 2 * outside > area and outside >= min_area:
            target[rest] = next_id
            next_id += 1
        else:
            replaced += 1
    return relabel(labels), replaced


def _windows(patches: Sequence[Annotation], shape: tuple[int, int]) -> list[tuple[int, np.ndarray, tuple]]:
    windows = []
    for number, (row, col, size, labels) in enumerate(patches):
        check_label_map(labels, f"annotated patch {number}")
        if labels.shape != (size, size) or row < 0 or col < 0 or row + size > shape[0] or col + size > shape[1]:
            raise ValueError(
                f"annotated patch {number}: labels of shape {labels.shape}, size {size} at row {row}, column {col} "
                f"do not fit an image of {shape[0]} x {shape[1]}"
            )
        windows.append((number, labels, (slice(row, row + size), slice(col, col + size))))
    return windows


def _paste_patches(patches: Sequence[Annotation], shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """All true labels of an image, (H, W) int32, and where the truth is known, (H, W) bool."""
    truth, inside = np.zeros(shape, dtype=np.int32), np.zeros(shape, dtype=bool)
    next_id = 1
    for _, labels, window in _windows(patches, shape):
        known, here = inside[window].copy(), truth[window]
        for value in np.unique(labels[labels > 0]):
            mask = labels == value
            ids, counts = np.unique(here[mask & known], return_counts=True)
            same = 0
            if ids.any():
                best = ids[ids > 0][counts[ids > 0].argmax()]
                common = np.count_nonzero(mask & known & (here == best))
                union = np.count_nonzero(known & (mask | (here == best)))
                same = int(best) if 2 * common > union else 0
            free = mask & ~known
            here[free] = same or next_id
            next_id += not same
        inside[window] = True
    return truth, inside
