"""BatchNorm with the activation behind it: one module, and on a GPU `nucseg.kernels.batch_norm` does both at once."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import Function

from nucseg.kernels import usable
from nucseg.recording import is_recording

# Values from which the kernels pay where they are launched one by one: a launch from Python takes the host longer than
# PyTorch's own takes, and small maps leave the device waiting for it. A step that is recorded has no such limit.
LARGE = 2**22

ACTIVATIONS = {nn.Identity: (1.0, math.inf), nn.ReLU: (0.0, math.inf), nn.ReLU6: (0.0, 6.0)}  # slope below 0, cap


class _NormAct(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, slope, cap, eps, running, fixed):
        from nucseg.kernels import batch_norm

        if fixed:
            y, norm = batch_norm.forward_fixed(x, weight, bias, slope, cap, eps, *running)
        else:
            y, norm = batch_norm.forward(x, weight, bias, slope, cap, eps, running)
        ctx.save_for_backward(*norm)
        ctx.how = slope, cap, fixed
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        from nucseg.kernels import batch_norm

        dx, (db, dw) = batch_norm.gradient(g, batch_norm.Norm(*ctx.saved_tensors), *ctx.how)
        return dx, dw, db, None, None, None, None, None


class _NormActBeside(Function):
    """Of x also its centre, for what passes by: one kernel then adds the gradients that come back on both ways."""

    @staticmethod
    def forward(ctx, x, weight, bias, slope, cap, eps, running, border):
        from nucseg.kernels import batch_norm

        y, norm = batch_norm.forward(x, weight, bias, slope, cap, eps, running)
        ctx.save_for_backward(*norm)
        ctx.how = slope, cap
        return y, _centre(x, border)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g, beside):
        from nucseg.kernels import batch_norm

        dx, (db, dw) = batch_norm.gradient(g, batch_norm.Norm(*ctx.saved_tensors), *ctx.how, beside=beside)
        return dx, dw, db, None, None, None, None, None


def _centre(x: Tensor, border: int) -> Tensor:
    return x[..., border:-border, border:-border] if border else x.view_as(x)


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
        if self._by_kernels(x):
            running = self._running() if self.training else (self.running_mean, self.running_var)
            how = self.slope, self.cap, self.eps, running, not self.training
            return _NormAct.apply(x, self.weight, self.bias, *how)
        y = super().forward(x)
        if self.activation is nn.Identity:
            return y
        return F.relu(y, inplace=True) if self.cap == math.inf else F.hardtanh(y, 0.0, self.cap, inplace=True)

    def beside(self, x: Float[Tensor, "b c h w"], border: int = 0) -> tuple[Tensor, Tensor]:
        """Return ``self(x)``, and x without `border` pixels on each side, as a residual or dense unit needs them.

        The two gradients by x are then added as they are made; a sum of its own takes three passes over memory.
        """
        if self.training and self._by_kernels(x):
            how = self.slope, self.cap, self.eps, self._running(), border
            return _NormActBeside.apply(x, self.weight, self.bias, *how)
        return self(x), crop(x, border)

    def _by_kernels(self, x: Tensor) -> bool:
        plain = self.affine and self.track_running_stats and self.momentum is not None
        large = is_recording() or x.numel() >= LARGE
        return plain and large and torch.is_grad_enabled() and usable(x)

    def _running(self) -> tuple[Tensor, Tensor, float]:
        self.num_batches_tracked.add_(1)
        return self.running_mean, self.running_var, self.momentum

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation.__name__}"


def crop(x: Float[Tensor, "b c h w"], border: int) -> Float[Tensor, "b c p q"]:
    """Return x without `border` pixels on each side: a view whose gradient lies in memory as the gradient behind it.

    That of a slice is laid out anew, in rows of one channel, and a sum of the two layouts takes a GPU five times as
    long as a sum of equal ones.
    """
    return _Crop.apply(x, border) if border else x


class _Crop(Function):
    @staticmethod
    def forward(ctx, x, border):
        ctx.border = border
        return _centre(x, border)

    @staticmethod
    def backward(ctx, g):
        return F.pad(g, [ctx.border] * 4), None


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
