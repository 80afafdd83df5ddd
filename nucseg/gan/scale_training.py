"""One step of one GAN at one scale, written so that k1 of them can be recorded in one CUDA graph (`parallel.py`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nucseg.gan.base import foreground, to_signed
from nucseg.gan.losses import critic_losses, generator_loss
from nucseg.gan.scales import image_pyramid, inputs_of, mask_pyramid, upsample, window

if TYPE_CHECKING:
    from nucseg.gan.pyramid import PyramidConfig, PyramidSynthesizer


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


class StepBuffers:
    """What changes from step to step, for all patches: refilled in place, since a recorded graph reads fixed places."""

    def __init__(self, data: TrainingData, n: int, config: PyramidConfig, terms: int, device: torch.device):
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


class ScaleTraining:
    """One GAN at one scale: its networks, its optimisers, and its step."""

    def __init__(
        self, owner: PyramidSynthesizer, n, i, data: TrainingData, buffers: StepBuffers, previous, generator, critics
    ):
        self.owner, self.n, self.i, self.data, self.buffers = owner, n, i, data, buffers
        self.config, self.weights = owner.config, owner.weights()
        self.generator, self.critics = generator, critics
        self.real = data.images[n][i : i + 1]
        self.real_mask = data.real_masks[n][i : i + 1]
        self.real_previous = previous
        self.real_noise = owner.amplitudes[n][i] * owner.reconstruction_noise(i, n, data.sizes[n])
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
            below = owner.chain(i, n, masks if owner.conditional else None, noise)[-1]
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
