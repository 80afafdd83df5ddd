"""BatchNorm and activation as few passes over memory, for channels-last tensors on a GPU: kernels in Triton.

PyTorch's BatchNorm in bf16 and channels-last takes one and a half to four times as long on an H100 (docs/speed.md), and
the activation behind it is one more pass each way. Here it is part of the normalisation, so forward and backward take
eight passes over the activations in place of thirteen, and the second derivative that CSinGAN's gradient penalty asks
for takes eight in place of about twenty. Where the statistics stay as they are, as those of Mask R-CNN's encoder do,
both directions together take five passes.

A tensor (b, c, h, w) in channels-last lies in memory as rows of c values. Programs first sum their share of the rows by
channel, always in the same order, and write the sums side by side: no atomic additions, so that the same input gives
the same result. The activation is ``min(z, cap)`` above zero and ``slope * z`` below: ReLU, ReLU6, LeakyReLU, identity.

In the symbols of `nucseg.gan.fast_norm`: ^x the normalised input, a the gradient behind the activation, [.] the mean.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

HEIGHT, WIDTH = 128, 32  # rows and channels of a tile
WARPS = 8  # 16 values to a thread
PROGRAMS = 528  # four to each of an H100's multiprocessors
TOGETHER = 8  # channels come in eights, so that all loads are of 16 bytes; one compiled kernel then serves all shapes


class Shape(NamedTuple):
    """How a tensor is cut into programs: rows and channels by eights, tiles among each other and side by side."""

    rows: int
    eights: int
    down: int
    across: int

    @property
    def channels(self) -> int:
        return TOGETHER * self.eights

    @property
    def tiles(self) -> tuple[int, int]:
        """Grid of a kernel whose programs do one tile each."""
        return self.down, self.across

    @property
    def sums(self) -> tuple[int, int]:
        """Grid of a kernel whose programs run over many tiles each."""
        return min(self.down, max(1, PROGRAMS // self.across)), self.across


def shape_of(x: Float[Tensor, "b c h w"]) -> Shape:
    """Return the programs for a tensor in channels-last."""
    channels = x.shape[1]
    rows = x.numel() // channels
    return Shape(rows, channels // TOGETHER, triton.cdiv(rows, HEIGHT), triton.cdiv(channels, WIDTH))


# -- what kernels share


@triton.jit
def _normalised(x, at, here, mean, r):
    """^x of a tile."""
    return (tl.load(x + at, mask=here, other=0.0).to(tl.float32) - mean[None, :]) * r[None, :]


@triton.jit
def _behind(g, at, here, z, slope, cap):
    """a of a tile: the gradient g behind the activation of z."""
    above = tl.where(z < cap, 1.0, 0.0)
    return tl.load(g + at, mask=here, other=0.0).to(tl.float32) * tl.where(z > 0, above, slope)


@triton.jit
def _channels(eights, width: tl.constexpr):
    channels = 8 * eights
    c = tl.program_id(1) * width + tl.arange(0, width)
    return channels, c, c < channels


@triton.jit
def _places(start, c, inside, rows, channels, height: tl.constexpr):
    """Where a tile lies, and which of its values are there."""
    row = start + tl.arange(0, height)
    return row.to(tl.int64)[:, None] * channels + c[None, :], (row < rows)[:, None] & inside[None, :]


# -- forward


@triton.jit(do_not_specialize=["rows", "eights"])
def _moments(x, parts, rows, eights, height: tl.constexpr, width: tl.constexpr):
    """Sums of x - pivot and of its square; the pivot is the first row, near the mean, so that little cancels."""
    channels, c, inside = _channels(eights, width)
    pivot = tl.load(x + c, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((height, width), tl.float32)
    square = tl.zeros((height, width), tl.float32)
    for start in range(tl.program_id(0) * height, rows, tl.num_programs(0) * height):
        at, here = _places(start, c, inside, rows, channels, height)
        v = tl.where(here, tl.load(x + at, mask=here, other=0.0).to(tl.float32) - pivot[None, :], 0.0)
        total += v
        square += v * v
    place = parts + tl.program_id(0) * 2 * channels + c
    tl.store(place, tl.sum(total, 0), mask=inside)
    tl.store(place + channels, tl.sum(square, 0), mask=inside)


@triton.jit(do_not_specialize=["rows", "eights", "programs"])
def _finish_moments(
    x, parts, mean, r, running_mean, running_var, rows, eights, programs, eps, momentum,
    running: tl.constexpr, height: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    channels = 8 * eights
    c = tl.program_id(0) * width + tl.arange(0, width)
    inside = c < channels
    total = tl.zeros((height, width), tl.float32)
    square = tl.zeros((height, width), tl.float32)
    for start in range(0, programs, height):
        p = start + tl.arange(0, height)
        here = (p < programs)[:, None] & inside[None, :]
        at = p[:, None] * 2 * channels + c[None, :]
        total += tl.load(parts + at, mask=here, other=0.0)
        square += tl.load(parts + at + channels, mask=here, other=0.0)
    offset = tl.sum(total, 0) / rows
    var = tl.maximum(tl.sum(square, 0) / rows - offset * offset, 0.0)
    m = offset + tl.load(x + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(mean + c, m, mask=inside)
    tl.store(r + c, 1.0 / tl.sqrt(var + eps), mask=inside)
    if running:
        old_mean, old_var = tl.load(running_mean + c, mask=inside), tl.load(running_var + c, mask=inside)
        unbiased = var * (rows / (rows - 1.0))
        tl.store(running_mean + c, old_mean + momentum * (m - old_mean), mask=inside)
        tl.store(running_var + c, old_var + momentum * (unbiased - old_var), mask=inside)


@triton.jit(do_not_specialize=["rows", "eights"])
def _apply(x, y, w, b, mean, r, rows, eights, slope, cap, height: tl.constexpr, width: tl.constexpr):
    channels, c, inside = _channels(eights, width)
    at, here = _places(tl.program_id(0) * height, c, inside, rows, channels, height)
    m, s = tl.load(mean + c, mask=inside, other=0.0), tl.load(r + c, mask=inside, other=0.0)
    z = _normalised(x, at, here, m, s) * tl.load(w + c, mask=inside, other=0.0)[None, :]
    z += tl.load(b + c, mask=inside, other=0.0)[None, :]
    tl.store(y + at, tl.where(z > 0, tl.minimum(z, cap), slope * z).to(y.dtype.element_ty), mask=here)


# -- its gradient


@triton.jit(do_not_specialize=["programs", "values"])
def _add_parts(parts, sums, programs, values, height: tl.constexpr, width: tl.constexpr):
    """Add what the programs have summed."""
    c = tl.program_id(0) * width + tl.arange(0, width)
    inside = c < values
    total = tl.zeros((height, width), tl.float32)
    for start in range(0, programs, height):
        p = start + tl.arange(0, height)
        total += tl.load(
            parts + p[:, None] * values + c[None, :], mask=(p < programs)[:, None] & inside[None, :], other=0.0
        )
    tl.store(sums + c, tl.sum(total, 0), mask=inside)


@triton.jit(do_not_specialize=["rows", "eights"])
def _gradient_sums(
    g, x, w, b, mean, r, dx, parts, rows, eights, slope, cap,
    fixed: tl.constexpr, height: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Sums of a and of a ^x; where the statistics are fixed and do not depend on x, dx = w r a as well."""
    channels, c, inside = _channels(eights, width)
    m, s = tl.load(mean + c, mask=inside, other=0.0), tl.load(r + c, mask=inside, other=0.0)
    weight, bias = tl.load(w + c, mask=inside, other=0.0), tl.load(b + c, mask=inside, other=0.0)
    sum_a = tl.zeros((height, width), tl.float32)
    sum_ax = tl.zeros((height, width), tl.float32)
    for start in range(tl.program_id(0) * height, rows, tl.num_programs(0) * height):
        at, here = _places(start, c, inside, rows, channels, height)
        xn = _normalised(x, at, here, m, s)
        a = _behind(g, at, here, xn * weight[None, :] + bias[None, :], slope, cap)
        if fixed:
            tl.store(dx + at, (a * (weight * s)[None, :]).to(dx.dtype.element_ty), mask=here)
        sum_a += a
        sum_ax += a * xn
    place = parts + tl.program_id(0) * 2 * channels + c
    tl.store(place, tl.sum(sum_a, 0), mask=inside)
    tl.store(place + channels, tl.sum(sum_ax, 0), mask=inside)


