"""A pyramid of generators trained scale by scale, for k1 patches at once (Sec. III-B, Eq. 2-4, Fig. 5).

CSinGAN and SinGAN are this pyramid with other settings: `csingan.py` conditions it on masks and judges it by three
critics, `singan.py` leaves both out.

    Eq. 2   y_0 = G_0([m_0, z_0]),   y_n = G_n([m_n, z_n + y_(n-1)])
    Eq. 3   L_ADV = beta Ladv(D_g; y, x) + gamma Ladv(D_f; y*m, x*r) + delta Ladv(D_b; y*(1-m), x*(1-r))
    Eq. 4   Ladv(D; y, x) = E[D(y)] - E[D(x)] + lambda E[(|grad D(x^)|_2 - 1)^2]

The critics minimise L_ADV; a generator minimises -E[D(y)] for each critic with the same weights, plus alpha L_REC.

Resolutions and deviations (REFERENCE section 3)
- Masking multiplies in [-1, 1] space and stays in the graph, so that each critic's gradient reaches the generator
  (A20; in the released code those of D_f and D_b cannot). A critic's map is averaged over the mask area, the mask
  centre-cropped to the map. Critics: LeakyReLU, linear output (A19).
- Noise at all scales in training and sampling (A23), none in the reconstruction (A22); gradient penalty per pixel over
  channels (A24); masks in {0, 1}, resized by nearest neighbour, padded with background (A21).
- Each step draws several masks (A18), and the real mask rides in the same batch: BatchNorm then has one set of
  statistics, which sampling can reuse. They are measured anew when a scale is finished.
- Within a step the generator runs once: its images do not change while the critics update.
- The learning rate falls at 80 % of a scale's steps, as in SinGAN (the released schedule ends before its decay).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from nucseg.gan.base import (
    Checkpoint,
    Progress,
    Synthesizer,
    check_losses,
    check_masks,
    check_pairs,
    foreground,
    to_signed,
    to_uint8,
)
from nucseg.gan.fast_conv import for_penalty
from nucseg.gan.networks import Critic, ScaleGenerator, initialise
from nucseg.gan.parallel import ParallelStep

REGIONS = ("global", "foreground", "background")  # D_g, D_f, D_b


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
        Train on random windows of this many pixels instead of whole images, one place for a whole batch; None: whole
        images. Receptive fields are 2 * `layers` + 1 pixels, so a window is a smaller sample of the same losses: for
        slow devices.
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
    noise_amplitude
        Noise at finer scales, in units of the RMSE between the real patch and the upsampled reconstruction.
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
    cuda_graph
        On CUDA, record the step of all GANs in one graph; False runs them eagerly, one after the other.
    deterministic, tf32
        On CUDA: only kernels that give the same result every time; 19-bit products in convolutions.
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
    d_steps: int = 3
    g_steps: int = 1
    lr: float = 5e-4
    betas: tuple[float, float] = (0.5, 0.999)
    decay_at: float = 0.8
    decay: float = 0.1
    alpha: float = 10.0
    lambda_: float = 0.1
    noise_amplitude: float = 0.1
    masked_average: bool = True
    min_area: float = 0.01
    calibration_steps: int = 10
    check_every: int = 100
    divergence_limit: float = 1e5
    cuda_graph: bool = True
    deterministic: bool = True
    tf32: bool = True
    generate_batch: int = 16

    def __post_init__(self):
        for name in ("scales", "channels", "max_channels", "steps", "masks_per_step", "g_steps", "check_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("d_steps", "calibration_steps", "generate_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("alpha", "lambda_", "noise_amplitude", "decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.layers < 2:
            raise ValueError(f"layers must be at least 2, got {self.layers}")
        if self.crop is not None and self.crop <= 2 * self.layers:
            raise ValueError(f"crop must exceed 2 * layers = {2 * self.layers}, got {self.crop}")
        if not self.lr > 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
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


# --------------------------------------------------------------------------- Eq. 3 and 4


def area_of(mask: Float[Tensor, "b 1 h w"] | None, region: str) -> Float[Tensor, "b 1 h w"] | None:
    """Return where the critic of `region` looks: m for nuclei, 1 - m for background, None for everywhere."""
    if region == "global":
        return None
    return mask if region == "foreground" else 1 - mask


def centre_crop(area: Float[Tensor, "b 1 h w"], height: int, width: int) -> Float[Tensor, "b 1 h2 w2"]:
    """Cut the centre of `height` x `width` that an unpadded network's map stands for."""
    top, left = (area.shape[-2] - height) // 2, (area.shape[-1] - width) // 2
    return area[..., top : top + height, left : left + width]


