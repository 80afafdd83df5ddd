"""Time CSinGAN's training: all k1 GANs at once beside one GAN in a plain loop, and generation.

    python tests/bench/bench_gan.py [--seconds S] [--only TEXT] [--crop PX] [--fit STEPS] [--out FILE.json]

Prints milliseconds per GAN, mask and step (three updates of three critics and one of the generator) for every scale of
a 256-pixel patch, the ratio to the plain loop, and the machine's name. The plain loop trains one GAN eagerly, one mask
a step, with PyTorch's own convolution and BatchNorm and their double backward. The released code's step takes
377-490 ms on an H100 (one mask, one GAN).

The variants that matter come first, none takes much longer than ``--seconds`` (warm-up and recording excepted, which
are printed beside it), and the JSON file is rewritten after each, so a run that is cut off still leaves its numbers.
``--only whole`` runs the variants that have "whole" in their name. ``--fit`` then trains k1 GANs for that many steps a
scale and paints 50 masks each, and prints the minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import platform
import time
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from nucseg.gan import build, fast_conv, fast_norm
from nucseg.gan.csingan import CSinGANConfig
from nucseg.gan.parallel import ParallelStep
from nucseg.gan.scale_training import ScaleTraining, StepBuffers, TrainingData

VIEWS = ("view", "detach", "alias", "slice", "select", "expand", "unsqueeze", "split", "as_strided", "unbind", "empty",
         "empty_like", "new_empty", "_record_function_enter_new", "_record_function_exit")  # fmt: skip


def toy_set(k1: int, size: int, count: int) -> tuple[list, np.ndarray]:
    """k1 patches of dark discs on pink with noise, and masks of discs: speed does not depend on what is painted."""
    rng = np.random.default_rng(0)
    rows, cols = np.mgrid[:size, :size]

    def discs() -> np.ndarray:
        labels = np.zeros((size, size), np.int32)
        for k in range(1, size // 6):
            r, c = rng.integers(0, size, 2)
            labels[(rows - r) ** 2 + (cols - c) ** 2 < rng.integers(25, 100)] = k
        return labels

    pairs = []
    for _ in range(k1):
        labels = discs()
        image = np.where((labels > 0)[..., None], (90, 60, 130), (220, 170, 195)) + rng.normal(0, 12, (size, size, 3))
        pairs.append((image.clip(0, 255).astype(np.uint8), labels))
    return pairs, np.stack([[discs() for _ in range(count)] for _ in range(k1)])


@contextlib.contextmanager
def plain(convolution: bool = True, norm: bool = True) -> Iterator[None]:
    """Give the critics PyTorch's own convolution and BatchNorm, whose second derivatives are the slow ones."""

    def theirs(x, weight, bias, slope=0.2, eps=1e-5):
        return F.leaky_relu(F.batch_norm(x, None, None, weight, bias, training=True, eps=eps), slope)

    ours = fast_conv.conv2d, fast_norm.norm_relu
    fast_conv.conv2d = F.conv2d if convolution else ours[0]
    fast_norm.norm_relu = theirs if norm else ours[1]
    try:
        yield
    finally:
        fast_conv.conv2d, fast_norm.norm_relu = ours


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Scale:
    """One scale of k1 GANs, ready to step; earlier scales are there, untrained: speed does not depend on weights."""

    def __init__(self, gan, n: int, data: TrainingData):
        config, device = gan.config, gan.device
        self.buffers = StepBuffers(data, n, config, len(gan.terms), device)
        self.generators, critics = gan._new_networks(n, data.k1, torch.Generator().manual_seed(n))
        below = gan._below(n, data)
        gan.amplitudes.append(torch.stack([b.amplitude for b in below]))
        self.trainings = [
            ScaleTraining(config, gan.weights(), n, i, data, self.buffers, below[i], self.generators[i], critics[i],
                          config.lr, True)
            for i in range(data.k1)
        ]  # fmt: skip
        gan.critics = critics

    def finish(self, gan) -> None:
        for net in self.generators:
            net.eval().requires_grad_(False)
        gan.generators.append(self.generators)


