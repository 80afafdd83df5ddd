"""How real do masks look? Distributions of shape and spacing, and their Wasserstein distance to those of the tissue."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.spatial import cKDTree
from scipy.stats import wasserstein_distance
from skimage.measure import regionprops_table

from nucseg.labels import check_label_map, relabel

STATISTICS = ("area", "eccentricity", "solidity", "nearest_neighbour", "density")


def shape_statistics(labels: np.ndarray | Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Measure every nucleus of one or several label maps; those cut by the border count as they are.

    Parameters
    ----------
    labels
        One label map (H, W), a stack (n, H, W), or a sequence of label maps.

    Returns
    -------
    statistics
        One float array per name. One entry per nucleus: ``area`` (pixels), ``eccentricity`` and ``solidity`` (0..1).
        ``nearest_neighbour``: distance of the centroid to the nearest other one in the same map (pixels), one entry
        per nucleus that is not alone. ``density``: foreground fraction, one entry per map.
    """
    maps = [labels] if isinstance(labels, np.ndarray) and labels.ndim == 2 else list(labels)
    found: dict[str, list[np.ndarray]] = {name: [np.empty(0)] for name in STATISTICS}
    for index, one in enumerate(maps):
        check_label_map(one, f"labels[{index}]")
        found["density"].append(np.array([(one > 0).mean()]))
        if not one.any():
            continue
        table = regionprops_table(relabel(one), properties=("area", "eccentricity", "solidity", "centroid"))
        for name in ("area", "eccentricity", "solidity"):
            found[name].append(table[name].astype(float))
        centres = np.stack([table["centroid-0"], table["centroid-1"]], axis=1)
        if len(centres) > 1:
            found["nearest_neighbour"].append(cKDTree(centres).query(centres, k=2)[0][:, 1])
    return {name: np.concatenate(parts) for name, parts in found.items()}


def realism(
    real: np.ndarray | Sequence[np.ndarray] | dict[str, np.ndarray],
    synthetic: np.ndarray | Sequence[np.ndarray] | dict[str, np.ndarray],
) -> dict[str, float]:
    """Return the Wasserstein distance between real and synthetic masks for every shape statistic.

    Parameters
    ----------
    real, synthetic
        Label maps, as `shape_statistics` takes them, or what it returned.

    Returns
    -------
    distances
        In the unit of each statistic, 0 for equal distributions; NaN where one side has no value (no nucleus, or none
        with a neighbour).
    """
    real, synthetic = (x if isinstance(x, dict) else shape_statistics(x) for x in (real, synthetic))
    return {
        name: float(wasserstein_distance(real[name], synthetic[name]))
        if real[name].size and synthetic[name].size
        else float("nan")
        for name in STATISTICS
    }
