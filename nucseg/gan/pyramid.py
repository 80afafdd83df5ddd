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
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from nucseg.gan.base import (
    Checkpoint,
    Progress,
    Synthesizer,
    check_losses,
    check_masks,
    check_pairs,
    foreground,
    to_uint8,
)
from nucseg.gan.networks import Critic, ScaleGenerator, initialise
from nucseg.gan.parallel import ParallelStep
from nucseg.gan.scale_training import ScaleTraining, StepBuffers, TrainingData
from nucseg.gan.scales import mask_pyramid, paint, upsample


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
    coarse_noise
        Noise at the coarsest scale (1 in the released code and SinGAN). The reconstruction sees none, so the more noise
        there is, the less L_REC teaches about synthetic masks; a short training wants little.
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
    coarse_noise: float = 1.0
    masked_average: bool = True
    min_area: float = 0.01
    calibration_steps: int = 10
    check_every: int = 100
    divergence_limit: float = 1e8
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
        for name in ("alpha", "lambda_", "noise_amplitude", "coarse_noise", "decay"):
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
            data = TrainingData(images, labels, masks, sizes, self.device)
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
        return self.chain(i, len(sizes), mask_pyramid(masks, sizes) if self.conditional else None, noise)

    @torch.no_grad()
    def reconstruct(self, i: int, mask: Float[Tensor, "1 1 s s"]) -> list[Float[Tensor, "1 3 h h"]]:
        """Return the images of every scale for the patch's own mask, without noise (REFERENCE A22)."""
        sizes = self.config.sizes(self.size)
        scales = len(self.generators)
        noise = [self.reconstruction_noise(i, n, sizes[n]) for n in range(scales)]
        return self.chain(i, scales, mask_pyramid(mask, sizes) if self.conditional else None, noise)

    def chain(
        self, i: int, scales: int, masks: list[Tensor] | None, noise: list[Tensor], start: int = 0, below=None
    ) -> list[Tensor]:
        """Eq. 2 from scale `start` to `scales` - 1 with finished generators; `below` is the image before `start`."""
        images = [] if below is None else [below]
        for n in range(start, scales):
            previous = upsample(images[-1], noise[n].shape[-1]) if images else None
            mask = None if masks is None else masks[n]
            images.append(paint(self.generators[n][i], mask, self.amplitudes[n][i] * noise[n], previous))
        return images if below is None else images[1:]

    def reconstruction_noise(self, i: int, n: int, size: int) -> Tensor:
        if n == 0 and self.fixed is not None:
            return self.fixed[i : i + 1]
        return torch.zeros(1, 3, size, size, device=self.device)

    def _check_trained(self) -> None:
        if not self.generators or len(self.generators) != self.config.scales:
            raise RuntimeError(f"{type(self).__name__}: {len(self.generators)} scales are trained; call fit first")

    # -- one scale

    def _train_scale(self, n: int, data: TrainingData, progress: Progress | None) -> None:
        config, k1 = self.config, data.k1
        draw = torch.Generator(self.device).manual_seed(_seed(self.seed, n, 0))
        init = torch.Generator().manual_seed(_seed(self.seed, n, 2))
        if n == 0 and self.fixed_noise:
            self.fixed = torch.randn(k1, 3, data.sizes[0], data.sizes[0], generator=init).to(self.device)
        generators, critics = self._new_networks(n, k1, init)
        with torch.no_grad():
            previous = [self._previous_reconstruction(i, n, data) for i in range(k1)]
            amplitude = torch.full((k1,), config.coarse_noise, device=self.device)
            if n:
                error = torch.cat(previous) - data.images[n]
                amplitude = config.noise_amplitude * error.square().mean((1, 2, 3)).sqrt()
        self.amplitudes.append(amplitude)

        buffers = StepBuffers(data, n, config, len(self.terms), self.device)
        trainings = [
            ScaleTraining(self, n, i, data, buffers, previous[i], generators[i], critics[i]) for i in range(k1)
        ]
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

    def _previous_reconstruction(self, i: int, n: int, data: TrainingData) -> Tensor | None:
        if n == 0:
            return None
        masks = [m[i : i + 1] for m in data.real_masks[:n]] if self.conditional else None
        noise = [self.reconstruction_noise(i, j, data.sizes[j]) for j in range(n)]
        return upsample(self.chain(i, n, masks, noise)[-1], data.sizes[n])

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
