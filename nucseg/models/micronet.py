"""Micro-Net (Raza et al., Medical Image Analysis 2019; Table IV), REFERENCE section 5: the image enters at every level.

Four encoder levels, each joined by two convolutions of the image shrunk to its resolution; a bottleneck; a decoder with
skips, whose last three levels are enlarged to full size. All three together make the main output, each alone an
auxiliary one. Nuclei are the connected pieces of the main output, without a watershed; so the truth is eroded by a 3x3
cross, to keep neighbours apart, and what is found is dilated back. Written from the description.

Deviations
- Padded convolutions instead of valid ones (252 px in, as many out), so that any size will do. Valid ones bring the
  bottleneck to half the size of the last level by eating its rim, which sets the decoder askew to its skips; here the
  bottleneck is pooled, and the decoder lies on the encoder.
- Skips and decoder still pass a 5x5 transposed convolution before they are joined, though padding has made its purpose
  (to regain the rim) void: the parameters are those of the published network.
- The image is shrunk with anti-aliasing, and weights are drawn as Glorot and Bengio do for tanh.
- The weights of the cross-entropy are U-Net's (Ronneberger et al. 2015) on the eroded truth, as in the hover_net port.
- The port divides the auxiliary losses by the number of the epoch. `loss` knows no epochs: a buffer counts its calls in
  training, on the device, and so many of them (`auxiliary_epoch`) are one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from scipy import ndimage
from torch import Tensor, nn

from nucseg.encoders import EncoderError
from nucseg.inference import InferenceConfig
from nucseg.labels import IGNORE
from nucseg.models.base import Instances
from nucseg.models.decoder import to_multiple_of_32
from nucseg.models.maps import MapSegmenter, score_instances


@dataclass(frozen=True)
class MicroNetConfig:
    """The network, its loss and what follows it.

    Attributes
    ----------
    width
        Channels of the first level; the bottleneck has 32 times as many. Published: 64, up to 2048.
    standardise
        Whether each crop, in prediction each tile, is brought to mean 0 and standard deviation 1 (all colours
        together), as TIAToolbox does with whole images; otherwise [0, 1] becomes [-1, 1].
    dropout
        Share of the features dropped before each output.
    border, sigma
        A pixel of the background weighs 1 + border exp(-(d1 + d2)^2 / (2 sigma^2)), where d1 and d2 are its distances
        to the nearest two nuclei, pixels; all others weigh 1. Those of U-Net and of the port.
    auxiliary_epoch
        Calls of `MicroNet.loss` in training that are an epoch: in the n-th, each auxiliary loss weighs 1 / n.
        Published: 250 epochs; so 8 for 2000 iterations.
    threshold
        Probability above which a pixel is nucleus, as published. Weights at the borders teach doubt: after a short
        training, 0.4 has a higher AJI on Kumar's validation images (0.33 against 0.28).
    min_area
        Smallest nucleus, pixels, before it is dilated.
    inference
        Tiles and averaging of whole images.
    """

    width: int = 64
    standardise: bool = True
    dropout: float = 0.5
    border: float = 10.0
    sigma: float = 5.0
    auxiliary_epoch: int = 8
    threshold: float = 0.5
    min_area: int = 10
    inference: InferenceConfig = field(default_factory=InferenceConfig)

    def __post_init__(self) -> None:
        for name in ("width", "auxiliary_epoch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold must be between 0 and 1, got {self.threshold}")
        if not 0 < self.sigma <= 20:
            raise ValueError(f"sigma must be above 0 and at most 20 pixels, got {self.sigma}")
        for name in ("border", "min_area"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")


class MicroNet(MapSegmenter):
    """The published network, of any width.

    Parameters
    ----------
    config
        Every number.
    weights
        None: there are no pretrained ones.
    pretrained
        Without effect: training starts from random weights.

    Attributes
    ----------
    calls
        How often `loss` was called in training; part of the state, so that a resumed training goes on with it.
    """

    calls: Tensor

    def __init__(
        self,
        config: MicroNetConfig | None = None,
        weights: str | Path | None = None,
        pretrained: bool = True,
    ):
        config = config or MicroNetConfig()
        super().__init__(config.inference)
        if weights is not None and pretrained:
            raise EncoderError(f"micronet: starts from random weights and cannot use {weights}")
        self.config = config
        w = config.width
        self.levels = nn.ModuleList(_Level(a, b) for a, b in ((3, w), (2 * w, 2 * w), (4 * w, 4 * w), (8 * w, 8 * w)))
        self.bottleneck = nn.Sequential(_conv(16 * w, 32 * w), _conv(32 * w, 32 * w))
        self.joins = nn.ModuleList(_Join(n * w, n * w // 2) for n in (32, 16, 8, 4))
        # From the finest decoder level to the third finest.
        sizes = ((2 * w, w, 2), (4 * w, 2 * w, 4), (8 * w, 4 * w, 8))
        self.enlarge = nn.ModuleList(
            nn.Sequential(nn.ConvTranspose2d(a, b, k, stride=k), _conv(b, b)) for a, b, k in sizes
        )
        self.outputs = nn.ModuleList(
            nn.Sequential(nn.Dropout(config.dropout), nn.Conv2d(n, 2, 3, padding=1)) for n in (7 * w, w, 2 * w, 4 * w)
        )
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.xavier_uniform_(module.weight, nn.init.calculate_gain("tanh"))
                nn.init.zeros_(module.bias)

    def logits(self, images: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b 2 h w"]]:
        """Return the logits (background, nucleus), float32, of the main output and of the three auxiliary ones."""
        image = 2 * images - 1
        if self.config.standardise:
            std, mean = torch.std_mean(images, dim=(1, 2, 3), keepdim=True)
            image = (images - mean) / std.clamp(min=0.02)
        x = image = to_multiple_of_32(image)
        skips, features = [], []
        for i, level in enumerate(self.levels):
            size = [n >> (i + 1) for n in image.shape[-2:]]
            x = level(x, F.interpolate(image, size=size, mode="bicubic", align_corners=False, antialias=True))
            skips.append(x)
        x = self.bottleneck(F.max_pool2d(x, 2))
        for join in self.joins:
            x = join(x, skips.pop())
            features.insert(0, x)
        full = [enlarge(x) for enlarge, x in zip(self.enlarge, features, strict=False)]
        inputs = (torch.cat(full, dim=1), *full)
        found = (output(x).float() for output, x in zip(self.outputs, inputs, strict=True))
        return [maps[..., : images.shape[2], : images.shape[3]] for maps in found]

    def loss(self, images: Float[Tensor, "b 3 h w"], label_maps: Int[Tensor, "b h w"]) -> dict[str, Float[Tensor, ""]]:
        """Return the weighted cross-entropies ``main`` and ``auxiliary``: means over the known pixels."""
        eroded = erode(label_maps)
        known = label_maps != IGNORE
        weights = border_weights(eroded, self.config.border, self.config.sigma) * known
        weights = weights / known.sum().clamp(min=1)
        truth = (eroded > 0).long()
        main, *others = (
            (F.cross_entropy(logits, truth, reduction="none") * weights).sum() for logits in self.logits(images)
        )
        epoch = self.calls // self.config.auxiliary_epoch + 1
        if self.training:
            # In place, so that a captured step counts too; a copy of `epoch` was made above.
            self.calls += 1
        return {"main": main, "auxiliary": sum(others) / epoch}

    def maps(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 h w"]:
        """Return the probability of (eroded) nucleus at the input's resolution."""
        return self.logits(images)[0].softmax(dim=1)[:, 1:]

    @property
    def finish(self) -> Callable[[np.ndarray], Instances]:
        """`instances_from_probability` with these settings."""
        return partial(instances_from_probability, config=self.config)


