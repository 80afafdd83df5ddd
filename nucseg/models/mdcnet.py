"""Our reading of MDC-Net (Liu et al., Computers in Biology and Medicine 2021; Table IV), REFERENCE section 5.

No code of it is public. Its title promises distance maps and contours; so here three decoders over one pretrained
encoder predict the mask, the contours of nuclei, and how deep each pixel lies in its nucleus. Nuclei are the catchment
basins of the depth, from its maxima in the mask without the contours. All else (depth relative to the middle of the
nucleus, losses, widths) is ours, so a table's row is "our reading" and no reproduction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from scipy import ndimage
from skimage.morphology import local_maxima, reconstruction
from skimage.segmentation import watershed
from torch import Tensor, nn

from nucseg.encoders import Pyramid
from nucseg.inference import InferenceConfig
from nucseg.labels import IGNORE
from nucseg.models.base import Instances, origin
from nucseg.models.decoder import Decoder, at_size, block, check_widths, to_multiple_of_32
from nucseg.models.distances import distance_bounds, of_its_largest
from nucseg.models.maps import MapSegmenter, at_least, mark_the_rest, score_instances


@dataclass(frozen=True)
class MDCNetConfig:
    """Decoders, losses and post-processing.

    Attributes
    ----------
    widths
        Channels of each decoder at strides 16, 8, 4, 2 and, with a fifth number, 1.
    contour_width
        Pixels at the rim of a nucleus that are its contour.
    reach
        No distance is longer, pixels: the number of erosions that make the target.
    mask, contour, distance
        Weights of the losses: cross-entropy and Dice for mask and contour, squared error for the distance.
    threshold
        Probability of mask from which a pixel is nucleus, and of contour from which it is no marker.
    depth
        How far the distance (1 = middle of a nucleus) falls between two maxima that are two nuclei.
        On Kumar's validation images 0.1 to 0.3 are level.
    min_area
        Smallest nucleus, and smallest hole that stays open, pixels.
    inference
        Tiles and averaging of whole images.
    """

    widths: tuple[int, ...] = (128, 64, 32, 32, 16)
    contour_width: int = 2
    reach: int = 32
    mask: float = 1.0
    contour: float = 1.0
    distance: float = 1.0
    threshold: float = 0.5
    depth: float = 0.15
    min_area: int = 20
    inference: InferenceConfig = field(default_factory=InferenceConfig)

    def __post_init__(self) -> None:
        check_widths(self.widths)
        for name in ("threshold", "depth"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        for name in ("mask", "contour", "distance", "min_area"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 1 <= self.contour_width < self.reach:
            raise ValueError(f"contour_width must be at least 1 and below reach, got {self.contour_width}")


class MDCNet(MapSegmenter):
    """One encoder; a decoder and a 1x1 head for each of mask, contour and distance."""

    def __init__(
        self,
        encoder: str = "efficientnet_lite0",
        config: MDCNetConfig | None = None,
        weights: str | Path | None = None,
        pretrained: bool = True,
    ):
        self.config = config = config or MDCNetConfig()
        super().__init__(config.inference)
        self.encoder = Pyramid(encoder, weights, pretrained)
        self.initialised_from = origin(encoder, weights, pretrained)
        self.decoders = nn.ModuleList(Decoder(self.encoder.channels, config.widths) for _ in range(3))
        self.heads = nn.ModuleList(
            nn.Sequential(block(decoder.width, decoder.width), nn.Conv2d(decoder.width, 1, 1))
            for decoder in self.decoders
        )

    def _predict(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """Return the logits of mask and contour, and the distance."""
        padded = to_multiple_of_32(images)
        levels = self.encoder(padded)
        maps = [head(decoder(levels)) for decoder, head in zip(self.decoders, self.heads, strict=True)]
        return at_size(torch.cat(maps, dim=1), padded.shape[-2:], images.shape[-2:]).float()

    def loss(self, images: Float[Tensor, "b 3 h w"], label_maps: Int[Tensor, "b h w"]) -> dict[str, Float[Tensor, ""]]:
        """Return the terms ``mask``, ``contour`` and ``distance``."""
        maps, config = self._predict(images), self.config
        known = label_maps != IGNORE
        # What a crop's border cuts goes on beyond it, so that no contour is taught there.
        _, distances = distance_bounds(label_maps, config.reach)
        largest = int(label_maps.max()) if self.largest_id is None else self.largest_id
        contour = (distances > 0) & (distances <= config.contour_width)
        relative = of_its_largest(distances, label_maps, max(largest, 0))
        squared = ((maps[:, 2] - relative) ** 2 * known).sum() / known.sum().clamp(min=1)
        return {
            "mask": config.mask * entropy_and_dice(maps[:, 0], label_maps > 0, known),
            "contour": config.contour * entropy_and_dice(maps[:, 1], contour, known),
            "distance": config.distance * squared,
        }

    def maps(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """Return the probabilities of mask and contour, and the distance relative to the middle of the nucleus."""
        maps = self._predict(images)
        return torch.cat((maps[:, :2].sigmoid(), maps[:, 2:].clamp(0, 1)), dim=1)

    @property
    def finish(self) -> Callable[[np.ndarray], Instances]:
        """`nuclei_of` with these settings."""
        return partial(nuclei_of, config=self.config)


def entropy_and_dice(
    logits: Float[Tensor, "b h w"], truth: Bool[Tensor, "b h w"], known: Bool[Tensor, "b h w"]
) -> Float[Tensor, ""]:
    """Binary cross-entropy, mean of the known pixels, plus 1 - Dice of the batch."""
    truth = (truth & known).float()
    entropy = F.binary_cross_entropy_with_logits(logits, truth, weight=known.float(), reduction="sum")
    probability = logits.sigmoid() * known
    dice = (2 * (probability * truth).sum() + 1) / (probability.sum() + truth.sum() + 1)
    return entropy / known.sum().clamp(min=1) + 1 - dice


def nuclei_of(maps: Float[np.ndarray, "3 h w"], config: MDCNetConfig) -> Instances:
    """Find nuclei: maxima of the distance in the mask without contours, and their catchment basins in the mask.

    A piece of the mask without any such maximum is a nucleus of its own.
    """
    mask_probability, contour, distance = maps
    mask = at_least(mask_probability >= config.threshold, max(config.min_area, 1))
    mask = ~at_least(~mask, max(config.min_area, 1))
    if not mask.any():
        return Instances(np.zeros(mask.shape, dtype=np.int32), np.zeros(0, dtype=np.float32))
    depth = np.where(mask, distance * (contour < config.threshold), 0)
    # In steps of 1/255: plateaus of whole numbers are exact.
    depth = np.rint(np.clip(ndimage.gaussian_filter(depth, 1.0), 0, 1) * 255).astype(np.int16)
    lowered = np.clip(depth - max(round(config.depth * 255), 1), 0, None)
    # Maxima of the reconstruction, not skimage's `h_maxima`, which parts two equal tops whatever lies between them.
    maxima = local_maxima(reconstruction(lowered, depth).astype(np.int16)) & mask
    markers, _ = ndimage.label(maxima, structure=np.ones((3, 3)))
    labels = watershed(-depth, mark_the_rest(markers, mask), mask=mask)
    return score_instances(labels, mask_probability, config.min_area)
