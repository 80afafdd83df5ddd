"""Boxes for a whole batch at once: what torchvision's Mask R-CNN does image by image, in a few batched kernels.

Boxes are (x1, y1, x2, y2) in pixels of the image, where pixel (row r, column c) covers the square from (c, r) to
(c + 1, r + 1): a nucleus of one pixel has a box of width 1. Every function here works on padded batches, so that a
training step asks nothing of the host image by image (torchvision's own loops are what holds it at 24 to 71 images/s).

Deviations from torchvision, all in favour of small objects: anchors are centred on the cells of the feature map
instead of their corners; mask targets are sampled at pixel centres (torchvision's sit half a pixel off, which is a
tenth of the width of a small nucleus's IoU); non-maximum suppression of proposals runs over all levels together.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nucseg.labels import IGNORE
from nucseg.models.per_nucleus import nucleus_keys, pixel_positions
from nucseg.recording import is_recording

_SMOOTH_L1_BETA = 1 / 9  # torchvision's
_TOGETHER = 256  # nuclei that `match` compares with all candidates at a time: gigabytes in a large crop


class Targets(NamedTuple):
    """The true nuclei of a batch, padded to a count of places (at least 1)."""

    boxes: Tensor  # (b, g, 4) float32
    valid: Tensor  # (b, g) bool: which of the g places hold a nucleus
    index: Tensor  # (b, h, w) int64: 0 = background, j + 1 = the nucleus in place j, IGNORE = unknown


def targets_from_labels(
    label_maps: Int[Tensor, "b h w"], largest_id: int | None = None, most: int | None = None
) -> Targets:
    """Read boxes from label maps, on their device and without a loop over ids.

    Ids may be any positive integers, with gaps and in several pieces; places follow the order of the ids. An image
    without nuclei has no valid place. `nucseg.labels.IGNORE` is no nucleus, and marks its pixels in `Targets.index`.

    Parameters
    ----------
    largest_id
        No id is larger. None: the device is asked.
    most
        Places for the nuclei of an image; those of the largest ids, which find none left, become unknown. None: as many
        as the fullest image has, for which the device is asked.
    """
    b, h, w = label_maps.shape
    device = label_maps.device
    ids = label_maps.long()
    key, span, keys = nucleus_keys(ids, largest_id)
    present = torch.zeros(keys, dtype=torch.bool, device=device).index_fill_(0, key, True)
    nuclei = present[: span * b].view(b, span)
    place = nuclei.cumsum(1) - 1
    index = torch.where(ids > 0, place.view(-1)[key.clamp(max=span * b - 1)].view(b, h, w) + 1, ids.clamp(max=0))
    if most is None:
        most = max(1, int(nuclei.sum(dim=1).max()))
    index = torch.where(index > most, IGNORE, index)

    position = pixel_positions(label_maps).T
    each = key[:, None].expand(-1, 2)
    low = torch.full((keys, 2), max(h, w), device=device).scatter_reduce(0, each, position, "amin")
    high = torch.zeros((keys, 2), dtype=torch.int64, device=device).scatter_reduce(0, each, position + 1, "amax")
    boxes = torch.zeros((b, most + 1, 4), device=device)  # the last place takes the ids that are not there
    slot = torch.where(nuclei, place, most).clamp(max=most)[..., None].expand(-1, -1, 4)
    boxes.scatter_(1, slot, torch.cat((low, high), dim=1)[: span * b].view(b, span, 4).float())
    valid = torch.arange(most, device=device) < nuclei.sum(dim=1, keepdim=True)
    return Targets(boxes[:, :most] * valid[..., None], valid, index)


def mask_targets(
    index: Int[Tensor, "b h w"],
    image: Int[Tensor, " n"],
    place: Int[Tensor, " n"],
    boxes: Float[Tensor, "n 4"],
    size: int,
) -> Float[Tensor, "n size size"]:
    """Cut the mask of one nucleus per box out of the label maps, resampled to `size` x `size`, values in [0, 1].

    Bilinear at the centres of the cells, as ``roi_align(..., sampling_ratio=1, aligned=True)`` on the nucleus's binary
    mask, but read from the label map, so that no mask of the whole image is ever made.

    Parameters
    ----------
    index
        `Targets.index`.
    image, place
        Of each box: its image in the batch, and the place of its nucleus in `Targets`.
    boxes
        In pixels of the label maps.
    size
        Cells on each side.
    """
    x0, x1, y0, y1, fx, fy = _cells(boxes, size, index.shape)
    wanted = (place + 1)[:, None, None]

    def inside(rows: Tensor, columns: Tensor) -> Tensor:
        return (index[image[:, None, None], rows[:, :, None], columns[:, None, :]] == wanted).float()

    fx, fy = fx[:, None, :], fy[:, :, None]
    top = inside(y0, x0) * (1 - fx) + inside(y0, x1) * fx
    bottom = inside(y1, x0) * (1 - fx) + inside(y1, x1) * fx
    return top * (1 - fy) + bottom * fy


def known_cells(
    index: Int[Tensor, "b h w"], image: Int[Tensor, " n"], boxes: Float[Tensor, "n 4"], size: int
) -> Bool[Tensor, "n size size"]:
    """Say which cells of `mask_targets` are made from known pixels only."""
    x0, x1, y0, y1, _, _ = _cells(boxes, size, index.shape)

    def known(rows: Tensor, columns: Tensor) -> Tensor:
        return index[image[:, None, None], rows[:, :, None], columns[:, None, :]] != IGNORE

    return known(y0, x0) & known(y0, x1) & known(y1, x0) & known(y1, x1)


def _cells(boxes: Tensor, size: int, shape: torch.Size) -> tuple[Tensor, ...]:
    """Pixels on both sides of each cell's centre, (n, size) each: x0, x1, y0, y1, and how far it lies between them."""
    _, h, w = shape
    cell = (torch.arange(size, device=boxes.device) + 0.5) / size
    x = (boxes[:, 0, None] + cell * (boxes[:, 2] - boxes[:, 0])[:, None] - 0.5).clamp(0, w - 1)
    y = (boxes[:, 1, None] + cell * (boxes[:, 3] - boxes[:, 1])[:, None] - 0.5).clamp(0, h - 1)
    x0, y0 = x.floor(), y.floor()
    fx, fy = x - x0, y - y0
    x0, y0 = x0.long(), y0.long()
    return x0, (x0 + 1).clamp(max=w - 1), y0, (y0 + 1).clamp(max=h - 1), fx, fy


