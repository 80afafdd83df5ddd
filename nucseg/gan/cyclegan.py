"""CycleGAN, a rival of Table II (Zhu et al. 2017; junyanz/pytorch-CycleGAN-and-pix2pix).

Two ResNet generators (masks to images and back) with instance normalisation, two PatchGANs with pools of past images,
least-squares GAN loss, cycle weight 10 each way, identity 0.5 of it. Unpaired: one domain is all masks, real and
synthetic, the other the k1 images; masks are repeated to three channels, as identity needs (REFERENCE section 5, A43).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nucseg.gan.networks import PatchDiscriminator
from nucseg.gan.translation import TranslationConfig, TranslationSynthesizer, update


@dataclass(frozen=True)
class CycleGANConfig(TranslationConfig):
    """Settings of CycleGAN.

    Attributes
    ----------
    blocks
        Residual blocks of each generator (9 for 256 pixels).
    cycle, identity
        Weight of the cycle loss, and of the identity loss as a share of it.
    pool
        Past fakes that a critic may be shown again.
    """

    blocks: int = 9
    cycle: float = 10.0
    identity: float = 0.5
    pool: int = 50

    def __post_init__(self):
        super().__post_init__()
        if self.blocks < 1:
            raise ValueError(f"blocks must be at least 1, got {self.blocks}")
        for name in ("cycle", "identity", "pool"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


class _Residual(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3), nn.InstanceNorm2d(channels), nn.ReLU(),
            nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3), nn.InstanceNorm2d(channels),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


class ResNetGenerator(nn.Module):
    """resnet_9blocks: 7x7 stem, two halvings, residual blocks, two doublings, 7x7 head with Tanh."""

    def __init__(self, channels: int, blocks: int):
        super().__init__()
        c = channels
        net = [nn.ReflectionPad2d(3), nn.Conv2d(3, c, 7), nn.InstanceNorm2d(c), nn.ReLU()]
        for width in (c, 2 * c):
            net += [nn.Conv2d(width, 2 * width, 3, 2, 1), nn.InstanceNorm2d(2 * width), nn.ReLU()]
        net += [_Residual(4 * c) for _ in range(blocks)]
        for width in (4 * c, 2 * c):
            net += [
                nn.ConvTranspose2d(width, width // 2, 3, 2, 1, output_padding=1),
                nn.InstanceNorm2d(width // 2),
                nn.ReLU(),
            ]
        self.net = nn.Sequential(*net, nn.ReflectionPad2d(3), nn.Conv2d(c, 3, 7), nn.Tanh())

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        return self.net(x)


class ImagePool:
    """The last fakes: each query returns the new one, or (half of the time) an old one that it replaces."""

    def __init__(self, size: int):
        self.size = size
        self.images: list[Tensor] = []

    def query(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        if len(self.images) < self.size:
            self.images.append(image)
            return image
        if self.size == 0 or rng.random() < 0.5:
            return image
        place = rng.integers(self.size)
        old, self.images[place] = self.images[place], image
        return old


class CycleGAN(TranslationSynthesizer):
    """One CycleGAN for all patches; see `Synthesizer` for the interface."""

    config: CycleGANConfig
    terms = ("critic_image", "critic_mask", "adversarial", "cycle", "identity")

    def __init__(self, config, device):
        super().__init__(config, device)
        self.pools = {"image": ImagePool(config.pool), "mask": ImagePool(config.pool)}

    def _make(self, size):
        c = self.config
        if size % 4:
            raise ValueError(f"cyclegan: the patch's side must be divisible by 4, got {size} px")
        nets = {name: ResNetGenerator(c.channels, c.blocks) for name in ("generator", "backward")}
        for name in ("critic_image", "critic_mask"):
            nets[name] = PatchDiscriminator(3, c.critic_channels, c.critic_layers, nn.InstanceNorm2d)
        return nets

    def _groups(self):
        return {"generators": ["generator", "backward"], "critics": ["critic_image", "critic_mask"]}

    def paint(self, mask):
        return self.nets["generator"](mask.repeat(1, 3, 1, 1))

    def _step(self, image, mask, optimizers, draw, other):
        # Unpaired on purpose: `other`, not the image's own mask.
        config, nets, mask = self.config, self.nets, other.repeat(1, 3, 1, 1)
        fake_image, fake_mask = nets["generator"](mask), nets["backward"](image)
        adversarial = _square(nets["critic_image"](fake_image), 1) + _square(nets["critic_mask"](fake_mask), 1)
        cycle = F.l1_loss(nets["backward"](fake_image), mask) + F.l1_loss(nets["generator"](fake_mask), image)
        identity = F.l1_loss(nets["generator"](image), image) + F.l1_loss(nets["backward"](mask), mask)
        update(optimizers["generators"], adversarial + config.cycle * (cycle + config.identity * identity))
        old_image = self.pools["image"].query(fake_image.detach(), draw)
        old_mask = self.pools["mask"].query(fake_mask.detach(), draw)
        on_image = 0.5 * (_square(nets["critic_image"](image), 1) + _square(nets["critic_image"](old_image), 0))
        on_mask = 0.5 * (_square(nets["critic_mask"](mask), 1) + _square(nets["critic_mask"](old_mask), 0))
        update(optimizers["critics"], on_image + on_mask)
        return [t.detach() for t in (on_image, on_mask, adversarial, cycle, identity)]


def _square(score: Tensor, target: int) -> Tensor:
    """Least-squares GAN loss."""
    return torch.mean((score - target) ** 2)
