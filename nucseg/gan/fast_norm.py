"""BatchNorm and LeakyReLU in one, with a second derivative worked out by hand.

The gradient penalty of Eq. 4 differentiates the critics' normalisation twice. PyTorch's own second derivative of
BatchNorm takes about 80 operators a layer, most of them over whole activations: of the 5,000 operators in one step of
CSinGAN, 3,500. The one below takes about 20, five of them over whole activations.

In the symbols below, per channel, with N values, ^x = (x - mean) r, r = 1 / sqrt(var + eps), a = g * slope(y) the
gradient behind the LeakyReLU and [.] the mean over the N values:

    y      = LeakyReLU(w ^x + b)
    dx     = w r (a - [a] - ^x [a ^x]),    dw = N [a ^x],    db = N [a]

and for cotangents u of dx, v of dw, t of db, where the LeakyReLU's slope is a constant:

    by a   = w r (u - [u] - ^x [u ^x]) + v ^x + t
    by w   = N r ([u a] - [u] [a] - [u ^x] [a ^x])
    by x   = -w r^2 ([a ^x] (u - [u]) + [u ^x] (a - [a]) + ^x ([u a] - [u] [a] - 3 [u ^x] [a ^x]))
             + v r (a - [a] - ^x [a ^x])

The first line has the form of dx itself, so the ordinary kernel of BatchNorm's backward pass serves both derivatives.
On a GPU and in channels-last, `nucseg.kernels.batch_norm` does all of it: nine kernels a layer, not about thirty.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import Function

from nucseg.kernels import usable


def _normalised_gradient(a: Tensor, x: Tensor, w: Tensor, mean: Tensor, r: Tensor, eps: float) -> tuple[Tensor, ...]:
    """w r (a - [a] - ^x [a ^x]), N [a ^x] and N [a]."""
    return torch.ops.aten.native_batch_norm_backward(a, x, w, None, None, mean, r, True, eps, [True, True, True])


def _through_slope(g: Tensor, y: Tensor, slope: float) -> Tensor:
    return torch.ops.aten.leaky_relu_backward(g, y, slope, True)  # the output's sign is the input's


class _NormReLU(Function):
    """y(x, w, b)."""

    @staticmethod
    def forward(ctx, x, w, b, slope, eps):
        z, mean, r = torch.ops.aten.native_batch_norm(x, w, b, None, None, True, 0.0, eps)
        y = torch.nn.functional.leaky_relu_(z, slope)
        ctx.save_for_backward(x, w, y, mean, r)
        ctx.slope, ctx.eps = slope, eps
        return y

    @staticmethod
    def backward(ctx, g):
        return *_Gradient.apply(g, *ctx.saved_tensors, ctx.slope, ctx.eps), None, None


class _Gradient(Function):
    """(dx, dw, db)(g, x, w); mean, r and the slope by y follow from x."""

    @staticmethod
    def forward(ctx, g, x, w, y, mean, r, slope, eps):
        a = _through_slope(g, y, slope)
        dx, dw, db = _normalised_gradient(a, x, w, mean, r, eps)
        ctx.save_for_backward(a, x, w, y, mean, r, dw, db)
        ctx.slope, ctx.eps = slope, eps
        ctx.set_materialize_grads(False)
        return dx, dw, db

    @staticmethod
    def backward(ctx, u, v, t):
        _no_third()
        found = _second_gradient(u, v, t, *ctx.saved_tensors, ctx.slope, ctx.eps)
        return *found, None, None, None, None, None


def _no_third() -> None:
    if torch.is_grad_enabled():  # by create_graph=True; `once_differentiable` would let most of it pass in silence
        raise RuntimeError("norm_relu has no third derivative: take its second one without create_graph")


def _second_gradient(u, v, t, a, x, w, y, mean, r, dw, db, slope, eps) -> tuple[Tensor, Tensor, Tensor]:
    """Derivatives of <u, dx> + <v, dw> + <t, db> by g, x and w."""
    n = x.shape[1] / x.numel()  # 1 / N

    def wide(channels: Tensor) -> Tensor:
        return channels.view(1, -1, 1, 1)

    u = torch.zeros_like(x) if u is None else u
    by_a, ux, u1 = _normalised_gradient(u, x, w, mean, r, eps)
    ua = (u * a).sum((0, 2, 3))
    fall = w * r * r * -n
    along_u, along_a = fall * dw, fall * ux
    inner = torch.addcmul(ua, u1, db, value=-n)
    by_w = torch.addcmul(inner, ux, dw, value=-n) * r
    along_x = fall * r * torch.addcmul(inner, ux, dw, value=-3 * n)
    if v is not None:
        along_a = along_a + v * r
        along_x = along_x - v * r * r * dw * n
        by_a = torch.addcmul(by_a, x - wide(mean), wide(v * r))
    if t is not None:
        by_a = by_a + wide(t)
    # what makes each of the three terms free of its mean, in one constant
    level = torch.addcmul(torch.addcmul(along_x * mean, along_u, u1, value=n), along_a, db, value=n)
    by_x = torch.addcmul(wide(-level), u, wide(along_u)).addcmul_(a, wide(along_a)).addcmul_(x, wide(along_x))
    return _through_slope(by_a, y, slope), by_x, by_w


class _FusedNormReLU(Function):
    """y(x, w, b) by the kernels for a GPU."""

    @staticmethod
    def forward(ctx, x, w, b, slope, eps):
        from nucseg.kernels import batch_norm

        y, norm = batch_norm.forward(x, w, b, slope, math.inf, eps)
        ctx.save_for_backward(*norm)
        ctx.slope, ctx.eps = slope, eps
        return y

    @staticmethod
    def backward(ctx, g):
        return *_FusedGradient.apply(g, *ctx.saved_tensors, ctx.slope, ctx.eps), None, None


class _FusedGradient(Function):
    """(dx, dw, db)(g, x, w); mean, r and the slope by b follow from x."""

    @staticmethod
    def forward(ctx, g, x, w, b, mean, r, slope, eps):
        from nucseg.kernels import batch_norm

        dx, sums = batch_norm.gradient(g, batch_norm.Norm(x, w, b, mean, r), slope, math.inf)
        ctx.save_for_backward(g, x, w, b, mean, r, sums)
        ctx.slope, ctx.eps = slope, eps
        ctx.set_materialize_grads(False)
        return dx, sums[1], sums[0]

    @staticmethod
    def backward(ctx, u, v, t):
        from nucseg.kernels import batch_norm

        _no_third()
        g, x, w, b, mean, r, sums = ctx.saved_tensors
        if v is None and t is None and u is not None:  # what a gradient penalty asks for
            norm = batch_norm.Norm(x, w, b, mean, r)
            found = batch_norm.second_gradient(u, g, norm, sums, ctx.slope, math.inf)
        else:
            y = (x - mean.view(1, -1, 1, 1)) * (w * r).view(1, -1, 1, 1) + b.view(1, -1, 1, 1)
            a = _through_slope(g, y, ctx.slope)
            found = _second_gradient(u, v, t, a, x, w, y, mean, r, sums[1], sums[0], ctx.slope, ctx.eps)
        return *found, None, None, None, None, None


def norm_relu(
    x: Float[Tensor, "b c h w"],
    weight: Float[Tensor, " c"],
    bias: Float[Tensor, " c"],
    slope: float = 0.2,
    eps: float = 1e-5,
) -> Float[Tensor, "b c h w"]:
    """Normalise by the batch's own statistics, scale and shift by channel, and apply LeakyReLU.

    The same as ``leaky_relu(batch_norm(x, None, None, weight, bias, training=True, eps=eps), slope)``, twice
    differentiable.
    """
    function = _FusedNormReLU if usable(x) else _NormReLU
    return function.apply(x, weight, bias, slope, eps)


class NormReLU(nn.Module):
    """`norm_relu` with its parameters; always by the batch's own statistics, in training and after it."""

    def __init__(self, channels: int, slope: float = 0.2, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.slope, self.eps = slope, eps

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return norm_relu(x, self.weight, self.bias, self.slope, self.eps)