def unknown_share(index: Int[Tensor, "b h w"], boxes: Float[Tensor, "b n 4"]) -> Float[Tensor, "b n"]:
    """Measure which part of each box, in pixels of the label maps, is unknown; corners are rounded to whole pixels."""
    b, h, w = index.shape
    # Sums over every rectangle from the upper left corner; exact in float32 up to 16 million pixels.
    table = F.pad((index == IGNORE).float(), (1, 0, 1, 0)).cumsum(1).cumsum(2).view(b, -1)
    x1, x2 = (boxes[..., i].round().long().clamp(0, w) for i in (0, 2))
    y1, y2 = (boxes[..., i].round().long().clamp(0, h) for i in (1, 3))

    def until(y: Tensor, x: Tensor) -> Tensor:
        return table.gather(1, y * (w + 1) + x)

    return (until(y2, x2) - until(y1, x2) - until(y2, x1) + until(y1, x1)) / ((x2 - x1) * (y2 - y1)).clamp(min=1)


def make_anchors(
    shapes: list[tuple[int, int]],
    strides: tuple[int, ...],
    sizes: tuple[tuple[float, ...], ...],
    ratios: tuple[float, ...],
    device: torch.device,
) -> Float[Tensor, "a 4"]:
    """Anchors of all levels, ordered level, row, column, shape; a ratio is height / width at equal area."""
    return _make_anchors(tuple(tuple(shape) for shape in shapes), strides, sizes, ratios, device)


