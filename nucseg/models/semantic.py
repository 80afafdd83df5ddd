"""The semantic side of PFFNet and DPMSFF: which pixels are nucleus, seen twice, beside the instances of Mask R-CNN.

`SemanticBranch` reads the encoder's maps (large kernels as in Peng et al., CVPR 2017), `FusedMap` the pyramid's finest
map together with the masks of the instances. Both give scores of two classes: background, nucleus.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from nucseg.labels import IGNORE
from nucseg.models.heads import conv, group_norm

CLASSES = 2  # background, nucleus


class LargeKernel(nn.Module):
    """A window of 5 x 5 as 5 x 1 after 1 x 5 plus 1 x 5 after 5 x 1."""

    def __init__(self, channels: int, width: int, size: int = 5):
        super().__init__()
        tall, wide = (size, 1), (1, size)
        self.paths = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, width, a, padding="same"), nn.Conv2d(width, width, b, padding="same"))
            for a, b in ((tall, wide), (wide, tall))
        )
        self.norm = group_norm(width)

    def forward(self, features: Tensor) -> Tensor:
        return self.norm(self.paths[0](features) + self.paths[1](features))


class Residual(nn.Module):
    """Adds what two 3 x 3 convolutions make of a map."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(*conv(width, width, norm=group_norm), nn.Conv2d(width, width, 3, padding=1))

    def forward(self, features: Tensor) -> Tensor:
        return features + self.layers(features)


class SemanticBranch(nn.Module):
    """Maps of the encoder at strides 4, 8, 16 and 32, finest first, to scores of the two classes at stride 4.

    Each map goes through a large kernel and a residual block; from the coarsest on, maps are enlarged, added to the
    next finer one, and refined by another residual block.
    """

    def __init__(self, channels: Sequence[int], width: int):
        super().__init__()
        self.lateral = nn.ModuleList(nn.Sequential(LargeKernel(c, width), Residual(width)) for c in channels)
        self.merge = nn.ModuleList(Residual(width) for _ in channels[1:])
        self.classify = nn.Conv2d(width, CLASSES, 1)

    def forward(self, maps: Sequence[Tensor]) -> Float[Tensor, "b 2 h w"]:
        *finer, top = (lateral(features) for lateral, features in zip(self.lateral, maps, strict=True))
        for features, merge in zip(reversed(finer), self.merge, strict=True):
            enlarged = F.interpolate(top, size=features.shape[-2:], mode="bilinear", align_corners=False)
            top = merge(features + enlarged)
        return self.classify(top)


class FusedMap(nn.Module):
    """A map of the pyramid and the masks of the instances to scores of the two classes, at the map's stride.

    The map is first brought to the two classes. Into these goes what the instances know (`fusion`), then come a 3 x 3
    and a 1 x 1 convolution.

    Parameters
    ----------
    width
        Channels of the pyramid.
    hidden
        Channels of the convolutions before and after the fusion.
    fusion
        ``"attention"``: both classes' scores are multiplied by 1 + sigmoid(mask logit) inside an instance's box.
        ``"paste"``: where a mask says nucleus, the two scores become 0 and the mask's logit, whose softmax is that
        mask. Outside, and where there are no instances, the scores stay.
    """

    def __init__(self, width: int, hidden: int, fusion: Literal["attention", "paste"]):
        super().__init__()
        self.fusion = fusion
        self.reduce = nn.Sequential(*conv(width, hidden, norm=group_norm), nn.Conv2d(hidden, CLASSES, 1))
        self.refine = nn.Sequential(*conv(CLASSES, hidden), nn.Conv2d(hidden, CLASSES, 1))

    def forward(self, features: Float[Tensor, "b c h w"], masks: Float[Tensor, "b h w"]) -> Float[Tensor, "b 2 h w"]:
        """Fuse a map with the logits that `paste_masks` returns for it."""
        return self.refine(fuse(self.reduce(features).float(), masks, self.fusion))


