"""How fast the selection is, side by side: bare forward passes, a plain patch-by-patch loop, and ours.

    python tests/bench/bench_cps.py --data-root DIR [--dataset kumar] [--encoder resnet50] [--random-weights] [--quick]

One pool patch means one patch and its four sub-regions. ``--random-weights`` makes a state dict on the spot, for timing
only: its picks mean nothing. ``--agreement-encoder`` names the encoder whose picks are compared in half precision
and in float32 (on a GPU).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image

from nucseg.data import load_dataset
from nucseg.encoders import Encoder
from nucseg.selection import CPS, STRATEGIES, PatchFeatures, SelectionConfig, coverage_table, cps, extract
from nucseg.selection.kmeans import kmeans
from nucseg.selection.pool import grid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root")
    parser.add_argument("--dataset", default="kumar")
    parser.add_argument("--encoder", default="resnet50")
    parser.add_argument("--random-weights", action="store_true")
    parser.add_argument("--agreement-encoder")
    parser.add_argument("--k1", type=int, default=9)
    parser.add_argument("--step", type=int)
    parser.add_argument("--quick", action="store_true", help="one image and a coarse step")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    samples = list(load_dataset(args.dataset, args.data_root).train)[: 1 if args.quick else None]
    config = SelectionConfig(step=args.step or (120 if args.quick else 15))
    encoder = random_encoder(args.encoder) if args.random_weights else Encoder(args.encoder)
    for sample in samples:
        _ = sample.image  # decoding is measured apart: a second experiment finds the images decoded
    pool = sum(len(grid(s.id, *s.image.shape[:2], config)[0]) for s in samples)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    result = {"device": name, "torch": torch.__version__, "encoder": args.encoder, "patches": pool, "step": config.step}
    print(f"{args.dataset}: {len(samples)} images, {pool} patches, {4 * pool} sub-regions; {args.encoder} on {name}")

    warm = dataclasses.replace(config, step=10_000)  # one patch an image: loads kernels, fills caches
    extract(samples[:1], encoder, warm, device)
    bare = bare_passes(encoder, config, device, args.quick)
    plain = plain_loop(encoder, samples, config, device, 500 if device.type == "cuda" else 10)
    start = time.perf_counter()
    features = extract(samples, encoder, config, device)
    sync(device)
    extracted = time.perf_counter() - start
    start = time.perf_counter()
    cps(features.features, features.sub_features, min(args.k1, pool), 4, 42, config=config, device=device)
    clustered = time.perf_counter() - start
    start = time.perf_counter()
    points = torch.from_numpy(features.features)
    kmeans(points, min(args.k1, pool), 42, init="random", n_init=10, max_iter=10_000, tol=1e-4)
    host_kmeans = time.perf_counter() - start
    ours = extracted / pool
    result |= {
        "bare_ms": 1e3 * bare, "plain_ms": 1e3 * plain, "ours_ms": 1e3 * ours,
        "ours_over_bare": ours / bare, "plain_over_ours": plain / ours,
        "features_s": extracted, "clustering_s": clustered, "selection_s": extracted + clustered,
        "scikit_learn_coarse_kmeans_s": host_kmeans,
        "peak_host_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "peak_device_gb": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0,
    }  # fmt: skip
    print(f"  per pool patch: bare {1e3 * bare:.3f} ms | plain loop {1e3 * plain:.3f} ms | ours {1e3 * ours:.3f} ms")
    print(f"  ours / bare {ours / bare:.3f}   plain / ours {plain / ours:.2f}")
    print(
        f"  features {extracted:.2f} s + clustering {clustered:.2f} s = {extracted + clustered:.2f} s; "
        f"coarse k-means by scikit-learn {host_kmeans:.2f} s"
    )
    print(f"  peak memory: host {result['peak_host_gb']:.2f} GB, device {result['peak_device_gb']:.2f} GB")
    if args.agreement_encoder and device.type == "cuda":
        del features, points
        result |= agreement(samples, args.agreement_encoder, config, args.k1, device)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def random_encoder(name: str) -> Encoder:
    """An encoder with random weights, through a file as a user would give one."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pth"
        torch.save(timm.create_model(name, pretrained=False).state_dict(), path)
        return Encoder(name, weights=path)


def sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def bare_passes(encoder: Encoder, config: SelectionConfig, device: torch.device, quick: bool) -> float:
    """Seconds per pool patch of nothing but forward passes, in the same type, layout and batch as ours."""
    kind = getattr(torch, config.precision) if device.type == "cuda" else torch.float32
    net = encoder.net.eval().to(device=device, dtype=kind, memory_format=torch.channels_last)
    seconds = 0.0
    batch = config.batch if device.type == "cuda" else config.cpu_batch
    with torch.inference_mode():
        for size, number in ((config.size, batch), (config.size // 2, 4 * batch)):
            x = torch.rand(number, 3, size, size, device=device, dtype=kind).to(memory_format=torch.channels_last)
            net(x)
            times = []
            for _ in range(3 if quick else 5):
                sync(device)
                start = time.perf_counter()
                net(x)
                sync(device)
                times.append(time.perf_counter() - start)
            seconds += statistics.median(times) / batch
    encoder.net.float()
    return seconds


def plain_loop(encoder: Encoder, samples: list, config: SelectionConfig, device: torch.device, count: int) -> float:
    """Seconds per pool patch of a loop as one would first write it: PIL crops, stacked, batch 50, float32."""
    image = Image.fromarray(samples[0].image)
    rows, cols = grid("", image.height, image.width, config)
    encoder = encoder.eval().to(device)
    half = config.size // 2

    def tensor(r: int, c: int, size: int) -> torch.Tensor:
        crop = np.array(image.crop((c, r, c + size, r + size)))
        return torch.from_numpy(crop).permute(2, 0, 1).float() / 255

    seconds = 0.0
    with torch.inference_mode():
        for size, offsets in ((config.size, [(0, 0)]), (half, [(0, 0), (0, half), (half, 0), (half, half)])):
            places = [(r + y, c + x) for r, c in zip(rows[:count], cols[:count], strict=True) for y, x in offsets]
            encoder(torch.zeros(min(50, len(places)), 3, size, size, device=device))
            sync(device)
            start = time.perf_counter()
            for first in range(0, len(places), 50):
                batch = torch.stack([tensor(r, c, size) for r, c in places[first : first + 50]])
                encoder(batch.to(device)).cpu().numpy()
            seconds += (time.perf_counter() - start) / min(count, len(rows))
    return seconds


def agreement(samples: list, name: str, config: SelectionConfig, k1: int, device: torch.device) -> dict[str, dict]:
    """How many of the picks of CPS are those of float32, over four seeds, and the seconds of every strategy."""
    encoder = Encoder(name)
    exact = extract(samples, encoder, dataclasses.replace(config, precision="float32"), device)
    seeds = (42, 1, 2, 3)

    def run(pool: PatchFeatures) -> list[CPS]:
        return [cps(pool.features, pool.sub_features, k1, 4, s, config=config, device=device) for s in seeds]

    wanted, found = run(exact), {}
    # Rounding of another kind, far smaller: what the argmin and k-means make of any change at all.
    noise = np.float32(1 + 1e-6 * np.random.default_rng(0).standard_normal(exact.features.shape[1]))
    for precision in ("bfloat16", "float16", "float32 x (1 + 1e-6 noise)"):
        if precision in ("bfloat16", "float16"):
            pool = extract(samples, encoder, dataclasses.replace(config, precision=precision), device)
        else:
            pool = dataclasses.replace(exact, features=exact.features * noise, sub_features=exact.sub_features * noise)
        wrong = np.linalg.norm(pool.features - exact.features, axis=1) / np.linalg.norm(exact.features, axis=1)
        same, coarse = [], []
        for mine, theirs in zip(run(pool), wanted, strict=True):
            same.append(len(set(mine.chosen) & set(theirs.chosen)))
            table = np.zeros((k1, k1), int)
            np.add.at(table, (mine.coarse, theirs.coarse), 1)
            coarse.append(round(float(table.max(1).sum() / len(pool)), 4))
        found[precision] = {"feature_error": float(np.median(wrong)), "same_picks": same, "same_cluster": coarse}
        print(
            f"  {name}, {precision} against float32: {same} of {k1} picks the same (seeds {seeds}), "
            f"coarse clusters {coarse}, median feature error {np.median(wrong):.1e}"
        )
        del pool
    seconds = {}
    for strategy in STRATEGIES:
        if strategy != "cps-standardised":  # that one is cps and a haematoxylin channel
            start = time.perf_counter()
            coverage_table(exact, k1, 4, (42,), [strategy], config, device)
            seconds[strategy] = round(time.perf_counter() - start, 2)
    print(f"  seconds of each strategy on these features: {seconds}")
    return {"agreement": found, "strategy_seconds": seconds}


if __name__ == "__main__":
    main()
