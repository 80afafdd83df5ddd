"""Heads of Mask R-CNN, torchvision's for one class: a logit where it has a softmax over two, boxes for all alike.

Convolutions and hidden layers take a normalisation where one is given; `group_norm` is PFFNet's.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

Norm = Callable[[int], nn.Module]


def group_norm(channels: int) -> nn.GroupNorm:
    """Normalise groups of eight channels: 32 groups of the usual 256. One group where eight does not divide them.

    Eight and not one in a narrow network: a group needs more than the single value of a 1 x 1 map.
    """
    return nn.GroupNorm(channels // 8 if channels % 8 == 0 else 1, channels)


def conv(a: int, b: int, size: int = 3, norm: Norm | None = None, stride: int = 1) -> list[nn.Module]:
    """Layers of a convolution with padding, its normalisation if any, and ReLU."""
    layers: list[nn.Module] = [nn.Conv2d(a, b, size, stride, padding=size // 2, bias=norm is None)]
    return [*layers, *([norm(b)] if norm else []), nn.ReLU()]


def kaiming(module: nn.Module) -> None:
    """Give convolutions torchvision's initial weights of a mask head; for `nn.Module.apply`."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class ProposalHead(nn.Module):
    """torchvision's RPNHead: a 3 x 3 convolution, then objectness and box offsets of each anchor."""

    def __init__(self, width: int, anchors: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.score = nn.Conv2d(width, anchors, 1)
        self.box = nn.Conv2d(width, anchors * 4, 1)
        for layer in (self.conv, self.score, self.box):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        hidden = F.relu(self.conv(features))
        score = self.score(hidden).permute(0, 2, 3, 1).flatten(1)
        return score, self.box(hidden).permute(0, 2, 3, 1).reshape(len(features), -1, 4)


class BoxHead(nn.Module):
    """torchvision's TwoMLPHead and predictor for one class: (n, c, p, p) to logits (n,) and offsets (n, 4)."""

    def __init__(self, width: int, pool: int, widths: tuple[int, ...], norm: Norm | None = None):
        super().__init__()
        widths = (width * pool**2, *widths)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(norm(b) if norm else nn.Identity() for b in widths[1:])
        self.score = nn.Linear(widths[-1], 1)
        self.box = nn.Linear(widths[-1], 4)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        hidden = pooled.flatten(1)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            hidden = F.relu(norm(layer(hidden)))
        return self.score(hidden)[:, 0], self.box(hidden)


class MaskHead(nn.Sequential):
    """torchvision's mask head for one class: (n, c, p, p) to logits (n, 2p, 2p)."""

    def __init__(self, width: int, widths: tuple[int, ...]):
        layers: list[nn.Module] = []
        for a, b in pairwise((width, *widths)):
            layers += conv(a, b)
        last = (width, *widths)[-1]
        layers += [nn.ConvTranspose2d(last, last, 2, 2), nn.ReLU(), nn.Conv2d(last, 1, 1)]
        super().__init__(*layers)
        self.apply(kaiming)
        # With a single class, torchvision's initial weights of the last layer would start the mask loss near 15.
        nn.init.normal_(self[-1].weight, std=0.01)

    def forward(self, pooled: Tensor) -> Tensor:
        return super().forward(pooled)[:, 0]
