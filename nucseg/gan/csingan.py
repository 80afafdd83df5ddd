"""CSinGAN: a conditional SinGAN with component-wise discriminators (Sec. III-B, Eq. 2-4, Fig. 5).

One pyramid of generators for each annotated patch, conditioned on masks, against three critics: D_g sees the whole
image, D_f its nuclei, D_b its background. The pyramid, the losses and every deviation are in `pyramid.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from nucseg.gan.pyramid import PyramidConfig, PyramidSynthesizer


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