def time_scales(config: CSinGANConfig, k1: int, size: int, count: int, device: torch.device, seconds: float) -> dict:
    """Return, by scale, ms per GAN, mask and step, and the seconds of warm-up and recording before."""
    pairs, masks = toy_set(k1, size, count)
    gan, sizes = build("csingan", config, device), config.sizes(size)
    gan.size = size
    result = {"ms": [], "steps": [], "warm_up_s": [], "record_s": []}
    with gan.kernels():
        images, labels = np.stack([p[0] for p in pairs]), np.stack([p[1] for p in pairs])
        data = TrainingData(images, labels, masks, sizes, device)
        draw = torch.Generator(device).manual_seed(0)
        for n in range(len(sizes)):
            scale = Scale(gan, n, data)
            with ParallelStep([t.step for t in scale.trainings], device, config.cuda_graph) as step:

                def run(step=step, scale=scale) -> None:
                    scale.buffers.refill(draw)
                    step()

                marks = [time.perf_counter()]
                for calls in (step.warmup, 1):  # the first call after the warm-up records and replays once
                    for _ in range(calls):
                        run()
                    wait(device)
                    marks.append(time.perf_counter())
                start, done, batch = time.perf_counter(), 0, 1
                while time.perf_counter() - start < seconds / len(sizes):
                    for _ in range(batch):
                        run()
                    wait(device)  # once a batch, so that the wait does not count
                    done, batch = done + batch, min(2 * batch, 64)
                took = time.perf_counter() - start
            scale.finish(gan)
            result["ms"].append(1000 * took / (done * k1 * config.masks_per_step))
            result["steps"].append(done)
            result["warm_up_s"].append(marks[1] - marks[0])
            result["record_s"].append(marks[2] - marks[1])
    return result


class Operators(TorchDispatchMode):
    """Counts operators that compute something: about one kernel each."""

    calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split("::")[1].split(".")[0]
        self.calls += name not in VIEWS
        return function(*args, **(kwargs or {}))


