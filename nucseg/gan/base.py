"""What every synthesiser of Table II is: fitted on a few annotated patches, it paints label maps as H&E images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Integer, UInt8
from torch import Tensor

from nucseg.gan.divergence import Divergence
from nucseg.labels import check_label_map

Progress = Callable[[int, int, str], None]
Checkpoint = Callable[[dict[str, Tensor]], None]


class Synthesizer(ABC):
    """The interface behind which every system of Table II runs.

    To add one, write one file with a subclass and its frozen configuration, and name it in `nucseg.gan.REGISTRY`.

    Attributes
    ----------
    config
        Frozen settings.
    device
        Where it trains and generates.
    terms
        Names of the loss terms in `history`.
    history
        One (steps, networks, terms) float32 tensor on the CPU for each scale (or phase) already trained; `networks` is
        k1 where each patch has its own network and 1 where they share one.
    divergences
        What diverged on the way, where each patch has its own network and the others could go on.
    """

    terms: tuple[str, ...]

    def __init__(self, config: Any, device: torch.device):
        self.config = config
        self.device = torch.device(device)
        self.history: list[Tensor] = []
        self.divergences: list[Divergence] = []

    @property
    def left_out(self) -> tuple[int, ...]:
        """Patches that have no usable network because theirs diverged: what `generate` returns for them is black."""
        return tuple(sorted({d.patch for d in self.divergences if d.outcome == "left out"}))

    @abstractmethod
    def fit(
        self,
        pairs: Sequence[tuple[UInt8[np.ndarray, "s s 3"], Integer[np.ndarray, "s s"]]],
        masks: Integer[np.ndarray, "k1 count s s"],
        seed: int = 0,
        progress: Progress | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> Synthesizer:
        """Learn the look of k1 annotated patches.

        Parameters
        ----------
        pairs
            The k1 annotated patches: RGB image and label map.
        masks
            Synthetic label maps, `count` for each patch; only foreground and background are used.
        seed
            Seeds initial weights and every draw; the same seed gives the same weights on the same device.
        progress
            Called as ``progress(done, total, text)`` now and then.
        checkpoint
            Called with `to_tensors()` after each scale (or phase). A synthesiser that `from_tensors` has filled with
            such a dictionary goes on after the last finished scale, and ends as if it had never been stopped.

        Raises
        ------
        ValueError
            If shapes, dtypes or counts do not agree.
        DivergenceError
            With network and step, when a loss is no longer finite and no other network can go on. Where each patch has
            its own network, one that diverges is trained again or given up, with a `DivergenceWarning` and an entry in
            `divergences`, and the others go on.
        """

    @abstractmethod
    def generate(
        self, masks: Integer[np.ndarray, "k1 count s s"], seed: int = 0
    ) -> UInt8[np.ndarray, "k1 count s s 3"]:
        """Paint label maps, those of row i in the look of patch i; the same seed gives the same images."""

    @abstractmethod
    def to_tensors(self) -> dict[str, Tensor]:
        """Return the whole trained state as a flat dictionary of CPU tensors, as safetensors wants it."""

    @abstractmethod
    def from_tensors(self, tensors: Mapping[str, Tensor]) -> Synthesizer:
        """Take over a state that `to_tensors` returned; returns self."""


def check_pairs(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]],
) -> tuple[UInt8[np.ndarray, "k1 s s 3"], Integer[np.ndarray, "k1 s s"]]:
    """Check the annotated patches and stack them into images and label maps."""
    if len(pairs) == 0:
        raise ValueError("pairs: at least one annotated patch is needed")
    for i, (image, labels) in enumerate(pairs):
        check_label_map(labels, f"pairs[{i}] labels")
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"pairs[{i}] image: expected (s, s, 3) uint8, got {image.shape} {image.dtype}")
        if image.shape[:2] != labels.shape or image.shape[0] != image.shape[1]:
            raise ValueError(f"pairs[{i}]: square image and labels of one size wanted: {image.shape}, {labels.shape}")
        if image.shape != pairs[0][0].shape:
            raise ValueError(f"pairs[{i}] image: {image.shape}, but pairs[0] has {pairs[0][0].shape}")
    return np.stack([image for image, _ in pairs]), np.stack([labels.astype(np.int64) for _, labels in pairs])


def check_masks(masks: np.ndarray, k1: int, size: int) -> np.ndarray:
    """Return `masks` unchanged if they are label maps for `k1` patches of `size` pixels."""
    if masks.dtype.kind not in "iu":
        raise ValueError(f"masks: expected integer label maps, got {masks.dtype}")
    if masks.ndim != 4 or masks.shape[0] != k1 or masks.shape[1] == 0 or masks.shape[2:] != (size, size):
        raise ValueError(f"masks: expected ({k1}, count, {size}, {size}) with count >= 1, got {masks.shape}")
    return masks


def to_signed(images: UInt8[np.ndarray, "... h w 3"], device: torch.device) -> Float[Tensor, "... 3 h w"]:
    """Turn 8-bit images into [-1, 1], channels first."""
    return torch.from_numpy(images).to(device).movedim(-1, -3).float() / 127.5 - 1


def to_uint8(images: Float[Tensor, "... 3 h w"]) -> UInt8[np.ndarray, "... h w 3"]:
    """Turn [-1, 1], channels first, into 8-bit images; values outside are clipped."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(-3, -1).cpu().numpy()


def foreground(labels: Integer[np.ndarray, "... h w"], device: torch.device) -> Float[Tensor, "... 1 h w"]:
    """Return m in {0, 1} of label maps: 1 inside nuclei."""
    return torch.from_numpy(labels > 0).to(device).unsqueeze(-3).float()
