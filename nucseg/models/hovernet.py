"""HoVer-Net as published (Graham et al., Medical Image Analysis 2019; Sec. IV-A), REFERENCE section 5 and A36.

A pre-activation ResNet50 with a 7x7 stem at stride 1 and no pooling, and one decoder of dense units for each of NP and
HV. The type branch is left out: the paper segments without classes. Written from the published description.

- ``fast``: 3x3 decoder kernels, padded stem; 256 px in, the central 164 out (92 px less, for any input that fits).
- ``original``: 5x5 kernels, stem without padding; 270 in, 80 out (190 less).

Deviations: fast mode is the default, since a 256 px patch cannot feed the original mode (A36); BatchNorm momentum and
initial values are PyTorch's. It is trained in one phase: the published 50 epochs with a frozen encoder and 50 with all
of it make sense with an encoder that is pretrained. Holes below 60 pixels in the foreground are filled and nuclei below
20 pixels dropped (`nucseg.models.hover`), where the published code fills none and drops pieces below 10. ImageNet
weights of this encoder exist only where the user has them, as ``weights: {preact-resnet50: <file>}`` in a profile or as
``preact-resnet50.safetensors`` in the folder that NUCSEG_WEIGHTS names; `HoverNet.initialised_from` says what was used.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nucseg.encoders import EncoderError, read_weights, weights_file
from nucseg.inference import InferenceConfig
from nucseg.models.decoder import enlarge
from nucseg.models.hover import HoverConfig, HoverSegmenter
from nucseg.norm_act import NormAct, crop

ENCODER = "preact-resnet50"


@dataclass(frozen=True)
class HoverNetConfig:
    """The variant, and what follows it.

    Attributes
    ----------
    mode
        ``"fast"`` or ``"original"``.
    mirror
        Whether a training crop is mirrored outwards so that all of it is supervised; False supervises only its centre,
        as published (a 256 px crop: 41 % of its pixels). With nine patches to learn from, no pixel is wasted.
    hover, inference
        Losses and post-processing; tiles and averaging of whole images.
    """

    mode: Literal["fast", "original"] = "fast"
    mirror: bool = False
    hover: HoverConfig = field(default_factory=HoverConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)


class HoverNet(HoverSegmenter):
    """The published network.

    Parameters
    ----------
    config
        Variant and settings.
    weights
        The pre-activation ResNet50 as in the published ``ImageNet-ResNet50-Preact_pytorch.tar``: a state dict with the
        names ``conv0``, ``d0`` to ``d3``, plain or under ``desc``, with or without ``module.`` in front of each name.
        A file of tensors only, since nothing is unpickled. What else it holds (decoders, ``conv_bot``) is left aside.
    pretrained
        False ignores `weights`.

    Attributes
    ----------
    initialised_from
        ``"random weights"``, or the name of the weights' file.
    """

    def __init__(
        self,
        config: HoverNetConfig | None = None,
        weights: str | Path | None = None,
        pretrained: bool = True,
    ):
        config = config or HoverNetConfig()
        super().__init__(config.hover, config.inference)
        self.config = config
        fast = config.mode == "fast"
        self.kernel, self.margin, self.stem = (3, 46, 0) if fast else (5, 95, 6)  # stem: pixels that the 7x7 eats
        self.conv0 = nn.Sequential()
        self.conv0.add_module("/", nn.Conv2d(3, 64, 7, padding=3 if fast else 0, bias=False))
        self.conv0.add_module("bn", NormAct(64))
        self.d0 = _Residual(64, (64, 64, 256), 3, 1)
        self.d1 = _Residual(256, (128, 128, 512), 4, 2)
        self.d2 = _Residual(512, (256, 256, 1024), 6, 2)
        self.d3 = _Residual(1024, (512, 512, 2048), 3, 2)
        self.conv_bot = nn.Conv2d(2048, 1024, 1, bias=False)
        self.np_branch, self.hv_branch = _Branch(self.kernel), _Branch(self.kernel)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if pretrained and (path := weights_file(ENCODER, weights)):
            self._load_encoder(path)

    def heads(self, images: Float[Tensor, "b 3 h w"]) -> tuple[Float[Tensor, "b 2 p q"], Float[Tensor, "b 2 p q"]]:
        """Return NP logits and HV of the centre: `margin` pixels less on each side, or of all with ``mirror``."""
        if self.config.mirror:
            return self._whole(images)
        return self._centre(images)

    def maps(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """Return probability and HV at the input's resolution, mirrored outwards for what the convolutions eat."""
        logits, hv = self._whole(images)
        return torch.cat((logits.float().softmax(dim=1)[:, 1:], hv.float()), dim=1)

    def _whole(self, images: Tensor) -> tuple[Tensor, Tensor]:
        h, w = images.shape[-2:]
        # Round up to a size that fits, and cut the surplus off again.
        down, right = ((self.stem - n - 2 * self.margin) % 8 for n in (h, w))
        images = _mirror(images, (self.margin, self.margin + right, self.margin, self.margin + down))
        logits, hv = self._centre(images)
        return logits[..., :h, :w], hv[..., :h, :w]

    def _centre(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if any(n <= 2 * self.margin or (n - self.stem) % 8 for n in images.shape[-2:]):
            raise ValueError(
                f"hovernet, {self.config.mode} mode: sides must be above {2 * self.margin} and a multiple of 8 plus "
                f"{self.stem}, got {tuple(images.shape[-2:])}; with `mirror` any size will do"
            )
        x = self.conv0(images)
        x0 = self.d0(x)
        x1 = self.d1(x0)
        x2 = self.d2(x1)
        x3 = self.conv_bot(self.d3(x2))
        cuts = (46, 18) if self.config.mode == "fast" else (92, 36)  # pixels on each side
        skips = (crop(x0, cuts[0]), crop(x1, cuts[1]), x2)
        return self.np_branch(x3, skips), self.hv_branch(x3, skips)

    def encoder_state(self) -> dict[str, Tensor]:
        """Return the part of the state that pretrained weights hold, by its published names."""
        return {k: v for k, v in self.state_dict().items() if k.split(".")[0] in ("conv0", "d0", "d1", "d2", "d3")}

    def _load_encoder(self, path: Path) -> None:
        state, own = _published_names(path), self.encoder_state()
        wrong = [k for k, v in own.items() if not k.endswith("num_batches_tracked")
                 and (k not in state or state[k].shape != v.shape)]  # fmt: skip
        if wrong:
            raise EncoderError(f"{path}: no weights of a pre-activation ResNet50; missing or ill-shaped {wrong[:3]}")
        self.load_state_dict({k: state[k] for k in own if k in state}, strict=False)
        self.initialised_from = path.name


def _published_names(path: Path) -> dict[str, Tensor]:
    """Read weights that may lie under ``desc`` and come from a model in parallel, as the published code saves them."""
    if path.suffix != ".safetensors" and path.is_file():
        with contextlib.suppress(Exception):  # whatever is wrong with the file, read_weights says it
            found = torch.load(path, map_location="cpu", weights_only=True)
            if isinstance(found.get("desc"), dict):
                state = {name.removeprefix("module."): value for name, value in found["desc"].items()}
                return {name: value for name, value in state.items() if isinstance(value, Tensor)}
    return {name.removeprefix("module."): value for name, value in read_weights(path).items()}


class _Residual(nn.Module):
    """Pre-activation bottleneck units; the stride sits in the first unit's 3x3 convolution and in the shortcut."""

    def __init__(self, inputs: int, widths: tuple[int, int, int], count: int, stride: int):
        super().__init__()
        first, middle, last = widths
        self.shortcut = nn.Conv2d(inputs, last, 1, stride=stride, bias=False)
        self.units = nn.ModuleList()
        for i in range(count):
            parts: list[tuple[str, nn.Module]] = []
            if i > 0:  # the block before has ended in BatchNorm and ReLU
                parts += [("preact/bn", NormAct(last))]
            parts += [
                ("conv1", nn.Conv2d(inputs if i == 0 else last, first, 1, bias=False)),
                ("conv1/bn", NormAct(first)),
                ("conv2", nn.Conv2d(first, middle, 3, stride if i == 0 else 1, padding=1, bias=False)),
                ("conv2/bn", NormAct(middle)),
                ("conv3", nn.Conv2d(middle, last, 1, bias=False)),
            ]
            self.units.append(_named(parts))
        self.blk_bna = _named([("bn", NormAct(last))])

    def forward(self, x: Tensor) -> Tensor:
        total = self.shortcut(x) + self.units[0](x)
        for unit in self.units[1:]:
            y, total = unit[0].beside(total)
            total = total + unit[1:](y)
        return self.blk_bna(total)


class _Dense(nn.Module):
    """Dense units without padding: each eats its kernel and adds 32 channels to the cropped input."""

    def __init__(self, inputs: int, count: int, kernel: int):
        super().__init__()
        self.units = nn.ModuleList()
        for i in range(count):
            width = inputs + 32 * i
            self.units.append(
                _named([
                    ("0", NormAct(width)), ("2", nn.Conv2d(width, 128, 1, bias=False)),
                    ("3", NormAct(128)), ("5", _Grouped(128, 32, kernel, groups=4, bias=False)),
                ])
            )  # fmt: skip
        self.border = kernel // 2
        self.end = nn.Sequential(NormAct(inputs + 32 * count))

    def forward(self, x: Tensor) -> Tensor:
        for unit in self.units:
            y, x = unit[0].beside(x, self.border)
            x = torch.cat((x, unit[1:](y)), dim=1)
        return self.end(x)


class _Grouped(nn.Conv2d):
    """A convolution in groups; in channels-last on a GPU as one of all channels, with zeros between the groups.

    cuDNN changes the layout of grouped ones there and back, which takes longer than four times the products of these
    narrow ones: 201 ms a step became 194 (docs/speed.md).
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda and x.is_contiguous(memory_format=torch.channels_last):
            return F.conv2d(x, self.dense_weight(), self.bias, self.stride, self.padding, self.dilation)
        return super().forward(x)

    def dense_weight(self) -> Float[Tensor, "o i k l"]:
        """Return the weight of the same map without groups."""
        o, i, *kernel = self.weight.shape
        g = self.groups
        apart = torch.eye(g, device=self.weight.device, dtype=self.weight.dtype).view(g, 1, g, 1, 1, 1)
        # Of a weight in channels-last no view has these axes side by side.
        return (self.weight.reshape(g, o // g, 1, i, *kernel) * apart).reshape(o, g * i, *kernel)


class _Branch(nn.Module):
    """One decoder: 1/8 to full resolution in three enlargements, with skips."""

    def __init__(self, kernel: int):
        super().__init__()
        self.u3 = nn.Sequential(
            nn.Conv2d(1024, 256, kernel, bias=False), _Dense(256, 8, kernel), nn.Conv2d(512, 512, 1, bias=False)
        )
        self.u2 = nn.Sequential(
            nn.Conv2d(512, 128, kernel, bias=False), _Dense(128, 4, kernel), nn.Conv2d(256, 256, 1, bias=False)
        )
        self.u1 = nn.Conv2d(256, 64, kernel, padding=kernel // 2, bias=False)
        self.u0 = _named([("0", NormAct(64)), ("2", nn.Conv2d(64, 2, 1))])

    def forward(self, x: Tensor, skips: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        fine, middle, coarse = skips
        x = self.u3(enlarge(x) + coarse)
        x = self.u2(enlarge(x) + middle)
        return self.u0(self.u1(enlarge(x) + fine))


def _named(parts: list[tuple[str, nn.Module]]) -> nn.Sequential:
    sequence = nn.Sequential()
    for name, module in parts:
        sequence.add_module(name, module)
    return sequence


def _mirror(images: Tensor, pads: tuple[int, int, int, int]) -> Tensor:
    """Mirror outwards by left, right, top, bottom, also by more than the image is wide."""
    h, w = images.shape[-2:]
    left, right, top, bottom = pads
    for axis, length, before, after in ((2, h, top, bottom), (3, w, left, right)):
        place = torch.arange(-before, length + after, device=images.device) % (2 * length)
        images = images.index_select(axis, torch.where(place < length, place, 2 * length - 1 - place))
    return images
