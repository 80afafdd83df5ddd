"""DIST (Naylor et al., IEEE TMI 2019; Table IV), REFERENCE section 5: a U-Net that predicts how deep a pixel lies.

The network regresses, by mean squared error, the chessboard distance of each pixel of a nucleus to what is not its
nucleus, in pixels and not normalised; nuclei are the catchment basins of that distance. Written from the description.

Deviations
- 32 features at full resolution, 512 at the bottom, as in the hover_net port, since its AJI on Kumar (0.560) is what
  Table IV prints for DIST; the example of the authors has 16, and they swept 16, 32 and 64. Convolutions are padded.
- A crop shows only a part of a nucleus that its border cuts. The authors cut crops out of whole distance maps; here
  crops are augmented label maps, which bound the distance from both sides (`distance_bounds`), and a prediction
  between the bounds costs nothing. Wherever the distance is certain this is the published loss. `nucseg.labels.IGNORE`
  hides parts of nuclei in the same way.
- The authors swept the post-processing's p1 and p2 (here `depth` and `threshold`) on their test images. Here they are
  settings, and the default of `depth` was chosen on Kumar's validation images.
- Pixels on the line between two touching nuclei, which the authors remove, go to one of the two: in our truth nuclei
  touch without a gap. A piece of foreground without a marker is a nucleus of its own, if it is large enough.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from scipy import ndimage
from skimage.morphology import local_maxima, reconstruction
from skimage.segmentation import watershed
from torch import Tensor, nn

from nucseg.encoders import EncoderError
from nucseg.inference import InferenceConfig
from nucseg.labels import IGNORE
from nucseg.models.base import Instances
from nucseg.models.decoder import block, to_multiple_of_32
from nucseg.models.distances import distance_bounds
from nucseg.models.maps import MapSegmenter, mark_the_rest, score_instances


@dataclass(frozen=True)
class DistConfig:
    """The network, its target and what follows it.

    Attributes
    ----------
    features
        Channels at full resolution, doubled with each halving. 32 as in the hover_net port; the authors' example: 16.
    halvings
        How often the resolution is halved, 1 to 5; 4 in both.
    reach
        No distance is longer, pixels: the number of erosions that make the target. The deepest pixel of Kumar's and
        TNBC's training nuclei has 22, enlarged by 1.25 it has 28.
    threshold
        Distance above which a pixel is nucleus (p2), as published.
    depth
        How far, in pixels, the distance falls between two maxima that are two nuclei (p1, the h of H-maxima). On
        Kumar's validation images, after a short training, AJI at 0, 0.5, 0.75, 1 and 2 is 0.28, 0.37, 0.37, 0.36 and
        0.29; of the true distances, hardly blurred, 0.5 to 1 give back all nuclei alike.
    min_area
        Smallest nucleus, pixels.
    inference
        Tiles and averaging of whole images.
    """

    features: int = 32
    halvings: int = 4
    reach: int = 32
    threshold: float = 0.5
    depth: float = 0.75
    min_area: int = 20
    inference: InferenceConfig = field(default_factory=InferenceConfig)

    def __post_init__(self) -> None:
        for name in ("features", "reach"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 1 <= self.halvings <= 5:
            raise ValueError(f"halvings must be 1 to 5, got {self.halvings}")
        if self.threshold <= 0:
            raise ValueError(f"threshold must be above 0 pixels, got {self.threshold}")
        for name in ("depth", "min_area"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")


class Dist(MapSegmenter):
    """A U-Net with BatchNorm and one linear output.

    Parameters
    ----------
    config
        Every number.
    weights
        None: there are no pretrained ones.
    pretrained
        Without effect: training starts from random weights.
    """

    def __init__(
        self,
        config: DistConfig | None = None,
        weights: str | Path | None = None,
        pretrained: bool = True,
    ):
        config = config or DistConfig()
        super().__init__(config.inference)
        if weights is not None and pretrained:
            raise EncoderError(f"dist: starts from random weights and cannot use {weights}")
        self.config = config
        widths = [config.features * 2**i for i in range(config.halvings + 1)]
        self.down = nn.ModuleList(_two_blocks(a, b) for a, b in zip([3, *widths[:-1]], widths, strict=True))
        steps = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.enlarge = nn.ModuleList(nn.ConvTranspose2d(below, width, 2, stride=2) for below, width in steps)
        self.up = nn.ModuleList(_two_blocks(2 * width, width) for _, width in steps)
        self.head = nn.Conv2d(widths[0], 1, 1)

    def distances(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b h w"]:
        """Return predicted distances, float32 and not clipped, of images of any size."""
        x = to_multiple_of_32(images)
        skips = []
        for i, stage in enumerate(self.down):
            x = stage(F.max_pool2d(x, 2) if i else x)
            skips.append(x)
        skips.pop()
        for enlarge, stage in zip(self.enlarge, self.up, strict=True):
            x = stage(torch.cat((enlarge(x), skips.pop()), dim=1))
        # bfloat16 has steps of 1/16 from 8 pixels on and would make terraces of a dome: the last layer is exact.
        with torch.autocast("cuda" if images.is_cuda else "cpu", enabled=False):
            maps = self.head(x.float())
        return maps[:, 0, : images.shape[2], : images.shape[3]]

    def loss(self, images: Float[Tensor, "b 3 h w"], label_maps: Int[Tensor, "b h w"]) -> dict[str, Float[Tensor, ""]]:
        """Return the mean squared error ``distance`` over the known pixels, 0 between the bounds of the target."""
        lowest, highest = distance_bounds(label_maps, self.config.reach)
        predicted = self.distances(images)
        target = torch.minimum(torch.maximum(predicted.detach(), lowest), highest)
        known = label_maps != IGNORE
        squared = torch.where(known, (predicted - target) ** 2, 0.0)
        return {"distance": squared.sum() / known.sum().clamp(min=1)}

    def maps(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 h w"]:
        """Return the distance at the input's resolution."""
        return self.distances(images)[:, None]

    @property
    def finish(self) -> Callable[[np.ndarray], Instances]:
        """`instances_from_distance` with these settings."""
        return partial(instances_from_distance, config=self.config)


def instances_from_distance(maps: Float[np.ndarray, "1 h w"], config: DistConfig) -> Instances:
    """Turn a map of distances into nuclei: threshold, H-maxima as markers, watershed (published), and score them.

    The score of a nucleus is m / (1 + m) of its mean predicted distance m, pixels: 0.5 for a mean of one pixel, about
    0.75 for a sure nucleus of common size. A network trained by squared error predicts the mean of what may be, so that
    doubt lowers m; but small nuclei have low scores too.
    """
    distance = np.clip(maps[0], 0, 255)
    mask = distance > config.threshold
    if not mask.any():
        return Instances(np.zeros(mask.shape, dtype=np.int32), np.zeros(0, dtype=np.float32))
    height = np.where(mask, distance, 0)
    flooded = reconstruction(height - config.depth, height) if config.depth else height
    markers, _ = ndimage.label(local_maxima(flooded) & mask, np.ones((3, 3)))
    labels = watershed(-height, mark_the_rest(markers, mask), mask=mask)
    mean = np.bincount(labels.ravel(), weights=height.ravel()) / np.maximum(np.bincount(labels.ravel()), 1)
    share = mean / (1 + mean)
    return score_instances(labels, share[labels], config.min_area)


def _two_blocks(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(block(inputs, outputs), block(outputs, outputs))
