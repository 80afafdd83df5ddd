"""What every segmenter is: a network with a loss on label maps and a prediction that is a label map."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn


class Instances(NamedTuple):
    """A prediction: a label map with ids 1..n, and the confidence of each nucleus."""

    labels: np.ndarray  # (H, W) int32, 0 = background
    scores: np.ndarray  # (n,) float32 in [0, 1]; scores[i] belongs to id i + 1


RANDOM = "random weights"


class Segmenter(nn.Module, ABC):
    """The interface behind which every system of Table IV runs.

    To add one, write one file with a subclass and its frozen configuration, and name it in `nucseg.models.REGISTRY`.

    Attributes
    ----------
    fixed_shapes
        Whether, inside `nucseg.recording.recording`, every tensor of `loss` has a shape that follows from those of its
        arguments, and nothing waits for the device: such a training step can be captured as a CUDA graph.
    largest_id
        The largest id that the label maps of `loss` can hold, where the caller knows it, as the training loop does.
        None: `loss` looks, and the host waits for the device.
    initialised_from
        What the encoder started from: ``"random weights"``, the name of pretrained ones or of their file; printed with
        every result.
    """

    initialised_from = RANDOM

    fixed_shapes = False
    largest_id: int | None = None

    @abstractmethod
    def loss(self, images: Float[Tensor, "b 3 h w"], label_maps: Int[Tensor, "b h w"]) -> dict[str, Float[Tensor, ""]]:
        """Return the named loss terms of a batch; training minimises their sum.

        `images` are in [0, 1]; targets are made from `label_maps` on their device. Crops without nuclei are allowed,
        and so are pixels marked `nucseg.labels.IGNORE`, which add to no term.
        """

    @abstractmethod
    def predict_instances(self, image: np.ndarray) -> Instances:
        """Segment one whole image, (H, W, 3) uint8 of any size from 32 pixels."""

    def prepare(self, image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
        """Return an image as this segmenter wants to see it, in training and in prediction: here as it is.

        `predict_instances` and `begin` call it themselves, and so does the training loop on labelled images.
        """
        return image

    def remarks(self) -> list[str]:
        """Say what a user should know of the training data, asked once after a training; nothing by default."""
        return []

    def begin(self, image: np.ndarray) -> Callable[[], Instances]:
        """Do the network's part of `predict_instances`; what is returned does the rest.

        That function knows no device and can be sent to another process. A segmenter whose rest takes long splits its
        work there; the others, as here, do all of it at once.
        """
        return partial(_as_it_is, self.predict_instances(image))

    def predict(self, image: np.ndarray) -> np.ndarray:
        """Segment one whole image, (H, W, 3) uint8, into a label map, (H, W) int32."""
        return self.predict_instances(image).labels


def _as_it_is(found: Instances) -> Instances:
    return found


def origin(encoder: str, weights: str | Path | None, pretrained: bool) -> str:
    """Name what an encoder started from, for `Segmenter.initialised_from`."""
    if not pretrained:
        return RANDOM
    return Path(weights).name if weights is not None else f"{encoder} (ImageNet)"