def score(
    critic: nn.Module, images: Float[Tensor, "b 3 h w"], area: Float[Tensor, "b 1 h w"] | None
) -> Float[Tensor, ""]:
    """E[D(images)]: the critic's map averaged over the area (0 where the area is empty)."""
    out = critic(images)
    if area is None:
        return out.mean()
    area = centre_crop(area, out.shape[-2], out.shape[-1])
    return (out * area).sum() / area.sum().clamp(min=1)


def gradient_penalty(
    critic: nn.Module,
    real: Float[Tensor, "1 3 h w"],
    fake: Float[Tensor, "b 3 h w"],
    mix: Float[Tensor, "b 1 1 1"],
) -> Float[Tensor, ""]:
    """E[(|grad D(x^)|_2 - 1)^2] at x^ = mix x + (1 - mix) y, the norm per pixel over channels (REFERENCE A24)."""
    between = (fake + mix * (real - fake)).detach().requires_grad_()
    with for_penalty():
        out = critic(between)
    (gradient,) = torch.autograd.grad(out.sum(), between, create_graph=True)
    # The root's derivative at 0 is infinite; 1e-12 keeps it finite and is far below any gradient met.
    return ((gradient.square().sum(1).add(1e-12).sqrt() - 1) ** 2).mean()


def critic_losses(
    critics: Mapping[str, nn.Module],
    weights: Mapping[str, float],
    real: Float[Tensor, "1 3 h w"],
    real_mask: Float[Tensor, "1 1 h w"] | None,
    fake: Float[Tensor, "b 3 h w"],
    fake_mask: Float[Tensor, "b 1 h w"] | None,
    mix: Float[Tensor, "b 1 1 1"],
    lambda_: float,
    masked_average: bool = True,
    min_area: float = 0.0,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]], Float[Tensor, ""]]:
    """L_ADV of Eq. 3, as the critics minimise it.

    Where real or fake masks leave a critic less than `min_area` of its images, it would see a constant: BatchNorm then
    divides by nothing and the penalty explodes. For that batch the critic takes the penalty on the unmasked images and
    makes no comparison.

    Returns
    -------
    loss
        The weighted sum.
    distances
        E[D(x)] - E[D(y)] of each critic, detached: its estimate of how far apart real and fake are.
    penalty
        Sum of the gradient penalties, detached.
    """
    fake = fake.detach()
    loss, penalty, distances = 0.0, 0.0, {}
    for name, critic in critics.items():
        x, y, enough = real, fake, 1.0
        x_area, y_area = area_of(real_mask, name), area_of(fake_mask, name)
        if x_area is not None:
            enough = (torch.minimum(x_area.mean(), y_area.mean()) >= min_area).float()
            x_area, y_area = torch.maximum(x_area, 1 - enough), torch.maximum(y_area, 1 - enough)
            x, y = x * x_area, y * y_area
        if not masked_average:
            x_area = y_area = None
        distance = enough * (score(critic, x, x_area) - score(critic, y, y_area))
        gp = gradient_penalty(critic, x, y, mix)
        loss = loss + weights[name] * (lambda_ * gp - distance)
        distances[name] = distance.detach()
        penalty = penalty + gp.detach()
    return loss, distances, penalty


