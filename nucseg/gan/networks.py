"""Networks that the synthesisers share: SinGAN's generator and critic (Sec. III-B), and the PatchGAN."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nucseg.gan.fast_conv import FastConv2d
from nucseg.gan.fast_norm import NormReLU


class ScaleGenerator(nn.Module):
    """G_n of Eq. 2: `layers` blocks of convolution 3x3, BatchNorm, LeakyReLU; the last one is convolution and Tanh.

    The convolutions are unpadded and the input is padded once, by `layers` pixels of zero: background for the mask
    (REFERENCE A21), the middle of [-1, 1] for the image. What it returns is added to the image of the scale before.
    """

    def __init__(self, in_channels: int, channels: int, layers: int):
        super().__init__()
        blocks = []
        for i in range(layers - 1):
            blocks += [
                nn.Conv2d(in_channels if i == 0 else channels, channels, 3, bias=False),  # BatchNorm has the bias
                nn.BatchNorm2d(channels),
                nn.LeakyReLU(0.2),
            ]
        self.body = nn.Sequential(*blocks)
        self.tail = nn.Conv2d(channels, 3, 3)
        self.layers = layers

    def pad(self, inputs: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        """Add the margin that the unpadded convolutions use up."""
        return F.pad(inputs, [self.layers] * 4)

    @torch.no_grad()
    def silence(self) -> None:
        """Return zero from now on, so that the image of the scale before passes unchanged."""
        self.tail.weight.zero_()
        self.tail.bias.zero_()

    def forward(self, padded: Float[Tensor, "b c h2 w2"]) -> Float[Tensor, "b 3 h w"]:
        """Take an input that has its margin already: from `pad`, or cut out of a larger image."""
        return torch.tanh(self.tail(self.body(padded)))


class Critic(nn.Module):
    """D of Eq. 4: the generator's blocks on an image alone, with a linear one-channel map as output (REFERENCE A19).

    Unpadded: the map is 2 * `layers` pixels smaller than the image and stands for its centre. BatchNorm always uses the
    batch's own statistics, since a critic is never used outside training.
    """

    def __init__(self, channels: int, layers: int):
        super().__init__()
        blocks = []
        for i in range(layers - 1):
            blocks += [FastConv2d(3 if i == 0 else channels, channels, 3, bias=False), NormReLU(channels)]
        self.net = nn.Sequential(*blocks, FastConv2d(channels, 1, 3))

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 h2 w2"]:
        return self.net(images)


def initialise(net: nn.Module, generator: torch.Generator) -> None:
    """Draw the weights as SinGAN and pix2pix do: N(0, 0.02) for convolutions, N(1, 0.02) for normalisations."""
    norms = nn.BatchNorm2d | NormReLU
    for module in net.modules():
        weight = getattr(module, "weight", None)
        if weight is None or not isinstance(module, nn.Conv2d | nn.ConvTranspose2d | FastConv2d | norms):
            continue
        # Drawn on the CPU: one stream of numbers, whatever the device.
        mean = 1.0 if isinstance(module, norms) else 0.0
        with torch.no_grad():
            weight.copy_(mean + 0.02 * torch.randn(weight.shape, generator=generator))
            if module.bias is not None:
                module.bias.zero_()


class PatchDiscriminator(nn.Module):
    """PatchGAN of pix2pix and CycleGAN: convolutions 4x4, `layers` of them at stride 2; 3 give a 70-pixel field."""

    def __init__(self, in_channels: int, channels: int, layers: int, norm: type[nn.Module]):
        super().__init__()
        bias = norm is nn.InstanceNorm2d
        net = [nn.Conv2d(in_channels, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = channels
        for i in range(1, layers + 1):
            before, width = width, channels * min(2**i, 8)
            stride = 2 if i < layers else 1
            net += [nn.Conv2d(before, width, 4, stride=stride, padding=1, bias=bias), norm(width), nn.LeakyReLU(0.2)]
        self.net = nn.Sequential(*net, nn.Conv2d(width, 1, 4, padding=1))

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 h2 w2"]:
        return self.net(images)


class SeededDropout(nn.Module):
    """Dropout that draws from its own `draw` (a `torch.Generator`) and never from the global one.

    Always on: pix2pix keeps it when it generates, as its only source of variety.
    """

    def __init__(self, share: float):
        super().__init__()
        self.share = share
        self.draw: torch.Generator | None = None

    def forward(self, x: Tensor) -> Tensor:
        keep = torch.rand(x.shape, generator=self.draw, device=x.device) >= self.share
        return x * keep / (1 - self.share)
