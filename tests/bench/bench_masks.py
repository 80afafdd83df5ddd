"""Mask synthesis on the densest patches: CPU seconds for 50 masks, beside transforming the whole canvas each time.

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


def by_whole_transform(patch: np.ndarray, placements: int) -> None:
    """The same rule with a distance transform of the whole canvas for every nucleus: one mask."""
    rng, pool = np.random.default_rng(0), nucleus_pool(patch)
    canvas = np.zeros((300, 300), bool)
    canvas[150, 150] = True
    for _ in range(placements):
        nucleus = pool.nuclei[rng.integers(len(pool.nuclei))]
        free = np.argwhere(ndimage.distance_transform_edt(~canvas) >= nucleus.reach + 2)
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
        by_whole_transform(patch, placements)
        seconds = 50 * (time.process_time() - start)
        print(f"  a transform of the whole canvas for each of {placements} nuclei: 50 masks {seconds:.0f} s CPU")


if __name__ == "__main__":
    main()
