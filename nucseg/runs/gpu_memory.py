"""Several processes to one GPU: an experiment starts when there is memory for it.

Each process reserves what its experiment is likely to need, in a file that its death frees. Out of memory all the
same, an experiment is run once more with the GPU to itself.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import torch

from nucseg.progress import task
from nucseg.store import claimed, holder, locked

T = TypeVar("T")

# For a segmenter that was never measured: two to an 80 GB GPU, which has 79,900 MB to give. The largest of ours,
# HoVer-Net with 16 crops of 256 px in bf16, has about 18,000 by counting its tensors, and 34,000 as h100 trains it:
# mirrored outwards to 352 px, which is 1.89 times the pixels. Micro-Net has 11,700.
UNKNOWN_MB = 36_000
MARGIN = 1.25  # the allocator holds more than the tensors at their peak
CONTEXT_MB = 1_000  # of CUDA itself, per process
GAN_MB, GAN_MB_PER_PIXEL = 300, 0.0225


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes
    ----------
    folder
        Where the processes of this machine that share it leave their reservations.
    memory
        Returns free and total memory in MB.
    usable
        Says whether this process can still use it.
    """

    folder: Path
    memory: Callable[[], tuple[float, float]]
    usable: Callable[[], bool] = lambda: True

    def empty_cache(self) -> None:
        """Give back what this process's allocator keeps without using it: others cannot use it either."""
        gc.collect()
        if torch.cuda.is_available():
            with contextlib.suppress(RuntimeError):  # of a process that has lost its GPU, see `usable`
                torch.cuda.empty_cache()


def usable(device: torch.device) -> bool:
    """Say whether this process can go on using its GPU: an assertion on the device or a broken recording ends that."""
    try:
        torch.cuda.empty_cache()
        torch.rand(1, device=device)
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        return True  # others have filled it, which is no fault of this process
    except RuntimeError:
        return False
    return True


def gpu(device: torch.device, folder: Path) -> Gpu:
    """Return the GPU behind a CUDA device; reservations go to a folder of its own under `folder`."""
    name = getattr(torch.cuda.get_device_properties(device), "uuid", device.index or 0)

    def memory() -> tuple[float, float]:
        free, total = torch.cuda.mem_get_info(device)
        return free / 2**20, total / 2**20

    return Gpu(folder / f"{socket.gethostname()}-{name}", memory, lambda: usable(device))


def of_synthesis(config: Any, k1: int, size: int) -> float:
    """Return the MB that the training of k1 generators at once is likely to need, each on a stream with its own memory.

    By counting a step's tensors: 830 for each with four masks and windows of 96 px, 6,050 with whole patches of 256 px.
    """
    side, masks = getattr(config, "crop", None) or size, getattr(config, "masks_per_step", 1)
    return k1 * (GAN_MB + GAN_MB_PER_PIXEL * masks * side**2) + CONTEXT_MB


def needed(runs: pd.DataFrame | None, segmenter: str) -> float:
    """Return the MB that a segmenter is likely to need, by the peaks of its trainings in ``runs.csv``.

    Older lines do not count the memory of a recorded step, and say nothing where the steps were recorded.
    """
    peaks = [] if runs is None else runs.loc[[_counts(c, segmenter) for c in runs["config"]], "peak_gpu_mb"]
    peak = max((peak for peak in peaks if peak > 0), default=None)  # NaN on a CPU
    return UNKNOWN_MB if peak is None else MARGIN * peak + CONTEXT_MB


def _counts(config: str, segmenter: str) -> bool:
    settings = json.loads(config)
    schedule = settings.get("model", {}).get("training", [{}])[0]
    whole = settings.get("recorded_gpu_mb") is not None or not schedule.get("cuda_graph")
    return whole and settings.get("experiment", {}).get("segmenter") == segmenter


@contextlib.contextmanager
def reserved(gpu: Gpu, need: float, poll: float = 0.5) -> Iterator[None]:
    """Wait until `need` MB are free and not promised to another process, and hold them inside the block.

    With no other experiment on the GPU there is nothing to wait for, so one that needs more than there is starts too.
    Those who wait are let in one after another, so none is passed by for ever.
    """
    with contextlib.ExitStack() as stack:
        with locked(gpu.folder / ".lock"):
            if not _fits(gpu, need):
                with task("waiting for GPU memory"):
                    while not _fits(gpu, need):
                        time.sleep(poll)
            stack.enter_context(claimed(gpu.folder / f"{os.getpid()}.json", json.dumps(need)))
        try:
            yield
        finally:
            gpu.empty_cache()


def _fits(gpu: Gpu, need: float) -> bool:
    gpu.empty_cache()
    free, total = gpu.memory()
    promised = _promised(gpu.folder)
    return not promised or (need <= free and need + sum(promised) <= total)


def _promised(folder: Path) -> list[float]:
    found = []
    for path in folder.glob("*.json"):
        text = holder(path)
        if text is None:
            path.unlink(missing_ok=True)  # nobody can claim it meanwhile: we hold the lock
        else:
            found.append(json.loads(text))
    return found


def run(work: Callable[[], T], need: float, gpu: Gpu, poll: float = 0.5) -> T:
    """Return ``work()``, begun when there is memory for it, and tried once more alone where that was not enough.

    Raises
    ------
    torch.OutOfMemoryError
        If the GPU is too small for it even alone, or lost to this process by the first try.
    """
    with reserved(gpu, need, poll):
        try:
            return work()
        except torch.OutOfMemoryError:
            if not gpu.usable():
                raise
            # The traceback holds tensors: it has to be gone before the second try.
    with reserved(gpu, float("inf"), poll):
        return work()
