"""BatchNorm with its activation, by our kernels and by PyTorch's, forward and backward, on a CUDA device.

    python tests/bench/bench_norm.py [--batch N] [--out FILE.json]

For some layers of `hoverlite` on batches of 256-pixel crops in bf16 and channels-last: milliseconds of each, their
ratio, and the share of the memory's bandwidth that ours reach, by the eight passes over the activations that they need
(`nucseg.kernels.batch_norm`), where a copy on the same device counts as all of it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from nucseg.norm_act import NormAct

LAYERS = ((32, 256), (96, 128), (48, 128), (144, 64), (256, 16), (1248, 8))  # channels, side
PASSES = 8


def milliseconds(work: Callable[[], object], repeats: int = 20) -> float:
    """Median time of one call, after a warm-up, between two events on the device."""
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def bandwidth_of_a_copy(values: int = 2**29) -> float:
    """GB/s, read and written."""
    source = torch.empty(values, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds(lambda: target.copy_(source)) / 1e6


def both_ways(net: nn.Module, x: torch.Tensor, g: torch.Tensor) -> Callable[[], object]:
    """Return a forward and backward pass as one captured graph, so that launching it costs nothing."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    inputs = [x, *net.parameters()]

    def run() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            out = net(x)
        torch.autograd.grad(out, inputs, g)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    options = parser.parse_args()
    bandwidth = bandwidth_of_a_copy()
    record = {"device": torch.cuda.get_device_name(), "copy_gb_per_s": bandwidth, "layers": []}
    print(f"{record['device']}, torch {torch.__version__}; a copy: {bandwidth:.0f} GB/s")
    for channels, side in LAYERS:
        shape = options.batch, channels, side, side
        x, g = (
            torch.randn(shape, device="cuda").to(torch.bfloat16).to(memory_format=torch.channels_last) for _ in "xg"
        )
        theirs = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True)).cuda()
        took = {name: milliseconds(both_ways(net, x, g)) for name, net in
                (("ours", NormAct(channels).cuda()), ("theirs", theirs))}  # fmt: skip
        share = PASSES * x.nbytes / took["ours"] / 1e6 / bandwidth
        record["layers"].append({"channels": channels, "side": side, **took, "share_of_bandwidth": share})
        print(
            f"{channels:5d} channels at {side:3d} px: ours {took['ours']:7.3f} ms, PyTorch's {took['theirs']:7.3f} ms, "
            f"{took['theirs'] / took['ours']:.1f} times; {100 * share:.0f} % of a copy's bandwidth",
            flush=True,
        )
        if options.out:
            options.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
