"""Settings of the pyramids of generators (`pyramid.py`)."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class PyramidConfig:
    """Settings that CSinGAN and SinGAN share; defaults are CSinGAN's (REFERENCE 2.3 and A16-A26).

    Attributes
    ----------
    scales, min_size
        Number of scales, and the coarsest one's side in pixels (None: half the patch). Sides in between are
        geometric, rounded up: 128, 153, 182, 216, 256 for a patch of 256 (A17).
    channels, max_channels, layers
        Width at the coarsest scale, doubled every 4 scales up to `max_channels`; convolutions in each network.
    steps
        Generator steps per scale (A18).
    masks_per_step
        Synthetic masks in one batch.
    crop
        Train on random windows of this many pixels instead of whole images; None: whole images. Receptive fields are
        2 * `layers` + 1 pixels, so a window is a smaller sample of the same losses: for slow devices.
    crop_on_nuclei
        Share of the windows, real and synthetic alike, that are put on a nucleus; the others fall anywhere. In sparse
        tissue few windows would hold one.
    d_steps, g_steps
        Updates of the critics and of the generator in one step (A25).
    lr, betas
        Adam, for generators and critics.
    decay_at, decay
        After this share of a scale's steps the learning rate is multiplied by `decay`.
    alpha
        Weight of L_REC (A16).
    lambda_
        Weight of the gradient penalty in Eq. 4.
    penalty_every
        Of a step's critic updates only every so many take the gradient penalty, with a weight that makes up for the
        others: two thirds of an update's time go into it. 1, as in the paper: all.
    noise_amplitude
        Noise at finer scales, in units of the RMSE between the real patch and the upsampled reconstruction.
    coarse_noise
        Noise at the coarsest scale (1 in the released code and SinGAN).
    reconstruction_noise
        Share of the noise, at all scales, from which the real pair is reconstructed in training; 0, as in the paper
        (A22): none. The critics' BatchNorm hides colour and contrast from them, so that only L_REC holds those, and
        without noise it holds them for images without noise alone: a short training then paints what it is shown in
        colours of its own.
    masked_average
        Average a critic's map over its mask area (A20); False: over all positions.
    min_area
        A critic of nuclei or background compares nothing in a batch where it has less than this share of the image.
    calibration_steps
        Batches over which the generators' BatchNorm statistics are measured when a scale is finished.
    check_every
        Steps between two looks at the losses (each waits for the device once).
    divergence_limit
        A loss term beyond this counts as diverged.
    restart_lr
        A patch whose training diverges repeats the scale once, from its start, with `lr` times this.
    cuda_graph
        On CUDA, record the step of all GANs in one graph; False runs them eagerly, one after the other.
    deterministic, benchmark, tf32
        On CUDA: only convolution kernels that give the same result every time; time the kernels on first use and keep
        the fastest (of the deterministic ones, if only those are allowed), though another run may then choose others,
        and round otherwise; 19-bit products in convolutions.
    generate_batch
        Masks painted at once in `generate`.
    """

    scales: int = 5
    min_size: int | None = None
    channels: int = 32
    max_channels: int = 128
    layers: int = 5
    steps: int = 2000
    masks_per_step: int = 4
    crop: int | None = None
    crop_on_nuclei: float = 0.5
    d_steps: int = 3
    g_steps: int = 1
    lr: float = 5e-4
    betas: tuple[float, float] = (0.5, 0.999)
    decay_at: float = 0.8
    decay: float = 0.1
    alpha: float = 10.0
    lambda_: float = 0.1
    penalty_every: int = 1
    noise_amplitude: float = 0.1
    coarse_noise: float = 1.0
    reconstruction_noise: float = 0.0
    masked_average: bool = True
    min_area: float = 0.01
    calibration_steps: int = 10
    check_every: int = 100
    divergence_limit: float = 1e8
    restart_lr: float = 0.3
    cuda_graph: bool = True
    deterministic: bool = True
    benchmark: bool = False
    tf32: bool = True
    generate_batch: int = 16

    def __post_init__(self):
        for name in ("scales", "channels", "max_channels", "steps", "masks_per_step", "g_steps", "check_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("d_steps", "penalty_every", "calibration_steps", "generate_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("alpha", "lambda_", "noise_amplitude", "coarse_noise", "reconstruction_noise", "decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.layers < 2:
            raise ValueError(f"layers must be at least 2, got {self.layers}")
        if self.crop is not None and self.crop <= 2 * self.layers:
            raise ValueError(f"crop must exceed 2 * layers = {2 * self.layers}, got {self.crop}")
        if not 0 <= self.crop_on_nuclei <= 1:
            raise ValueError(f"crop_on_nuclei must be in [0, 1], got {self.crop_on_nuclei}")
        if not self.lr > 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        if not 0 < self.restart_lr < 1:
            raise ValueError(f"restart_lr must be in (0, 1), got {self.restart_lr}")
        if not 0 < self.decay_at <= 1:
            raise ValueError(f"decay_at must be in (0, 1], got {self.decay_at}")
        if self.min_size is not None and self.min_size <= 2 * self.layers:
            raise ValueError(f"min_size must exceed 2 * layers = {2 * self.layers}, got {self.min_size}")

    def sizes(self, size: int) -> tuple[int, ...]:
        """Sides of the images at every scale, coarsest first, for patches of `size` pixels."""
        low = self.min_size if self.min_size is not None else size // 2
        if self.scales == 1:
            return (size,)
        if not 2 * self.layers < low < size:
            raise ValueError(
                f"patches of {size} px cannot have {self.scales} scales from {low} px with {self.layers} layers: "
                f"min_size must be above {2 * self.layers} and below {size}"
            )
        ratio = (size / low) ** (1 / (self.scales - 1))
        return (*(math.ceil(round(low * ratio**n, 6)) for n in range(self.scales - 1)), size)

    def width(self, scale: int) -> int:
        """Channels of the networks at one scale."""
        return min(self.channels * 2 ** (scale // 4), self.max_channels)