@functools.lru_cache(maxsize=16)  # made on the host and copied: at every step that would make it wait for the device
def _make_anchors(
    shapes: tuple[tuple[int, int], ...],
    strides: tuple[int, ...],
    sizes: tuple[tuple[float, ...], ...],
    ratios: tuple[float, ...],
    device: torch.device,
) -> Tensor:
    levels = []
    for (rows, columns), stride, level_sizes in zip(shapes, strides, sizes, strict=True):
        sides = [(s / r**0.5, s * r**0.5) for s in level_sizes for r in ratios]
        half = torch.tensor(sides, device=device) / 2
        y = (torch.arange(rows, device=device) + 0.5) * stride
        x = (torch.arange(columns, device=device) + 0.5) * stride
        centre = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1)[:, :, None]
        levels.append(torch.cat((centre - half, centre + half), dim=-1).reshape(-1, 4))
    return torch.cat(levels)


def encode(boxes: Float[Tensor, "*n 4"], anchors: Float[Tensor, "*n 4"], weights: tuple[float, float]) -> Tensor:
    """Offsets that turn anchors into boxes: centre shift in anchor sides and log ratio of sides, times `weights`."""
    centre, side = (anchors[..., :2] + anchors[..., 2:]) / 2, anchors[..., 2:] - anchors[..., :2]
    shift = ((boxes[..., :2] + boxes[..., 2:]) / 2 - centre) / side
    return torch.cat((shift * weights[0], torch.log((boxes[..., 2:] - boxes[..., :2]) / side) * weights[1]), dim=-1)


def decode(offsets: Float[Tensor, "*n 4"], anchors: Float[Tensor, "*n 4"], weights: tuple[float, float]) -> Tensor:
    """Invert `encode`; a side grows at most 62.5-fold, torchvision's bound against overflow."""
    centre, side = (anchors[..., :2] + anchors[..., 2:]) / 2, anchors[..., 2:] - anchors[..., :2]
    offsets = offsets.float()
    centre = centre + offsets[..., :2] / weights[0] * side
    half = side * torch.exp((offsets[..., 2:] / weights[1]).clamp(max=4.135)) / 2
    return torch.cat((centre - half, centre + half), dim=-1)


def box_loss(offsets: Tensor, truth: Tensor, anchors: Tensor, positive: Tensor, weights: tuple[float, float]) -> Tensor:
    """Sum of torchvision's smooth L1 over the positive boxes; (n, 4) each but `positive`, (n,) bool."""
    # A place that is not used may hold a box without area, whose offsets are no numbers.
    wanted = torch.where(positive[:, None], encode(truth, anchors, weights), 0.0)
    loss = F.smooth_l1_loss(offsets.float(), wanted, beta=_SMOOTH_L1_BETA, reduction="none")
    return (loss * positive[:, None]).sum()


def pairwise_iou(a: Float[Tensor, "b n 4"], b: Float[Tensor, "b m 4"]) -> Float[Tensor, "b n m"]:
    """IoU of every box of `a` with every box of `b`, image by image; 0 where both are empty."""
    a, b = a[:, :, None], b[:, None]
    common = (torch.minimum(a[..., 2], b[..., 2]) - torch.maximum(a[..., 0], b[..., 0])).clamp_(min=0)
    common *= (torch.minimum(a[..., 3], b[..., 3]) - torch.maximum(a[..., 1], b[..., 1])).clamp_(min=0)
    area_a = (a[..., 2] - a[..., 0]) * (a[..., 3] - a[..., 1])
    area_b = (b[..., 2] - b[..., 0]) * (b[..., 3] - b[..., 1])
    return common / (area_a + area_b - common).clamp_(min=1e-6)


class Matches(NamedTuple):
    """For each candidate box: its nucleus, and whether it is an example of a nucleus, of background, or of neither."""

    place: Tensor  # (b, n) int64, meaningful where positive
    positive: Tensor  # (b, n) bool
    negative: Tensor  # (b, n) bool


