"""Euclidean k-means of Sec. III-A: scikit-learn on a CPU, the same algorithm in torch on a GPU.

The GPU path draws the same initial centres from the same random state, runs Lloyd's algorithm with the same stopping
rule, relocation of empty clusters and choice among the initialisations, so that a seed means the same on both; only
rounding differs. It runs all initialisations at once, two matrix products an iteration.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from jaxtyping import Float
from sklearn.cluster import KMeans, kmeans_plusplus
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor


def kmeans(
    x: Float[Tensor, "n d"], k: int, seed: int, *, init: str, n_init: int, max_iter: int, tol: float
) -> np.ndarray:
    """Cluster the rows of `x` into `k` groups.

    Parameters
    ----------
    x
        Float32 or float64 vectors; their device decides where the work is done.
    k
        Clusters, at most n.
    seed
        As scikit-learn's ``random_state``.
    init, n_init, max_iter, tol
        As in `sklearn.cluster.KMeans`.

    Returns
    -------
    np.ndarray
        (n,) int64 labels 0..k-1. Fewer than `k` different values when fewer than `k` rows differ.
    """
    if x.device.type == "cpu":
        model = KMeans(k, init=init, n_init=n_init, max_iter=max_iter, tol=tol, random_state=seed)
        with warnings.catch_warnings():
            # Fewer distinct rows than clusters: the caller sees the missing labels and decides.
            warnings.filterwarnings("ignore", "Number of distinct clusters", ConvergenceWarning)
            return model.fit_predict(x.numpy()).astype(np.int64)
    return _lloyd(x, k, seed, init, n_init, max_iter, tol)


def _lloyd(x: Tensor, k: int, seed: int, init: str, n_init: int, max_iter: int, tol: float) -> np.ndarray:
    n, _ = x.shape
    starts = _initial_centres(x, k, seed, init, n_init)
    x = x - x.mean(0)  # as scikit-learn does: distances of centred data round less
    centres = x[starts]  # (runs, k, d)
    limit = tol * x.var(0, unbiased=False).mean()
    running = torch.ones(n_init, dtype=torch.bool, device=x.device)
    old = torch.full((n_init, n), -1, device=x.device)
    for _ in range(max_iter):
        labels, distances = _assign(x, centres)
        moved = _means(x, labels, distances, k, centres)
        # A run that has stopped keeps its centres; it is carried along because all runs share the matrix products.
        same = (labels == old).all(1)
        shift = ((moved - centres) ** 2).sum((1, 2))
        centres = torch.where(running[:, None, None], moved, centres)
        running &= ~same & (shift > limit)
        old = labels
        if not running.any():
            break
    labels, distances = _assign(x, centres)
    inertia = distances.double().sum(1).cpu().numpy()
    found = labels.cpu().numpy()
    best = 0
    for run in range(1, n_init):
        if inertia[run] < inertia[best] and not _same_clustering(found[run], found[best]):
            best = run
    return found[best].astype(np.int64)


def _initial_centres(x: Tensor, k: int, seed: int, init: str, n_init: int) -> Tensor:
    """Row numbers of the first centres, (runs, k), drawn as scikit-learn draws them."""
    state = np.random.RandomState(seed)  # scikit-learn's generator: a seed means the same
    n = len(x)
    if init == "k-means++":
        host = (x - x.mean(0)).cpu().numpy()
        rows = [kmeans_plusplus(host, k, random_state=state)[1] for _ in range(n_init)]
    else:
        weight = np.ones(n, dtype=np.float32)
        rows = [state.choice(n, size=k, replace=False, p=weight / weight.sum()) for _ in range(n_init)]
    return torch.as_tensor(np.stack(rows), device=x.device)


def _assign(x: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest centre of every row in every run, and the squared distance to it; both (runs, n)."""
    runs, k, d = centres.shape
    # |x|^2 is the same for all centres of a row, so it is added after the minimum, where it cannot round the choice.
    scores = (centres**2).sum(2)[:, None] - 2 * (x @ centres.reshape(-1, d).T).view(-1, runs, k).transpose(0, 1)
    nearest, labels = scores.min(2)
    return labels, (nearest + (x**2).sum(1)).clamp_min(0)


def _means(x: Tensor, labels: Tensor, distances: Tensor, k: int, centres: Tensor) -> Tensor:
    """Mean of every cluster of every run; an empty one takes the row farthest from its centre (scikit-learn)."""
    member = torch.nn.functional.one_hot(labels, k).to(x.dtype)  # (runs, n, k)
    counts = member.sum(1)
    sums = torch.einsum("rnk,nd->rkd", member, x)
    for run in (counts == 0).any(1).nonzero().flatten().tolist():
        empty = (counts[run] == 0).nonzero().flatten()
        rows = distances[run].topk(len(empty)).indices
        for cluster, row in zip(empty.tolist(), rows.tolist(), strict=True):
            home = labels[run, row]
            sums[run, home] -= x[row]
            counts[run, home] -= 1
            sums[run, cluster], counts[run, cluster] = x[row], 1
    return torch.where(counts[..., None] > 0, sums / counts[..., None].clamp_min(1), centres)


def _same_clustering(a: np.ndarray, b: np.ndarray) -> bool:
    """Tell whether two labelings differ in the names of the clusters only."""
    pairs = np.unique(np.stack([a, b]), axis=1)
    return len(pairs[0]) == len(np.unique(a)) == len(np.unique(b))
