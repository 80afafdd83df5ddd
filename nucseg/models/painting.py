"""From detections to one label map: masks resampled inside their boxes, and painted in order of score (REFERENCE A33).

Also the tiles of a large image, each with the part of the image whose nuclei it owns.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torchvision.ops import nms

from nucseg.models.base import Instances


def paint(
    boxes: Float[Tensor, "n 4"],
    scores: Float[Tensor, " n"],
    masks: Float[Tensor, "n m m"],
    shape: tuple[int, int],
    threshold: float = 0.5,
    drop_covered: float = 0.7,
    min_area: int = 15,
) -> Instances:
    """Turn detections into one label map: best first, each taking the pixels still free (REFERENCE A33).

    A detection is dropped when more than `drop_covered` of its mask is taken already, or when fewer than `min_area`
    pixels are left of it. Masks are resampled inside their boxes only, many at a time.

    Parameters
    ----------
    boxes
        In pixels of the image, in falling order of `scores`.
    scores
        In [0, 1].
    masks
        Probabilities on a grid over each box.
    shape
        Of the label map, (H, W).
    """
    labels = np.zeros(shape, dtype=np.int32)
    kept: list[int] = []
    corners = boxes.floor().long().clamp(min=0)
    ends = torch.minimum(boxes.ceil().long(), torch.tensor([shape[1], shape[0]] * 2))
    corner, end = corners[:, :2].numpy(), ends[:, 2:].numpy()
    windows = _resample(boxes, masks, torch.from_numpy(corner), torch.from_numpy(end), threshold)
    for number, window in enumerate(windows):
        (x0, y0), (x1, y1) = corner[number], end[number]
        if x1 <= x0 or y1 <= y0:
            continue
        mask = window[: y1 - y0, : x1 - x0]
        under = labels[y0:y1, x0:x1]
        free = mask & (under == 0)
        area, left = np.count_nonzero(mask), np.count_nonzero(free)
        if left == 0 or left < min_area or area - left > drop_covered * area:
            continue
        kept.append(number)
        under[free] = len(kept)
    return Instances(labels, scores.float().numpy()[kept])


def _resample(boxes: Tensor, masks: Tensor, corner: Tensor, end: Tensor, threshold: float) -> list[np.ndarray]:
    """Binary masks on the image's pixels, from each box's corner; boxes of like size are resampled together."""
    sides = (end - corner).clamp(min=1).amax(dim=1)
    buckets = torch.ceil(torch.log2(sides.float().clamp(min=16))).long()
    windows: list[np.ndarray] = [np.zeros((0, 0), dtype=bool)] * len(boxes)
    for bucket in buckets.unique().tolist():
        side = 2**bucket
        group = (buckets == bucket).nonzero()[:, 0]
        for part in group.split(max(1, 2**24 // side**2)):
            box, start = boxes[part].to(masks.device), corner[part].to(masks.device)
            pixel = torch.arange(side, device=masks.device) + 0.5
            # Position of every pixel centre in its box, from -1 to 1 across the box, as grid_sample counts.
            position = 2 * (start[:, None] + pixel[:, None] - box[:, None, :2]) / (box[:, 2:] - box[:, :2])[:, None] - 1
            x, y = position[:, None, :, 0].expand(-1, side, -1), position[:, :, None, 1].expand(-1, -1, side)
            probability = F.grid_sample(
                masks[part.to(masks.device), None], torch.stack((x, y), dim=-1), mode="bilinear",
                padding_mode="border", align_corners=False,
            )[:, 0]  # fmt: skip
            inside = (x.abs() <= 1) & (y.abs() <= 1)
            for number, window in zip(part.tolist(), ((probability > threshold) & inside).cpu().numpy(), strict=True):
                windows[number] = window
    return windows


def spans(length: int, tile: int, overlap: int) -> list[tuple[int, int, int, int]]:
    """Tiles along one side: (start, end, start and end of the part whose nuclei it owns)."""
    if length <= tile:
        return [(0, length, 0, length)]
    count = -(-(length - overlap) // (tile - overlap))
    starts = [round(i * (length - tile) / (count - 1)) for i in range(count)]
    cuts = [0] + [(a + tile + b) // 2 for a, b in pairwise(starts)] + [length]
    return [(start, start + tile, low, high) for start, low, high in zip(starts, cuts, cuts[1:], strict=False)]


def nms_across(
    boxes: Float[Tensor, "n 4"], scores: Float[Tensor, " n"], threshold: float, x_cuts: list[int], y_cuts: list[int]
) -> Tensor:
    """Suppress doubles across the cuts between tiles; indices of what stays, in falling order of score.

    Inside a tile that has been done, so only boxes that come within their own size of a cut are compared: all pairs of
    the 200,000 nuclei of a 10,000 x 10,000 image would not fit into memory.
    """
    side = boxes[:, 2:] - boxes[:, :2]
    low, high = boxes[:, :2] - side, boxes[:, 2:] + side
    near = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    for axis, cuts in enumerate((x_cuts, y_cuts)):
        cut = boxes.new_tensor(cuts)
        near |= ((low[:, axis, None] < cut) & (high[:, axis, None] > cut)).any(dim=1)
    keep = ~near
    candidates = near.nonzero()[:, 0]
    keep[candidates[nms(boxes[near], scores[near], threshold)]] = True
    kept = keep.nonzero()[:, 0]
    return kept[scores[kept].argsort(descending=True, stable=True)]
