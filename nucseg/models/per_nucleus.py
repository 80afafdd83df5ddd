"""Which nucleus of which image a pixel belongs to: the numbers by which targets of all nuclei are made at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor


class Keys(NamedTuple):
    """A number for each nucleus of a batch, to scatter over.

    Attributes
    ----------
    of_pixels
        (b * h * w,) int64: image i's nucleus of id n has key ``i * span + n``. All other pixels get keys behind those,
        one a column: thousands of writes to one place would queue on a GPU.
    span
        Keys of an image: one more than the largest id.
    count
        Of all keys, those of the other pixels too.
    """

    of_pixels: Int[Tensor, " pixels"]
    span: int
    count: int


def nucleus_keys(ids: Int[Tensor, "b h w"], largest_id: int | None = None) -> Keys:
    """Number the nuclei of all images of a batch.

    Parameters
    ----------
    ids
        Label maps, int64; nuclei are above 0.
    largest_id
        No id is larger. None: the device is asked, and the host waits for it.
    """
    b, _, w = ids.shape
    if largest_id is None:
        largest_id = int(ids.max()) if ids.numel() else 0
    span = max(largest_id, 0) + 1
    images = span * torch.arange(b, device=ids.device).view(b, 1, 1)
    others = span * b + torch.arange(w, device=ids.device)
    return Keys(torch.where(ids > 0, ids + images, others).view(-1), span, span * b + w)


def pixel_positions(label_maps: Tensor) -> Int[Tensor, "2 pixels"]:
    """Return column and row of every pixel of (b, h, w) maps, in the order of `Keys.of_pixels`."""
    (b, h, w), device = label_maps.shape, label_maps.device
    column, row = torch.arange(w, device=device), torch.arange(h, device=device)[:, None]
    return torch.stack((column.expand(b, h, w), row.expand(b, h, w))).reshape(2, -1)