def generator_loss(
    critics: Mapping[str, nn.Module],
    weights: Mapping[str, float],
    fake: Float[Tensor, "b 3 h w"],
    fake_mask: Float[Tensor, "b 1 h w"] | None,
    masked_average: bool = True,
    min_area: float = 0.0,
) -> Float[Tensor, ""]:
    """-beta E[D_g(y)] - gamma E[D_f(y*m)] - delta E[D_b(y*(1-m))]: the adversarial part of a generator's loss."""
    loss = fake.new_zeros(())
    for name, critic in critics.items():
        area = area_of(fake_mask, name)
        if area is None:
            loss = loss - weights[name] * score(critic, fake, None)
        else:
            enough = (area.mean() >= min_area).float()
            loss = loss - weights[name] * enough * score(critic, fake * area, area if masked_average else None)
    return loss


# --------------------------------------------------------------------------- images and masks at every scale


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


# --------------------------------------------------------------------------- training


class PyramidSynthesizer(Synthesizer):
    """k1 pyramids of generators, one for each patch, trained side by side.

    Attributes
    ----------
    generators
        ``generators[n][i]``: G_n of patch i, frozen once its scale is finished.
    critics
        ``critics[i]``: the critics of patch i at the last finished scale, by region.
    amplitudes
        ``amplitudes[n]``: (k1,) noise amplitude at scale n.
    """

    conditional = True  # are masks an input?
    fixed_noise = False  # is there noise in the reconstruction (z* of SinGAN)?

    def __init__(self, config: PyramidConfig, device: torch.device):
        super().__init__(config, device)
        self.size = 0
        self.seed = 0
        self.generators: list[list[ScaleGenerator]] = []
        self.critics: list[nn.ModuleDict] = []
        self.amplitudes: list[Tensor] = []
        self.fixed: Tensor | None = None  # (k1, 3, h, h) z* at the coarsest scale
        self.terms = (*(f"distance_{name}" for name in self.weights()), "penalty", "adversarial", "reconstruction")

    def weights(self) -> dict[str, float]:
        """Weight of each critic; one whose weight is zero is left out and costs nothing."""
        return {"global": 1.0}

    # -- interface

    def fit(self, pairs, masks, seed=0, progress: Progress | None = None, checkpoint: Checkpoint | None = None):
        images, labels = check_pairs(pairs)
        k1, size = images.shape[0], images.shape[1]
        check_masks(masks, k1, size)
        sizes = self.config.sizes(size)
        if self.generators and (self.size, self.seed, len(self.generators[0])) != (size, seed, k1):
            raise ValueError(
                f"this state was trained on {len(self.generators[0])} patches of {self.size} px with seed {self.seed}; "
                f"cannot go on with {k1} patches of {size} px and seed {seed}"
            )
        self.size, self.seed = size, seed
        with torch.backends.cudnn.flags(
            enabled=True, benchmark=False, deterministic=self.config.deterministic, allow_tf32=self.config.tf32
        ):
            data = _Data(images, labels, masks, sizes, self.device)
            for n in range(len(self.generators), len(sizes)):
                self._train_scale(n, data, progress)
                if checkpoint is not None:
                    checkpoint(self.to_tensors())
        return self

    def generate(self, masks, seed=0):
        self._check_trained()
        check_masks(masks, len(self.generators[0]), self.size)
        return np.stack([self._generate_patch(i, masks[i], seed) for i in range(len(masks))])

    @torch.no_grad()
    def _generate_patch(self, i: int, masks: np.ndarray, seed: int) -> UInt8[np.ndarray, "count s s 3"]:
        draw = torch.Generator(self.device).manual_seed(_seed(seed, i, 1))
        images = []
        for start in range(0, len(masks), self.config.generate_batch):
            batch = foreground(masks[start : start + self.config.generate_batch], self.device)
            images.append(to_uint8(self.sample(i, batch, draw)[-1]))
        return np.concatenate(images)

    @torch.no_grad()
    def sample(self, i: int, masks: Float[Tensor, "b 1 s s"], draw: torch.Generator) -> list[Float[Tensor, "b 3 h h"]]:
        """Return the images of every scale for `masks` in the look of patch i, noise at all scales."""
        sizes = self.config.sizes(self.size)
        noise = [torch.randn(len(masks), 3, s, s, generator=draw, device=self.device) for s in sizes]
        return self._chain(i, len(sizes), mask_pyramid(masks, sizes) if self.conditional else None, noise)

    @torch.no_grad()
    def reconstruct(self, i: int, mask: Float[Tensor, "1 1 s s"]) -> list[Float[Tensor, "1 3 h h"]]:
        """Return the images of every scale for the patch's own mask, without noise (REFERENCE A22)."""
        sizes = self.config.sizes(self.size)
        scales = len(self.generators)
        noise = [self._rec_noise(i, n, sizes[n]) for n in range(scales)]
        return self._chain(i, scales, mask_pyramid(mask, sizes) if self.conditional else None, noise)

    def _chain(
        self, i: int, scales: int, masks: list[Tensor] | None, noise: list[Tensor], start: int = 0, below=None
    ) -> list[Tensor]:
        """Eq. 2 from scale `start` to `scales` - 1 with finished generators; `below` is the image before `start`."""
        images = [] if below is None else [below]
        for n in range(start, scales):
            previous = upsample(images[-1], noise[n].shape[-1]) if images else None
            mask = None if masks is None else masks[n]
            images.append(paint(self.generators[n][i], mask, self.amplitudes[n][i] * noise[n], previous))
        return images if below is None else images[1:]

    def _rec_noise(self, i: int, n: int, size: int) -> Tensor:
        if n == 0 and self.fixed is not None:
            return self.fixed[i : i + 1]
        return torch.zeros(1, 3, size, size, device=self.device)

    def _check_trained(self) -> None:
        if not self.generators or len(self.generators) != self.config.scales:
            raise RuntimeError(f"{type(self).__name__}: {len(self.generators)} scales are trained; call fit first")

    # -- one scale

    def _train_scale(self, n: int, data: _Data, progress: Progress | None) -> None:
        config, k1 = self.config, data.k1
        draw = torch.Generator(self.device).manual_seed(_seed(self.seed, n, 0))
        init = torch.Generator().manual_seed(_seed(self.seed, n, 2))
        if n == 0 and self.fixed_noise:
            self.fixed = torch.randn(k1, 3, data.sizes[0], data.sizes[0], generator=init).to(self.device)
        generators, critics = self._new_networks(n, k1, init)
        with torch.no_grad():
            previous = [self._previous_reconstruction(i, n, data) for i in range(k1)]
            amplitude = torch.ones(k1, device=self.device)
            if n:
                error = torch.cat(previous) - data.images[n]
                amplitude = config.noise_amplitude * error.square().mean((1, 2, 3)).sqrt()
        self.amplitudes.append(amplitude)

        buffers = _Buffers(data, n, config, len(self.terms), self.device)
        trainings = [_Training(self, n, i, data, buffers, previous[i], generators[i], critics[i]) for i in range(k1)]
        losses = torch.zeros(config.steps, k1, len(self.terms), device=self.device)
        decay_step, checked = round(config.decay_at * config.steps), 0
        with ParallelStep([t.step for t in trainings], self.device, config.cuda_graph) as step_all:
            for step in range(config.steps):
                if step == decay_step:
                    for training in trainings:
                        training.scale_learning_rate(config.decay)
                buffers.refill(draw)
                step_all()
                losses[step].copy_(buffers.losses)
                last = step + 1 == config.steps
                if (step + 1) % config.check_every == 0 or last:
                    check_losses(losses[checked : step + 1], config.divergence_limit, type(self).__name__, n, checked)
                    checked = step + 1
                if progress is not None and ((step + 1) % max(1, config.steps // 50) == 0 or last):
                    text = f"{type(self).__name__} scale {n + 1}/{config.scales}, {data.sizes[n]} px, {k1} patches"
                    progress(n * config.steps + step + 1, config.scales * config.steps, text)

        for training in trainings:
            training.calibrate(draw)
        for net in generators:
            net.eval().requires_grad_(False)
        self.generators.append(generators)
        self.critics = critics
        self.history.append(losses.cpu())

    def _new_networks(self, n: int, k1: int, init: torch.Generator) -> tuple[list[ScaleGenerator], list[nn.ModuleDict]]:
        """Make the networks of scale n; they start from those of the scale before where the widths agree."""
        generators, critics = self._make_networks(n, k1)
        inherit = n > 0 and self.config.width(n) == self.config.width(n - 1)
        for i in range(k1):
            if inherit:
                generators[i].load_state_dict(self.generators[n - 1][i].state_dict())
                critics[i].load_state_dict(self.critics[i].state_dict())
            else:
                initialise(generators[i], init)
                initialise(critics[i], init)
        return [g.to(self.device).train() for g in generators], [c.to(self.device).train() for c in critics]

    def _make_networks(self, n: int, k1: int) -> tuple[list[ScaleGenerator], list[nn.ModuleDict]]:
        width, layers = self.config.width(n), self.config.layers
        with torch.random.fork_rng(devices=[]):  # constructors draw from the global generator
            generators = [ScaleGenerator(4 if self.conditional else 3, width, layers) for _ in range(k1)]
            critics = [nn.ModuleDict({r: Critic(width, layers) for r in self.weights()}) for _ in range(k1)]
        return generators, critics

    def _previous_reconstruction(self, i: int, n: int, data: _Data) -> Tensor | None:
        if n == 0:
            return None
        masks = [m[i : i + 1] for m in data.real_masks[:n]] if self.conditional else None
        noise = [self._rec_noise(i, j, data.sizes[j]) for j in range(n)]
        return upsample(self._chain(i, n, masks, noise)[-1], data.sizes[n])

    # -- state

    def to_tensors(self):
        """Return ``meta``, and for each finished scale generators (stacked over patches), amplitudes and losses.

        The critics of the last finished scale are kept too: the next scale starts from them.
        """
        if not self.generators:
            raise RuntimeError(f"{type(self).__name__}: nothing is trained yet; call fit first")
        tensors = {"meta": torch.tensor([self.size, len(self.generators[0]), self.seed, len(self.generators)])}
        for n, generators in enumerate(self.generators):
            for key, stacked in _stack(generators).items():
                tensors[f"scale{n}.generator.{key}"] = stacked
            tensors[f"scale{n}.amplitude"] = self.amplitudes[n].cpu()
            tensors[f"scale{n}.history"] = self.history[n]
        for key, stacked in _stack(self.critics).items():
            tensors[f"critic.{key}"] = stacked
        if self.fixed is not None:
            tensors["fixed"] = self.fixed.cpu()
        return tensors

    def from_tensors(self, tensors):
        if "meta" not in tensors:
            raise ValueError(f"{type(self).__name__}: not a state of to_tensors(): it has no 'meta'")
        self.size, k1, self.seed, scales = tensors["meta"].tolist()
        if scales > self.config.scales:
            raise ValueError(f"the state has {scales} scales, the configuration {self.config.scales}")
        self.generators, self.amplitudes, self.history, self.critics = [], [], [], []
        for n in range(scales):
            generators, critics = self._make_networks(n, k1)
            _unstack(generators, tensors, f"scale{n}.generator.")
            if n == scales - 1:
                _unstack(critics, tensors, "critic.")
                self.critics = [c.to(self.device) for c in critics]
            self.generators.append([g.to(self.device).eval().requires_grad_(False) for g in generators])
            self.amplitudes.append(tensors[f"scale{n}.amplitude"].to(self.device))
            self.history.append(tensors[f"scale{n}.history"].cpu())
        self.fixed = tensors["fixed"].to(self.device) if "fixed" in tensors else None
        return self


class _Data:
    """Patches and masks at every scale, resident on the device."""

    def __init__(self, images, labels, masks, sizes, device):
        self.k1, self.count, self.sizes = images.shape[0], masks.shape[1], sizes
        self.images = image_pyramid(to_signed(images, device), sizes)  # per scale (k1, 3, h, h)
        self.real_masks = mask_pyramid(foreground(labels, device), sizes)  # per scale (k1, 1, h, h)
        # per scale (k1, count, 1, h, h); a byte a pixel, because all masks of all patches stay on the device
        self.masks = [
            torch.stack([mask_pyramid(foreground(m, device), [size])[0].to(torch.uint8) for m in masks])
            for size in sizes
        ]


class _Buffers:
    """What changes from step to step, for all patches: refilled in place, since a recorded graph reads fixed places."""

    def __init__(self, data: _Data, n: int, config: PyramidConfig, terms: int, device: torch.device):
        k1, b = data.k1, config.masks_per_step
        self.count = data.count
        self.index = torch.zeros(k1, b, dtype=torch.int64, device=device)  # which masks
        self.noise = [torch.zeros(k1, b, 3, s, s, device=device) for s in data.sizes[: n + 1]]
        side = data.sizes[n]
        self.crop = config.crop if config.crop is not None and config.crop < side else None
        self.places = 1 if self.crop is None else side - self.crop + 1
        self.corner = torch.zeros(k1, 2, dtype=torch.int64, device=device)  # of the window
        self.mix = torch.zeros(k1, config.d_steps, b, 1, 1, 1, device=device)  # where x^ lies
        self.losses = torch.zeros(k1, terms, device=device)

    def refill(self, draw: torch.Generator) -> None:
        self.index.random_(0, self.count, generator=draw)
        for noise in self.noise:
            noise.normal_(generator=draw)
        self.mix.uniform_(generator=draw)
        if self.crop is not None:
            self.corner.random_(0, self.places, generator=draw)


class _Training:
    """One GAN at one scale: its networks, its optimisers, and its step."""

    def __init__(self, owner: PyramidSynthesizer, n, i, data: _Data, buffers: _Buffers, previous, generator, critics):
        self.owner, self.n, self.i, self.data, self.buffers = owner, n, i, data, buffers
        self.config, self.weights = owner.config, owner.weights()
        self.generator, self.critics = generator, critics
        self.real = data.images[n][i : i + 1]
        self.real_mask = data.real_masks[n][i : i + 1]
        self.real_previous = previous
        self.real_noise = owner.amplitudes[n][i] * owner._rec_noise(i, n, data.sizes[n])
        self.optimizer_g = self._adam(generator)
        self.optimizer_d = self._adam(critics)

    def _adam(self, net: nn.Module) -> torch.optim.Adam:
        cuda = self.real.device.type == "cuda"
        # A recorded graph reads the learning rate from where it is: a tensor on the device.
        lr = torch.tensor(self.config.lr, device=self.real.device) if cuda else self.config.lr
        return torch.optim.Adam(net.parameters(), lr=lr, betas=self.config.betas, fused=True, capturable=cuda)

    def scale_learning_rate(self, factor: float) -> None:
        for optimizer in (self.optimizer_g, self.optimizer_d):
            for group in optimizer.param_groups:
                group["lr"] *= factor  # in place where it is a tensor

    def step(self) -> None:
        """`d_steps` updates of the critics, then `g_steps` of the generator; nothing waits for the device."""
        config, critics, weights = self.config, self.critics, self.weights
        inputs, previous, mask = self._batch()
        real, real_mask = self._cut(self.real), self._cut(self.real_mask)
        both = self.generator(inputs) + previous
        for d in range(config.d_steps):
            loss, distances, penalty = critic_losses(
                critics, weights, real, real_mask, both[:-1], mask, self.buffers.mix[self.i, d],
                config.lambda_, config.masked_average, config.min_area,
            )  # fmt: skip
            _update(self.optimizer_d, loss, critics)
        critics.requires_grad_(False)  # spares their weights' gradients, which nobody wants here
        for g in range(config.g_steps):
            if g:
                both = self.generator(inputs) + previous
            adversarial = generator_loss(critics, weights, both[:-1], mask, config.masked_average, config.min_area)
            reconstruction = F.mse_loss(both[-1:], real)
            _update(self.optimizer_g, adversarial + config.alpha * reconstruction, self.generator)
        critics.requires_grad_(True)
        row = [*distances.values(), penalty, adversarial.detach(), reconstruction.detach()]
        self.buffers.losses[self.i].copy_(torch.stack(row))

    @torch.no_grad()
    def _batch(self, crop: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """Paint the drawn synthetic masks with the finished scales; the real mask and its reconstruction come last.

        Returns the generator's padded inputs and the previous images, (b + 1, ...), and the synthetic masks, (b, ...).
        """
        n, i, owner = self.n, self.i, self.owner
        masks = [self.data.masks[j][i].index_select(0, self.buffers.index[i]).float() for j in range(n + 1)]
        noise = [z[i] for z in self.buffers.noise]
        here = torch.cat([owner.amplitudes[n][i] * noise[n], self.real_noise])
        previous = None
        if n:
            below = owner._chain(i, n, masks if owner.conditional else None, noise)[-1]
            previous = torch.cat([upsample(below, self.data.sizes[n]), self.real_previous])
        mask = torch.cat([masks[n], self.real_mask]) if owner.conditional else None
        inputs = self.generator.pad(inputs_of(mask, here, previous))
        if previous is None:
            previous = torch.zeros_like(here)
        if crop:
            return self._cut(inputs, self.config.layers), self._cut(previous), self._cut(masks[n])
        return inputs, previous, masks[n]

    def _cut(self, images: Tensor, margin: int = 0) -> Tensor:
        """Cut this step's window out of images that have `margin` more pixels on each side."""
        if self.buffers.crop is None:
            return images
        return window(images, self.buffers.corner[self.i], self.buffers.crop + 2 * margin)

    @torch.no_grad()
    def calibrate(self, draw: torch.Generator) -> None:
        """Measure the generator's BatchNorm statistics over fresh batches, with its final weights."""
        norms = [m for m in self.generator.modules() if isinstance(m, nn.BatchNorm2d)]
        momenta = [m.momentum for m in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain average over batches
        for _ in range(self.config.calibration_steps):
            self.buffers.refill(draw)
            self.generator(self._batch(crop=False)[0])
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def _update(optimizer: torch.optim.Optimizer, loss: Tensor, net: nn.Module) -> None:
    # autograd.grad, not backward(): it accumulates nothing, and a recorded graph needs no zeroing.
    parameters = list(net.parameters())
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = gradient
    optimizer.step()


def _seed(seed: int, *path: int) -> int:
    """One 63-bit seed for each place in the training, all different."""
    return int(np.random.SeedSequence([seed, *path]).generate_state(1, np.uint64)[0] >> 1)


def _stack(nets: Sequence[nn.Module]) -> dict[str, Tensor]:
    states = [net.state_dict() for net in nets]
    return {key: torch.stack([state[key] for state in states]).cpu() for key in states[0]}


def _unstack(nets: Sequence[nn.Module], tensors: Mapping[str, Tensor], prefix: str) -> None:
    own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    for i, net in enumerate(nets):
        net.load_state_dict({key: value[i] for key, value in own.items()})
