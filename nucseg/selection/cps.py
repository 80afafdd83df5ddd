"""Consistency-based patch selection (CPS): Sec. III-A, Eq. 1 and Algorithm 1.

Patches are clustered into K1 coarse clusters; inside each, the four sub-regions of every patch into K2 fine clusters.
From each coarse cluster k the patch x with the smallest cost is chosen,

    x* = argmin_{x in C_k}  |f(x) - c_k|  +  1/4 sum_p |f(x_p) - c*|  +  max_{i<j} |f(x_i) - f(x_j)|        (Eq. 1)
                               d1                      d2                          d3

with c_k the mean of the cluster, and c* the mean of its largest fine cluster: representative, typical in its parts, and
self-consistent.

Deviations: Algorithm 1 as printed never empties its list d between clusters; here the argmin is over one cluster
(REFERENCE 1.2). Every patch of a cluster is a candidate, as printed; the released code takes only those with a
sub-region in the largest fine cluster (`SelectionConfig.candidates`, A9). Ties go to the lowest index (A10). Where a
cluster has fewer different sub-regions than K2, it gets as many fine clusters as it has different ones.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nucseg.selection.config import SelectionConfig
from nucseg.selection.kmeans import kmeans

Conflicts = Callable[[np.ndarray, list[int]], np.ndarray]
CHUNK = 2048  # patches whose distances are computed at once: bounds the memory of the differences


class CPS(NamedTuple):
    """Result of `cps`."""

    chosen: np.ndarray  # (k1,) int64: row of the patch chosen from coarse cluster 0, 1, ...
    coarse: np.ndarray  # (n,) int64 in 0..k1-1
    fine: np.ndarray  # (n, 4) int64 in 0..k2-1, numbered inside the patch's own coarse cluster
    terms: np.ndarray  # (n, 3) float64: d1, d2, d3 of Eq. 1 for every patch


def cps(
    features: np.ndarray,
    sub_features: np.ndarray,
    k1: int,
    k2: int,
    seed: int,
    terms: Collection[int] = (1, 2, 3),
    config: SelectionConfig | None = None,
    device: str | torch.device = "cpu",
) -> CPS:
    """Choose one patch from each of `k1` coarse clusters (Algorithm 1).

    Parameters
    ----------
    features
        (n, d) floats: f of every patch.
    sub_features
        (n, 4, d) floats: f of its sub-regions, row-major.
    k1, k2
        Coarse clusters (patches to annotate), and fine clusters in each of them.
    seed
        Seeds both k-means, see `SelectionConfig.seeds`.
    terms
        Which of d1, d2, d3 are summed: (1, 2, 3) CPS, (1, 3) "w/o 2nd", (1, 2) "w/o 3rd", (1,) "K-means" (A44).
    config
        k-means settings and candidate rule; the others are not used here (exclusion needs places: `select`).
    device
        Where the distances are computed: ``"cpu"`` (scikit-learn's k-means) or a CUDA device (`kmeans`).

    Raises
    ------
    ValueError
        For shapes that do not fit, NaN or infinite features, k1 outside 1..n, k2 < 1, unknown terms, or fewer than
        k1 different patches.
    """
    config = config or SelectionConfig()
    coarse, fine, costs = cluster(features, sub_features, k1, k2, seed, config, device)
    allowed = candidates(coarse, fine, config)
    return CPS(choose(total(costs, terms), coarse, k1, allowed), coarse, fine, costs)


def cluster(
    features: np.ndarray | Tensor,
    sub_features: np.ndarray | Tensor,
    k1: int,
    k2: int,
    seed: int,
    config: SelectionConfig,
    device: str | torch.device = "cpu",
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both levels of clusters and the three terms: the fields coarse, fine, terms of `CPS`, for any subset of terms.

    Tensors, as `on_device` returns them, spare repeated calls the checks and the way to the device; of arrays the
    sub-regions go there one cluster at a time, since there may be more of them than fit.
    """
    points, parts = _tensor(features, "features", 2).to(device), _tensor(sub_features, "sub_features", 3)
    n, d = points.shape
    if parts.shape != (n, 4, d):
        raise ValueError(
            f"sub_features: expected shape ({n}, 4, {d}), four sub-regions of each patch, got {tuple(parts.shape)}"
        )
    if not 1 <= k1 <= n:
        raise ValueError(f"k1 must lie in 1..{n} (the number of patches), got {k1}; use a smaller step or k1")
    if k2 < 1:
        raise ValueError(f"k2 must be at least 1, got {k2}")
    coarse_seed, fine_seed = config.seeds(seed)
    how = {"init": config.init, "n_init": config.n_init, "tol": config.tol}
    coarse = kmeans(points, k1, coarse_seed, max_iter=config.coarse_max_iter, **how)
    found = len(np.unique(coarse))
    if found < k1:
        raise ValueError(f"k1 = {k1}, but only {found} patches differ in their features; choose a smaller k1")

    fine = np.zeros((n, 4), dtype=np.int64)
    terms = np.zeros((n, 3))
    for k in range(k1):
        members = np.flatnonzero(coarse == k)
        rows = torch.from_numpy(members)
        own, sub = points[rows.to(points.device)], parts[rows.to(parts.device)].to(device)
        flat = sub.reshape(-1, d)
        # A small cluster may have fewer (different) sub-regions than k2: then each of them is a fine cluster.
        labels = kmeans(flat, min(k2, len(flat)), fine_seed, max_iter=config.fine_max_iter, **how)
        fine[members] = labels.reshape(-1, 4)
        largest = torch.from_numpy(labels == np.bincount(labels).argmax()).to(points.device)
        terms[members] = _terms(own, sub, _mean(own), _mean(flat[largest]))
    return coarse, fine, terms


def on_device(features: np.ndarray, sub_features: np.ndarray, device: str | torch.device) -> tuple[Tensor, Tensor]:
    """Return features (n, d) and those of the sub-regions (n, 4, d), checked, as tensors on a device."""
    return _tensor(features, "features", 2).to(device), _tensor(sub_features, "sub_features", 3).to(device)


def total(terms: np.ndarray, which: Collection[int]) -> np.ndarray:
    """Sum the columns of `terms` (n, 3) named by `which`, a non-empty subset of {1, 2, 3}: the cost of Eq. 1, (n,)."""
    if not which or not set(which) <= {1, 2, 3} or len(set(which)) != len(which):
        raise ValueError(f"terms: expected a subset of (1, 2, 3), got {tuple(which)}")
    return terms[:, [i - 1 for i in sorted(which)]].sum(1)


def candidates(coarse: np.ndarray, fine: np.ndarray, config: SelectionConfig) -> np.ndarray:
    """Tell which patches may be chosen, (n,) bool: all of them, or the released code's restriction (A9)."""
    if config.candidates == "all":
        return np.ones(len(coarse), dtype=bool)
    allowed = np.zeros(len(coarse), dtype=bool)
    for k in np.unique(coarse):
        members = np.flatnonzero(coarse == k)
        largest = np.bincount(fine[members].ravel()).argmax()
        allowed[members] = (fine[members] == largest).any(1)
    return allowed


def choose(
    cost: np.ndarray, coarse: np.ndarray, k1: int, allowed: np.ndarray, conflicts: Conflicts | None = None
) -> np.ndarray:
    """Row of the cheapest allowed patch of each coarse cluster, lowest row first on ties; (k1,).

    Parameters
    ----------
    cost, coarse, allowed
        (n,) costs, coarse clusters, and which rows may be chosen. A cluster without an allowed row takes any of its
        rows.
    k1
        Coarse clusters; each has at least one row.
    conflicts
        None, or a function ``rows, picked -> (len(rows),) bool`` that tells which rows overlap the rows picked so far;
        clusters are then served in their order and take the next best row. Where every row conflicts, the rule is
        waived for that cluster.
    """
    chosen: list[int] = []
    for k in range(k1):
        rows = np.flatnonzero((coarse == k) & allowed)
        if not len(rows):
            rows = np.flatnonzero(coarse == k)
        if conflicts is not None and chosen:
            free = rows[~conflicts(rows, chosen)]
            rows = free if len(free) else rows
        chosen.append(int(rows[np.argmin(cost[rows])]))
    return np.asarray(chosen, dtype=np.int64)


def _tensor(values: np.ndarray | Tensor, name: str, ndim: int) -> Tensor:
    return values if isinstance(values, Tensor) else torch.from_numpy(_checked(values, name, ndim))


def _checked(values: np.ndarray, name: str, ndim: int) -> np.ndarray:
    values = np.asarray(values)
    if values.ndim != ndim or values.size == 0:
        raise ValueError(f"{name}: expected a non-empty array of {ndim} dimensions, got shape {values.shape}")
    if values.dtype not in (np.float32, np.float64):
        values = values.astype(np.float32)
    # One number decides (a sum is NaN or infinite if any value is), and only then are the bad rows looked for.
    if not np.isfinite(values.sum(dtype=np.float64)):
        bad = np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(1))
        if len(bad):
            raise ValueError(f"{name}: NaN or infinite values in {len(bad)} of {len(values)} rows, first row {bad[0]}")
    return np.ascontiguousarray(values)


def _mean(x: Tensor) -> Tensor:
    return x.mean(0, dtype=torch.float64).to(x.dtype)


def _terms(own: Tensor, sub: Tensor, centre: Tensor, typical: Tensor) -> np.ndarray:
    """d1, d2, d3 of Eq. 1 for the patches of one coarse cluster, (n, 3).

    Differences are taken before squaring: |a|^2 - 2ab + |b|^2 would round near neighbours.
    """
    norm = torch.linalg.vector_norm
    out = []
    for x, p in zip(own.split(CHUNK), sub.split(CHUNK), strict=True):
        d1 = norm(x - centre, dim=1)
        d2 = norm(p - typical, dim=2).mean(1)
        pairs = [norm(p[:, i] - p[:, j], dim=1) for i in range(4) for j in range(i + 1, 4)]
        out.append(torch.stack([d1, d2, torch.stack(pairs).amax(0)], dim=1))
    return torch.cat(out).double().cpu().numpy()
