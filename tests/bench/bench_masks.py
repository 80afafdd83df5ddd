"""Mask synthesis on the densest patch at hand: seconds of one core for 50 masks, and what a plain dilation would take.

Usage: OMP_NUM_THREADS=1 NUCSEG_DATA=<folder with kumar/> python tests/bench/bench_masks.py
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from nucseg.masks import MaskConfig, nucleus_pool, synthesize_with_report


def densest(folder: Path, by_count: bool) -> np.ndarray:
    """The 256 x 256 training patch with the largest foreground, or with the most nuclei."""
    best, best_score = None, -1.0
    for path in sorted(folder.glob("*.png")):
        labels = np.array(Image.open(path)).astype(np.int32)
        for row in range(0, labels.shape[0] - 255, 124):
            for col in range(0, labels.shape[1] - 255, 124):
                patch = labels[row : row + 256, col : col + 256]
                score = np.unique(patch).size if by_count else (patch > 0).mean()
                if score > best_score:
                    best, best_score = patch, score
    return best


def by_dilation(patch: np.ndarray, count: int, placements: int) -> None:
    """The same placements by dilating the whole canvas for every nucleus, as the paper puts it."""
    rng, pool = np.random.default_rng(0), nucleus_pool(patch)
    for _ in range(count):
        canvas = np.zeros((300, 300), bool)
        for _ in range(placements):
            nucleus = pool.nuclei[rng.integers(len(pool.nuclei))]
            reach = int(np.ceil(nucleus.reach)) + 1
            rows, cols = np.mgrid[-reach : reach + 1, -reach : reach + 1]
            free = np.argwhere(~ndimage.binary_dilation(canvas, rows**2 + cols**2 <= reach**2))
            if len(free):
                row, col = free[rng.integers(len(free))]
                top, left = max(row - nucleus.centre[0], 0), max(col - nucleus.centre[1], 0)
                part = canvas[top : top + nucleus.mask.shape[0], left : left + nucleus.mask.shape[1]]
                part |= nucleus.mask[: part.shape[0], : part.shape[1]]


def main() -> None:
    """Print one line per patch and setting."""
    folder = Path(os.environ["NUCSEG_DATA"]) / "kumar" / "labels"
    for name, by_count in (("largest foreground", False), ("most nuclei", True)):
        patch = densest(folder, by_count)
        print(f"{name}: {np.unique(patch).size - 1} nuclei, {(patch > 0).mean():.0%} foreground")
        for touch in (0.0, None):
            start = time.process_time()
            _, report = synthesize_with_report(patch, 50, 256, 0, MaskConfig(touch=touch))
            seconds = time.process_time() - start
            density = report.achieved.mean() / report.wanted
            print(
                f"  touch={touch}: 50 masks {seconds:.2f} s CPU, {density:.0%} of the patch's density, "
                f"{report.reached.sum()} reached it, {report.passed.mean():.0f} nuclei passed over"
            )
        placements = int(np.mean([len(p) for p in report.placements]))
        start = time.process_time()
        by_dilation(patch, 1, placements)
        seconds = 50 * (time.process_time() - start)
        print(f"  dilating the canvas for each of {placements} nuclei: 50 masks {seconds:.0f} s CPU")


if __name__ == "__main__":
    main()
