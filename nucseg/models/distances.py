"""Distances inside nuclei as training targets, for a whole batch at once on its device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from nucseg.labels import IGNORE
from nucseg.models.per_nucleus import nucleus_keys


def distance_bounds(
    label_maps: Int[Tensor, "b h w"], reach: int
) -> tuple[Float[Tensor, "b h w"], Float[Tensor, "b h w"]]:
    """Bound the chessboard distance of each pixel to what is not its nucleus, as far as a crop can tell.

    A pixel of a nucleus beside another nucleus or the background has 1, the background has 0. All nuclei of a batch are
    eroded together, `reach` times by 3x3 pixels: after one erosion no two of them touch.

    Parameters
    ----------
    label_maps
        Any ids below 2^24.
    reach
        No distance is longer.

    Returns
    -------
    lowest
        If nothing beyond the crop's border and under `nucseg.labels.IGNORE` belonged to the nucleus.
    highest
        If it all did. Both are equal where the edge of the nucleus is nearer than anything unknown. What they are
        under IGNORE itself has no meaning.
    """
    ids = label_maps.float()
    unknown = label_maps == IGNORE
    inside = (ids > 0).float()
    # Pooling sees beyond the border what is least: nothing counts there as an edge.
    largest = F.max_pool2d(ids, 3, 1, 1)
    smallest = -F.max_pool2d(torch.where(unknown, -torch.inf, -ids), 3, 1, 1)
    at_most = ((largest == smallest) & (largest > 0)) | (largest < 0)  # one nucleus, or nothing known
    at_least = at_most & (F.max_pool2d(unknown.float(), 3, 1, 1) == 0)
    at_least = F.pad(at_least[:, 1:-1, 1:-1], (1, 1, 1, 1))  # a pixel at the border is beside the unknown
    left = torch.stack((at_least, at_most)).flatten(0, 1).float()
    distance = torch.cat((inside, inside))
    for i in range(reach - 1):
        if i:
            left = -F.max_pool2d(-left, 3, 1, 1)
        distance = distance + left
    distance = distance * torch.cat((inside, inside))
    return distance[: len(ids)], distance[len(ids) :]


def of_its_largest(distances: Float[Tensor, "b h w"], label_maps: Int[Tensor, "b h w"], largest_id: int) -> Tensor:
    """Divide the distances in each nucleus by their largest: 1 at its middle, 0 in the background, (b, h, w)."""
    key, _, keys = nucleus_keys(label_maps.long(), largest_id)
    largest = torch.zeros(keys, device=distances.device).scatter_reduce(0, key, distances.reshape(-1), "amax")
    return distances / largest[key].view_as(distances).clamp(min=1)