@triton.jit
def _inner(row, h, w, half, pitch):
    """Where the pixels of rows lie in maps that lack `half` pixels on each side, and which of them are there."""
    line, column = row // w, row % w - half
    image, line = line // h, line % h - half
    tall, broad = h - 2 * half, w - 2 * half
    inside = (line >= 0) & (line < tall) & (column >= 0) & (column < broad)
    return ((image * tall + line) * broad + column).to(tl.int64) * pitch, inside


@triton.jit(do_not_specialize=["rows", "eights", "h", "wide", "half"])
def _gradient(
    g, x, w, b, mean, r, sums, dx, more, rows, eights, slope, cap, h, wide, half, pitch,
    added: tl.constexpr, height: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """w r (a - [a] - ^x [a ^x]); where `added`, plus `more`, which lacks `half` pixels on each side."""
    channels, c, inside = _channels(eights, width)
    at, here = _places(tl.program_id(0) * height, c, inside, rows, channels, height)
    m, s = tl.load(mean + c, mask=inside, other=0.0), tl.load(r + c, mask=inside, other=0.0)
    weight, bias = tl.load(w + c, mask=inside, other=0.0), tl.load(b + c, mask=inside, other=0.0)
    a1 = tl.load(sums + c, mask=inside, other=0.0) / rows
    ax = tl.load(sums + channels + c, mask=inside, other=0.0) / rows
    xn = _normalised(x, at, here, m, s)
    a = _behind(g, at, here, xn * weight[None, :] + bias[None, :], slope, cap)
    out = (weight * s)[None, :] * (a - a1[None, :] - xn * ax[None, :])
    if added:
        place, inner = _inner(tl.program_id(0) * height + tl.arange(0, height), h, wide, half, pitch)
        beside = tl.load(more + place[:, None] + c[None, :], mask=here & inner[:, None], other=0.0)
        out += beside.to(tl.float32)
    tl.store(dx + at, out.to(dx.dtype.element_ty), mask=here)


# -- and the gradient of that


@triton.jit(do_not_specialize=["rows", "eights"])
def _second_sums(
    u, g, x, w, b, mean, r, parts, rows, eights, slope, cap, height: tl.constexpr, width: tl.constexpr
):  # fmt: skip
    """Sums of u, u ^x and u a."""
    channels, c, inside = _channels(eights, width)
    m, s = tl.load(mean + c, mask=inside, other=0.0), tl.load(r + c, mask=inside, other=0.0)
    weight, bias = tl.load(w + c, mask=inside, other=0.0), tl.load(b + c, mask=inside, other=0.0)
    sum_u = tl.zeros((height, width), tl.float32)
    sum_ux = tl.zeros((height, width), tl.float32)
    sum_ua = tl.zeros((height, width), tl.float32)
    for start in range(tl.program_id(0) * height, rows, tl.num_programs(0) * height):
        at, here = _places(start, c, inside, rows, channels, height)
        xn = _normalised(x, at, here, m, s)
        a = _behind(g, at, here, xn * weight[None, :] + bias[None, :], slope, cap)
        v = tl.load(u + at, mask=here, other=0.0).to(tl.float32)
        sum_u += v
        sum_ux += v * xn
        sum_ua += v * a
    place = parts + tl.program_id(0) * 3 * channels + c
    tl.store(place, tl.sum(sum_u, 0), mask=inside)
    tl.store(place + channels, tl.sum(sum_ux, 0), mask=inside)
    tl.store(place + 2 * channels, tl.sum(sum_ua, 0), mask=inside)


@triton.jit(do_not_specialize=["rows", "eights"])
def _second(
    u, g, x, w, b, mean, r, sums, more, by_g, by_x, by_w, rows, eights, slope, cap,
    height: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    channels, c, inside = _channels(eights, width)
    at, here = _places(tl.program_id(0) * height, c, inside, rows, channels, height)
    m, s = tl.load(mean + c, mask=inside, other=0.0), tl.load(r + c, mask=inside, other=0.0)
    weight, bias = tl.load(w + c, mask=inside, other=0.0), tl.load(b + c, mask=inside, other=0.0)
    a1 = tl.load(sums + c, mask=inside, other=0.0) / rows
    ax = tl.load(sums + channels + c, mask=inside, other=0.0) / rows
    u1 = tl.load(more + c, mask=inside, other=0.0) / rows
    ux = tl.load(more + channels + c, mask=inside, other=0.0) / rows
    ua = tl.load(more + 2 * channels + c, mask=inside, other=0.0) / rows

    xn = _normalised(x, at, here, m, s)
    z = xn * weight[None, :] + bias[None, :]
    a = _behind(g, at, here, z, slope, cap)
    v = tl.load(u + at, mask=here, other=0.0).to(tl.float32)
    by_a = (weight * s)[None, :] * (v - u1[None, :] - xn * ux[None, :])
    through = tl.where(z > 0, tl.where(z < cap, 1.0, 0.0), slope)
    tl.store(by_g + at, (by_a * through).to(by_g.dtype.element_ty), mask=here)
    inner = ua - u1 * a1
    along = ax[None, :] * (v - u1[None, :]) + ux[None, :] * (a - a1[None, :]) + xn * (inner - 3.0 * ux * ax)[None, :]
    tl.store(by_x + at, (-(weight * s * s)[None, :] * along).to(by_x.dtype.element_ty), mask=here)
    tl.store(by_w + c, rows * s * (inner - ux * ax), mask=inside & (tl.program_id(0) == 0))


# -- from Python


class Norm(NamedTuple):
    """A normalisation done: its input and parameters, and the input's mean and 1 / standard deviation by channel."""

    x: Float[Tensor, "b c h w"]
    weight: Float[Tensor, " c"]
    bias: Float[Tensor, " c"]
    mean: Float[Tensor, " c"]
    r: Float[Tensor, " c"]


def _where_it_lies(function: Callable) -> Callable:
    """Run with the first argument's GPU as the current one: Triton knows no other."""

    @functools.wraps(function)
    def there(x: Tensor, *arguments: Any, **options: Any) -> Any:
        with torch.cuda.device_of(x):
            return function(x, *arguments, **options)

    return there


@_where_it_lies
def forward(
    x: Float[Tensor, "b c h w"],
    weight: Float[Tensor, " c"],
    bias: Float[Tensor, " c"],
    slope: float,
    cap: float,
    eps: float,
    running: tuple[Tensor, Tensor, float] | None = None,
) -> tuple[Float[Tensor, "b c h w"], Norm]:
    """Normalise by the batch's own statistics, scale, shift, activate.

    Parameters
    ----------
    x
        In channels-last, with a multiple of 8 channels, in float32, float16 or bfloat16; all else is float32.
    slope, cap
        Of the activation below and above zero.
    running
        Running mean and variance, which are updated in place, and the momentum.
    """
    shape = shape_of(x)
    parts = x.new_empty(shape.sums[0], 2, shape.channels, dtype=torch.float32)
    mean, r = parts.new_empty(2, shape.channels)
    _moments[shape.sums](x, parts, shape.rows, shape.eights, HEIGHT, WIDTH, num_warps=WARPS)
    running_mean, running_var, momentum = running or (mean, r, 0.0)
    _finish_moments[(triton.cdiv(shape.channels, 16),)](
        x, parts, mean, r, running_mean, running_var, shape.rows, shape.eights, len(parts), eps, momentum,
        running is not None, 64, 16,
    )  # fmt: skip
    y = torch.empty_like(x)
    _apply[shape.tiles](
        x, y, weight, bias, mean, r, shape.rows, shape.eights, slope, cap, HEIGHT, WIDTH, num_warps=WARPS
    )  # fmt: skip
    return y, Norm(x, weight, bias, mean, r)


@_where_it_lies
def forward_fixed(
    x: Float[Tensor, "b c h w"],
    weight: Float[Tensor, " c"],
    bias: Float[Tensor, " c"],
    slope: float,
    cap: float,
    eps: float,
    mean: Float[Tensor, " c"],
    var: Float[Tensor, " c"],
) -> tuple[Float[Tensor, "b c h w"], Norm]:
    """Normalise by statistics that are given, scale, shift, activate; see `forward`."""
    shape = shape_of(x)
    norm = Norm(x, weight, bias, mean, torch.rsqrt(var + eps))
    y = torch.empty_like(x)
    _apply[shape.tiles](
        x, y, *norm[1:], shape.rows, shape.eights, slope, cap, HEIGHT, WIDTH, num_warps=WARPS
    )  # fmt: skip
    return y, norm


@_where_it_lies
def gradient(
    g: Float[Tensor, "b c h w"],
    norm: Norm,
    slope: float,
    cap: float,
    fixed: bool = False,
    beside: Float[Tensor, "b c p q"] | None = None,
) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "2 c"]]:
    """Return dx, and db and dw in one tensor.

    Parameters
    ----------
    g
        The gradient behind the activation.
    norm, slope, cap
        What `forward` returned and took.
    fixed
        After `forward_fixed`.
    beside
        Another gradient by x, or by the centre of x, to be added to dx; not with `fixed`.
    """
    shape = shape_of(norm.x)
    g = g.contiguous(memory_format=torch.channels_last)
    parts = norm.mean.new_empty(shape.sums[0], 2, shape.channels)
    dx = torch.empty_like(norm.x)
    rest = shape.rows, shape.eights, slope, cap
    _gradient_sums[shape.sums](g, *norm, dx, parts, *rest, fixed, HEIGHT, WIDTH, num_warps=WARPS)
    sums = add_parts(parts)
    if not fixed:
        more, where = _beside(beside, norm.x)
        _gradient[shape.tiles](
            g, *norm, sums, dx, dx if more is None else more, *rest, *where, more is not None,
            HEIGHT, WIDTH, num_warps=WARPS,
        )  # fmt: skip
    return dx, sums


