"""Whole images: memory and time of a large one, and what worker processes are worth for several.

    python tests/bench/bench_inference.py [--size 10000] [--images 8] [--device cuda] [--model hoverlite]

`--model stub` reads its maps from the picture instead of computing them, so that what is measured is all but the
network: tiles, blending, watershed, joining. Peak memory is that of this process and its workers beyond what they held
before, 4 GB at most; the picture itself is not counted. Ratios are side by side.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from nucseg.inference import InferenceConfig, predict_all
from nucseg.models import build, config_class
from nucseg.models.hover import HoverConfig, HoverSegmenter, hv_targets
from nucseg.models.painting import nms_across, paint


class Stub(HoverSegmenter):
    """Takes the nucleus probability and HV from the colours of the picture."""

    def __init__(self, inference: InferenceConfig):
        super().__init__(HoverConfig(), inference)
        self.weight = nn.Parameter(torch.ones(()))

    def heads(self, images):
        nucleus = images[:, :1] * self.weight
        return torch.cat((0.5 - nucleus, nucleus - 0.5), dim=1) * 8, 2 * images[:, 1:] - 1


def picture(size: int, seed: int = 0) -> np.ndarray:
    """Make an image of touching discs that `Stub` can read: about 20,000 nuclei per 16 million pixels."""
    side = 1000
    rng, labels = np.random.default_rng(seed), np.zeros((side, side), dtype=np.int32)
    grid = np.arange(12, side, 27)
    for i, (y, x) in enumerate((y, x) for y in grid for x in grid):
        y, x = y + rng.uniform(-4, 4), x + rng.uniform(-4, 4)
        top, left = max(int(y) - 13, 0), max(int(x) - 13, 0)
        part = labels[top : top + 27, left : left + 27]
        yy, xx = np.mgrid[top : top + part.shape[0], left : left + part.shape[1]]
        part[((yy - y) ** 2 + (xx - x) ** 2 < rng.uniform(7, 13) ** 2) & (part == 0)] = i + 1
    inside, hv = hv_targets(torch.from_numpy(labels)[None])
    maps = torch.cat((inside[0][None].float(), (hv[0] + 1) / 2))
    tile = (maps * 255).round().byte().permute(1, 2, 0).numpy()
    times = -(-size // side)
    return np.ascontiguousarray(np.tile(tile, (times, times, 1))[:size, :size])


class Peak:
    """Watches the memory of this process and its children, megabytes beyond what was held at the start."""

    def __enter__(self) -> Peak:
        self.before, self.most, self.over = self._now(), 0.0, threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.over.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.over.wait(0.05):
            self.most = max(self.most, self._now() - self.before)

    @staticmethod
    def _now() -> float:
        total, own = 0, os.getpid()
        for status in Path("/proc").glob("[0-9]*/status"):
            try:
                lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
            except OSError:  # it has ended
                continue
            if int(lines["Pid"]) == own or int(lines["PPid"]) == own:
                total += int(lines.get("VmRSS", "0").split()[0])
        return total / 1024


def measure_detections(size: int, count: int) -> None:
    """Measure what Mask R-CNN does with the detections of a large image: suppression across tiles and painting."""
    rng = np.random.default_rng(0)
    corner = torch.from_numpy(rng.uniform(0, size - 30, (count, 2)).astype(np.float32))
    boxes = torch.cat((corner, corner + torch.from_numpy(rng.uniform(12, 28, (count, 2)).astype(np.float32))), dim=1)
    scores = torch.from_numpy(rng.uniform(0.5, 1, count).astype(np.float32))
    cuts = list(range(900, size, 900))
    with Peak() as peak:
        masks, began = torch.ones(count, 28, 28), time.perf_counter()
        keep = nms_across(boxes, scores, 0.4, cuts, cuts)
        found = paint(boxes[keep], scores[keep], masks[keep], (size, size))
        seconds = time.perf_counter() - began
    print(f"maskrcnn, {count} detections on {size} px: {len(found.scores)} nuclei, {seconds:.1f} s, {peak.most:.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=10000)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--workers", type=int, default=min(4, (os.cpu_count() or 2) - 1))
    parser.add_argument("--model", default="hoverlite" if torch.cuda.is_available() else "stub")
    parser.add_argument("--tta", default="none")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()

    def make(workers: int) -> HoverSegmenter:
        precision = "bf16" if options.device == "cuda" else "fp32"
        inference = InferenceConfig(workers=workers, tta=options.tta, precision=precision)
        if options.model == "stub":
            return Stub(inference).to(options.device)
        config = config_class(options.model)(inference=inference)
        return build(options.model, "efficientnet_lite0", config, pretrained=False).to(options.device).eval()

    print(f"{options.model}, {options.device}, torch {torch.__version__}, averaging {options.tta}")
    images = [picture(1000, seed) for seed in range(options.images)]
    times = {}
    for workers in (0, options.workers):
        model = make(workers)
        list(predict_all(model, images[:2], workers))  # warm up: kernels, processes
        began = time.perf_counter()
        list(predict_all(model, images, workers))
        times[workers] = (time.perf_counter() - began) / len(images)
        print(f"{times[workers]:8.3f} s per image of 1000 px, {workers} workers")
    print(f"{times[0] / times[options.workers]:8.2f} x as fast with workers")
    large = picture(options.size)
    for workers in (0, options.workers):
        model = make(workers)
        if options.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with Peak() as peak:
            began = time.perf_counter()
            found = model.predict_instances(large)
            seconds = time.perf_counter() - began
        device = torch.cuda.max_memory_allocated() / 2**20 if options.device == "cuda" else 0
        print(
            f"{options.size} px, {workers} workers: {len(found.scores)} nuclei, {seconds:.0f} s, "
            f"peak {peak.most:.0f} MB of memory and {device:.0f} MB on the device"
        )
        del found
    measure_detections(options.size, options.size**2 // 500)


if __name__ == "__main__":
    main()