class _Level(nn.Module):
    """Two convolutions and pooling, beside two convolutions of the shrunk image: twice `width` channels."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.main = nn.Sequential(_conv(inputs, width), nn.BatchNorm2d(width), _conv(width, width), nn.MaxPool2d(2))
        self.side = nn.Sequential(_conv(3, width), nn.BatchNorm2d(width), _conv(width, width))

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        return torch.cat((self.main(x), self.side(image)), dim=1)


class _Join(nn.Module):
    """Enlarge, two convolutions, and join with a skip of as many channels."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.enlarge = nn.Sequential(
            nn.ConvTranspose2d(inputs, width, 2, stride=2), _conv(width, width), _conv(width, width),
            nn.ConvTranspose2d(width, width, 5, padding=2),
        )  # fmt: skip
        self.skip = nn.ConvTranspose2d(width, width, 5, padding=2)
        self.join = _conv(2 * width, width, 1)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.join(torch.cat((self.enlarge(x), self.skip(skip)), dim=1))


def _conv(inputs: int, outputs: int, kernel: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2), nn.Tanh())


def erode(label_maps: Int[Tensor, "b h w"]) -> Int[Tensor, "b h w"]:
    """Take from each nucleus the pixels with a known neighbour, of four, that is not of it.

    What is unknown, beyond the crop's border or under `nucseg.labels.IGNORE`, takes nothing away.
    """
    h, w = label_maps.shape[1:]
    wide = F.pad(label_maps, (1, 1, 1, 1), value=IGNORE)
    kept = label_maps > 0
    for row, col in ((0, 1), (1, 0), (1, 2), (2, 1)):
        beside = wide[:, row : row + h, col : col + w]
        kept = kept & ((beside == label_maps) | (beside == IGNORE))
    return torch.where(kept, label_maps, label_maps.clamp(max=0))