def operators_per_step(config: CSinGANConfig) -> int:
    """Count the operators in one step of one GAN at the second scale; their number does not depend on sizes."""
    config = dataclasses.replace(config, scales=2, min_size=24, channels=4, masks_per_step=2, crop=None)
    pairs, masks = toy_set(1, 32, 2)
    gan, sizes = build("csingan", config, "cpu"), config.sizes(32)
    data = TrainingData(np.stack([pairs[0][0]]), np.stack([pairs[0][1]]), masks, sizes, torch.device("cpu"))
    for n in range(2):
        scale = Scale(gan, n, data)
        scale.trainings[0].step()  # optimisers make their states
        if n == 0:
            scale.finish(gan)
    with Operators() as operators:
        scale.trainings[0].step()
    return operators.calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="measuring time of a variant, all scales")
    parser.add_argument("--only", default="", help="run the variants with this text in their name")
    parser.add_argument("--fit", type=int, default=0, metavar="STEPS", help="also time a whole training")
    parser.add_argument("--k1", type=int, default=9)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--crop", type=int, default=None, help="train on windows of this many pixels; h100: 96")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", help="write the numbers as JSON")
    args = parser.parse_args()
    device, k1 = torch.device(args.device), args.k1
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    machine += f", torch {torch.__version__}"

    base = CSinGANConfig()
    if device.type == "cpu":  # so that the script itself can be tried anywhere
        base = dataclasses.replace(base, scales=2, channels=8, crop=40)
    if args.crop:
        base = dataclasses.replace(base, crop=args.crop)

    def change(**changes) -> CSinGANConfig:
        return dataclasses.replace(base, **changes)

    ours = contextlib.nullcontext
    eager = change(masks_per_step=1, cuda_graph=False)
    windows, large = change(crop=96), f"{k1} GANs, whole patches"
    # Whole patches with four masks take 53 GiB of an H100, with PyTorch's BatchNorm 69, with eight masks 101 (counted).
    # A recording that runs out of memory spoils CUDA graphs for the whole process (torch 2.11), so the large ones that
    # might are timed on windows.
    variants = [
        (f"graph, {k1} GANs, 4 masks, windows of 96 px (as h100)", windows, k1, ours),
        ("plain loop, 1 GAN, 1 mask", eager, 1, plain),
        (f"graph, {large}, 4 masks", base, k1, ours),
        ("windows, any kernel, benchmark", change(crop=96, deterministic=False, benchmark=True), k1, ours),
        ("windows, deterministic, benchmark", change(crop=96, benchmark=True), k1, ours),
        ("windows, penalty at 1 update of 3", change(crop=96, penalty_every=3), k1, ours),
        ("windows, any kernel", change(crop=96, deterministic=False), k1, ours),
        (f"graph, {large}, 1 mask", change(masks_per_step=1), k1, ours),
        ("windows, 8 masks", change(crop=96, masks_per_step=8), k1, ours),
        ("windows, PyTorch's BatchNorm", windows, k1, lambda: plain(convolution=False)),
        ("windows, no TF32", change(crop=96, tf32=False), k1, ours),
        ("eager, 1 GAN, 1 mask", eager, 1, ours),
    ]
    variants = [v for v in variants if args.only in v[0]]
    sizes = base.sizes(args.size)
    record = {"machine": machine, "sizes": sizes, "variants": {}}

    def save() -> None:
        if device.type == "cuda":
            record["peak_gb"] = torch.cuda.max_memory_allocated(device) / 2**30
        if args.out:
            with open(args.out, "w") as file:
                json.dump(record, file, indent=1)

    print(f"{machine}\nms per GAN, mask and step ({base.d_steps} critic + {base.g_steps} generator updates)")
    print(
        f"{'':54s}"
        + "".join(f"{s:>7d}px" for s in sizes)
        + f"{'mean':>9s}{'warm-up s':>11s}{'record s':>10s}{'ops':>6s}"
    )
    for name, config, gans, context in variants:
        try:
            with context():
                times = time_scales(config, gans, args.size, 16, device, args.seconds)
                times["operators"] = operators_per_step(config)
        except Exception as error:  # one variant that fails must not hide the others' numbers
            print(f"{name:54s} {type(error).__name__}: {str(error)[:200]}", flush=True)
            record["variants"][name] = repr(error)
            save()
            continue
        times["mean_ms"] = float(np.mean(times["ms"]))
        cells = "".join(f"{ms:9.2f}" for ms in times["ms"])
        starts = f"{sum(times['warm_up_s']):11.1f}{sum(times['record_s']):10.1f}"
        print(f"{name:54s}{cells}{times['mean_ms']:9.2f}{starts}{times['operators']:6d}", flush=True)
        record["variants"][name] = times
        save()
    slow = record["variants"].get("plain loop, 1 GAN, 1 mask")
    if isinstance(slow, dict):
        for name, times in record["variants"].items():
            if isinstance(times, dict):
                print(f"{name:54s} {slow['mean_ms'] / times['mean_ms']:6.1f} times the plain loop")
    if device.type == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB")
    if args.fit:
        pairs, masks = toy_set(k1, args.size, 50)
        start = time.perf_counter()
        gan = build("csingan", change(steps=args.fit), device).fit(pairs, masks, seed=0)
        wait(device)
        trained = time.perf_counter()
        gan.generate(masks)
        done = time.perf_counter()
        record["fit"] = {"steps": args.fit, "fit_s": trained - start, "generate_s": done - trained}
        print(f"{k1} GANs, {base.scales} scales of {args.fit} steps: {trained - start:.1f} s; "
              f"{masks.shape[0] * masks.shape[1]} images: {done - trained:.1f} s")  # fmt: skip
        save()


if __name__ == "__main__":
    main()
