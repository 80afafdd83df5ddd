"""The training images on the device, and random crops of them: what each training step draws from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from skimage.measure import label as connected_components
from torch import Tensor

from nucseg.labels import IGNORE, check_label_map, relabel


class CropPool:
    """All pairs on the device as two flat arrays, from which a batch of random crops is one gather each.

    Ids are renumbered to 1..n in each pair.

    Parameters
    ----------
    pairs
        Image (H, W, 3) uint8 and label map (H, W) each; label maps may hold `nucseg.labels.IGNORE`.
    size
        Side of a crop in pixels; smaller pairs are mirrored outwards.
    device
        Where everything lies.
    weights
        Relative probability of each pair, None = equal.

    Attributes
    ----------
    largest_id
        Of all pairs. Known to the host, so that a training step need not ask the device.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[np.ndarray, np.ndarray]],
        size: int,
        device: torch.device,
        weights: Sequence[float] | None = None,
    ):
        if not pairs:
            raise ValueError("pairs: nothing to train on")
        self.size = size
        ready = [_check_pair(image, labels, size, f"pairs[{i}]") for i, (image, labels) in enumerate(pairs)]
        self.largest_id = max(int(labels.max(initial=0)) for _, labels in ready)
        self.pixels = torch.from_numpy(np.concatenate([image.reshape(-1, 3) for image, _ in ready])).to(device)
        self.labels = torch.from_numpy(np.concatenate([labels.ravel() for _, labels in ready])).to(device)
        shapes = np.array([labels.shape for _, labels in ready])
        starts = np.concatenate(([0], np.cumsum(shapes.prod(axis=1))[:-1]))
        self.heights, self.widths = (torch.from_numpy(shapes[:, i].copy()).to(device) for i in (0, 1))
        self.starts = torch.from_numpy(starts).to(device)
        weights = np.ones(len(ready)) if weights is None else np.asarray(weights, dtype=float)
        if weights.shape != (len(ready),) or not np.isfinite(weights).all() or (weights < 0).any() or not weights.any():
            raise ValueError(f"pair_weights: expected {len(ready)} numbers >= 0, not all 0, got {weights}")
        self.weights = torch.from_numpy(weights).to(device, torch.float32)
        self.offsets = torch.arange(size, device=device)

    def draw(
        self, count: int, generator: torch.Generator
    ) -> tuple[Float[Tensor, "{count} 3 s s"], Int[Tensor, "{count} s s"]]:
        """Draw crops, a pair by its weight and a position uniformly; images in [0, 1], labels int32."""
        pair = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        u = torch.rand(2, count, generator=generator, device=generator.device)
        height, width = self.heights[pair], self.widths[pair]
        row = (u[0] * (height - self.size + 1)).long().clamp(max=height - self.size)
        col = (u[1] * (width - self.size + 1)).long().clamp(max=width - self.size)
        index = (self.starts[pair] + row * width + col).view(-1, 1, 1)
        index = index + self.offsets.view(-1, 1) * width.view(-1, 1, 1) + self.offsets
        return self.pixels[index].permute(0, 3, 1, 2).float() / 255, self.labels[index]


def _check_pair(image: np.ndarray, labels: np.ndarray, size: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    check_label_map(labels, f"{name} labels", unknown=True)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"{name} image: expected (H, W, 3) uint8, got {image.shape} {image.dtype}")
    if image.shape[:2] != labels.shape:
        raise ValueError(f"{name}: the image is {image.shape[:2]} and its label map {labels.shape}")
    return mirror_pair(image, relabel(labels), size)


def mirror_pair(image: np.ndarray, labels: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Mirror an image and its label map outwards until both sides measure `size`; larger ones return unchanged.

    Mirrored nuclei are nuclei (as background they would teach the network to overlook nuclei): one joined to its
    mirror image across the border keeps its id, one apart from it gets a new id. What is unknown stays unknown.
    """
    missing = [max(size - length, 0) for length in labels.shape]
    if not any(missing):
        return image, labels
    before = [m // 2 for m in missing]
    core = tuple(slice(b, b + n) for b, n in zip(before, labels.shape, strict=True))
    # By index, which takes a third of the time of padding: a training may start with a thousand of these.
    rows, cols = (
        np.pad(np.arange(n), (b, m - b), mode="symmetric")
        for n, b, m in zip(labels.shape, before, missing, strict=True)
    )  # fmt: skip
    padded = labels.take(rows, 0).take(cols, 1)
    parts = connected_components(np.maximum(padded, 0), connectivity=2)
    own = np.zeros(parts.max() + 1, dtype=labels.dtype)  # the id of each part that reaches into the image itself
    own[parts[core]] = np.maximum(labels, 0)
    fresh = np.flatnonzero(own == 0)[1:]  # without the background
    own[fresh] = labels.max() + 1 + np.arange(len(fresh))
    return image.take(rows, 0).take(cols, 1), np.where(padded == IGNORE, IGNORE, own[parts])
