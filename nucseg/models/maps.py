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

from nucseg.inference import InferenceConfig, check_image, predict_instances, predict_maps
from nucseg.models.base import Instances, Segmenter
from nucseg.models.pieces import Pieces


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
        check_image(image)
        return self._begin(self.prepare(image))

    def _begin(self, image: np.ndarray) -> Callable[[], Instances]:
        return partial(self.finish, predict_maps(self, image, self.inference))

    def predict_instances(self, image: np.ndarray) -> Instances:
        """Segment a whole image; large ones block by block, in bounded memory."""
        check_image(image)
        workers = self.inference.processes(next(self.parameters()).device)
        return predict_instances(self._begin, self.prepare(image), self.inference, workers)


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


def flood(height: np.ndarray, markers: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Give each pixel of a mask the id of the marker whose basin it lies in; ids beyond those to pieces without any.

    ``watershed(height, mark_the_rest(markers, mask), mask=mask)``, but that most pieces of a mask of nuclei hold one
    marker, which gets all of its piece without going through the watershed's queue. Where pixels of two basins are
    equally high the two may differ by a few pixels: there the queue's order decides, which hangs on all that is in it.

    Parameters
    ----------
    height
        (H, W) float.
    markers
        (H, W) ids 1..n, 0 elsewhere. What lies outside the mask counts for nothing.
    mask
        (H, W) bool.
    """
    pieces = Pieces(mask)
    marked = np.flatnonzero(mask & (markers > 0))
    held_by = pieces.paint(np.arange(pieces.count, dtype=np.int32)).ravel().take(marked)
    held = markers.ravel().take(marked)
    owner = np.zeros(pieces.count, dtype=markers.dtype)
    owner[held_by] = held  # one of them, where there are several
    shared = np.zeros(pieces.count, dtype=bool)
    shared[held_by[owner[held_by] != held]] = True
    alone = owner == 0
    owner[alone] = markers.max() + 1 + np.arange(np.count_nonzero(alone))
    labels = pieces.paint(owner)
    if shared.any():
        inside = pieces.paint(shared)
        np.copyto(labels, watershed(height, np.where(inside, markers, 0), mask=inside), where=inside)
    return labels
