"""What HoVer-Net and its light relative share: targets, losses, post-processing (REFERENCE section 5, A36).

HoVer-Net (Graham et al. 2019) predicts for each pixel whether it is nucleus (NP) and how far it lies right of and below
the centroid of its nucleus, each side scaled to [-1, 1] (HV). Where nuclei touch, HV jumps from +1 to -1.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from scipy import ndimage
from torch import Tensor

from nucseg import stain
from nucseg.inference import InferenceConfig
from nucseg.labels import IGNORE
from nucseg.models.base import Instances
from nucseg.models.maps import MapSegmenter, at_least, central, flood, score_instances
from nucseg.models.per_nucleus import nucleus_keys, pixel_positions
from nucseg.models.pieces import Pieces, filled, opened


@dataclass(frozen=True)
class HoverConfig:
    """Losses and post-processing.

    Attributes
    ----------
    np_ce, np_dice, hv_mse, hv_gradient
        Weights of the four loss terms (1 each in the PyTorch code; its TensorFlow ancestor had ``hv_mse`` 2).
    smallest_target
        Nuclei with fewer pixels in the crop get no HV target but stay in NP.
    threshold
        NP probability from which a pixel is nucleus.
    edge
        Edge strength (1 = HV falls from +1 to -1 in one step) from which a pixel is no marker. The published 0.4 of a
        min-max normalised map lies near 0.15 on this scale, but depends there on the strongest edge of the tile. Maps
        made from the truth give back AJI 0.96 (at 0.15: 0.93). On Kumar's validation images 0.04 to 0.08 was best after
        short trainings; networks trained for longer on 256 px crops split large nuclei, and gain from 0.03.
    sigma
        Width of the Gaussian derivative, pixels; 2.2 is the published 21-tap Sobel filter.
    stain
        ``"macenko"``: images are stain-normalised before anything else (`nucseg.stain`), in training and in prediction;
        for H&E only. ``"as it is"``: they are not.
    max_hole
        Holes in the foreground with fewer pixels are filled (pale nuclei).
    min_marker, min_area
        Smallest marker and smallest nucleus, pixels.
    """

    np_ce: float = 1.0
    np_dice: float = 1.0
    hv_mse: float = 1.0
    hv_gradient: float = 1.0
    smallest_target: int = 30
    threshold: float = 0.5
    edge: float = 0.07
    sigma: float = 2.2
    max_hole: int = 60
    min_marker: int = 10
    min_area: int = 20
    stain: Literal["as it is", "macenko"] = "as it is"

    def __post_init__(self) -> None:
        for name in ("threshold", "edge"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        if self.sigma <= 0:
            raise ValueError(f"sigma must be above 0, got {self.sigma}")
        for name in (
            "np_ce",
            "np_dice",
            "hv_mse",
            "hv_gradient",
            "smallest_target",
            "max_hole",
            "min_marker",
            "min_area",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")


class HoverTargets(NamedTuple):
    """What a HoVer loss compares with, pixel by pixel."""

    inside: Tensor  # (b, h, w) bool: nucleus or not
    hv: Tensor  # (b, 2, h, w) float32: x and y in [-1, 1], 0 in the background
    known: Tensor  # (b, h, w) bool: False adds to no term


class HoverSegmenter(MapSegmenter):
    """A network with NP and HV heads; a subclass gives `heads`."""

    vector_channels = (1, 2)

    def __init__(self, hover: HoverConfig, inference: InferenceConfig):
        super().__init__(inference)
        self.hover = hover

    def prepare(self, image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
        """Normalise the stains, where the configuration says so."""
        return stain.normalise(image) if self.hover.stain == "macenko" else image

    @abstractmethod
    def heads(self, images: Float[Tensor, "b 3 h w"]) -> tuple[Float[Tensor, "b 2 p q"], Float[Tensor, "b 2 p q"]]:
        """Return NP logits (background, nucleus) and HV (x, y), for the whole input or for its centre."""

    def loss(self, images: Float[Tensor, "b 3 h w"], label_maps: Int[Tensor, "b h w"]) -> dict[str, Float[Tensor, ""]]:
        """Return the four weighted terms ``np_ce``, ``np_dice``, ``hv_mse``, ``hv_gradient``."""
        inside, hv = hv_targets(label_maps, self.hover.smallest_target, self.largest_id)
        return self.loss_on(images, HoverTargets(inside, hv, label_maps != IGNORE))

    def loss_on(self, images: Float[Tensor, "b 3 h w"], targets: HoverTargets) -> dict[str, Float[Tensor, ""]]:
        """Return the same terms on targets of the size of the images, or of their predicted centre."""
        logits, hv = self.heads(images)
        # A network without padding sees more than it predicts.
        targets = HoverTargets(*(central(target, hv.shape[-2:]) for target in targets))
        terms = hover_losses(logits, hv, targets.inside, targets.hv, targets.known)
        return {name: getattr(self.hover, name) * value for name, value in terms.items()}

    @torch.no_grad()
    def teach(self, images: Float[Tensor, "b 3 h w"], sure: float) -> HoverTargets:
        """Return what this network, as a teacher, says of images: per pixel, known where it is sure.

        Parameters
        ----------
        images
            In [0, 1]; the network should be in eval mode.
        sure
            Probability, of nucleus or of background, from which a pixel is known.
        """
        logits, hv = self.heads(images)
        nucleus = logits.float().softmax(dim=1)[:, 1]
        inside = nucleus >= 0.5
        known = (nucleus >= sure) | (nucleus <= 1 - sure)
        return HoverTargets(inside, torch.where(inside[:, None], hv.float().clamp(-1, 1), 0.0), known)

    def maps(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """Return the probability of nucleus, HV x and HV y at the input's resolution."""
        logits, hv = self.heads(images)
        return torch.cat((logits.float().softmax(dim=1)[:, 1:], hv.float()), dim=1)

    @property
    def finish(self) -> Callable[[np.ndarray], Instances]:
        """`instances_from_maps` with these settings."""
        return partial(instances_from_maps, config=self.hover)


