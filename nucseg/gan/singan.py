"""SinGAN with paint-to-image, a rival of Table II (Shaham et al. 2019; tamarott/SinGAN).

One unconditional pyramid for each patch: it learns the patch's texture from noise alone. To paint a label map, the map
is coloured with the mean colours inside and outside the patch's nuclei, shrunk to one scale below the start scale,
enlarged again and refined from there on (paint2image). Start scale: a third of the pyramid; no quantisation (A42).
The pyramid, its losses and its deviations are in `pyramid.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from nucseg.gan.base import check_pairs
from nucseg.gan.pyramid import PyramidSynthesizer
from nucseg.gan.pyramid_config import PyramidConfig


@dataclass(frozen=True)
class SinGANConfig(PyramidConfig):
    """Settings of SinGAN: those of `PyramidConfig` with the original's defaults, and where painting starts.

    Attributes
    ----------
    scales, min_size
        10 scales from 25 pixels on.
    d_steps, g_steps
        3 and 3, as in the original.
    masks_per_step
        Noise draws in one batch (masks are not used in training); 1 as in the original.
    start
        Scale at which a coloured mask enters, 1 <= start < scales; None: a third of the pyramid (REFERENCE A42).
    """

    scales: int = 10
    min_size: int | None = 25
    masks_per_step: int = 1
    g_steps: int = 3
    start: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.scales < 2:
            raise ValueError(f"scales must be at least 2 to paint from the scale before, got {self.scales}")
        if self.start is not None and not 1 <= self.start < self.scales:
            raise ValueError(f"start must be in 1..{self.scales - 1}, got {self.start}")
        if self.reconstruction_noise:
            raise ValueError(f"reconstruction_noise: SinGAN's own is z*, so it must be 0; {self.reconstruction_noise}")

    @property
    def start_scale(self) -> int:
        """The scale at which a coloured mask enters."""
        return self.start if self.start is not None else max(1, round(self.scales / 3))


class SinGAN(PyramidSynthesizer):
    """k1 unconditional SinGANs; see `Synthesizer` for the interface.

    Attributes
    ----------
    colours
        (k1, 2, 3) mean colour of background and nuclei of each patch, in [-1, 1].
    """

    config: SinGANConfig
    conditional = False
    fixed_noise = True

    def fit(self, pairs, masks, seed=0, progress=None, checkpoint=None):
        images, labels = check_pairs(pairs)
        self.colours = torch.tensor(
            np.stack([[_mean(x, m == 0), _mean(x, m > 0)] for x, m in zip(images, labels, strict=True)]),
            dtype=torch.float32,
            device=self.device,
        )
        return super().fit(pairs, masks, seed, progress, checkpoint)

    @torch.no_grad()
    def sample(self, i, masks, draw):
        """Return the images of every scale from the start scale on."""
        sizes, start = self.config.sizes(self.size), self.config.start_scale
        background, nuclei = self.colours[i].view(2, 3, 1, 1)
        coloured = masks * nuclei + (1 - masks) * background
        below = F.interpolate(
            coloured, (sizes[start - 1],) * 2, mode="bicubic", align_corners=False, antialias=True
        )  # the chain enlarges it again
        noise = [torch.randn(len(masks), 3, s, s, generator=draw, device=self.device) for s in sizes]
        return self.chain(i, len(sizes), None, noise, start, below)

    def to_tensors(self):
        return {**super().to_tensors(), "colours": self.colours.cpu()}

    def from_tensors(self, tensors):
        super().from_tensors(tensors)
        self.colours = tensors["colours"].to(self.device)
        return self


def _mean(image: np.ndarray, where: np.ndarray) -> np.ndarray:
    pixels = image[where] if where.any() else image.reshape(-1, 3)
    return pixels.mean(0) / 127.5 - 1
