"""Time CSinGAN's training: all k1 GANs at once beside one GAN in a plain loop, and generation.

    python tests/bench/bench_gan.py [--quick] [--fit STEPS] [--out FILE.json]

Prints milliseconds per GAN, mask and step (three updates of three critics and one of the generator) for every scale of
a 256-pixel patch, the ratio to the plain loop, and the machine's name. The plain loop trains one GAN eagerly, one mask
a step, with PyTorch's own double backward. The released code's step takes 377-490 ms on an H100 (one mask, one GAN).
``--fit`` then trains k1 GANs for that many steps a scale and paints 50 masks each, and prints the minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import platform
import time

import numpy as np
import torch
import torch.nn.functional as F

from nucseg.gan import build, fast_conv
from nucseg.gan.csingan import CSinGANConfig


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
def plain_convolutions():
    """Give the critics PyTorch's own convolution, whose second derivative is the slow one."""
    ours = fast_conv.conv2d
    fast_conv.conv2d = F.conv2d
    try:
        yield
    finally:
        fast_conv.conv2d = ours


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ms_per_step(config: CSinGANConfig, k1: int, size: int, count: int, device: torch.device) -> list[float]:
    """Milliseconds per GAN, mask and step at every scale, start-up (warm-up, recording) left out."""
    marks: list[tuple[int, float]] = []

    def progress(done: int, total: int, text: str) -> None:
        wait(device)
        marks.append((done, time.perf_counter()))

    build("csingan", config, device).fit(*toy_set(k1, size, count), seed=0, progress=progress)
    result = []
    for n in range(config.scales):
        first, last = n * config.steps, (n + 1) * config.steps
        inside = [(d, t) for d, t in marks if first + 0.4 * config.steps <= d <= last]
        steps, seconds = inside[-1][0] - inside[0][0], inside[-1][1] - inside[0][1]
        result.append(1000 * seconds / (steps * k1 * config.masks_per_step))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps and variants")
    parser.add_argument("--fit", type=int, default=0, metavar="STEPS", help="also time a whole training")
    parser.add_argument("--k1", type=int, default=9)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", help="write the numbers as JSON")
    args = parser.parse_args()
    device = torch.device(args.device)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    machine += f", torch {torch.__version__}"

    steps = 20 if args.quick else 50
    base = CSinGANConfig(steps=steps, calibration_steps=1, check_every=10**6)
    if device.type == "cpu":  # so that the script itself can be tried anywhere
        base = dataclasses.replace(base, steps=6, scales=2, channels=8, crop=40)
    one = dataclasses.replace(base, masks_per_step=1, cuda_graph=False)
    k1 = args.k1
    variants: list[tuple[str, CSinGANConfig, int, bool]] = [
        ("plain loop, 1 GAN, 1 mask", one, 1, True),
        ("eager, 1 GAN, 1 mask", one, 1, False),
        (f"graph, {k1} GANs, 1 mask", dataclasses.replace(base, masks_per_step=1), k1, False),
        (f"graph, {k1} GANs, 4 masks", dataclasses.replace(base, masks_per_step=4), k1, False),
    ]
    if not args.quick:
        variants += [
            (f"graph, {k1} GANs, 8 masks", dataclasses.replace(base, masks_per_step=8), k1, False),
            (
                f"graph, {k1} GANs, 4 masks, any kernel",
                dataclasses.replace(base, deterministic=False),
                k1,
                False,
            ),
            (f"graph, {k1} GANs, 4 masks, no TF32", dataclasses.replace(base, tf32=False), k1, False),
            (f"eager, {k1} GANs, 4 masks", dataclasses.replace(base, cuda_graph=False), k1, False),
        ]
    sizes = base.sizes(args.size)
    print(f"{machine}\nms per GAN, mask and step ({base.d_steps} critic + {base.g_steps} generator updates)")
    print(f"{'':44s}" + "".join(f"{s:>8d}px" for s in sizes) + f"{'mean':>10s}{'plain/this':>12s}")
    record, plain_mean = {"machine": machine, "sizes": sizes, "ms": {}}, None
    for name, config, gans, plain in variants:
        try:
            with plain_convolutions() if plain else contextlib.nullcontext():
                ms = ms_per_step(config, gans, args.size, 16, device)
        except Exception as error:  # one variant that fails must not hide the others' numbers
            print(f"{name:44s} {type(error).__name__}: {str(error)[:200]}", flush=True)
            record["ms"][name] = repr(error)
            continue
        mean = float(np.mean(ms))
        plain_mean = plain_mean or mean
        cells = "".join(f"{m:10.2f}" for m in ms)
        print(f"{name:44s}{cells}{mean:10.2f}{plain_mean / mean:12.1f}", flush=True)
        record["ms"][name] = ms
    if device.type == "cuda":
        record["peak_gb"] = torch.cuda.max_memory_allocated(device) / 2**30
        print(f"peak memory {record['peak_gb']:.1f} GiB")
    if args.fit:
        config = dataclasses.replace(base, steps=args.fit, calibration_steps=10, check_every=100)
        pairs, masks = toy_set(k1, args.size, 50)
        start = time.perf_counter()
        gan = build("csingan", config, device).fit(pairs, masks, seed=0)
        wait(device)
        trained = time.perf_counter()
        gan.generate(masks)
        done = time.perf_counter()
        record["fit"] = {"steps": args.fit, "fit_s": trained - start, "generate_s": done - trained}
        print(f"{k1} GANs, {config.scales} scales of {args.fit} steps: {trained - start:.1f} s; "
              f"{masks.shape[0] * masks.shape[1]} images: {done - trained:.1f} s")  # fmt: skip
    if args.out:
        with open(args.out, "w") as file:
            json.dump(record, file, indent=1)


if __name__ == "__main__":
    main()