def hv_targets(
    label_maps: Int[Tensor, "b h w"], smallest: int = 0, largest_id: int | None = None
) -> tuple[Bool[Tensor, "b h w"], Float[Tensor, "b 2 h w"]]:
    """Make NP and HV targets for all nuclei of all images at once, by scattering over (image, id).

    Parameters
    ----------
    label_maps
        Any ids. A nucleus is what of it lies in the crop and is not hidden by `nucseg.labels.IGNORE`.
    smallest
        Nuclei with fewer pixels get HV 0.
    largest_id
        No id is larger. None: the device is asked, and the host waits for it.

    Returns
    -------
    inside
        Nucleus or not.
    hv
        x and y offset from the rounded centroid, negative side divided by its largest absolute value, positive side by
        its own; 0 in the background.
    """
    b, h, w = label_maps.shape
    device = label_maps.device
    inside = label_maps > 0
    key, _, keys = nucleus_keys(label_maps.long(), largest_id)
    position = pixel_positions(label_maps)
    count = torch.zeros(keys, dtype=torch.int64, device=device).index_add_(0, key, torch.ones_like(key))
    total = torch.zeros(2, keys, dtype=torch.int64, device=device).index_add_(1, key, position)
    centre = torch.floor(total / count.clamp(min=1) + 0.5).long()
    offset = position - centre[:, key]
    index = key.expand(2, -1)
    empty = torch.zeros(2, keys, dtype=torch.int64, device=device)
    lowest = empty.scatter_reduce(1, index, offset, "amin")  # at most 0, since the zeros take part
    highest = empty.scatter_reduce(1, index, offset, "amax")
    reach = torch.where(offset < 0, -lowest[:, key], highest[:, key]).clamp(min=1)
    counted = inside.view(-1) & (count[key] >= smallest)
    hv = torch.where(counted, offset / reach, 0.0)
    return inside, hv.view(2, b, h, w).transpose(0, 1).float()


def hover_losses(
    logits: Float[Tensor, "b 2 h w"],
    hv: Float[Tensor, "b 2 h w"],
    inside: Bool[Tensor, "b h w"],
    target: Float[Tensor, "b 2 h w"],
    known: Bool[Tensor, "b h w"] | None = None,
) -> dict[str, Float[Tensor, ""]]:
    """Cross-entropy and Dice (both channels, smooth 1e-3) of NP; squared error of HV and, inside, of its gradients.

    Pixels that are not `known` add to no term, and neither does a gradient whose 5x5 stencil touches one. With all
    known (None) the terms are the published ones.
    """
    logits, hv = logits.float(), hv.float()
    if known is None:
        known = torch.ones_like(inside)
    counted = known.sum().clamp(min=1)
    truth = torch.stack((~inside & known, inside & known), dim=1).float()
    probability = logits.softmax(dim=1) * known[:, None]
    overlap = 2 * (probability * truth).sum(dim=(0, 2, 3)) + 1e-3
    dice = 1 - overlap / (probability.sum(dim=(0, 2, 3)) + truth.sum(dim=(0, 2, 3)) + 1e-3)
    with torch.autocast(hv.device.type, enabled=False):  # a convolution would run in the step's precision
        error = _gradients(hv) - _gradients(target)
    near_unknown = F.max_pool2d((~known)[:, None].float(), 5, stride=1, padding=2) > 0
    focus = (inside[:, None] & ~near_unknown).float()
    entropy = F.cross_entropy(logits, torch.where(known, inside.long(), IGNORE), ignore_index=IGNORE, reduction="sum")
    # An unknown pixel's target is what the network says there; the mean is then brought to the known ones.
    squared = F.mse_loss(hv, torch.where(known[:, None], target, hv.detach())) * (known.numel() / counted)
    return {
        "np_ce": entropy / counted,
        "np_dice": dice.sum(),
        "hv_mse": squared,
        "hv_gradient": (focus * error**2).sum() / (2 * focus.sum() + 1e-8),
    }


