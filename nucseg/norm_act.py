"""BatchNorm with the activation behind it: one module, and on a GPU kernels that do both (`nucseg.triton_norm`)."""

from __future__ import annotations

import functools
import importlib.util
import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import Function

from nucseg.recording import is_recording

# Values from which the kernels pay where they are launched one by one: a launch from Python takes the host longer than
# PyTorch's own takes, and small maps leave the device waiting for it. A step that is recorded has no such limit.
LARGE = 2**22

ACTIVATIONS = {nn.Identity: (1.0, math.inf), nn.ReLU: (0.0, math.inf), nn.ReLU6: (0.0, 6.0)}  # slope below 0, cap


@functools.cache
def has_kernels(device: torch.device) -> bool:
    """Does `nucseg.triton_norm` work here? It needs Triton, a C compiler, Python's headers, a GPU from Ampere on."""
    if device.type != "cuda" or torch.version.hip is not None or importlib.util.find_spec("triton") is None:
        return False
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        from nucseg import triton_norm

        x = torch.zeros(1, 8, 1, 1, device=device).contiguous(memory_format=torch.channels_last)
        triton_norm.forward(x, x.new_ones(8), x.new_zeros(8), 1.0, math.inf, 1e-5)
    except Exception as error:  # whatever Triton's compilation lacks: PyTorch's own kernels do without
        warnings.warn(f"Triton's kernels cannot be used, PyTorch's slower ones are: {error}", stacklevel=2)
        return False
    return True


def usable(x: Float[Tensor, "b c h w"]) -> bool:
    """Can `nucseg.triton_norm` take this tensor?"""
    fits = x.dtype in (torch.float32, torch.bfloat16, torch.float16) and x.shape[1] % 8 == 0
    return x.is_cuda and fits and x.is_contiguous(memory_format=torch.channels_last) and has_kernels(x.device)


class _NormAct(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, slope, cap, eps, running, fixed):
        from nucseg import triton_norm

        if fixed:
            y, norm = triton_norm.forward_fixed(x, weight, bias, slope, cap, eps, *running)
        else:
            y, norm = triton_norm.forward(x, weight, bias, slope, cap, eps, running)
        ctx.save_for_backward(*norm)
        ctx.how = slope, cap, fixed
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        from nucseg import triton_norm

        dx, (db, dw) = triton_norm.gradient(g, triton_norm.Norm(*ctx.saved_tensors), *ctx.how)
        return dx, dw, db, None, None, None, None, None


class NormAct(nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` and an activation: same parameters, same state, same result.

    Parameters
    ----------
    channels
        Of the input.
    activation
        ``nn.ReLU``, ``nn.ReLU6`` or ``nn.Identity``.
    **options
        As for `torch.nn.BatchNorm2d`.
    """

    def __init__(self, channels: int, activation: type[nn.Module] = nn.ReLU, **options: Any):
        super().__init__(channels, **options)
        self.activation = activation
        self.slope, self.cap = ACTIVATIONS[activation]

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        plain = self.affine and self.track_running_stats and self.momentum is not None
        large = is_recording() or x.numel() >= LARGE
        if plain and large and torch.is_grad_enabled() and usable(x):
            running = self.running_mean, self.running_var
            if self.training:
                self.num_batches_tracked.add_(1)
                running = *running, self.momentum
            how = self.slope, self.cap, self.eps, running, not self.training
            return _NormAct.apply(x, self.weight, self.bias, *how)
        y = super().forward(x)
        if self.activation is nn.Identity:
            return y
        return F.relu(y, inplace=True) if self.cap == math.inf else F.hardtanh(y, 0.0, self.cap, inplace=True)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation.__name__}"


def fuse(net: nn.Module) -> nn.Module:
    """Put a `NormAct` in place of each of timm's BatchNorms with an activation of ours; return the network.

    They share the parameters and keep their names, so weights load as before.
    """
    from timm.layers import BatchNormAct2d

    for module in net.modules():
        for name, child in module.named_children():
            if type(child) is BatchNormAct2d and type(child.act) in ACTIVATIONS and type(child.drop) is nn.Identity:
                setattr(module, name, _from_timm(child))
    return net


def _from_timm(norm: nn.Module) -> NormAct:
    options = {"eps": norm.eps, "momentum": norm.momentum, "affine": norm.affine}
    fused = NormAct(norm.num_features, type(norm.act), track_running_stats=norm.track_running_stats, **options)
    fused.weight, fused.bias = norm.weight, norm.bias
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        setattr(fused, name, getattr(norm, name))
    return fused.train(norm.training)
