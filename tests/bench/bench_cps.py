"""How fast the selection is, side by side: bare forward passes, a plain patch-by-patch loop, and ours.

    python tests/bench/bench_cps.py --data-root DIR [--dataset kumar] [--encoder resnet50] [--random-weights] [--quick]

One pool patch means one patch and its four sub-regions. ``--random-weights`` makes a state dict on the spot, for timing
only: its picks mean nothing. ``--agreement-encoder`` names the encoder whose picks are compared in bfloat16 and
float32 (on a GPU).
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
from nucseg.selection import STRATEGIES, SelectionConfig, coverage_table, cps, extract
from nucseg.selection.features import grid
from nucseg.selection.kmeans import kmeans


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
        result["agreement"] = agreement(samples, args.agreement_encoder, config, args.k1, device)
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
    kind = torch.bfloat16 if device.type == "cuda" else torch.float32
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


def agreement(samples: list, name: str, config: SelectionConfig, k1: int, device: torch.device) -> dict[str, float]:
    """How many of the picks of CPS are the same in bfloat16 and float32, over four seeds."""
    encoder = Encoder(name)
    pools = {bf16: extract(samples, encoder, dataclasses.replace(config, bf16=bf16), device) for bf16 in (True, False)}
    wrong = np.linalg.norm(pools[True].features - pools[False].features, axis=1)
    error = float(np.median(wrong / np.linalg.norm(pools[False].features, axis=1)))
    same, near, coarse = [], [], []
    for seed in (42, 1, 2, 3):
        low, high = (
            cps(p.features, p.sub_features, k1, 4, seed, config=config, device=device)
            for p in (pools[True], pools[False])
        )
        pool = pools[False]
        same.append(len(set(low.chosen) & set(high.chosen)))
        # A pick that moved by at most one step shows the same tissue.
        moved = [
            min(
                max(abs(int(pool.rows[i] - pool.rows[j])), abs(int(pool.cols[i] - pool.cols[j])))
                if pool.image_ids[i] == pool.image_ids[j] else 10**6
                for j in high.chosen
            )
            for i in low.chosen
        ]  # fmt: skip
        near.append(sum(m <= config.step for m in moved))
        table = np.zeros((k1, k1), int)
        np.add.at(table, (low.coarse, high.coarse), 1)
        coarse.append(float(table.max(1).sum() / len(pool)))
        print(
            f"  bf16 vs fp32, {name}, seed {seed}: {same[-1]} of {k1} picks the same, {near[-1]} within one step; "
            f"coarse clusters agree on {coarse[-1]:.2%}"
        )
    print(f"  median relative error of bf16 features {error:.4f}")
    seconds = {}
    for strategy in STRATEGIES:
        if strategy != "cps-standardised":  # that one is cps and a haematoxylin channel
            start = time.perf_counter()
            coverage_table(pools[True], k1, 4, (42,), [strategy], config, device)
            seconds[strategy] = round(time.perf_counter() - start, 2)
    print(f"  seconds of each strategy on these features: {seconds}")
    return {
        "strategy_seconds": seconds,
        "feature_error": error,
        "same": same,
        "within_one_step": near,
        "coarse_agreement": coarse,
    }


if __name__ == "__main__":
    main()