def _gradients(hv: Float[Tensor, "b 2 h w"]) -> Float[Tensor, "b 2 h w"]:
    """Differentiate x along x and y along y with the published 5x5 kernel h / (h^2 + v^2)."""
    steps = torch.arange(-2.0, 3.0, device=hv.device)
    v, h = torch.meshgrid(steps, steps, indexing="ij")
    along_x = h / (h * h + v * v + 1e-15)
    kernels = torch.stack((along_x, along_x.T))[:, None]
    return F.conv2d(hv, kernels, padding=2, groups=2)


def instances_from_maps(maps: Float[np.ndarray, "3 h w"], config: HoverConfig) -> Instances:
    """Turn NP and HV maps into nuclei: threshold, markers where HV does not fall, watershed.

    Deviation: the published code stretches each HV gradient between its minimum and maximum in the tile, so that one
    artefact sets the scale for all nuclei. Here HV is cut to [-1, 1], its 90th percentile inside nuclei is brought to
    0.8 (what round nuclei have; an undertrained network falls short of it), and a fall from +1 to -1 is an edge of
    strength 1 in every image. A piece of foreground too small for any marker is a nucleus of its own. Small holes are
    filled and nuclei below `HoverConfig.min_area` dropped, neither of which the published code does, and markers are
    opened by a disc of 21 pixels (there an ellipse of 5 x 5). `HoverConfig.edge` was chosen on Kumar's validation
    images and is the default on every set; four of these are training images of MoNuSeg, none is a test image of any.
    """
    probability, hv = maps[0], maps[1:]
    mask = ~at_least(probability < config.threshold, config.max_hole)
    mask = at_least(mask, config.min_marker)
    if not mask.any():
        return Instances(np.zeros(mask.shape, dtype=np.int32), np.zeros(0, dtype=np.float32))
    hv = np.clip(hv, -1, 1)
    inside = np.abs(hv.reshape(2, -1).take(np.flatnonzero(mask), axis=1))
    hv *= 0.8 / max(float(np.percentile(inside, 90, overwrite_input=True)), 0.1)
    np.clip(hv, -1, 1, out=hv)
    for component, order in zip(hv, ((0, 1), (1, 0)), strict=True):
        _differentiate(component, config.sigma, order)
    slope = np.minimum(*hv, out=hv[0])
    # A step of -2 seen through a Gaussian derivative has the slope -2 / (sigma sqrt(2 pi)); that is an edge of 1.
    unit = config.sigma * np.sqrt(2 * np.pi) / 2
    cores = Pieces(opened(filled(mask & (slope > -config.edge / unit))))
    large = cores.areas() >= config.min_marker
    markers = cores.paint(np.where(large, np.cumsum(large), 0).astype(np.int32))
    height = ndimage.gaussian_filter(np.clip(-unit * slope, 0, 1), 0.8)
    return score_instances(flood(height, markers, mask), probability, config.min_area)


def _differentiate(image: Float[np.ndarray, "h w"], sigma: float, order: tuple[int, int]) -> None:
    """Filter an image with the derivative of a Gaussian, in place, as `scipy.ndimage.gaussian_filter` does.

    That goes down one column after the other. Where rows lie a power of two apart, as at 1024 px, the pixels of a
    column fall into the same few lines of the cache; strips of columns, copied, take half the time.
    """
    for left in range(0, image.shape[1], 64):
        strip = image[:, left : left + 64].copy()
        ndimage.gaussian_filter1d(strip, sigma, 0, order[0], output=strip, truncate=4.5)
        image[:, left : left + 64] = strip
    ndimage.gaussian_filter1d(image, sigma, 1, order[1], output=image, truncate=4.5)
