"""CSinGAN's 3x3 convolutions in channels-last on a GPU: kernels in Triton.

The critics' convolutions are so narrow, 32 or 64 channels on a few windows of a patch, that cuDNN's kernels take many
times as long as the reading of their arguments; most of all the gradient by the weight, a sum over all pixels that ends
in a few thousand numbers (docs/speed.md). Here

- the convolution and its gradient by the input are one kernel: a program takes a row of pixels, and adds the products
  with the weights of all nine taps;
- the gradient by the weight is summed by programs over shares of the pixels, for one row of taps each, and their sums
  are added in a fixed order: the same input gives the same result.

Products are in TF32, as cuDNN's are where that is allowed, and sums in float32.

Only for a GPU with Triton, which comes with PyTorch on Linux, and for 32 or 64 channels: see `nucseg.gan.fast_conv`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from nucseg.triton_norm import add_parts

TOGETHER = 32  # channels to a product
PIXELS, WARPS = 64, 2  # of a program of the convolution
SHARE, SHARE_WARPS = 64, 4  # pixels that the gradient by the weight takes at a time
PROGRAMS = 264  # of the gradient by the weight: two to each of an H100's multiprocessors


@triton.jit
def _pixel(m, oh, ow):
    """Image, row and column of output pixels."""
    line = m // ow
    return line // oh, line % oh, m % ow


@triton.jit(do_not_specialize=["rows", "h", "w", "oh", "ow", "pad"])
def _convolve(
    x, weight, y, rows, h, w, oh, ow, pad,
    c: tl.constexpr, d: tl.constexpr, flip: tl.constexpr, by_d: tl.constexpr, by_c: tl.constexpr,
    tap_step: tl.constexpr, pixels: tl.constexpr, together: tl.constexpr,
):  # fmt: skip
    """y of d channels from x of c, for all of d in one program; weights lie by_d, tap_step and by_c apart."""
    m = tl.program_id(0) * pixels + tl.arange(0, pixels)
    image, row, column = _pixel(m, oh, ow)
    n, k = tl.arange(0, d), tl.arange(0, together)
    total = tl.zeros((pixels, d), tl.float32)
    for tap in range(9):
        r, s = row + tap // 3 - pad, column + tap % 3 - pad
        inside = (m < rows) & (r >= 0) & (r < h) & (s >= 0) & (s < w)
        at = ((image * h + r) * w + s) * c
        place = 8 - tap if flip else tap
        for first in tl.static_range(0, c, together):
            values = tl.load(x + at[:, None] + first + k[None, :], mask=inside[:, None], other=0.0)
            weights = tl.load(weight + n[None, :] * by_d + place * tap_step + (first + k[:, None]) * by_c)
            total = tl.dot(values, weights, total, input_precision="tf32")
    tl.store(y + m[:, None] * d + n[None, :], total, mask=(m < rows)[:, None])


@triton.jit(do_not_specialize=["rows", "h", "w", "oh", "ow"])
def _by_weight(
    g, x, parts, rows, h, w, oh, ow, c: tl.constexpr, d: tl.constexpr, share: tl.constexpr, together: tl.constexpr
):
    """Sums of g x over a share of the pixels, for one row of three taps and a square of channels."""
    taps, square = tl.program_id(1), tl.program_id(2)
    n = square // (c // together) * together + tl.arange(0, together)
    k = square % (c // together) * together + tl.arange(0, together)
    left = tl.zeros((together, together), tl.float32)
    middle = tl.zeros((together, together), tl.float32)
    right = tl.zeros((together, together), tl.float32)
    for start in range(tl.program_id(0) * share, rows, tl.num_programs(0) * share):
        m = start + tl.arange(0, share)
        image, row, column = _pixel(m, oh, ow)
        here = (m < rows)[:, None]
        gradient = tl.trans(tl.load(g + m[:, None] * d + n[None, :], mask=here, other=0.0))
        at = x + (((image * h + row + taps) * w + column) * c)[:, None] + k[None, :]
        left = tl.dot(gradient, tl.load(at, mask=here, other=0.0), left, input_precision="tf32")
        middle = tl.dot(gradient, tl.load(at + c, mask=here, other=0.0), middle, input_precision="tf32")
        right = tl.dot(gradient, tl.load(at + 2 * c, mask=here, other=0.0), right, input_precision="tf32")
    place = parts + tl.program_id(0) * d * 9 * c + n[:, None] * 9 * c + 3 * taps * c + k[None, :]
    tl.store(place, left)
    tl.store(place + c, middle)
    tl.store(place + 2 * c, right)


# -- from Python


def convolve(x: Float[Tensor, "b c h w"], weight: Float[Tensor, "d c 3 3"]) -> Float[Tensor, "b d h-2 w-2"]:
    """Convolve without padding, at stride 1."""
    d, c = weight.shape[:2]
    return _run(x, weight, c, d, x.shape[2] - 2, x.shape[3] - 2, 0, (9 * c, 1), flip=False)


def by_input(g: Float[Tensor, "b d h-2 w-2"], weight: Float[Tensor, "d c 3 3"]) -> Float[Tensor, "b c h w"]:
    """Return the gradient of `convolve` by its input."""
    d, c = weight.shape[:2]
    return _run(g, weight, d, c, g.shape[2] + 2, g.shape[3] + 2, 2, (1, 9 * c), flip=True)


def _run(x, weight, c, d, oh, ow, pad, strides, flip) -> Tensor:
    x, weight = (value.contiguous(memory_format=torch.channels_last) for value in (x, weight))
    b, _, h, w = x.shape
    y = x.new_empty(b, oh, ow, d).permute(0, 3, 1, 2)
    rows = b * oh * ow
    tap_step = weight.shape[1]
    with torch.cuda.device_of(x):
        _convolve[(triton.cdiv(rows, PIXELS),)](
            x, weight, y, rows, h, w, oh, ow, pad, c, d, flip, *strides, tap_step, PIXELS, TOGETHER, num_warps=WARPS
        )
    return y


def by_weight(g: Float[Tensor, "b d h-2 w-2"], x: Float[Tensor, "b c h w"]) -> Float[Tensor, "d c 3 3"]:
    """Return the gradient of `convolve` by its weight."""
    g, x = (value.contiguous(memory_format=torch.channels_last) for value in (g, x))
    (b, d, oh, ow), (_, c, h, w) = g.shape, x.shape
    rows, squares = b * oh * ow, (c // TOGETHER) * (d // TOGETHER)
    programs = min(triton.cdiv(rows, SHARE), max(1, PROGRAMS // (3 * squares)))
    parts = x.new_empty(programs, 1, d * 9 * c)
    with torch.cuda.device_of(x):
        _by_weight[(programs, 3, squares)](
            g, x, parts, rows, h, w, oh, ow, c, d, SHARE, TOGETHER, num_warps=SHARE_WARPS
        )
        return add_parts(parts).view(d, 3, 3, c).permute(0, 3, 1, 2)
