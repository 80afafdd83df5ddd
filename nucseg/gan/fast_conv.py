"""A convolution whose second derivative is as cheap as its first.

The gradient penalty of Eq. 4 differentiates a gradient. PyTorch writes the second derivative of a convolution as a
convolution whose kernel is as large as the image, which took 71 % of a critic's update on an H100. But the three maps

    Y(x, w): the convolution,    X(g, w): its gradient by the input,    W(g, x): its gradient by the weight

are the three sides of one trilinear form <g, Y(x, w)>, so each of them is bilinear and its derivatives are the other
two. As three `autograd.Function`s that differentiate into each other, every derivative of any order runs on the
ordinary kernels (3.1 times faster a critic update on that H100). Unpadded, stride 1: all that Eq. 4's critics need.
On a GPU and in channels-last, `nucseg.kernels.convolution` does those from 32 channels to 32.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import Function

from nucseg.kernels import usable

_STRIDE, _PADDING, _DILATION, _OUTPUT_PADDING = [1, 1], [0, 0], [1, 1], [0, 0]


_here = threading.local()


@contextmanager
def for_penalty() -> Iterator[None]:
    """Inside, convolutions skip derivatives that a gradient penalty never asks for.

    Its first derivative (taken with ``create_graph=True``) is wanted by the images alone, its second (taken without) by
    the weights alone. Autograd tells a Python function what could be differentiated, not what is wanted, and would
    compute both both times.
    """
    _here.penalty = True
    try:
        yield
    finally:
        _here.penalty = False


def _has_kernels(x: Tensor, shape: torch.Size) -> bool:
    """Are the kernels for this tensor, and for a convolution with weights of this shape?"""
    rounded = x.dtype == torch.float32 and torch.backends.cudnn.allow_tf32
    return tuple(shape) == (32, 32, 3, 3) and rounded and x.numel() < 2**30 and usable(x)


def _convolution(x: Tensor, w: Tensor) -> Tensor:
    if _has_kernels(x, w.shape):
        from nucseg.kernels import convolution

        return convolution.convolve(x, w)
    return torch.ops.aten.convolution(x, w, None, _STRIDE, _PADDING, _DILATION, False, _OUTPUT_PADDING, 1)


def _by_input(g: Tensor, w: Tensor, shape: torch.Size) -> Tensor:
    if _has_kernels(g, w.shape):
        from nucseg.kernels import convolution

        return convolution.by_input(g, w)
    # Of the input only the shape matters; memory that nobody writes or reads costs next to nothing.
    return _backward(g, _empty(shape, w), w, [True, False, False])[0]


def _by_weight(g: Tensor, x: Tensor, shape: torch.Size) -> Tensor:
    if _has_kernels(x, shape):
        from nucseg.kernels import convolution

        return convolution.by_weight(g, x)
    return _backward(g, x, _empty(shape, x), [False, True, False])[1]


def _backward(g: Tensor, x: Tensor, w: Tensor, mask: list[bool]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return torch.ops.aten.convolution_backward(
        g, x, w, None, _STRIDE, _PADDING, _DILATION, False, _OUTPUT_PADDING, 1, mask
    )


def _empty(shape: torch.Size, like: Tensor) -> Tensor:
    """Return memory of a shape in the layout of another tensor: the layout of what comes out follows the inputs'."""
    channels_last = like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


class _Y(Function):
    """Y(x, w): the convolution."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        ctx.penalty, ctx.first = getattr(_here, "penalty", False), x.is_leaf
        return _convolution(x, w)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        by_x, by_w = ctx.needs_input_grad
        if ctx.penalty:  # grad mode is on in a backward pass exactly with create_graph=True
            by_x, by_w = (by_x, False) if torch.is_grad_enabled() else (by_x and not ctx.first, by_w)
        return _X.apply(g, w, x.shape) if by_x else None, _W.apply(g, x, w.shape) if by_w else None


class _X(Function):
    """X(g, w): the gradient of <g, Y(x, w)> by x."""

    @staticmethod
    def forward(ctx, g, w, shape):
        ctx.save_for_backward(g, w)
        return _by_input(g, w, shape)

    @staticmethod
    def backward(ctx, h):
        g, w = ctx.saved_tensors
        return (
            _Y.apply(h, w) if ctx.needs_input_grad[0] else None,
            _W.apply(g, h, w.shape) if ctx.needs_input_grad[1] else None,
            None,
        )


class _W(Function):
    """W(g, x): the gradient of <g, Y(x, w)> by w."""

    @staticmethod
    def forward(ctx, g, x, shape):
        ctx.save_for_backward(g, x)
        return _by_weight(g, x, shape)

    @staticmethod
    def backward(ctx, v):
        g, x = ctx.saved_tensors
        return (
            _Y.apply(x, v) if ctx.needs_input_grad[0] else None,
            _X.apply(g, v, x.shape) if ctx.needs_input_grad[1] else None,
            None,
        )


def conv2d(x: Float[Tensor, "b c h w"], weight: Float[Tensor, "d c kh kw"]) -> Float[Tensor, "b d h2 w2"]:
    """Convolve without padding, at stride 1, as `torch.nn.functional.conv2d(x, weight)` does."""
    return _Y.apply(x, weight)


class FastConv2d(nn.Module):
    """`torch.nn.Conv2d` without padding, built on `conv2d`; same parameters, same result."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        nn.init.normal_(self.weight, 0.0, 0.02)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        y = conv2d(x, self.weight)
        return y if self.bias is None else y + self.bias.view(1, -1, 1, 1)
