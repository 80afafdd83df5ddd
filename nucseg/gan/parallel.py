"""k1 independent trainings side by side on one device: parallel streams, captured once in a CUDA graph.

One GAN of this size leaves an H100 mostly idle, and its step is hundreds of small kernels, so that launching them takes
longer than running them. Each GAN's step goes to a stream of its own; all of them together are recorded once and
replayed as one graph. On the CPU each of PyTorch's threads takes some of the steps, since one step is too small to be
split over threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch


class ParallelStep:
    """Call it to run every given step once.

    A context manager. The steps must be independent of each other, read and write the same tensors on every call
    (refill them in place between calls), and never wait for the device.

    Parameters
    ----------
    steps
        One callable for each training.
    device
        Where their tensors are.
    graph
        Record the steps in a CUDA graph; ignored on the CPU. False runs them eagerly, one after the other: slower,
        easier to debug.
    warmup
        Calls that run eagerly before the recording. They are ordinary calls and count as such; the recording needs one
        because optimisers and libraries allocate on first use.
    """

    def __init__(self, steps: Sequence[Callable[[], None]], device: torch.device, graph: bool = True, warmup: int = 1):
        self.steps = list(steps)
        self.device = device
        self.graph_wanted = graph and device.type == "cuda"
        self.warmup = warmup
        self.graph: torch.cuda.CUDAGraph | None = None
        self.threads = torch.get_num_threads()
        workers = min(self.threads, len(self.steps)) if device.type == "cpu" else 1
        self.pool = None
        if workers > 1:
            self.pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
        self.streams = [torch.cuda.Stream(device) for _ in self.steps] if self.graph_wanted else []
        self.main = torch.cuda.Stream(device) if self.graph_wanted else None

    def __enter__(self) -> ParallelStep:
        return self

    def __exit__(self, *error) -> None:
        """Free the recorded graph's memory, or stop the threads and give PyTorch's operators theirs back."""
        self.graph = None
        if self.pool is not None:
            self.pool.shutdown()
            torch.set_num_threads(self.threads)

    def __call__(self) -> None:
        if self.pool is not None:
            list(self.pool.map(lambda step: step(), self.steps))
            return
        if not self.graph_wanted:
            for step in self.steps:
                step()
            return
        if self.graph is None and self.warmup > 0:
            self.warmup -= 1
            # Not on the default stream, which cannot be recorded.
            self.main.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.main):
                self._fork_and_join()
            torch.cuda.current_stream(self.device).wait_stream(self.main)
            return
        if self.graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.main):  # records; nothing runs here
                self._fork_and_join()
            self.graph = graph  # a recording that failed must not be replayed
        self.graph.replay()

    def _fork_and_join(self) -> None:
        # Between fork and join nothing is allocated on the main stream, and a stream's tensors are used by that stream
        # only: the caching allocator, which knows one stream for each block, cannot hand a block out too early.
        # All wait before any runs: PyTorch has 32 streams for everybody, and a step that happens to be given the main
        # one must not keep the others waiting.
        main = torch.cuda.current_stream(self.device)
        for stream in self.streams:
            stream.wait_stream(main)
        for stream, step in zip(self.streams, self.steps, strict=True):
            with torch.cuda.stream(stream):
                step()
        for stream in self.streams:
            main.wait_stream(stream)
