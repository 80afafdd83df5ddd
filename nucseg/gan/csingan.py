"""CSinGAN: a conditional SinGAN with component-wise discriminators (Sec. III-B, Eq. 2-4, Fig. 5).

One pyramid of generators for each annotated patch, conditioned on masks, against three critics: D_g sees the whole
image, D_f its nuclei, D_b its background. The pyramid, the losses and every deviation are in `pyramid.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Integer, UInt8

from nucseg.gan.base import foreground, to_signed, to_uint8
from nucseg.gan.losses import area_of, centre_crop
from nucseg.gan.pyramid import PyramidSynthesizer
from nucseg.gan.pyramid_config import PyramidConfig
from nucseg.gan.scales import image_pyramid, mask_pyramid


class ScaleView(NamedTuple):
    """What goes into and comes out of one scale, beside the real patch (Fig. 5)."""

    mask: Float[np.ndarray, "h h"]  # m_n in {0, 1}
    noise: Float[np.ndarray, "h h 3"]  # z_n as it is added
    output: UInt8[np.ndarray, "h h 3"]  # y_n
    real: UInt8[np.ndarray, "h h 3"]  # x_n


@dataclass(frozen=True)
class CSinGANConfig(PyramidConfig):
    """Settings of CSinGAN: those of `PyramidConfig`, and the weights of Eq. 3.

    Attributes
    ----------
    beta, gamma, delta
        Weights of D_g, D_f and D_b. A critic of weight 0 is left out: ``gamma = delta = 0`` is Table II's "w/o CwD".
    """

    beta: float = 1.0
    gamma: float = 1.0
    delta: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        for name in ("beta", "gamma", "delta"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.beta == self.gamma == self.delta == 0:
            raise ValueError("beta, gamma and delta are all 0: no critic is left")


class CSinGAN(PyramidSynthesizer):
    """k1 conditional SinGANs with component-wise discriminators; see `Synthesizer` for the interface."""

    config: CSinGANConfig

    def weights(self) -> dict[str, float]:
        """Return beta, gamma and delta by region, without those that are 0."""
        c = self.config
        weights = {"global": c.beta, "foreground": c.gamma, "background": c.delta}
        return {region: weight for region, weight in weights.items() if weight > 0}

    @torch.no_grad()
    def views(
        self, i: int, image: UInt8[np.ndarray, "s s 3"], labels: Integer[np.ndarray, "s s"], seed: int = 0
    ) -> list[ScaleView]:
        """Return one `ScaleView` for each scale: label map `labels` painted in the look of patch i, beside the patch.

        Parameters
        ----------
        i
            Which patch's pyramid.
        image
            The real patch, shown beside the outputs.
        labels
            What to paint: its own label map or a synthetic one.
        seed
            Seeds the noise.
        """
        self._check_trained()
        sizes = self.config.sizes(self.size)
        draw = torch.Generator(self.device).manual_seed(seed)
        noise = [torch.randn(1, 3, s, s, generator=draw, device=self.device) for s in sizes]
        masks = mask_pyramid(foreground(labels[None], self.device), sizes)
        outputs = self.chain(i, len(sizes), masks, noise)
        reals = image_pyramid(to_signed(image[None], self.device), sizes)
        scaled = [self.amplitudes[n][i] * z for n, z in enumerate(noise)]
        return [
            ScaleView(m[0, 0].cpu().numpy(), z[0].movedim(0, -1).cpu().numpy(), to_uint8(y)[0], to_uint8(x)[0])
            for m, z, y, x in zip(masks, scaled, outputs, reals, strict=True)
        ]

    @torch.no_grad()
    def critic_maps(
        self, i: int, image: UInt8[np.ndarray, "s s 3"], labels: Integer[np.ndarray, "s s"]
    ) -> dict[str, Float[np.ndarray, "h w"]]:
        """Return each critic's map of an image at the finest scale, by region; NaN where it does not look.

        A map is smaller than the image by the critic's unpadded convolutions. Larger values: looks more real.
        """
        self._check_trained()
        x, mask, maps = to_signed(image[None], self.device), foreground(labels[None], self.device), {}
        for region, critic in self.critics[i].items():
            area = area_of(mask, region)
            out = critic(x if area is None else x * area)
            if area is not None:
                out = out.masked_fill(centre_crop(area, *out.shape[-2:]) == 0, float("nan"))
            maps[region] = out[0, 0].cpu().numpy()
        return maps
