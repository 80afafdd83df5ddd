"""The U-Net decoder over a pretrained encoder that our light segmenters share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import Function

from nucseg.kernels import usable
from nucseg.norm_act import NormAct


class Decoder(nn.ModuleList):
    """From the levels of an encoder to one map of features: enlarge, join the next finer level, two 3x3 convolutions.

    Parameters
    ----------
    channels
        Of the encoder's levels at strides 2, 4, 8, 16, 32.
    widths
        Channels of the decoder at strides 16, 8, 4, 2 and, with a fifth number, 1.

    Raises
    ------
    ValueError
        For widths that are not four or five positive numbers.
    """

    def __init__(self, channels: Sequence[int], widths: Sequence[int]):
        check_widths(widths)
        super().__init__()
        skips = (*channels[-2::-1], 0)  # strides 16, 8, 4, 2 and the image's own
        below = channels[-1]
        for width, skip in zip(widths, skips, strict=False):
            self.append(nn.Sequential(block(below + skip, width), block(width, width)))
            below = width
        self.width = below

    def forward(self, levels: Sequence[Tensor]) -> Float[Tensor, "b c h w"]:
        """Return features at stride 1 or 2."""
        *skips, x = levels
        for stage in self:
            x = enlarge(x)
            x = stage(torch.cat((x, skips.pop()), dim=1) if skips else x)
        return x


def enlarge(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c 2*h 2*w"]:
    """Double the sides by nearest neighbour, in the type at hand: autocast would go by way of float32, for nothing."""
    if usable(x):
        return _Enlarge.apply(x)
    if x.dtype == torch.float32:
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    with torch.autocast(x.device.type, enabled=False):
        return F.interpolate(x, scale_factor=2.0, mode="nearest")


class _Enlarge(Function):
    """The same by kernels of our own, on a GPU."""

    @staticmethod
    def forward(ctx, x):
        from nucseg.kernels import enlarging

        return enlarging.enlarge(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        from nucseg.kernels import enlarging

        return enlarging.gradient(g)


def check_widths(widths: Sequence[int]) -> None:
    """Raise for widths that no decoder can have."""
    if len(widths) not in (4, 5) or min(widths) < 1:
        raise ValueError(f"widths must be four or five positive numbers, got {widths}")


def block(inputs: int, outputs: int) -> nn.Sequential:
    """A 3x3 convolution, BatchNorm and ReLU."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), NormAct(outputs))


def to_multiple_of_32(images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 p q"]:
    """Enlarge images by mirroring on the right and at the bottom, so that every level of an encoder is whole."""
    h, w = images.shape[-2:]
    if h % 32 or w % 32:
        return F.pad(images, (0, -w % 32, 0, -h % 32), mode="reflect")
    return images


def at_size(maps: Float[Tensor, "b c h w"], padded: torch.Size, size: torch.Size) -> Float[Tensor, "b c p q"]:
    """Bring maps to the size of the padded images, and cut off what `to_multiple_of_32` added."""
    if maps.shape[-2:] != padded:
        maps = F.interpolate(maps, size=padded, mode="bilinear", align_corners=False)
    return maps[..., : size[0], : size[1]]