def match(
    candidates: Float[Tensor, "b n 4"],
    targets: Targets,
    above: float,
    below: float,
    keep_best: bool,
    unknown: Float[Tensor, "b n"] | None = None,
) -> Matches:
    """Assign candidates to true boxes by IoU: positive from `above`, background under `below`.

    `keep_best` also makes positive the best candidates of each nucleus, however low their IoU (above zero). With the
    `unknown` share of each candidate, one that is mostly unknown is no example of a nucleus, and one is background only
    if no nucleus that the unknown part may hide could overlap it by `below`.
    """
    best = candidates.new_full(candidates.shape[:2], -1.0)
    place = torch.zeros_like(best, dtype=torch.int64)
    kept = torch.zeros_like(best, dtype=torch.bool)
    for first in range(0, targets.boxes.shape[1], _TOGETHER):
        some = slice(first, first + _TOGETHER)
        iou = pairwise_iou(targets.boxes[:, some], candidates).masked_fill_(~targets.valid[:, some, None], -1.0)
        value, index = iou.max(dim=1)
        better = value > best
        best, place = torch.where(better, value, best), torch.where(better, index + first, place)
        if keep_best:
            highest = iou.amax(dim=2, keepdim=True)
            kept |= ((iou == highest) & (highest > 0)).any(dim=1)
    positive = (best >= above) | kept
    negative = (best < below) & ~positive
    if unknown is not None:
        positive, negative = positive & (unknown <= 0.5), negative & (unknown < below)
    return Matches(place, positive, negative)


def places(used: Bool[Tensor, "b k"]) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Return image and slot of the used places, or on a GPU and in a recording of all places.

    There it is cheaper to work on a few places for nothing than to make the host wait until it knows which they are:
    what is computed from them must be weighted by `used`.
    """
    if used.is_cuda or is_recording():
        b, k = used.shape
        image = torch.arange(b, device=used.device)[:, None].expand(b, k)
        return image.reshape(-1), torch.arange(k, device=used.device).expand(b, k).reshape(-1)
    return used.nonzero(as_tuple=True)


def sample(
    positive: Bool[Tensor, "b n"],
    negative: Bool[Tensor, "b n"],
    count: int,
    fraction: float,
) -> tuple[Int[Tensor, "b k"], Bool[Tensor, "b k"], Bool[Tensor, "b k"]]:
    """Draw up to `count` examples per image, at most `fraction` of them positive, the rest background.

    Uses torch's global random state, which the training loop seeds.

    Returns
    -------
    indices, is_positive, is_drawn
        Of `count` places (fewer if there are fewer candidates), drawn ones first and of these the positive ones: the
        example, whether it is positive, and whether the place is used.
    """
    n = positive.shape[1]
    key = torch.rand(positive.shape, device=positive.device)
    key_positive, first = key.masked_fill(~positive, 2.0).topk(min(round(count * fraction), n), largest=False)
    key_negative, second = key.masked_fill(~negative, 2.0).topk(min(count, n), largest=False)
    drawn = key_positive < 1.5
    room = count - drawn.sum(dim=1, keepdim=True)
    drawn_negative = (key_negative < 1.5) & (torch.arange(second.shape[1], device=key.device) < room)
    indices = torch.cat((first, second), dim=1)
    is_positive = torch.cat((drawn, torch.zeros_like(drawn_negative)), dim=1)
    is_drawn = torch.cat((drawn, drawn_negative), dim=1)
    order = torch.sort(is_drawn.byte(), dim=1, descending=True, stable=True).indices[:, :count]
    return indices.gather(1, order), is_positive.gather(1, order), is_drawn.gather(1, order)


def batched_nms(boxes: Float[Tensor, "b n 4"], threshold: float, rounds: int | None = None) -> Bool[Tensor, "b n"]:
    """Greedy non-maximum suppression of many images at once; `boxes` in falling order of score.

    A box stays unless a box before it that stays overlaps it by more than `threshold`. Iterating that rule from "all
    stay" settles the boxes in order of the length of their chains, so the fixed point is the greedy answer.

    Parameters
    ----------
    rounds
        Iterate so often, whether all is settled or not: boxes at the end of longer chains of overlaps may stay by
        mistake if the number is even. None: until nothing changes, for which the device is asked.
    """
    overlap = torch.triu(pairwise_iou(boxes, boxes) > threshold, diagonal=1).to(
        torch.bfloat16 if boxes.is_cuda else torch.float32
    )
    keep = torch.ones(boxes.shape[:2], dtype=torch.bool, device=boxes.device)
    look = 8 if boxes.is_cuda else 1  # looking whether it has settled makes the host wait
    for done in itertools.count(1):
        before, keep = keep, torch.bmm(keep[:, None].to(overlap), overlap)[:, 0] == 0
        if done == rounds or (rounds is None and done % look == 0 and torch.equal(before, keep)):
            return keep
