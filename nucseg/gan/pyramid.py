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
- Noise at all scales in training and sampling (A23), none in the reconstruction (A22) unless `reconstruction_noise`
  asks for it; SinGAN's is drawn once for a patch, the original's anew in every epoch; gradient penalty per pixel over
  channels (A24); masks in {0, 1}, resized by nearest neighbour, padded with background (A21).
- A critic's BatchNorm normalises real and synthetic images each by their own statistics, as in the released code, which
  hides their mean colour and contrast from it. One batch for both was tried, and in short trainings was worse.
- Each step draws several masks (A18), and the real mask rides in the same batch: BatchNorm then has one set of
  statistics, which sampling can reuse. They are measured anew when a scale is finished.
- Within a step the generator runs once: its images do not change while the critics update.
- A patch whose training diverges repeats the scale once, from its start, at a lower learning rate, while the others go
  on. If it diverges again, this scale only enlarges the image of the one before; at the coarsest scale, where there is
  none, the patch is left out. Either is warned of and recorded in `divergences`.
- The learning rate falls at 80 % of a scale's steps, as in SinGAN (the released schedule ends before its decay).
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from nucseg.gan.base import (
    Checkpoint,
    Progress,
    Synthesizer,
    check_masks,
    check_pairs,
    foreground,
    to_uint8,
)
from nucseg.gan.divergence import Divergence, DivergenceError, DivergenceWarning, first_divergences
from nucseg.gan.networks import Critic, ScaleGenerator, initialise
from nucseg.gan.parallel import ParallelStep
from nucseg.gan.pyramid_config import PyramidConfig
from nucseg.gan.scale_training import Below, ScaleTraining, StepBuffers, TrainingData
from nucseg.gan.scales import mask_pyramid, paint, upsample


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
        with self.kernels():
            data = TrainingData(images, labels, masks, sizes, self.device)
            for n in range(len(self.generators), len(sizes)):
                self._train_scale(n, data, progress)
                if checkpoint is not None:
                    checkpoint(self.to_tensors())
        return self

    def kernels(self) -> contextlib.AbstractContextManager:
        """Choose the convolution kernels of a training, as `config` says."""
        return torch.backends.cudnn.flags(
            enabled=True,
            benchmark=self.config.benchmark,  # the steps before a recording choose the kernels that it uses
            deterministic=self.config.deterministic,
            allow_tf32=self.config.tf32,
        )

    def generate(self, masks, seed=0):
        self._check_trained()
        check_masks(masks, len(self.generators[0]), self.size)
        painted = [
            np.zeros((*m.shape, 3), np.uint8) if i in self.left_out else self._generate_patch(i, m, seed)
            for i, m in enumerate(masks)
        ]
        return np.stack(painted)

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
        init = torch.Generator().manual_seed(_seed(self.seed, n, 2))
        if n == 0 and self.fixed_noise:
            self.fixed = torch.randn(k1, 3, data.sizes[0], data.sizes[0], generator=init).to(self.device)
        generators, critics = self._new_networks(n, k1, init)
        below = self._below(n, data)
        self.amplitudes.append(torch.stack([b.amplitude for b in below]))
        patches = [i for i in range(k1) if i not in self.left_out]
        losses = torch.full((config.steps, k1, len(self.terms)), float("nan"))

        def train(patches: list[int], lr: float, attempt: int) -> set[int]:
            buffers = StepBuffers(data, n, config, len(self.terms), self.device)
            trainings = {
                i: ScaleTraining(config, self.weights(), n, i, data, buffers, below[i], generators[i], critics[i], lr,
                                 self.conditional)
                for i in patches
            }  # fmt: skip
            draw = torch.Generator(self.device).manual_seed(_seed(self.seed, n, 3 * attempt))
            ours, found = self._run(n, trainings, buffers, draw, progress)
            losses[:, patches] = ours[:, patches]
            outcome = "restarted" if not attempt else "skipped" if n else "left out"
            for i, (step, term, value) in found.items():
                name = self.terms[term] if term < len(self.terms) else "weights"
                divergence = Divergence(i, n, step, name, value, outcome)
                self.divergences.append(divergence)
                warnings.warn(f"{type(self).__name__}: {divergence}", DivergenceWarning, stacklevel=4)
            for i in set(patches) - set(found):
                trainings[i].calibrate(draw)
            return set(found)

        # The networks are independent of each other: one that diverges takes no other with it.
        for attempt, lr in enumerate((config.lr, config.lr * config.restart_lr)):
            diverged = sorted(train(patches, lr, attempt)) if patches else []
            if diverged:  # back to the scale's start
                fresh = self._new_networks(n, k1, torch.Generator().manual_seed(_seed(self.seed, n, 4 + attempt)))
                for i in diverged:
                    generators[i], critics[i] = fresh[0][i], fresh[1][i]
            patches = diverged
        for i in {*patches, *self.left_out}:
            generators[i].silence()
        if len(self.left_out) == k1:
            raise DivergenceError(f"{type(self).__name__}: every training diverged: {self.divergences[-1]}")
        for net in generators:
            net.eval().requires_grad_(False)
            net.zero_grad(set_to_none=True)  # gradients of a recorded step keep its memory
        self.generators.append(generators)
        self.critics = critics
        self.history.append(losses)

    def _run(
        self,
        n: int,
        trainings: dict[int, ScaleTraining],
        buffers: StepBuffers,
        draw: torch.Generator,
        progress: Progress | None,
    ) -> tuple[Tensor, dict[int, tuple[int, int, float]]]:
        """Train one scale; return the losses, (steps, k1, terms) on the CPU, and what diverged, by patch."""
        config, found, checked = self.config, {}, 0
        losses = torch.zeros(config.steps, *buffers.losses.shape, device=self.device)
        decay_step = round(config.decay_at * config.steps)
        steps = [training.step for training in trainings.values()]
        with ParallelStep(steps, self.device, config.cuda_graph) as step_all:
            for step in range(config.steps):
                if step == decay_step:
                    for training in trainings.values():
                        training.scale_learning_rate(config.decay)
                buffers.refill(draw)
                step_all()
                losses[step].copy_(buffers.losses)
                last = step + 1 == config.steps
                if (step + 1) % config.check_every == 0 or last:
                    new = first_divergences(losses[checked : step + 1], config.divergence_limit, checked)
                    found = {**new, **found}
                    for i in new:
                        trainings[i].stopped = True
                    checked = step + 1
                if progress is not None and ((step + 1) % max(1, config.steps // 50) == 0 or last):
                    text = (
                        f"{type(self).__name__} scale {n + 1}/{config.scales}, {buffers.side} px, {len(steps)} patches"
                    )
                    progress(n * config.steps + step + 1, config.scales * config.steps, text)
                if len(found) == len(trainings):
                    break
        # The last update comes after the last loss.
        finite = torch.stack([training.finite() for training in trainings.values()]).tolist()
        for i, fine in zip(trainings, finite, strict=True):
            if not fine:
                found.setdefault(i, (config.steps - 1, len(self.terms), float("nan")))
        return losses.cpu(), found

    @torch.no_grad()
    def _below(self, n: int, data: TrainingData) -> list[Below]:
        """Return what the finished scales hand to scale n, for each patch."""
        below = []
        for i in range(data.k1):
            noise = self.reconstruction_noise(i, n, data.sizes[n])
            amplitude, previous = torch.tensor(self.config.coarse_noise, device=self.device), None
            if n:
                masks = [m[i : i + 1] for m in data.real_masks[:n]] if self.conditional else None
                earlier = [self.reconstruction_noise(i, j, data.sizes[j]) for j in range(n)]
                previous = upsample(self.chain(i, n, masks, earlier)[-1], data.sizes[n])
                error = previous - data.images[n][i : i + 1]
                amplitude = self.config.noise_amplitude * error.square().mean().sqrt()
            paint = functools.partial(lambda i, masks, noise: self.chain(i, n, masks, noise)[-1], i)
            below.append(Below(amplitude, amplitude * noise, previous, paint))
        return below

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
        if self.divergences:
            names = (*self.terms, "weights")
            rows = [
                (d.patch, d.scale, d.step, names.index(d.term), d.value, d.OUTCOMES.index(d.outcome))
                for d in self.divergences
            ]
            tensors["divergences"] = torch.tensor(rows, dtype=torch.float64)
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
        names, rows = (*self.terms, "weights"), tensors["divergences"].tolist() if "divergences" in tensors else []
        self.divergences = [
            Divergence(*map(int, row[:3]), names[int(row[3])], row[4], Divergence.OUTCOMES[int(row[5])]) for row in rows
        ]
        return self


def _seed(seed: int, *path: int) -> int:
    """One 63-bit seed for each place in the training, all different."""
    return int(np.random.SeedSequence([seed, *path]).generate_state(1, np.uint64)[0] >> 1)


def _stack(nets: Sequence[nn.Module]) -> dict[str, Tensor]:
    states = [net.state_dict() for net in nets]
    return {key: torch.stack([state[key] for state in states]).cpu().contiguous() for key in states[0]}


def _unstack(nets: Sequence[nn.Module], tensors: Mapping[str, Tensor], prefix: str) -> None:
    own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    for i, net in enumerate(nets):
        net.load_state_dict({key: value[i] for key, value in own.items()})
