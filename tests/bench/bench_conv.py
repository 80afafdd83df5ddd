"""CSinGAN's 3x3 convolutions of 32 channels by our kernels and by cuDNN's, on a CUDA device.

    python tests/bench/bench_conv.py [--windows N] [--out FILE.json]

For the critics' layers on windows of 96 pixels and on patches of 256, in float32 with TF32 products and channels-last:
microseconds of the convolution and of its gradients by input and weight, and their ratio. The floor is the time in
which a copy moves as many bytes as must be read and written.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from bench_norm import bandwidth_of_a_copy, milliseconds

from nucseg.kernels import convolution

SIDES = (94, 254)


def recorded(work):
    """Return twenty calls as one captured graph, so that launching them costs nothing, and the last result."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out = work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(20):
            work()
    return graph.replay, out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    options = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = True
    bandwidth = bandwidth_of_a_copy()
    record = {"device": torch.cuda.get_device_name(), "copy_gb_per_s": bandwidth, "layers": []}
    print(f"{record['device']}, torch {torch.__version__}; a copy: {bandwidth:.0f} GB/s")

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda").to(memory_format=torch.channels_last)

    channels = convolution.CHANNELS
    for side in SIDES:
        x, weight = draw(options.windows, channels, side, side), draw(channels, channels, 3, 3)
        g = draw(options.windows, channels, side - 2, side - 2)
        settings = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)

        def theirs(mask, g=g, x=x, weight=weight, settings=settings):
            return torch.ops.aten.convolution_backward(g, x, weight, None, *settings, mask)

        ways = {
            "forward": (
                lambda x=x, weight=weight: convolution.convolve(x, weight),
                lambda x=x, weight=weight: torch.nn.functional.conv2d(x, weight),
            ),
            "by input": (
                lambda g=g, weight=weight: convolution.by_input(g, weight),
                lambda theirs=theirs: theirs([True, False, False])[0],
            ),
            "by weight": (
                lambda g=g, x=x: convolution.by_weight(g, x),
                lambda theirs=theirs: theirs([False, True, False])[1],
            ),
        }
        floor = 1e6 * (x.nbytes + g.nbytes) / (bandwidth * 1e9)
        for name, pair in ways.items():
            (ours, mine), (cudnn, reference) = (recorded(work) for work in pair)
            away = float((mine - reference).norm() / reference.norm())
            took = {"ours": 50 * milliseconds(ours), "cudnn": 50 * milliseconds(cudnn)}
            record["layers"].append({"side": side, "map": name, **took, "floor": floor})
            print(
                f"{side:3d} px, {name:9s}: ours {took['ours']:6.1f} us, cuDNN's "
                f"{took['cudnn']:6.1f}, {took['cudnn'] / took['ours']:4.1f} times; a copy {floor:5.1f}; "
                f"apart by {away:.1e}",
                flush=True,
            )
            if options.out:
                options.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
