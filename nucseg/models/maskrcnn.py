"""Mask R-CNN set for nuclei (Sec. III-C and IV-A): torchvision's architecture and losses over any pretrained encoder.

A region proposal network on a feature pyramid, a box head and a mask head, with torchvision's layers, operators and
loss formulas. What differs, and why (REFERENCE section 6, A29-A33):

- No hidden rescaling: the network sees every image at one stated `MaskRCNNConfig.scale`, in training and test alike.
- Small anchors, up to 2,000 nuclei per image, and enough proposals for them.
- RoIs are pooled from the finest level of the pyramid only. torchvision chooses the level by box size and would take
  that same level for every box under 112 px.
- Every layer is trained. BatchNorm follows `MaskRCNNConfig.batch_norm`.
- One class, so one logit instead of a softmax over two, and class-agnostic boxes and masks.
- A training step does less: 500 proposals an image (torchvision: 2,000), 256 of them for the boxes (512), at most 32
  for the masks, and one sample in each cell of a pooled RoI (4).
- A training step works on the whole batch at once (`nucseg.models.boxes`), with masks for positive RoIs only.
- Overlapping masks become one label map in order of score.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork, clip_boxes_to_image, nms, roi_align

from nucseg.encoders import Pyramid
from nucseg.inference import check_image
from nucseg.labels import IGNORE
from nucseg.models.base import Instances, Segmenter, origin
from nucseg.models.boxes import (
    Targets,
    batched_nms,
    box_loss,
    decode,
    known_cells,
    make_anchors,
    mask_targets,
    match,
    places,
    sample,
    targets_from_labels,
    unknown_share,
)
from nucseg.models.heads import BoxHead, MaskHead, Norm, ProposalHead
from nucseg.models.painting import nms_across, paint, spans
from nucseg.recording import is_recording

NMS_ROUNDS = 16  # in a recorded step, which cannot ask whether it has settled; chains of overlaps above 0.7 are shorter
RPN_WEIGHTS, BOX_WEIGHTS = (1.0, 1.0), (10.0, 5.0)  # torchvision's scaling of box offsets: (centre, log side)


@dataclass(frozen=True)
class MaskRCNNConfig:
    """Every size and threshold of the Mask R-CNN; lengths are in pixels of the image, whatever the `scale`.

    Attributes
    ----------
    scale
        The factor by which images are enlarged for the network, in training and test alike.
    strides
        Levels of the feature pyramid for the proposals, in network pixels: powers of two, at most 64.
    anchors
        Anchor sizes of each level.
    ratios
        Height / width of the anchors.
    roi_stride
        The level from which RoIs are pooled: 2 or 4.
    batch_norm
        ``"frozen"`` keeps the encoder's ImageNet statistics and trains its affine weights; ``"train"`` updates both.
    """

    scale: float = 1.0
    # pyramid and heads
    strides: tuple[int, ...] = (4, 8, 16, 32, 64)
    roi_stride: int = 4
    fpn_channels: int = 256
    box_pool: int = 7
    box_widths: tuple[int, ...] = (1024, 1024)
    mask_pool: int = 14
    mask_widths: tuple[int, ...] = (256, 256, 256, 256)
    batch_norm: Literal["frozen", "train"] = "frozen"
    # anchors and proposals
    anchors: tuple[tuple[float, ...], ...] = ((8.0,), (16.0,), (32.0,), (64.0,), (128.0,))
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    rpn_above: float = 0.7
    rpn_below: float = 0.3
    rpn_samples: int = 256
    rpn_fraction: float = 0.5
    rpn_nms: float = 0.7
    train_candidates: int = 1000  # proposals per image before and after suppression, in training ...
    train_proposals: int = 500
    test_candidates: int = 12000  # ... and per tile at test
    test_proposals: int = 4000
    densest: int = 256  # most nuclei of a crop of 256 x 256 px in a recorded step: what exceeds them counts as unknown
    # boxes and masks
    roi_iou: float = 0.5
    roi_samples: int = 256
    roi_fraction: float = 0.33
    mask_samples: int = 32  # positive RoIs per image that train the mask head, by far the most work per RoI
    score: float = 0.5
    nms: float = 0.4
    detections: int = 2000
    # the label map (A33)
    mask_threshold: float = 0.5
    drop_covered: float = 0.7
    min_area: int = 15
    # whole images
    tile: int = 1024
    overlap: int = 128

    def __post_init__(self):
        if len(self.anchors) != len(self.strides) or len(set(map(len, self.anchors))) != 1:
            raise ValueError(f"anchors: equally many sizes for each stride of {self.strides}, got {self.anchors}")
        if any(stride not in (2, 4, 8, 16, 32, 64) for stride in self.strides):
            raise ValueError(f"strides: expected some of 2, 4, 8, 16, 32, 64, got {self.strides}")
        if self.roi_stride not in (2, 4):
            raise ValueError(f"roi_stride: expected 2 or 4, got {self.roi_stride}")
        if not self.scale > 0:
            raise ValueError(f"scale: expected a positive factor, got {self.scale}")
        if not 0 <= 2 * self.overlap <= self.tile:
            raise ValueError(f"overlap: expected 0 to half of the tile of {self.tile} px, got {self.overlap}")
        for name in ("rpn_above", "rpn_below", "rpn_fraction", "rpn_nms", "roi_iou", "roi_fraction", "score", "nms",
                     "mask_threshold", "drop_covered"):  # fmt: skip
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a value in [0, 1], got {getattr(self, name)}")
        for name in ("fpn_channels", "box_pool", "mask_pool", "rpn_samples", "train_candidates", "train_proposals",
                     "test_candidates", "test_proposals", "densest", "roi_samples", "mask_samples",
                     "detections"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")

    def places_for(self, shape: tuple[int, int]) -> int:
        """Return how many nuclei a training crop of this height and width may hold.

        They are counted in a frame of 32 px around it, half of it outside: nuclei that the border cuts are many in a
        small crop.
        """
        return math.ceil(self.densest * (shape[0] + 32) * (shape[1] + 32) / (256 + 32) ** 2)


class Features(NamedTuple):
    """What the heads look at, in network pixels."""

    encoded: dict[int, Tensor]  # the encoder's maps by stride
    levels: list[Tensor]  # the pyramid's maps of `MaskRCNNConfig.strides`
    roi_map: Tensor  # the one from which RoIs are pooled


class MaskExamples(NamedTuple):
    """The positive RoIs of a batch that the mask head is trained on; n of them, used or not."""

    image: Tensor  # (n,) int64
    place: Tensor  # (n,) int64: of the nucleus in `Targets`
    rois: Tensor  # (n, 4) in network pixels
    used: Tensor  # (n,) float32: 0 for a place worked on for nothing
    pooled: Tensor  # (n, c, p, p)
    logits: Tensor  # (n, m, m) float32
    truth: Tensor  # (n, m, m) in [0, 1]
    known: Tensor  # (n, m, m) float32: 0 where the truth is unknown, and at places not used


class MaskRCNN(Segmenter):
    """Mask R-CNN over the feature pyramid of a pretrained encoder.

    Parameters
    ----------
    encoder
        Any name of `nucseg.encoders.Pyramid`: ``"resnet50"`` (the paper's), ``"efficientnet_lite0"``, ...
    config
        Sizes and thresholds.
    weights
        A file of the encoder's weights, if not the installed or downloadable ones.
    pretrained
        False starts the encoder from random weights, for ablations and tests.

    Notes
    -----
    The heads' initial weights and the drawing of anchors and RoIs use torch's global random state, as layers with
    dropout do: the caller seeds it around the construction, and the training loop around the loss.

    A network built on this one overrides `norm`, `_new_mask_head`, `_further_losses` and `_final_scores`.
    """

    fixed_shapes = True
    norm: Norm | None = None  # of the pyramid's and the box head's layers, by their width

    def __init__(
        self,
        encoder: str = "resnet50",
        config: MaskRCNNConfig | None = None,
        weights: str | Path | None = None,
        pretrained: bool = True,
    ):
        super().__init__()
        self.config = config = config or MaskRCNNConfig()
        self.pyramid = Pyramid(encoder, weights, pretrained)
        self.initialised_from = origin(encoder, weights, pretrained)
        finest, coarsest = min(*config.strides, config.roi_stride), max(*config.strides, config.roi_stride)
        self.used = [i for i, stride in enumerate(self.pyramid.strides) if finest <= stride <= coarsest]
        width = config.fpn_channels
        self.fpn = FeaturePyramidNetwork([self.pyramid.channels[i] for i in self.used], width, norm_layer=self.norm)
        self.rpn = ProposalHead(width, len(config.anchors[0]) * len(config.ratios))
        self.box_head = BoxHead(width, config.box_pool, config.box_widths, self.norm)
        self.mask_head = self._new_mask_head()
        # recorded steps in which a crop held more nuclei than there were places for
        self.register_buffer("crowded", torch.zeros((), dtype=torch.int64), persistent=False)

    def _new_mask_head(self) -> nn.Module:
        return MaskHead(self.config.fpn_channels, self.config.mask_widths)

    def train(self, mode: bool = True) -> MaskRCNN:
        super().train(mode)
        if self.config.batch_norm == "frozen":
            for module in self.pyramid.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def remarks(self) -> list[str]:
        if not (steps := int(self.crowded)):
            return []
        return [
            f"in {steps} recorded steps a crop held more nuclei than there are places for (densest = "
            f"{self.config.densest} in 256 x 256 px), and the others counted as unknown: raise densest"
        ]

    # -- training ------------------------------------------------------------------------------------------------

    def loss(self, images: Float[Tensor, "b 3 h w"], label_maps: Int[Tensor, "b h w"]) -> dict[str, Float[Tensor, ""]]:
        """Return the five losses of Mask R-CNN; see `Segmenter.loss`.

        ``rpn_score`` and ``rpn_box`` of the proposals, ``score``, ``box`` and ``mask`` of the RoIs; each is
        torchvision's formula, averaged over the examples drawn in the batch. What is unknown (`nucseg.labels.IGNORE`)
        makes neither positive nor negative examples, and its pixels are left out of the masks.
        """
        config, scale = self.config, self.config.scale
        most = config.places_for(label_maps.shape[-2:]) if is_recording() else None
        targets = targets_from_labels(label_maps, self.largest_id, most)
        if most is not None:
            self.crowded += ((label_maps > 0) & (targets.index == IGNORE)).any()
        scaled = targets._replace(boxes=targets.boxes * scale)
        features = self._features(images)
        logits, offsets, anchors = self._propose(features.levels)
        self._anchors = anchors  # a recorded step reads them where they lie, and their cache may let them go
        losses = self._rpn_loss(logits, offsets, anchors, scaled)

        proposals, usable = self._train_proposals(logits.detach(), offsets.detach(), anchors, images.shape[-2:])
        # True boxes join the proposals, as in torchvision: at the start of training they are the only positives.
        candidates = torch.cat((proposals, scaled.boxes), dim=1)
        usable = torch.cat((usable, scaled.valid), dim=1)
        unknown = unknown_share(targets.index, candidates / scale)
        matches = match(candidates, scaled, config.roi_iou, config.roi_iou, keep_best=False, unknown=unknown)
        chosen, positive_slots, drawn = sample(
            matches.positive & usable, matches.negative & usable, config.roi_samples, config.roi_fraction
        )
        image, slot = places(drawn)
        index, drawn = chosen[image, slot], drawn[image, slot].float()
        positive = positive_slots[image, slot].float()
        rois, place = candidates[image, index], matches.place[image, index]
        count = drawn.sum().clamp(min=1)

        score, box_offsets = self.box_head(self._pool(features.roi_map, image, rois, config.box_pool))
        score_loss = F.binary_cross_entropy_with_logits(score.float(), positive, weight=drawn, reduction="sum")
        losses["score"] = score_loss / count
        losses["box"] = box_loss(box_offsets, scaled.boxes[image, place], rois, positive > 0, BOX_WEIGHTS) / count

        # Positives come first and in random order, so the first places are a fair draw of them.
        first = positive_slots[:, : min(config.mask_samples, round(config.roi_samples * config.roi_fraction))]
        image, slot = places(first)
        index, used = chosen[image, slot], first[image, slot].float()
        rois, place = candidates[image, index], matches.place[image, index]
        pooled = self._pool(features.roi_map, image, rois, config.mask_pool)
        masks = self.mask_head(pooled).float()
        truth = mask_targets(targets.index, image, place, rois / scale, masks.shape[-1])
        known = known_cells(targets.index, image, rois / scale, masks.shape[-1]) * used[:, None, None]
        mask_loss = F.binary_cross_entropy_with_logits(masks, truth, weight=known, reduction="sum")
        losses["mask"] = mask_loss / known.sum().clamp(min=1)
        examples = MaskExamples(image, place, rois, used, pooled, masks, truth, known)
        return losses | self._further_losses(features, targets, examples)

    def _further_losses(self, features: Features, targets: Targets, examples: MaskExamples) -> dict[str, Tensor]:
        """Terms of a network built on this one; `targets` in pixels of the image."""
        return {}

    def _features(self, images: Tensor) -> Features:
        if self.config.scale != 1:
            size = [round(side * self.config.scale) for side in images.shape[-2:]]
            images = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
        # Sides are rounded up to the coarsest stride of the encoder; added pixels repeat the border, so that no
        # artificial edge appears there.
        h, w = images.shape[-2:]
        images = F.pad(images, (0, -w % 32, 0, -h % 32), mode="replicate")
        encoded = dict(zip(self.pyramid.strides, self.pyramid(images), strict=True))
        maps = self.fpn({str(self.pyramid.strides[i]): encoded[self.pyramid.strides[i]] for i in self.used})
        maps = {int(stride): features for stride, features in maps.items()}
        if 64 in self.config.strides:  # torchvision's extra level
            maps[64] = F.max_pool2d(maps[32], 1, 2)
        return Features(encoded, [maps[stride] for stride in self.config.strides], maps[self.config.roi_stride])

    def _propose(self, levels: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Objectness logits (b, a), box offsets (b, a, 4) and anchors (a, 4), in network pixels."""
        logits, offsets = zip(*(self.rpn(features) for features in levels), strict=True)
        sizes = tuple(tuple(size * self.config.scale for size in sizes) for sizes in self.config.anchors)
        shapes = [features.shape[-2:] for features in levels]
        anchors = make_anchors(shapes, self.config.strides, sizes, self.config.ratios, levels[0].device)
        return torch.cat(logits, dim=1).float(), torch.cat(offsets, dim=1).float(), anchors

    def _rpn_loss(self, logits: Tensor, offsets: Tensor, anchors: Tensor, targets: Targets) -> dict[str, Tensor]:
        config = self.config
        everywhere = anchors.expand(len(logits), -1, 4)
        unknown = unknown_share(targets.index, everywhere / config.scale)
        matches = match(everywhere, targets, config.rpn_above, config.rpn_below, keep_best=True, unknown=unknown)
        index, positive, drawn = sample(matches.positive, matches.negative, config.rpn_samples, config.rpn_fraction)
        count = drawn.sum().clamp(min=1)
        score = F.binary_cross_entropy_with_logits(logits.gather(1, index), positive.float(), reduction="none")
        image, slot = places(positive)
        which = index[image, slot]
        truth = targets.boxes[image, matches.place[image, which]]
        box = box_loss(offsets[image, which], truth, anchors[which], positive[image, slot], RPN_WEIGHTS)
        return {"rpn_score": (score * drawn).sum() / count, "rpn_box": box / count}

    @torch.no_grad()
    def _train_proposals(
        self, logits: Tensor, offsets: Tensor, anchors: Tensor, shape: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Best proposals of each image after suppression, (b, p, 4), and which of them are meant."""
        config = self.config
        score, best = logits.topk(min(config.train_candidates, logits.shape[1]), dim=1)
        boxes = decode(offsets.gather(1, best[..., None].expand(-1, -1, 4)), anchors[best], RPN_WEIGHTS)
        # A diverged network's boxes would be places out of bounds, which kill a GPU's process before anybody is told.
        boxes = boxes.nan_to_num(0.0)
        boxes = clip_boxes_to_image(boxes, [round(side * config.scale) for side in shape])
        rounds = NMS_ROUNDS if is_recording() else None
        keep = batched_nms(boxes, config.rpn_nms, rounds) & ((boxes[..., 2:] - boxes[..., :2]) >= 1).all(dim=-1)
        score, order = score.masked_fill(~keep, -torch.inf).topk(min(config.train_proposals, score.shape[1]), dim=1)
        return boxes.gather(1, order[..., None].expand(-1, -1, 4)), score > -torch.inf

    def _pool(self, features: Tensor, image: Tensor, rois: Tensor, size: int) -> Tensor:
        rois = torch.cat((image[:, None].to(rois), rois), dim=1)
        # One sample per cell: a box of 28 px is 7 cells of the map wide, so that 7 x 7 samples miss nothing of it, and
        # the operator's gradient, the slowest piece of a training step, costs a quarter of torchvision's 2 x 2.
        return roi_align(features, rois, size, 1 / self.config.roi_stride, sampling_ratio=1, aligned=True)

    # -- prediction ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict_instances(self, image: np.ndarray) -> Instances:
        """Segment one whole image, (H, W, 3) uint8, in overlapping tiles where it is larger than `config.tile`.

        Each tile hands over the nuclei whose centre lies in its own part of the image; suppression and the order of
        scores then run over the whole image, so that no nucleus is doubled or cut at a tile's border.

        Returns
        -------
        Instances
            Ids 1..n in falling order of score.
        """
        check_image(image)
        config, device = self.config, next(self.parameters()).device
        training = self.training
        self.eval()
        try:
            rows, columns = (spans(side, config.tile, config.overlap) for side in image.shape[:2])
            found = []
            for top, bottom, own_top, own_bottom in rows:
                for left, right, own_left, own_right in columns:
                    tile = torch.from_numpy(np.ascontiguousarray(image[top:bottom, left:right])).to(device)
                    boxes, scores, masks = self._detect(tile.permute(2, 0, 1)[None].float() / 255)
                    boxes = boxes + boxes.new_tensor([left, top, left, top])
                    x, y = (boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2
                    own = (x >= own_left) & (x < own_right) & (y >= own_top) & (y < own_bottom)
                    found.append((boxes[own], scores[own], masks[own]))
        finally:
            self.train(training)
        boxes, scores, masks = (torch.cat(parts) for parts in zip(*found, strict=True))
        keep = nms_across(
            boxes, scores, config.nms, [low for *_, low, _ in columns[1:]], [low for *_, low, _ in rows[1:]]
        )
        return paint(
            boxes[keep].cpu(), scores[keep].cpu(), masks[keep], image.shape[:2],
            config.mask_threshold, config.drop_covered, config.min_area,
        )  # fmt: skip

    def _detect(self, image: Float[Tensor, "1 3 h w"]) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes (n, 4) in image pixels, scores (n,) and mask probabilities (n, m, m) of one tile."""
        config = self.config
        shape = [round(side * config.scale) for side in image.shape[-2:]]
        features = self._features(image)
        logits, offsets, anchors = self._propose(features.levels)
        score, best = logits[0].topk(min(config.test_candidates, logits.shape[1]))
        rois = clip_boxes_to_image(decode(offsets[0, best], anchors[best], RPN_WEIGHTS), shape)
        large = ((rois[:, 2:] - rois[:, :2]) >= 1).all(dim=1)
        rois, score = rois[large], score[large]
        rois = rois[nms(rois, score, config.rpn_nms)[: config.test_proposals]]
        first = torch.zeros(len(rois), dtype=torch.int64, device=rois.device)
        logit, box_offsets = self.box_head(self._pool(features.roi_map, first, rois, config.box_pool))
        scores = logit.float().sigmoid()
        boxes = clip_boxes_to_image(decode(box_offsets, rois, BOX_WEIGHTS), shape)
        sure = (scores >= config.score) & ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(dim=1)
        boxes, scores = boxes[sure], scores[sure]
        keep = nms(boxes, scores, config.nms)[: config.detections]
        boxes, scores = boxes[keep], scores[keep]
        pooled = self._pool(features.roi_map, first[: len(boxes)], boxes, config.mask_pool)
        masks = self.mask_head(pooled).float().sigmoid()
        return boxes / config.scale, self._final_scores(scores, pooled, masks), masks

    def _final_scores(self, scores: Tensor, pooled: Tensor, masks: Tensor) -> Tensor:
        """Scores (n,) by which detections are painted, from those of the boxes, the RoIs and the mask probabilities."""
        return scores
