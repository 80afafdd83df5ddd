"""Images and masks at every scale of a pyramid, and one scale's step of Eq. 2."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from nucseg.gan.networks import ScaleGenerator


def image_pyramid(images: Float[Tensor, "k 3 s s"], sizes: Sequence[int]) -> list[Float[Tensor, "k 3 h h"]]:
    """Resize images to every scale (bicubic, antialiased)."""
    return [
        images
        if size == images.shape[-1]
        else F.interpolate(images, (size, size), mode="bicubic", align_corners=False, antialias=True).clamp(-1, 1)
        for size in sizes
    ]


def mask_pyramid(masks: Float[Tensor, "k 1 s s"], sizes: Sequence[int]) -> list[Float[Tensor, "k 1 h h"]]:
    """Resize masks to every scale by nearest neighbour: they stay in {0, 1} (REFERENCE A21)."""
    return [F.interpolate(masks, (size, size), mode="nearest-exact") for size in sizes]


def upsample(images: Float[Tensor, "b 3 h h"], size: int) -> Float[Tensor, "b 3 s s"]:
    """Enlarge the image of one scale to the next one's size (bicubic, in the graph's own dtype)."""
    return F.interpolate(images, (size, size), mode="bicubic", align_corners=False)


def window(images: Float[Tensor, "b c h w"], corner: Int[Tensor, 2], side: int) -> Float[Tensor, "b c s s"]:
    """Cut one square of `side` pixels out of every image; `corner` (row, column) stays on the device."""
    offsets = torch.arange(side, device=images.device)
    return images.index_select(-2, corner[0] + offsets).index_select(-1, corner[1] + offsets)


def paint(
    generator: ScaleGenerator,
    mask: Float[Tensor, "b 1 h h"] | None,
    noise: Float[Tensor, "b 3 h h"],
    previous: Float[Tensor, "b 3 h h"] | None,
) -> Float[Tensor, "b 3 h h"]:
    """Eq. 2 at one scale: y = G([m, z + y_previous]) + y_previous (no y_previous at the coarsest)."""
    out = generator(generator.pad(inputs_of(mask, noise, previous)))
    return out if previous is None else out + previous


def inputs_of(
    mask: Float[Tensor, "b 1 h h"] | None, noise: Float[Tensor, "b 3 h h"], previous: Float[Tensor, "b 3 h h"] | None
) -> Float[Tensor, "b c h h"]:
    """[m, z + y_previous] of Eq. 2."""
    image = noise if previous is None else noise + previous
    return image if mask is None else torch.cat([mask, image], 1)
