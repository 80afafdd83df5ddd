"""What pix2pix and CycleGAN share: one network for all k1 patches, trained one patch a step with a falling rate."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nucseg.gan.base import Synthesizer, check_masks, check_pairs, foreground, to_signed, to_uint8
from nucseg.gan.divergence import check_losses
from nucseg.gan.networks import SeededDropout, initialise


@dataclass(frozen=True)
class TranslationConfig:
    """Settings that pix2pix and CycleGAN share; defaults are junyanz/pytorch-CycleGAN-and-pix2pix's (REFERENCE 5, A43).

    Attributes
    ----------
    epochs, decay_epochs
        Passes over the k1 patches at full learning rate, and passes during which it falls linearly to 0.
    lr, betas
        Adam.
    channels, critic_channels, critic_layers
        Width of the generators and of the PatchGANs, and the PatchGANs' depth.
    enlarge
        Patches are resized by this factor and cut back at random (286 / 256).
    flip
        Mirror half of them.
    check_every, divergence_limit
        Steps between two looks at the losses; a loss beyond the limit counts as diverged.
    """

    epochs: int = 100
    decay_epochs: int = 100
    lr: float = 2e-4
    betas: tuple[float, float] = (0.5, 0.999)
    channels: int = 64
    critic_channels: int = 64
    critic_layers: int = 3
    enlarge: float = 286 / 256
    flip: bool = True
    check_every: int = 100
    divergence_limit: float = 1e8

    def __post_init__(self):
        for name in ("epochs", "channels", "critic_channels", "critic_layers", "check_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.decay_epochs < 0:
            raise ValueError(f"decay_epochs must not be negative, got {self.decay_epochs}")
        if not self.lr > 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        if self.enlarge < 1:
            raise ValueError(f"enlarge must be at least 1, got {self.enlarge}")


class TranslationSynthesizer(Synthesizer):
    """A network from masks to images that all patches share.

    Attributes
    ----------
    nets
        All networks, by name; the generator that paints is ``nets["generator"]``.
    """

    config: TranslationConfig

    def __init__(self, config, device):
        super().__init__(config, device)
        self.size = 0
        self.nets: nn.ModuleDict = nn.ModuleDict()

    # -- what a subclass provides

    @abstractmethod
    def _make(self, size: int) -> dict[str, nn.Module]:
        """Return the untrained networks for patches of `size` pixels."""

    @abstractmethod
    def _groups(self) -> dict[str, list[str]]:
        """Return which networks share an optimiser."""

    @abstractmethod
    def _step(
        self, image: Float[Tensor, "1 3 s s"], mask: Float[Tensor, "1 1 s s"], optimizers, draw, other
    ) -> list[Tensor]:
        """Train one step; return the loss terms, detached. `other` is a random mask, real or synthetic."""

    # -- interface

    def fit(self, pairs, masks, seed=0, progress=None, checkpoint=None):
        if not self.nets:  # else from a finished state: there is one phase only
            # The same seed gives the same weights, on a GPU by kernels that add in a fixed order.
            with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=True):
                self._fit(pairs, masks, seed, progress, checkpoint)
        return self

    def _fit(self, pairs, masks, seed, progress, checkpoint):
        images, labels = check_pairs(pairs)
        k1, size = images.shape[0], images.shape[1]
        check_masks(masks, k1, size)
        config, init = self.config, torch.Generator().manual_seed(seed)
        draw = torch.Generator(self.device).manual_seed(seed + 1)
        self._set(size, init)
        self._draw_dropout_from(draw)
        real, real_masks = to_signed(images, self.device), 2 * foreground(labels, self.device) - 1
        every_mask = torch.cat([real_masks, 2 * foreground(masks.reshape(-1, size, size), self.device) - 1])
        optimizers = {
            group: torch.optim.Adam([p for n in names for p in self.nets[n].parameters()], config.lr, config.betas)
            for group, names in self._groups().items()
        }
        epochs = config.epochs + config.decay_epochs
        losses = torch.zeros(epochs * k1, 1, len(self.terms), device=self.device)
        rng, step, checked = np.random.default_rng(seed), 0, 0
        for epoch in range(epochs):
            share = min(1.0, (epochs - epoch) / (config.decay_epochs + 1))
            for optimizer in optimizers.values():
                optimizer.param_groups[0]["lr"] = config.lr * share
            for i in rng.permutation(k1):
                both = torch.cat([real[i : i + 1], real_masks[i : i + 1]], 1)
                both = augment(both, config.enlarge, config.flip, rng)
                j = rng.integers(len(every_mask))
                other = augment(every_mask[j : j + 1], config.enlarge, config.flip, rng)
                row = self._step(both[:, :3], both[:, 3:], optimizers, rng, other)
                losses[step, 0].copy_(torch.stack(row))
                step += 1
                if step % config.check_every == 0 or step == len(losses):
                    check_losses(
                        losses[checked:step], config.divergence_limit, type(self).__name__, checked, self.terms
                    )
                    checked = step
                if progress is not None and (step % max(1, len(losses) // 50) == 0 or step == len(losses)):
                    progress(step, len(losses), f"{type(self).__name__}, {size} px, {k1} patches")
        self.history = [losses.cpu()]
        if checkpoint is not None:
            checkpoint(self.to_tensors())

    @torch.no_grad()
    def generate(self, masks, seed=0):
        if not self.nets:
            raise RuntimeError(f"{type(self).__name__}: nothing is trained yet; call fit first")
        check_masks(masks, masks.shape[0], self.size)
        self._draw_dropout_from(torch.Generator(self.device).manual_seed(seed))
        signed = 2 * foreground(masks, self.device) - 1
        # One mask at a time and normalisation by the image's own statistics, as the original tests.
        flat = [to_uint8(self.paint(mask[None]))[0] for mask in signed.flatten(0, 1)]
        return np.stack(flat).reshape(*masks.shape, 3)

    def paint(self, mask: Float[Tensor, "1 1 s s"]) -> Float[Tensor, "1 3 s s"]:
        """Paint one mask in {-1, 1}."""
        return self.nets["generator"](mask)

    def to_tensors(self):
        if not self.nets:
            raise RuntimeError(f"{type(self).__name__}: nothing is trained yet; call fit first")
        state = {f"net.{key}": value.cpu().clone() for key, value in self.nets.state_dict().items()}
        return {"meta": torch.tensor([self.size]), "history": self.history[0], **state}

    def from_tensors(self, tensors):
        if "meta" not in tensors or "history" not in tensors:
            raise ValueError(f"{type(self).__name__}: not a state of to_tensors()")
        self._set(int(tensors["meta"][0]), torch.Generator().manual_seed(0))
        self.nets.load_state_dict({k.removeprefix("net."): v for k, v in tensors.items() if k.startswith("net.")})
        self.history = [tensors["history"].cpu()]
        return self

    def _set(self, size: int, init: torch.Generator) -> None:
        with torch.random.fork_rng(devices=[]):  # constructors draw from the global generator
            self.size, self.nets = size, nn.ModuleDict(self._make(size))
        initialise(self.nets, init)
        self.nets.to(self.device).train()

    def _draw_dropout_from(self, draw: torch.Generator) -> None:
        for module in self.nets.modules():
            if isinstance(module, SeededDropout):
                module.draw = draw


def augment(
    images: Float[Tensor, "1 c s s"], enlarge: float, flip: bool, rng: np.random.Generator
) -> Float[Tensor, "1 c s s"]:
    """Resize, cut a random window of the old size, mirror half of the time.

    The last channel is a mask and stays in {-1, 1} (nearest neighbour); colours before it are resized bicubically.
    """
    size = images.shape[-1]
    larger = round(size * enlarge)
    row, col = rng.integers(0, larger - size + 1, 2)
    if larger > size:
        parts = [F.interpolate(images[:, -1:], (larger, larger), mode="nearest-exact")]
        if images.shape[1] > 1:
            colour = F.interpolate(images[:, :-1], (larger, larger), mode="bicubic", align_corners=False)
            parts.insert(0, colour.clamp(-1, 1))
        images = torch.cat(parts, 1)[..., row : row + size, col : col + size]
    return images.flip(-1) if flip and rng.random() < 0.5 else images


def update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One optimiser step on `loss`, leaving no gradient on any other network."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = gradient
    optimizer.step()