def _beside(more: Tensor | None, x: Tensor) -> tuple[Tensor | None, tuple[int, int, int, int]]:
    """Return a gradient that the kernel can read, and height, width, border and distance between pixels for it."""
    c, h, w = x.shape[1:]
    if more is None:
        return None, (h, w, 0, c)
    tall, broad = more.shape[2:]
    pitch = more.stride(3)
    if more.stride() != (tall * broad * pitch, 1, broad * pitch, pitch):  # a slice of channels may stay as it is
        more, pitch = more.contiguous(memory_format=torch.channels_last), c
    return more, (h, w, (h - tall) // 2, pitch)


@_where_it_lies
def second_gradient(
    u: Float[Tensor, "b c h w"],
    g: Float[Tensor, "b c h w"],
    norm: Norm,
    sums: Float[Tensor, "2 c"],
    slope: float,
    cap: float,
) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"], Float[Tensor, " c"]]:
    """Return the derivatives of <u, dx> by g, x and the weight; `sums` as `gradient` gave them."""
    shape = shape_of(norm.x)
    u, g = (each.contiguous(memory_format=torch.channels_last) for each in (u, g))
    parts = norm.mean.new_empty(shape.sums[0], 3, shape.channels)
    rest = shape.rows, shape.eights, slope, cap, HEIGHT, WIDTH
    _second_sums[shape.sums](u, g, *norm, parts, *rest, num_warps=WARPS)
    by_g, by_x, by_w = torch.empty_like(g), torch.empty_like(norm.x), torch.empty_like(norm.weight)
    _second[shape.tiles](u, g, *norm, sums, add_parts(parts), by_g, by_x, by_w, *rest, num_warps=WARPS)
    return by_g, by_x, by_w


def add_parts(parts: Float[Tensor, "p k c"]) -> Float[Tensor, "k c"]:
    sums = parts.new_empty(parts.shape[1:])
    _add_parts[(triton.cdiv(sums.numel(), 16),)](parts, sums, len(parts), sums.numel(), 64, 16)
    return sums
