"""One step of one GAN at one scale, written so that k1 of them can be recorded in one CUDA graph (`parallel.py`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor, nn

from nucseg.gan.base import foreground, to_signed
from nucseg.gan.losses import critic_losses, generator_loss, views
from nucseg.gan.networks import ScaleGenerator
from nucseg.gan.pyramid_config import PyramidConfig
from nucseg.gan.scales import image_pyramid, inputs_of, mask_pyramid, upsample, window
from nucseg.kernels import available


class TrainingData:
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
        # where nuclei are, synthetic masks first and the real one last, in parts of a side: (k1, count + 1, places, 2)
        self.nuclei = torch.from_numpy(
            np.stack([[_places(m) for m in (*masks[i], labels[i])] for i in range(self.k1)])
        ).to(device)


def _places(mask: Integer[np.ndarray, "s s"], count: int = 64) -> Float[np.ndarray, "count 2"]:
    """Draw pixels of nuclei, or any pixels of a mask without nuclei; row and column in parts of a side."""
    rng = np.random.default_rng(0)
    places = np.argwhere(mask > 0) if mask.any() else np.argwhere(mask == 0)
    return ((places[rng.integers(len(places), size=count)] + 0.5) / len(mask)).astype(np.float32)


class StepBuffers:
    """What changes from step to step, for all patches: refilled in place, since a recorded graph reads fixed places."""

    def __init__(self, data: TrainingData, n: int, config: PyramidConfig, terms: int, device: torch.device):
        k1, b = data.k1, config.masks_per_step
        self.count = data.count
        self.index = torch.zeros(k1, b, dtype=torch.int64, device=device)  # which masks
        self.noise = [torch.zeros(k1, b, 3, s, s, device=device) for s in data.sizes[: n + 1]]
        self.side = side = data.sizes[n]
        self.crop = config.crop if config.crop is not None and config.crop < side else None
        self.nuclei, self.on_nuclei = data.nuclei, config.crop_on_nuclei
        # of the windows: one for each synthetic mask, and the real patch's last
        self.corner = torch.zeros(k1, b + 1, 2, dtype=torch.int64, device=device)
        self.mix = torch.zeros(k1, config.d_steps, b, 1, 1, 1, device=device)  # where x^ lies
        self.losses = torch.zeros(k1, terms, device=device)

    def refill(self, draw: torch.Generator) -> None:
        self.index.random_(0, self.count, generator=draw)
        for noise in self.noise:
            noise.normal_(generator=draw)
        self.mix.uniform_(generator=draw)
        if self.crop is not None:
            self._place_windows(draw)

    def _place_windows(self, draw: torch.Generator) -> None:
        """Put some of the windows anywhere, and the others where they hold a nucleus, not always at their centre."""
        k1, windows, _ = self.corner.shape
        places = self.side - self.crop + 1

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=draw, device=self.corner.device)

        last = self.index.new_full((k1, 1), self.count)
        which = torch.cat([self.index, last], 1), (uniform(k1, windows) * self.nuclei.shape[2]).long()
        patch = torch.arange(k1, device=self.corner.device).unsqueeze(1)
        nucleus = self.nuclei[patch, *which] * self.side
        near = nucleus - (0.2 + 0.6 * uniform(k1, windows, 2)) * self.crop
        anywhere = uniform(k1, windows, 2) * places
        corner = torch.where(uniform(k1, windows, 1) < self.on_nuclei, near, anywhere)
        self.corner.copy_(corner.long().clamp(0, places - 1))


@dataclass(frozen=True)
class Below:
    """What the finished scales of a patch hand to the one in training.

    Attributes
    ----------
    amplitude
        Scalar tensor: of this scale's noise.
    real_noise
        The noise of the reconstruction at this scale, (1, 3, h, h).
    real_previous
        The reconstruction of the scale before, enlarged, (1, 3, h, h); None at the coarsest scale.
    paint
        Masks (None if unconditional) and noise of every finished scale -> image of the last one.
    """

    amplitude: Float[Tensor, ""]
    real_noise: Float[Tensor, "1 3 h h"]
    real_previous: Float[Tensor, "1 3 h h"] | None
    paint: Callable[[list[Tensor] | None, list[Tensor]], Tensor]


class ScaleTraining:
    """One GAN at one scale: its networks, its optimisers, and its step.

    Parameters
    ----------
    config
        Settings.
    weights
        Weight of each critic of `critics`.
    n, i
        Scale and patch.
    data, buffers
        All patches' images and masks, and all patches' draws.
    below
        From the finished scales.
    generator, critics
        The networks to train.
    lr
        Learning rate of the first step.
    conditional
        Is the mask an input of the generator?
    """

    def __init__(
        self,
        config: PyramidConfig,
        weights: Mapping[str, float],
        n: int,
        i: int,
        data: TrainingData,
        buffers: StepBuffers,
        below: Below,
        generator: ScaleGenerator,
        critics: nn.ModuleDict,
        lr: float,
        conditional: bool,
    ):
        self.config, self.weights, self.n, self.i, self.data, self.buffers = config, weights, n, i, data, buffers
        self.below, self.generator, self.critics, self.conditional = below, generator, critics, conditional
        self.layout = _layout(data.images[n].device)
        for net in (generator, critics):
            net.to(memory_format=self.layout)
        self.real = data.images[n][i : i + 1]
        self.real_mask = data.real_masks[n][i : i + 1]
        self.optimizer_g = self._adam(generator, lr)
        self.optimizer_d = self._adam(critics, lr)
        self.stopped = False  # leaves the step out, where it is not recorded

    def _adam(self, net: nn.Module, lr: float) -> torch.optim.Adam:
        cuda = self.real.device.type == "cuda"
        # A recorded graph reads the learning rate from where it is: a tensor on the device.
        rate = torch.tensor(lr, device=self.real.device) if cuda else lr
        return torch.optim.Adam(net.parameters(), lr=rate, betas=self.config.betas, fused=True, capturable=cuda)

    def scale_learning_rate(self, factor: float) -> None:
        for optimizer in (self.optimizer_g, self.optimizer_d):
            for group in optimizer.param_groups:
                group["lr"] *= factor  # in place where it is a tensor

    def step(self) -> None:
        """`d_steps` updates of the critics, then `g_steps` of the generator; nothing waits for the device."""
        if self.stopped:
            return
        config, critics, weights = self.config, self.critics, self.weights
        inputs, previous, mask = self._batch()
        real, real_mask = self._cut(self.real, first=-1), self._cut(self.real_mask, first=-1)
        both, shown = self._paint(inputs, previous, mask, real, real_mask)
        penalised = range(0, config.d_steps, config.penalty_every)
        lambda_ = config.lambda_ * config.d_steps / len(penalised)
        for d in range(config.d_steps):
            mix = self.buffers.mix[self.i, d] if d in penalised else None
            loss, distances, gp = critic_losses(critics, weights, shown, lambda_, mix)
            if gp is not None:
                penalty = gp
            _update(self.optimizer_d, loss, critics)
        critics.requires_grad_(False)  # spares their weights' gradients, which nobody wants here
        for g in range(config.g_steps):
            if g:
                both, shown = self._paint(inputs, previous, mask, real, real_mask)
            adversarial = generator_loss(critics, weights, shown)
            reconstruction = F.mse_loss(both[-1:], real)
            _update(self.optimizer_g, adversarial + config.alpha * reconstruction, self.generator)
        critics.requires_grad_(True)
        row = [*distances.values(), penalty, adversarial.detach(), reconstruction.detach()]
        self.buffers.losses[self.i].copy_(torch.stack(row))

    def _paint(self, inputs, previous, mask, real, real_mask):
        """Paint the batch, and mask it for each critic."""
        config = self.config
        both = self.generator(inputs) + previous
        return both, views(
            self.weights, real, real_mask, both[:-1], mask, config.layers, config.masked_average, config.min_area
        )

    @torch.no_grad()
    def _batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """Paint the drawn synthetic masks with the finished scales; the real mask and its reconstruction come last.

        Returns the generator's padded inputs and the previous images, (b + 1, ...), and the synthetic masks, (b, ...).
        """
        n, i, below, share = self.n, self.i, self.below, self.config.reconstruction_noise
        masks = [self.data.masks[j][i].index_select(0, self.buffers.index[i]).float() for j in range(n + 1)]
        noise = [z[i] for z in self.buffers.noise]
        here = torch.cat([below.amplitude * noise[n], below.real_noise])
        earlier_masks, earlier_noise, previous = masks[:n], noise[:n], None
        if share:  # the reconstruction is painted from noise as well, that of the first mask
            here[-1] += share * here[0]
            earlier_masks = [torch.cat([m, self.data.real_masks[j][i : i + 1]]) for j, m in enumerate(earlier_masks)]
            earlier_noise = [torch.cat([z, share * z[:1]]) for z in earlier_noise]
        if n:
            painted = below.paint(earlier_masks if self.conditional else None, earlier_noise)
            previous = upsample(painted, self.data.sizes[n])
            previous = previous if share else torch.cat([previous, below.real_previous])
        mask = torch.cat([masks[n], self.real_mask]) if self.conditional else None
        inputs = self.generator.pad(inputs_of(mask, here, previous))
        if previous is None:
            previous = torch.zeros_like(here)
        return self._cut(inputs, self.config.layers), self._cut(previous), self._cut(masks[n])

    def _cut(self, images: Tensor, margin: int = 0, first: int = 0) -> Tensor:
        """Cut this step's windows out of images that have `margin` more pixels on each side.

        The images are those of the windows from `first` on: synthetic ones, then the real patch.
        """
        if self.buffers.crop is not None:
            corners, side = self.buffers.corner[self.i, first:], self.buffers.crop + 2 * margin
            images = torch.cat([window(images[k : k + 1], corners[k], side) for k in range(len(images))])
        return images.contiguous(memory_format=self.layout)

    @torch.no_grad()
    def finite(self) -> Tensor:
        """Are all weights of the generator and the critics finite? A scalar tensor on the device."""
        parameters = [*self.generator.parameters(), *self.critics.parameters()]
        return torch.stack([p.isfinite().all() for p in parameters]).all()

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
            self.generator(self._batch()[0])
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def _layout(device: torch.device) -> torch.memory_format:
    """What `nucseg.kernels` and a GPU's convolutions work in; elsewhere it gains nothing."""
    return torch.channels_last if available(device) else torch.contiguous_format


def _update(optimizer: torch.optim.Optimizer, loss: Tensor, net: nn.Module) -> None:
    # autograd.grad, not backward(): it accumulates nothing, and a recorded graph needs no zeroing.
    parameters = list(net.parameters())
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        # The fused optimiser wants both in one layout, and a convolution may choose its own.
        same = gradient.stride() == parameter.stride()
        parameter.grad = gradient if same else torch.empty_like(parameter).copy_(gradient)
    optimizer.step()
