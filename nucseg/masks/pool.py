"""The set E (Sec. III-B): the nuclei of flipped, rotated and cropped copies of one annotated patch; see `synthesis`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from nucseg.labels import check_label_map, relabel

_CLOSE = 4  # background pixels between two nuclei that stand close


@dataclass(frozen=True)
class MaskConfig:
    """Settings of the mask synthesis; the defaults are those of A13-A15.

    Attributes
    ----------
    margin
        Pixels cut from each side of the canvas: h' = w' = size + 2 margin.
    q
        Placements Q per mask; None places until the crop holds `density` times the foreground of the source patch.
    density
        Foreground wanted, relative to the source patch; only used when `q` is None.
    tolerance
        Relative error of the foreground at which a mask is accepted, and below which it is reported as too sparse.
    min_area
        Instances of fewer pixels are neither put in E nor kept after the crop.
    touch
        Chance that a nucleus is set against a neighbour instead of keeping its disc R_q free. 0: all keep it, and at
        least one background pixel lies between any two. None: so often that as many stand close and as many touch as
        in the source patch. Nuclei never overlap.
    copies
        Augmented copies of the patch that fill E; the first is the patch itself.
    crop
        Smallest side of the random crop of a copy, relative to the patch. Nuclei that it cuts are left out.
    tries
        Random positions tested when a nucleus has to fit by its shape.
    passes
        Nuclei in a row for which no room was found, after which the map counts as full.
    redraws
        Times a mask is drawn again when its foreground misses the tolerance; the nearest one is kept.
    """

    margin: int = 22
    q: int | None = None
    density: float = 1.0
    tolerance: float = 0.2
    min_area: int = 20
    touch: float | None = 0.0
    copies: int = 6
    crop: float = 0.8
    tries: int = 128
    passes: int = 20
    redraws: int = 5

    def __post_init__(self) -> None:
        for name, low in (("margin", 0), ("min_area", 1), ("copies", 1), ("tries", 1), ("passes", 1), ("redraws", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if self.q is not None and self.q < 1:
            raise ValueError(f"q must be at least 1 or None, got {self.q}")
        for name in ("density", "tolerance"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.touch is not None and not 0 <= self.touch <= 1:
            raise ValueError(f"touch must lie in 0..1 or be None, got {self.touch}")
        if not 0 < self.crop <= 1:
            raise ValueError(f"crop must lie in 0..1 (0 excluded), got {self.crop}")


@dataclass(frozen=True, eq=False)
class Nucleus:
    """One member of E.

    Attributes
    ----------
    mask
        (h, w) bool, the tight bounding box.
    centre
        Row and column of the insertion point inside `mask`: the rounded centroid.
    reach
        R_q: largest distance from the insertion point to a pixel of the nucleus.
    depth
        Distance from the insertion point to the nearest pixel outside the nucleus; 0 if it lies outside itself.
    outline
        (n, 2) rows and columns of the pixels that have a neighbour outside, relative to the insertion point.
    source
        Which nucleus of the patch it came from, counted from 0 over those in E.
    """

    mask: np.ndarray
    centre: tuple[int, int]
    reach: float
    depth: float
    outline: np.ndarray
    source: int


@dataclass(frozen=True, eq=False)
class Pool:
    """The set E, and how often each nucleus of the patch is drawn.

    Attributes
    ----------
    nuclei
        All members, in the order of the copies.
    members
        For each nucleus of the patch, the indices of its copies in `nuclei`.
    weights
        For each nucleus of the patch, its probability; they sum to 1.
    whole
        False when E had to be filled with nuclei cut by the patch's border.
    beside
        Chance that a nucleus is set beside a neighbour: `MaskConfig.touch`, measured on the patch where that is None.
    contact
        Chance that one set beside a neighbour touches it; otherwise one background pixel stays free.
    """

    nuclei: tuple[Nucleus, ...]
    members: tuple[tuple[int, ...], ...]
    weights: np.ndarray
    whole: bool
    beside: float
    contact: float


def _nucleus(mask: np.ndarray, source: int) -> Nucleus:
    rows, cols = np.nonzero(mask)
    mask = mask[rows.min() : rows.max() + 1, cols.min() : cols.max() + 1]
    rows, cols = rows - rows.min(), cols - cols.min()
    row, col = round(float(rows.mean())), round(float(cols.mean()))
    reach = float(np.sqrt(((rows - row) ** 2 + (cols - col) ** 2).max()))
    around = np.pad(mask, 1)
    outside = np.argwhere(~around) - 1
    depth = float(np.sqrt(((outside - (row, col)) ** 2).sum(axis=1).min()))
    inner = around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:]
    outline = np.argwhere(mask & ~inner) - (row, col)
    return Nucleus(np.ascontiguousarray(mask), (row, col), reach, depth, outline, source)


def _largest_part(mask: np.ndarray) -> np.ndarray:
    parts, n = ndimage.label(mask, np.ones((3, 3), int))
    return mask if n <= 1 else parts == 1 + np.argmax(np.bincount(parts.ravel())[1:])


def _turned(mask: np.ndarray, angle: float, flip: bool) -> np.ndarray:
    """Flip and rotate one shape.

    The shape is smoothed by one pixel first and the brightest pixels, as many as it had, are kept: resampling the bare
    mask gives stairs that real outlines lack (mean solidity 0.928 instead of 0.946 on Kumar and TNBC).
    """
    mask = mask[:, ::-1] if flip else mask
    if angle == 0:
        return mask
    soft = ndimage.gaussian_filter(np.pad(mask, 4).astype(np.float32), 1.0)
    soft = ndimage.rotate(soft, angle, order=1, reshape=True)
    return _largest_part(soft >= np.partition(soft, -int(mask.sum()), axis=None)[-int(mask.sum())])


def holds_nucleus(labels: np.ndarray, min_area: int) -> bool:
    """Say whether a label map has a nucleus of `min_area` pixels in one piece, without which there is no set E."""
    labels = relabel(labels)
    boxes = ndimage.find_objects(labels)
    return any(_largest_part(labels[box] == i).sum() >= min_area for i, box in enumerate(boxes, start=1))


def touching_share(labels: np.ndarray, gap: int = 0) -> float:
    """Return the share of nuclei in a label map that another one touches (8-neighbours), 0..1.

    With `gap` above 0: that have another one with at most so many background pixels (rows or columns) in between.
    """
    labels = relabel(labels)
    far, window = int(labels.max(initial=0)) + 1, 3 + 2 * gap
    high = ndimage.maximum_filter(labels, window)
    low = ndimage.minimum_filter(np.where(labels == 0, far, labels), window)
    touching = np.unique(labels[(labels > 0) & ((high != labels) | (low != labels))]).size
    return touching / max(np.unique(labels[labels > 0]).size, 1)


def _set_beside(share: float) -> float:
    """Return how often to set a nucleus beside another so that `share` of all have one there.

    A nucleus has one if it was set beside another, or another beside it: share = 1 - (1 - chance)^2.
    """
    return 1 - float(np.sqrt(1 - share))


def nucleus_pool(labels: np.ndarray, seed: int = 0, config: MaskConfig = MaskConfig()) -> Pool:
    """Collect E: the nuclei of flipped, rotated and cropped copies of a label map (Sec. III-B).

    Parameters
    ----------
    labels
        Label map (H, W) of the annotated patch. Of a nucleus in several pieces the largest is used.
    seed
        Decides angles, flips and crops.
    config
        `copies`, `crop` and `min_area` matter here.

    Raises
    ------
    ValueError
        If no nucleus has `min_area` pixels.
    """
    check_label_map(labels)
    height, width = labels.shape
    labels = relabel(labels)
    whole, cut = [], []
    for index, box in enumerate(ndimage.find_objects(labels), start=1):
        mask = _largest_part(labels[box] == index)
        if mask.sum() < config.min_area:
            continue
        (top, bottom), (left, right) = ((axis.start, axis.stop) for axis in box)
        inside = top > 0 and left > 0 and bottom < height and right < width
        (whole if inside else cut).append((mask, (top, left, bottom, right)))
    if not whole and not cut:
        found = int(labels.max(initial=0))
        raise ValueError(
            f"labels: mask synthesis needs a nucleus of at least {config.min_area} pixels, and none of the {found} "
            f"in this {height}x{width} label map is that large; choose another patch or lower min_area"
        )
    usable = whole or cut

    rng = np.random.default_rng((seed, 0))
    nuclei: list[Nucleus] = []
    members: list[list[int]] = [[] for _ in usable]
    for copy in range(config.copies):
        angle, flip, share = (0.0, False, 1.0) if copy == 0 else (rng.uniform(0, 360), rng.random() < 0.5, None)
        share = rng.uniform(config.crop, 1) if share is None else share
        first_row, first_col = rng.uniform(0, 1 - share, 2) * (height, width)
        last_row, last_col = first_row + share * height, first_col + share * width
        for source, (mask, (top, left, bottom, right)) in enumerate(usable):
            if top < first_row or left < first_col or bottom > last_row or right > last_col:
                continue
            turned = _turned(mask, angle, flip)
            if turned.sum() >= config.min_area:
                members[source].append(len(nuclei))
                nuclei.append(_nucleus(turned, source))
    # A nucleus h x w lies whole in an H x W window with a chance of (H - h)(W - w) / HW: the others were cut away.
    weights = np.array([1.0 / (max(height - (b - t), 1) * max(width - (r - le), 1)) for _, (t, le, b, r) in usable])
    beside, contact = config.touch, 1.0
    if beside is None:
        touching = _set_beside(touching_share(labels))
        beside = _set_beside(touching_share(labels, _CLOSE))
        contact = touching / beside if beside else 1.0
    weights = weights if whole else np.ones(len(usable))
    return Pool(tuple(nuclei), tuple(map(tuple, members)), weights / weights.sum(), bool(whole), beside, contact)
