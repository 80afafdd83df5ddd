"""Segmenters that predict maps, one value per pixel and channel, and find nuclei in them by classical means."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from skimage.segmentation import watershed
from torch import Tensor

from nucseg.inference import InferenceConfig, predict_instances, predict_maps
from nucseg.models.base import Instances, Segmenter
from nucseg.models.pieces import Pieces, Window, beside


class MapSegmenter(Segmenter):
    """A network of maps; a subclass gives `loss`, `maps` and `finish`.

    Attributes
    ----------
    vector_channels
        Of `maps`: the channels that are x and y of a vector, which turn with the image; None without any.
    """

    fixed_shapes = True
    vector_channels: tuple[int, int] | None = None

    def __init__(self, inference: InferenceConfig):
        super().__init__()
        self.inference = inference

    @abstractmethod
    def maps(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c h w"]:
        """Return the maps that nuclei are found in, at the input's resolution; its sides are multiples of 32.

        Tiles and views of an image are averaged, so a map is a probability or a distance, not a logit.
        """

    @property
    @abstractmethod
    def finish(self) -> Callable[[np.ndarray], Instances]:
        """The function from the maps of an image, (c, H, W) float32, to its nuclei; it can be sent to a process."""

    def begin(self, image: np.ndarray) -> Callable[[], Instances]:
        """Predict the maps of one image; what is returned makes nuclei of them, in any process."""
        if max(image.shape[:2]) > self.inference.block:
            return super().begin(image)
        return partial(self.finish, predict_maps(self, image, self.inference))

    def predict_instances(self, image: np.ndarray) -> Instances:
        """Segment a whole image; large ones block by block, in bounded memory."""
        workers = self.inference.processes(next(self.parameters()).device)
        return predict_instances(self.begin, image, self.inference, workers)


def central(maps: Tensor, size: torch.Size) -> Tensor:
    """Cut the central `size` (height, width) out of maps."""
    top, left = ((a - b) // 2 for a, b in zip(maps.shape[-2:], size, strict=True))
    return maps[..., top : top + size[0], left : left + size[1]]


def score_instances(labels: np.ndarray, probability: np.ndarray, min_area: int) -> Instances:
    """Drop nuclei below `min_area` pixels, renumber the rest 1..n and score each by its mean probability."""
    inside = np.flatnonzero(labels > 0)  # background is most of an image and has no score
    ids = labels.ravel().take(inside)
    area = np.bincount(ids, minlength=1)
    total = np.bincount(ids, weights=probability.ravel().take(inside), minlength=1)
    kept = np.flatnonzero(area >= max(min_area, 1))
    number = np.zeros(len(area), dtype=np.int32)
    number[kept] = 1 + np.arange(len(kept))
    numbered = np.zeros(labels.shape, dtype=np.int32)
    numbered.ravel()[inside] = number.take(ids)
    return Instances(numbered, np.clip(total[kept] / area[kept], 0, 1).astype(np.float32))


def at_least(mask: np.ndarray, area: int) -> np.ndarray:
    """Keep the pieces (4-connected) of a boolean mask that have at least so many pixels."""
    pieces = Pieces(mask)
    return pieces.paint(pieces.areas() >= area)


def mark_the_rest(markers: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Make each piece (4-connected) of a mask that holds no marker a marker of its own; (H, W), ids 1..n.

    Parameters
    ----------
    markers
        (H, W) ids 1..n of the markers for a watershed, 0 elsewhere.
    mask
        (H, W) bool.
    """
    pieces = Pieces(mask)
    alone = np.ones(pieces.count + 1, dtype=bool)
    alone[pieces.paint(np.arange(1, pieces.count + 1))[markers > 0]] = False
    alone = alone[1:]  # 0 is what lies in no piece
    number = np.zeros(pieces.count, dtype=markers.dtype)
    number[alone] = markers.max() + 1 + np.arange(np.count_nonzero(alone))
    return np.where(markers > 0, markers, pieces.paint(number))


WINDOW = 20_000  # pixels of an image that are looked at in the time which one more window takes


