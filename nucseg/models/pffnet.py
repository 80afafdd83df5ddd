"""PFFNet (Liu et al., IEEE TIP 2021) and its forerunner DPMSFF (Liu et al., IJCAI 2019), two rows of Table IV.

Mask R-CNN with a semantic side. PFFNet adds, after REFERENCE section 5:

- GroupNorm in the pyramid and the heads (the proposals' head stays torchvision's).
- A mask head whose logits are the sum of two paths: convolutions with a pixel shuffle, and a fully connected one.
- A semantic branch on the encoder's maps at strides 4 to 32, of two classes, enlarged to the image.
- A second map of the two classes, from the pyramid's finest level, into which the instances' masks go
  (`nucseg.models.semantic.FusedMap`); cross-entropy on both maps, and the squared difference of their softmaxes.
- A mask-quality head, whose answer multiplies the score of the box. Its target is half IoU plus half Dice of the mask.

DPMSFF is taken here as PFFNet that pastes instance masks into the second map instead of using them as attention,
without consistency loss and without mask-quality head. The switch is in PFFNet's released code, the rest is inferred
(REFERENCE section 5): a table should label that row as our reading of it.

The second map takes, in training, the positive RoIs that the mask head is trained on with their predicted masks. These
are not detached: that is how the semantic tasks teach the instances. The quality head gets detached masks, since it
judges them and should not bend them. At test the semantic side is silent, as published: the label map is made of the
instances alone (overlaps by A33). `PFFNet.semantic_maps` returns both maps for whoever wants to look at them.

Deviations, and why:

- The house's `MaskRCNN` with its sampling and counts, and any encoder with frozen BatchNorm instead of ResNet101 with
  GroupNorm, so that Table IV compares what the systems add and not what they start from.
- Anchors from 8 px instead of 32..512: on nuclei of 10-40 px the published ones miss most (REFERENCE section 6).
- Where boxes overlap, the highest mask logit stands, so that a nucleus counts once however many RoIs show it.
- Groups of eight channels instead of 32 groups, the same at the published width of 256.
- The quality of a mask is measured against the whole nucleus, also where it reaches over the RoI. The threshold on
  scores looks at the box alone; the product decides who is painted first, and is what is reported.
- What the descriptions leave open: the fully connected path leaves before the last convolution and has two of its own
  (as in PANet, Liu et al., CVPR 2018). The quality head is that of Mask Scoring R-CNN (Huang et al., CVPR 2019) with
  two fully connected layers and a sigmoid at its end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nucseg.models.boxes import Targets
from nucseg.models.heads import conv, group_norm, kaiming
from nucseg.models.maskrcnn import Features, MaskExamples, MaskRCNN, MaskRCNNConfig
from nucseg.models.per_nucleus import nucleus_keys
from nucseg.models.semantic import FusedMap, SemanticBranch, consistency_loss, enlarge, paste_masks, semantic_loss

_STRIDES = (4, 8, 16, 32)  # C2 to C5


@dataclass(frozen=True)
class PFFNetConfig(MaskRCNNConfig):
    """Sizes, thresholds and weights of PFFNet; what is not named here is as in `MaskRCNNConfig`.

    Attributes
    ----------
    fusion
        How instance masks enter the second map: as ``"attention"``, or ``"paste"``d.
    semantic_width
        Channels of the semantic branch and of the second map's convolutions.
    quality_widths
        Of the quality head's convolutions; the last one halves the map.
    quality_hidden
        Units of its fully connected layer before the answer.
    semantic, fused
        Weights of the cross-entropy of the semantic branch and of the second map.
    consistency
        Weight of the squared difference between the two maps' softmaxes.
    quality
        Weight of the quality head's squared error. At 0 there is no such head, and scores are those of the boxes.
    """

    nms: float = 0.3  # as published
    fusion: Literal["attention", "paste"] = "attention"
    semantic_width: int = 64
    quality_widths: tuple[int, ...] = (256, 256, 256, 256)
    quality_hidden: int = 1024
    # weights of the terms that Mask R-CNN does not have
    semantic: float = 1.0
    fused: float = 1.0
    consistency: float = 1.0
    quality: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        for name in ("semantic", "fused", "consistency", "quality"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a weight of at least 0, got {getattr(self, name)}")
        for name in ("semantic_width", "quality_hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("mask_widths", "quality_widths"):
            if not getattr(self, name) or min(getattr(self, name)) < 4:
                raise ValueError(f"{name}: expected one or more widths of at least 4, got {getattr(self, name)}")


@dataclass(frozen=True)
class DPMSFFConfig(PFFNetConfig):
    """`PFFNetConfig` as DPMSFF has it: masks pasted, no consistency loss, no quality head."""

    fusion: Literal["attention", "paste"] = "paste"
    consistency: float = 0.0
    quality: float = 0.0


class PFFNet(MaskRCNN):
    """Panoptic Feature Fusion Net over any pretrained encoder; parameters as those of `MaskRCNN`."""

    norm = staticmethod(group_norm)

    def __init__(
        self,
        encoder: str = "resnet50",
        config: PFFNetConfig | None = None,
        weights: str | Path | None = None,
        pretrained: bool = True,
    ):
        config = config or PFFNetConfig()
        super().__init__(encoder, config, weights, pretrained)
        channels = dict(zip(self.pyramid.strides, self.pyramid.channels, strict=True))
        width = config.fpn_channels
        self.semantic = SemanticBranch([channels[stride] for stride in _STRIDES], config.semantic_width)
        self.fused = FusedMap(width, config.semantic_width, config.fusion)
        self.quality = (
            QualityHead(width, config.mask_pool, config.quality_widths, config.quality_hidden)
            if config.quality
            else None
        )

    def _new_mask_head(self) -> nn.Module:
        return DualMaskHead(self.config.fpn_channels, self.config.mask_pool, self.config.mask_widths)

    def _further_losses(self, features: Features, targets: Targets, examples: MaskExamples) -> dict[str, Tensor]:
        """Terms ``semantic``, ``fused``, ``consistency`` and ``quality``; those of weight 0 are left out."""
        config, index = self.config, targets.index
        semantic, fused = self._semantic_maps(
            features, examples.logits, examples.rois, examples.image, examples.used, index.shape[-2:]
        )
        losses = {
            "semantic": config.semantic * semantic_loss(semantic, index),
            "fused": config.fused * semantic_loss(fused, index),
            "consistency": config.consistency * consistency_loss(semantic, fused, index),
        }
        if self.quality is not None:
            masks, pooled = examples.logits.detach().sigmoid(), examples.pooled
            truth = mask_quality(
                masks > config.mask_threshold, examples.truth > 0.5, examples.known > 0, examples.rois / config.scale,
                areas(targets)[examples.image, examples.place],
            )  # fmt: skip
            error = (self.quality(pooled, masks).float().sigmoid() - truth).square() * examples.used
            losses["quality"] = config.quality * error.sum() / examples.used.sum().clamp(min=1)
        return {name: loss for name, loss in losses.items() if getattr(config, name)}

    def _semantic_maps(
        self, features: Features, logits: Tensor, rois: Tensor, image: Tensor, used: Tensor, shape: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Scores (b, 2, h, w) of both maps on the image's pixels; RoIs in network pixels."""
        config = self.config
        b, _, h, w = features.roi_map.shape
        masks = paste_masks(logits, rois / config.roi_stride, image, used, (b, h, w))
        semantic = self.semantic([features.encoded[stride] for stride in _STRIDES])
        fused = self.fused(features.roi_map, masks)
        return (
            enlarge(semantic, _STRIDES[0], shape, config.scale),
            enlarge(fused, config.roi_stride, shape, config.scale),
        )

    def _final_scores(self, scores: Tensor, pooled: Tensor, masks: Tensor) -> Tensor:
        if self.quality is None:
            return scores
        return scores * self.quality(pooled, masks).float().sigmoid()

    @torch.no_grad()
    def semantic_maps(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return what `predict` does not use: the probability of nucleus in the semantic branch and the second map.

        Parameters
        ----------
        image
            (H, W, 3) uint8, seen as one tile.

        Returns
        -------
        semantic, fused
            (H, W) float32 each, in [0, 1]; the second with the masks of the detected instances.
        """
        device, training = next(self.parameters()).device, self.training
        self.eval()
        try:
            pixels = torch.from_numpy(np.ascontiguousarray(image)).to(device).permute(2, 0, 1)[None].float() / 255
            boxes, scores, masks = self._detect(pixels)
            maps = self._semantic_maps(
                self._features(pixels), masks.logit(1e-6), boxes * self.config.scale,
                torch.zeros(len(boxes), dtype=torch.int64, device=device), torch.ones_like(scores), image.shape[:2],
            )  # fmt: skip
        finally:
            self.train(training)
        semantic, fused = (two.softmax(dim=1)[0, 1].cpu().numpy() for two in maps)
        return semantic, fused


class DualMaskHead(nn.Module):
    """The sum of a convolutional and a fully connected path: (n, c, p, p) to logits (n, 2p, 2p)."""

    def __init__(self, width: int, pool: int, widths: tuple[int, ...]):
        super().__init__()
        *first, last = pairwise((width, *widths))
        self.shared = nn.Sequential(*(layer for a, b in first for layer in conv(a, b, norm=group_norm)))
        branch, end = last
        fine = end // 4
        self.local = nn.Sequential(
            *conv(branch, end, norm=group_norm),
            nn.Conv2d(end, 4 * fine, 3, padding=1), _Shuffle(), nn.ReLU(), nn.Conv2d(fine, 1, 1),
        )  # fmt: skip
        self.whole = nn.Sequential(
            *conv(branch, branch, norm=group_norm), *conv(branch, branch // 2, norm=group_norm),
            nn.Flatten(), nn.Linear(branch // 2 * pool**2, (2 * pool) ** 2),
        )  # fmt: skip
        self.apply(kaiming)
        nn.init.normal_(self.local[-1].weight, std=0.01)

    def forward(self, pooled: Float[Tensor, "n c p p"]) -> Float[Tensor, "n m m"]:
        hidden = self.shared(pooled)
        local = self.local(hidden)[:, 0]
        return local + self.whole(hidden).view_as(local)


class _Shuffle(nn.Module):
    """`nn.PixelShuffle` of 2, whose gradient fails where no RoI is positive: (n, 4c, p, p) to (n, c, 2p, 2p)."""

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.reshape(n, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c // 4, 2 * h, 2 * w)


class QualityHead(nn.Module):
    """RoI features and the mask found on them to the logit of the mask's quality, (n,)."""

    def __init__(self, width: int, pool: int, widths: tuple[int, ...], hidden: int):
        super().__init__()
        sides = tuple(pairwise((width + 1, *widths)))
        layers = [
            layer
            for number, (a, b) in enumerate(sides, start=1)
            for layer in conv(a, b, norm=group_norm, stride=2 if number == len(sides) else 1)
        ]
        self.layers = nn.Sequential(
            *layers, nn.Flatten(), nn.Linear(widths[-1] * math.ceil(pool / 2) ** 2, hidden), nn.ReLU(),
            nn.Linear(hidden, 1),
        )  # fmt: skip
        self.apply(kaiming)

    def forward(self, pooled: Float[Tensor, "n c p p"], masks: Float[Tensor, "n m m"]) -> Float[Tensor, " n"]:
        """Judge mask probabilities on a grid twice as fine as the RoI's."""
        return self.layers(torch.cat((pooled, F.max_pool2d(masks[:, None], 2).to(pooled)), dim=1))[:, 0]


def areas(targets: Targets) -> Float[Tensor, "b g"]:
    """Count the known pixels of each nucleus."""
    b, g = targets.valid.shape
    key, span, keys = nucleus_keys(targets.index, g)
    count = torch.zeros(keys, device=key.device)
    return count.scatter_add_(0, key, torch.ones_like(key, dtype=count.dtype))[: span * b].view(b, span)[:, 1:]


def mask_quality(
    masks: Tensor, truth: Tensor, known: Tensor, boxes: Float[Tensor, "n 4"], area: Float[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """Return half the IoU plus half the Dice of masks with whole nuclei, in [0, 1].

    Parameters
    ----------
    masks, truth, known
        (n, m, m) bool, on a grid over each box: what was found, the nucleus, and where that is known.
    boxes
        In pixels of the label maps.
    area
        Of each nucleus, in pixels, also outside of the box.
    """
    side = boxes[:, 2:] - boxes[:, :2]
    cell = side.prod(dim=1) / masks.shape[-1] ** 2
    found = (masks & known).sum(dim=(1, 2)) * cell
    common = torch.minimum((masks & truth & known).sum(dim=(1, 2)) * cell, area)  # cells count an edge but roughly
    both = found + area
    iou, dice = common / (both - common).clamp(min=1e-6), 2 * common / both.clamp(min=1e-6)
    return (iou + dice) / 2
