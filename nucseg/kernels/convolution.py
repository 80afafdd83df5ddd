"""CSinGAN's 3x3 convolutions of 32 channels, in channels-last on a GPU: kernels in Triton.

The critics' convolutions are so narrow, on a few windows of a patch, that cuDNN's kernels take five to fourteen times
as long as a copy of their arguments; most of all the gradient by the weight, a sum over all pixels that ends in a few
thousand numbers (docs/speed.md). Here

- the convolution and its gradient by the input are one kernel: a program takes a row of pixels, and adds the products
  with the weights of all nine taps;
- the gradient by the weight is summed by programs over shares of the pixels, for one row of taps each, and their sums
  are added in a fixed order: the same input gives the same result.

Products are in TF32, as cuDNN's are where that is allowed, and sums in float32. For 64 channels the same was tried, and
cuDNN was faster.

See `nucseg.gan.fast_conv` for where they are used.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from nucseg.kernels.batch_norm import add_parts

CHANNELS = 32  # on both sides
PIXELS, WARPS = 64, 2  # of a program of the convolution
SHARE, SHARE_WARPS = 64, 4  # pixels that the gradient by the weight takes at a time
PROGRAMS = 88  # of the gradient by the weight, for each row of taps: two to each of an H100's multiprocessors


@triton.jit
def _pixel(m, oh, ow):
    """Image, row and column of output pixels."""
    line = m // ow
    return line // oh, line % oh, m % ow


@triton.jit(do_not_specialize=["rows", "h", "w", "oh", "ow", "pad"])
def _convolve(
    x, weight, y, rows, h, w, oh, ow, pad, transposed: tl.constexpr, c: tl.constexpr, pixels: tl.constexpr
):  # fmt: skip
    """Convolve with weights (c, 9, c), or `transposed`: with their taps in reverse order and their channels swapped."""
    m = tl.program_id(0) * pixels + tl.arange(0, pixels)
    image, row, column = _pixel(m, oh, ow)
    n, k = tl.arange(0, c), tl.arange(0, c)
    total = tl.zeros((pixels, c), tl.float32)
    for tap in range(9):
        r, s = row + tap // 3 - pad, column + tap % 3 - pad
        inside = (m < rows) & (r >= 0) & (r < h) & (s >= 0) & (s < w)
        at = ((image * h + r) * w + s) * c
        values = tl.load(x + at[:, None] + k[None, :], mask=inside[:, None], other=0.0)
        if transposed:
            weights = tl.load(weight + k[:, None] * 9 * c + (8 - tap) * c + n[None, :])
        else:
            weights = tl.load(weight + n[None, :] * 9 * c + tap * c + k[:, None])
        total = tl.dot(values, weights, total, input_precision="tf32")
    tl.store(y + m[:, None] * c + n[None, :], total, mask=(m < rows)[:, None])


@triton.jit(do_not_specialize=["rows", "h", "w", "oh", "ow"])
def _by_weight(g, x, parts, rows, h, w, oh, ow, c: tl.constexpr, share: tl.constexpr):
    """Sums of g x over a share of the pixels, for one row of three taps."""
    taps = tl.program_id(1)
    n, k = tl.arange(0, c), tl.arange(0, c)
    left = tl.zeros((c, c), tl.float32)
    middle = tl.zeros((c, c), tl.float32)
    right = tl.zeros((c, c), tl.float32)
    for start in range(tl.program_id(0) * share, rows, tl.num_programs(0) * share):
        m = start + tl.arange(0, share)
        image, row, column = _pixel(m, oh, ow)
        here = (m < rows)[:, None]
        gradient = tl.trans(tl.load(g + m[:, None] * c + n[None, :], mask=here, other=0.0))
        at = x + (((image * h + row + taps) * w + column) * c)[:, None] + k[None, :]
        left = tl.dot(gradient, tl.load(at, mask=here, other=0.0), left, input_precision="tf32")
        middle = tl.dot(gradient, tl.load(at + c, mask=here, other=0.0), middle, input_precision="tf32")
        right = tl.dot(gradient, tl.load(at + 2 * c, mask=here, other=0.0), right, input_precision="tf32")
    place = parts + tl.program_id(0) * 9 * c * c + n[:, None] * 9 * c + 3 * taps * c + k[None, :]
    tl.store(place, left)
    tl.store(place + c, middle)
    tl.store(place + 2 * c, right)


# -- from Python: all tensors float32, of fewer than 2^31 values


def convolve(x: Float[Tensor, "b 32 h w"], weight: Float[Tensor, "32 32 3 3"]) -> Float[Tensor, "b 32 h-2 w-2"]:
    """Convolve without padding, at stride 1."""
    return _run(x, weight, x.shape[2] - 2, x.shape[3] - 2, 0, transposed=False)


def by_input(g: Float[Tensor, "b 32 h-2 w-2"], weight: Float[Tensor, "32 32 3 3"]) -> Float[Tensor, "b 32 h w"]:
    """Return the gradient of `convolve` by its input."""
    return _run(g, weight, g.shape[2] + 2, g.shape[3] + 2, 2, transposed=True)


def by_weight(g: Float[Tensor, "b 32 h-2 w-2"], x: Float[Tensor, "b 32 h w"]) -> Float[Tensor, "32 32 3 3"]:
    """Return the gradient of `convolve` by its weight."""
    g, x = (value.contiguous(memory_format=torch.channels_last) for value in (g, x))
    (b, _, oh, ow), (h, w) = g.shape, x.shape[2:]
    rows = b * oh * ow
    programs = min(triton.cdiv(rows, SHARE), PROGRAMS)
    parts = x.new_empty(programs, 1, 9 * CHANNELS**2)
    with torch.cuda.device_of(x):
        _by_weight[(programs, 3)](g, x, parts, rows, h, w, oh, ow, CHANNELS, SHARE, num_warps=SHARE_WARPS)
        return add_parts(parts).view(CHANNELS, 3, 3, CHANNELS).permute(0, 3, 1, 2)


def _run(x: Tensor, weight: Tensor, oh: int, ow: int, pad: int, transposed: bool) -> Tensor:
    x, weight = (value.contiguous(memory_format=torch.channels_last) for value in (x, weight))
    b, _, h, w = x.shape
    y = x.new_empty(b, oh, ow, CHANNELS).permute(0, 3, 1, 2)
    rows = b * oh * ow
    with torch.cuda.device_of(x):
        _convolve[(triton.cdiv(rows, PIXELS),)](
            x, weight, y, rows, h, w, oh, ow, pad, transposed, CHANNELS, PIXELS, num_warps=WARPS
        )
    return y