def flood(heights: Callable[[Window], np.ndarray], markers: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Give each pixel of a mask the id of the marker whose basin it lies in; ids beyond those to pieces without any.

    The result is ``watershed(height, mark_the_rest(markers, mask), mask=mask)`` to the last bit. But most pieces of a
    mask of nuclei hold one marker, which gets all of its piece whatever the height. And in the others most pixels are
    inside markers with nothing to flood beside them, which need not go through the queue of the watershed.

    Parameters
    ----------
    heights
        The function from a window, a slice of rows and one of columns, to the height there, all finite.
    markers
        (H, W) ids 1..n, 0 elsewhere. What lies outside the mask counts for nothing.
    mask
        (H, W) bool.
    """
    pieces = Pieces(mask)
    piece = pieces.paint(np.arange(pieces.count, dtype=np.int32))
    marked = np.flatnonzero(mask & (markers > 0))
    held_by, held = piece.ravel().take(marked), markers.ravel().take(marked)
    owner = np.zeros(pieces.count, dtype=markers.dtype)
    owner[held_by] = held  # one of them, where there are several
    shared = np.zeros(pieces.count, dtype=bool)
    shared[held_by[owner[held_by] != held]] = True
    alone = owner == 0
    owner[alone] = markers.max() + 1 + np.arange(np.count_nonzero(alone))
    labels = pieces.paint(owner)
    everywhere = (slice(0, mask.shape[0]), slice(0, mask.shape[1]))
    if WINDOW * np.count_nonzero(shared) > mask.size:
        parts = [(everywhere, pieces.paint(shared))]
    else:
        windows = {number: pieces.window(number) for number in np.flatnonzero(shared).tolist()}
        parts = [(window, mask[window] & (piece[window] == number)) for number, window in windows.items()]
    for window, inside in parts:
        ids = np.where(inside, markers[window], 0)
        empty = inside & (ids == 0)
        queued = inside & beside(empty)
        height = heights(window)
        flooded = watershed(height, np.where(queued, ids, 0), mask=queued)
        if _order_matters(height, flooded, piece[window], queued, empty):
            return watershed(heights(everywhere), mark_the_rest(markers, mask), mask=mask)
        np.copyto(labels[window], np.where(empty, flooded, ids), where=inside)
    return labels


def _order_matters(
    height: np.ndarray, labels: np.ndarray, pieces: np.ndarray, queued: np.ndarray, empty: np.ndarray
) -> bool:
    """Whether pixels of equal height, taken in another order, could give another watershed.

    The watershed takes what is lowest; of equal pixels first those of markers, in an order that hangs on all that is in
    its queue, then the others in the order in which they were reached. Which of two comes first can only matter if they
    lie in one piece and have different ids. In real maps only the lowest height occurs twice there, the flat floor of
    nuclei. From it the water spreads ring by ring, so that a pixel is in dispute only if the ring before holds
    neighbours of two ids.

    Parameters
    ----------
    height
        (H, W).
    labels
        (H, W) the watershed.
    pieces
        (H, W) the number of the piece that a pixel lies in.
    queued
        (H, W) bool: where `height` was looked at.
    empty
        (H, W) bool: the part of it that no marker held.
    """
    keys = height[queued], pieces[queued], labels[queued]
    ordered = np.sort(keys[0])
    tied = ordered[1:][ordered[1:] == ordered[:-1]]
    if not tied.size:
        return False
    floor = ordered[0]
    if tied[-1] > floor:
        order = np.lexsort(keys[::-1])
        same_height, same_piece, same_id = (np.diff(key[order]) == 0 for key in keys)
        if (same_height & same_piece & ~same_id & (ordered[1:] > floor)).any():
            return True
    # A frame of one pixel gives each pixel a neighbour on all sides.
    ids, left, flat = (np.pad(a, 1).ravel() for a in (labels, empty, queued & (height == floor)))
    width = labels.shape[1] + 2
    ring = np.flatnonzero(flat & ~left)
    while ring.size:
        around = ring[:, None] + np.array([-width, -1, 1, width])
        claimed = left[around]
        if (claimed & (ids[around] != ids[ring, None])).any():
            return True
        reached = np.unique(around[claimed])
        left[reached] = False
        ring = reached[flat[reached]]
    return False
