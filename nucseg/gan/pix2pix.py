"""pix2pix, a rival of Table II (Isola et al. 2017; junyanz/pytorch-CycleGAN-and-pix2pix).

A U-Net with BatchNorm and dropout from mask to image, a PatchGAN on mask and image together, vanilla GAN loss plus
100 x L1, batch 1, 100 + 100 epochs over the k1 patches (REFERENCE section 5, A43). Dropout stays on when it generates.
Deviation: the mask is one channel in {-1, 1}; depth adapts to patches that 2^8 does not divide.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nucseg.gan.networks import PatchDiscriminator, SeededDropout
from nucseg.gan.translation import TranslationConfig, TranslationSynthesizer, update


@dataclass(frozen=True)
class Pix2PixConfig(TranslationConfig):
    """Settings of pix2pix.

    Attributes
    ----------
    depth
        Halvings in the U-Net, 8 for 256 pixels; fewer where the patch's side is not divisible so often.
    dropout
        Share of dropped features in the innermost decoder blocks.
    l1
        Weight of the L1 term.
    """

    depth: int = 8
    dropout: float = 0.5
    l1: float = 100.0

    def __post_init__(self):
        super().__post_init__()
        if self.depth < 2:
            raise ValueError(f"depth must be at least 2, got {self.depth}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")


class UNet(nn.Module):
    """unet_256 of pix2pix: `depth` halvings with skips; the three blocks around the innermost one have dropout."""

    def __init__(self, in_channels: int, channels: int, depth: int, dropout: float):
        super().__init__()
        widths = [channels * min(2**i, 8) for i in range(depth)]
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for i, width in enumerate(widths):
            layers = [] if i == 0 else [nn.LeakyReLU(0.2)]
            layers.append(nn.Conv2d(in_channels if i == 0 else widths[i - 1], width, 4, 2, 1, bias=False))
            if 0 < i < depth - 1:  # the outermost and the innermost have no norm
                layers.append(nn.BatchNorm2d(width))
            self.down.append(nn.Sequential(*layers))
        for i in reversed(range(depth)):
            before = widths[i] if i == depth - 1 else 2 * widths[i]
            if i == 0:
                self.up.append(nn.Sequential(nn.ReLU(), nn.ConvTranspose2d(before, 3, 4, 2, 1), nn.Tanh()))
                continue
            after = widths[i - 1]
            layers = [nn.ReLU(), nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False), nn.BatchNorm2d(after)]
            if 4 <= i < depth - 1:
                layers.append(SeededDropout(dropout))
            self.up.append(nn.Sequential(*layers))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 h w"]:
        skips = []
        for down in self.down:
            x = down(x)
            skips.append(x)
        x = self.up[0](skips.pop())
        for up in self.up[1:]:
            x = up(torch.cat([skips.pop(), x], 1))
        return x


class Pix2Pix(TranslationSynthesizer):
    """One pix2pix for all patches; see `Synthesizer` for the interface."""

    config: Pix2PixConfig
    terms = ("critic", "adversarial", "l1")

    def _make(self, size):
        c, depth = self.config, 0
        while depth < c.depth and size % 2 ** (depth + 1) == 0:
            depth += 1
        if depth < 2:
            raise ValueError(f"pix2pix: the patch's side must be divisible by 4, got {size} px")
        return {
            "generator": UNet(1, c.channels, depth, c.dropout),
            "critic": PatchDiscriminator(4, c.critic_channels, c.critic_layers, nn.BatchNorm2d),
        }

    def _groups(self):
        return {"generator": ["generator"], "critic": ["critic"]}

    def _step(self, image, mask, optimizers, draw, other):
        generator, critic = self.nets["generator"], self.nets["critic"]
        fake = generator(mask)
        on_fake, on_real = critic(torch.cat([mask, fake.detach()], 1)), critic(torch.cat([mask, image], 1))
        loss_d = 0.5 * (F.softplus(on_fake).mean() + F.softplus(-on_real).mean())  # binary cross-entropy on logits
        update(optimizers["critic"], loss_d)
        adversarial = F.softplus(-critic(torch.cat([mask, fake], 1))).mean()
        l1 = F.l1_loss(fake, image)
        update(optimizers["generator"], adversarial + self.config.l1 * l1)
        return [loss_d.detach(), adversarial.detach(), l1.detach()]