def fuse(
    scores: Float[Tensor, "b 2 h w"], masks: Float[Tensor, "b h w"], fusion: Literal["attention", "paste"]
) -> Float[Tensor, "b 2 h w"]:
    """Bring mask logits, -inf where there is no instance, into scores of two classes; see `FusedMap`."""
    if fusion == "attention":
        return scores * (1 + masks.sigmoid()[:, None])
    pasted = torch.stack((torch.zeros_like(masks), masks), dim=1)
    return torch.where(masks[:, None] > 0, pasted, scores)


def paste_masks(
    logits: Float[Tensor, "n m m"],
    boxes: Float[Tensor, "n 4"],
    image: Int[Tensor, " n"],
    used: Float[Tensor, " n"],
    shape: tuple[int, int, int],
) -> Float[Tensor, "b h w"]:
    """Put masks back to where their boxes are, in maps of several images at once; -inf outside of all boxes.

    Resampled bilinearly at pixel centres. Where boxes overlap, the highest logit stands: in training many RoIs show the
    same nucleus, so that any sum or product would grow with their number. Gradients reach the masks.

    Parameters
    ----------
    boxes
        In pixels of the maps.
    image
        Of each mask: the map that it belongs to.
    used
        0 for masks that are left out.
    shape
        Of the maps, (b, h, w).
    """
    b, h, w = shape
    across, in_columns = _bilinear(boxes[:, 0], boxes[:, 2], w, logits.shape[-1])
    down, in_rows = _bilinear(boxes[:, 1], boxes[:, 3], h, logits.shape[-1])
    pasted = (down @ logits @ across.mT).float()
    inside = in_rows[:, :, None] & in_columns[:, None, :] & (used > 0)[:, None, None]
    pasted = torch.where(inside, pasted, -torch.inf).reshape(-1, h * w)
    empty = pasted.new_full((b, h * w), -torch.inf)
    return empty.scatter_reduce(0, image[:, None].expand(-1, h * w), pasted, "amax").view(b, h, w)


def _bilinear(low: Tensor, high: Tensor, size: int, cells: int) -> tuple[Tensor, Tensor]:
    """Weights (n, size, cells) with which pixels take from the cells between `low` and `high`; which lie there."""
    centre = torch.arange(size, device=low.device) + 0.5
    # A place that is not used may hold a box without area.
    position = (centre - low[:, None]) / (high - low)[:, None].clamp(min=1e-3)
    cell = (position * cells - 0.5).clamp(0, cells - 1)[:, :, None]
    weights = (1 - (cell - torch.arange(cells, device=low.device)).abs()).clamp(min=0)
    return weights, (position >= 0) & (position <= 1)


def enlarge(
    scores: Float[Tensor, "b 2 h w"], stride: int, shape: tuple[int, int], scale: float
) -> Float[Tensor, "b 2 y x"]:
    """Bring scores at a stride of the (padded) network's image to the pixels of the image, (y, x)."""
    scores = F.interpolate(scores.float(), scale_factor=stride, mode="bilinear", align_corners=False)
    scores = scores[..., : round(shape[0] * scale), : round(shape[1] * scale)]
    if scale != 1:
        scores = F.interpolate(scores, size=shape, mode="bilinear", align_corners=False)
    return scores


def semantic_loss(scores: Float[Tensor, "b 2 h w"], index: Int[Tensor, "b h w"]) -> Float[Tensor, ""]:
    """Cross-entropy over the known pixels; `index` is positive in nuclei and `IGNORE` where unknown."""
    truth = torch.where(index == IGNORE, IGNORE, (index > 0).long())
    loss = F.cross_entropy(scores.float(), truth, ignore_index=IGNORE, reduction="sum")
    return loss / (truth != IGNORE).sum().clamp(min=1)


def consistency_loss(
    a: Float[Tensor, "b 2 h w"], b: Float[Tensor, "b 2 h w"], index: Int[Tensor, "b h w"]
) -> Float[Tensor, ""]:
    """Mean squared difference between the softmaxes of two maps, over classes and known pixels."""
    known = (index != IGNORE)[:, None]
    difference = (a.float().softmax(dim=1) - b.float().softmax(dim=1)).square()
    return (difference * known).sum() / (CLASSES * known.sum().clamp(min=1))
