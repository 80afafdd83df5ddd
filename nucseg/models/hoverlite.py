"""HoVer heads on a pretrained timm encoder with a U-Net decoder: our recommended segmenter for practice.

Ours, not the paper's. HoVer-Net spends its time at full resolution; a pretrained encoder and a narrow decoder are
meant to come near its accuracy at a fraction of the cost (REFERENCE section 8). The two have not been compared yet.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nucseg.encoders import Pyramid
from nucseg.inference import InferenceConfig
from nucseg.models.base import origin
from nucseg.models.decoder import Decoder, at_size, block, check_widths, to_multiple_of_32
from nucseg.models.hover import HoverConfig, HoverSegmenter


@dataclass(frozen=True)
class HoverLiteConfig:
    """The decoder, and what follows it.

    Attributes
    ----------
    widths
        Channels of the decoder at strides 16, 8, 4, 2 and, with a fifth number, 1. With four, maps are made at stride 2
        and enlarged: a third of the time.
    frozen
        Encoder levels (strides 2, 4, 8, 16, 32) that keep their pretrained weights and statistics, finest first: 0
        trains everything, 5 the decoder alone. With
        ``widths=(64, 32, 16, 16)`` a step of four 128 px crops takes 0.19 s on one CPU core with 0 and 0.11 s with 5,
        which after 200 steps from twelve such patches was no worse either.
    hover, inference
        Losses and post-processing; tiles and averaging of whole images.
    """

    widths: tuple[int, ...] = (256, 128, 64, 48, 32)
    frozen: int = 0
    hover: HoverConfig = field(default_factory=HoverConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)

    def __post_init__(self) -> None:
        check_widths(self.widths)
        if not 0 <= self.frozen <= 5:
            raise ValueError(f"frozen must be 0 to 5 encoder levels, got {self.frozen}")


class HoverLite(HoverSegmenter):
    """Encoder, decoder with skips, one 3x3 convolution and a 1x1 head for each of NP and HV."""

    def __init__(
        self,
        encoder: str = "efficientnet_lite0",
        config: HoverLiteConfig | None = None,
        weights: str | Path | None = None,
        pretrained: bool = True,
    ):
        config = config or HoverLiteConfig()
        super().__init__(config.hover, config.inference)
        self.config = config
        self.encoder = Pyramid(encoder, weights, pretrained)
        self.initialised_from = origin(encoder, weights, pretrained)
        self.fixed = _first_levels(self.encoder.net, config.frozen)
        for module in self.fixed:
            module.requires_grad_(False)
        self.decoder = Decoder(self.encoder.channels, config.widths)
        below = self.decoder.width
        self.np_head = nn.Sequential(block(below, below), nn.Conv2d(below, 2, 1))
        self.hv_head = nn.Sequential(block(below, below), nn.Conv2d(below, 2, 1))

    def train(self, mode: bool = True) -> HoverLite:
        """Switch the mode of all but the fixed levels, whose batch statistics stay the pretrained ones."""
        super().train(mode)
        for module in self.fixed:
            module.eval()
        return self

    def heads(self, images: Float[Tensor, "b 3 h w"]) -> tuple[Float[Tensor, "b 2 h w"], Float[Tensor, "b 2 h w"]]:
        """Return NP logits and HV at the input's resolution; any size, enlarged to a multiple of 32 by mirroring."""
        padded = to_multiple_of_32(images)
        x = self.decoder(self.encoder(padded))
        maps = torch.cat((self.np_head(x), self.hv_head(x)), dim=1)
        maps = at_size(maps, padded.shape[-2:], images.shape[-2:])
        return maps[:, :2], maps[:, 2:]


def _first_levels(net: nn.Module, count: int) -> list[nn.Module]:
    """Return the modules of a timm feature network that make its finest `count` maps."""
    if not count:
        return []
    last = net.feature_info.module_name(count - 1)
    layers = [(name, module) for name, module in net.named_modules() if list(module.parameters(recurse=False))]
    end = max(i for i, (name, _) in enumerate(layers) if name == last or name.startswith(f"{last}."))
    return [module for _, module in layers[: end + 1]]  # defined in the order in which they compute