def border_weights(eroded: Int[Tensor, "b h w"], border: float, sigma: float) -> Float[Tensor, "b h w"]:
    """Return 1 + border exp(-(d1 + d2)^2 / (2 sigma^2)) in the background, 1 in nuclei (Ronneberger et al. 2015).

    d1 and d2 are the Euclidean distances to the nearest two nuclei of the crop. Nuclei farther than 3 sigma are not
    looked for: they would add less than 0.012 border.
    """
    near, second = nearest_two(eroded, math.ceil(3 * sigma))
    return 1 + torch.where(eroded > 0, 0.0, border * torch.exp(-((near + second) ** 2) / (2 * sigma**2)))


def nearest_two(label_maps: Int[Tensor, "b h w"], reach: int) -> tuple[Float[Tensor, "b h w"], Float[Tensor, "b h w"]]:
    """Return the Euclidean distances of each pixel to the nearest nucleus and to the nearest other one.

    First along columns, then along rows; exact, since the nearest nucleus (and the nearest but one) in a column are
    all of that column that can be the nearest two of a pixel beside it.

    Parameters
    ----------
    label_maps
        Any ids; those below 1 are no nucleus. A pixel of a nucleus is at the distance 0 from it.
    reach
        How far, along each axis, nuclei are looked for; infinite where there is none.
    """
    ids = label_maps.long()
    shift = 32  # squared distance and id in one number: the smaller one is nearer
    nothing = torch.iinfo(torch.int64).max // 2
    own = torch.where(ids > 0, ids, nothing)

    def id_of(packed: Tensor) -> Tensor:
        return packed & ((1 << shift) - 1)

    def beside(packed: Tensor, axis: int) -> Iterator[Tensor]:
        n = packed.shape[axis]
        pad = (0, 0, reach, reach) if axis == 1 else (reach, reach)
        wide = F.pad(packed, pad, value=nothing)
        for step in range(-reach, reach + 1):
            yield wide.narrow(axis, reach + step, n) + (step * step << shift)

    first = functools.reduce(torch.minimum, beside(own, 1))
    second = functools.reduce(
        torch.minimum, (torch.where(id_of(c) == id_of(first), nothing, c) for c in beside(own, 1))
    )
    nearest = functools.reduce(torch.minimum, beside(first, 2))
    next_nearest = functools.reduce(
        torch.minimum,
        (
            torch.where(id_of(c) == id_of(nearest), d, c)
            for c, d in zip(beside(first, 2), beside(second, 2), strict=True)
        ),
    )

    def distance(packed: Tensor) -> Tensor:
        return torch.where(packed < nothing, packed >> shift, torch.inf).sqrt()

    return distance(nearest), distance(next_nearest)


def instances_from_probability(maps: Float[np.ndarray, "1 h w"], config: MicroNetConfig) -> Instances:
    """Turn the probability of eroded nucleus into nuclei: threshold, fill holes, connected pieces, dilate.

    A nucleus is scored by its mean probability before it is dilated; where two dilated ones meet, the pixel goes to the
    one with the larger id.
    """
    mask = ndimage.binary_fill_holes(maps[0] > config.threshold)
    found = score_instances(ndimage.label(mask)[0], maps[0], config.min_area)
    cross = ndimage.generate_binary_structure(2, 1)
    grown = ndimage.grey_dilation(found.labels, footprint=cross)
    return found._replace(labels=np.where(found.labels > 0, found.labels, grown))
