"""What PyTorch does too slowly on a GPU: kernels in Triton, and where they can be used.

The modules of this package need Triton, which comes with PyTorch on Linux, so they are imported only where `usable`
says yes. Everything that they do PyTorch can do as well.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import warnings

import torch
from jaxtyping import Float
from torch import Tensor


@functools.cache
def available(device: torch.device) -> bool:
    """Do the kernels work here? They need Triton, a C compiler, Python's headers, and a GPU from Ampere on."""
    if device.type != "cuda" or torch.version.hip is not None or importlib.util.find_spec("triton") is None:
        return False
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        from nucseg.kernels import batch_norm

        x = torch.zeros(1, 8, 1, 1, device=device).contiguous(memory_format=torch.channels_last)
        batch_norm.forward(x, x.new_ones(8), x.new_zeros(8), 1.0, math.inf, 1e-5)
    except torch.OutOfMemoryError:
        raise  # others have filled the GPU: that says nothing about the kernels
    except Exception as error:  # whatever Triton's compilation lacks: PyTorch's own kernels do without
        warnings.warn(f"Triton's kernels cannot be used, PyTorch's slower ones are: {error}", stacklevel=2)
        return False
    return True


def usable(x: Float[Tensor, "b c h w"]) -> bool:
    """Can the kernels take this tensor? In channels-last, with a multiple of 8 channels."""
    fits = x.dtype in (torch.float32, torch.bfloat16, torch.float16) and x.shape[1] % 8 == 0
    return x.is_cuda and fits and x.is_contiguous(memory_format=torch.channels_last) and available(x.device)
