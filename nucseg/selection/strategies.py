"""The strategies of Table I: what each makes of a pool of patches.

``cps`` (Sec. III-A), its ablations ``cps-no-2nd``, ``cps-no-3rd`` and ``kmeans`` (A44), ``random-crop`` and
``random-centre-crop`` (A41). All draw from the same pool of sliding windows, but for ``random-centre-crop``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from nucseg.patches import Patch
from nucseg.selection.config import SelectionConfig
from nucseg.selection.cps import Conflicts, candidates, choose, cluster, total
from nucseg.selection.features import PatchFeatures
from nucseg.selection.kmeans import kmeans

CPS_TERMS = {"cps": (1, 2, 3), "cps-no-2nd": (1, 3), "cps-no-3rd": (1, 2), "kmeans": (1,)}


@dataclass(frozen=True)
class Picks:
    """What a strategy finds in a pool: rows of the pool, and their clusters and terms where there are any."""

    rows: np.ndarray  # (k1,)
    clusters: np.ndarray | None = None  # (k1,)
    terms: np.ndarray | None = None  # (k1, 3)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """What a strategy is asked for."""

    k1: int
    k2: int
    seed: int
    config: SelectionConfig
    device: torch.device
    content: np.ndarray | None = None  # (n,) nuclear content of every patch
    clusters: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None  # result of `cluster`, if it is known already

    def kmeans(self, x: np.ndarray) -> np.ndarray:
        """Coarse labels of the rows of `x`, (n,), k1 clusters."""
        how = {"init": self.config.init, "n_init": self.config.n_init, "tol": self.config.tol}
        points = torch.from_numpy(x).to(self.device)
        return kmeans(points, self.k1, self.config.seeds(self.seed)[0], max_iter=self.config.coarse_max_iter, **how)


def overlap_rule(pool: PatchFeatures, limit: float) -> Conflicts:
    """Return the rule for `choose`: does a patch overlap an earlier pick of its image with an IoU above `limit`?"""

    def conflicts(rows: np.ndarray, picked: list[int]) -> np.ndarray:
        found = np.zeros(len(rows), dtype=bool)
        for p in picked:
            dy, dx = (np.clip(pool.size - np.abs(v[rows] - v[p]), 0, None) for v in (pool.rows, pool.cols))
            shared = dy * dx
            iou = shared / (2 * pool.size**2 - shared)
            found |= (pool.image_ids[rows] == pool.image_ids[p]) & (iou > limit)
        return found

    return conflicts


def waived(rows: np.ndarray, rule: Conflicts | None) -> tuple[str, ...]:
    """Say how often every patch of a cluster overlapped earlier picks, so that the exclusion had to be waived."""
    times = sum(bool(rule(rows[i : i + 1], list(rows[:i]))[0]) for i in range(1, len(rows))) if rule else 0
    return (f"exclusion waived for {times} of {len(rows)} picks",) if times else ()


def consistency(which: tuple[int, ...]) -> Callable[[PatchFeatures, Request], Picks]:
    """CPS and its ablations: Eq. 1 with the terms in `which`."""

    def strategy(pool: PatchFeatures, request: Request) -> Picks:
        config, k1 = request.config, request.k1
        coarse, fine, terms = levels(pool, request)
        cost = total(terms, which)
        rule = None if config.exclusion is None else overlap_rule(pool, config.exclusion)
        rows = choose(cost, coarse, k1, candidates(coarse, fine, config), rule)
        other = dataclasses.replace(config, candidates="with-largest" if config.candidates == "all" else "all")
        differ = int((rows != choose(cost, coarse, k1, candidates(coarse, fine, other), rule)).sum())
        notes = (f"candidates={other.candidates!r} would choose {differ} of {k1} otherwise",) if differ else ()
        return Picks(rows, coarse[rows], terms[rows], notes + waived(rows, rule))

    return strategy


def levels(pool: PatchFeatures, request: Request) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if request.clusters is not None:
        return request.clusters
    args = (request.k1, request.k2, request.seed, request.config, request.device)
    return cluster(pool.features, pool.sub_features, *args)


def random_crops(pool: PatchFeatures, request: Request) -> Picks:
    """RndCrop: k1 patches of the pool, each equally likely, no patch twice."""
    return Picks(np.random.default_rng(request.seed).choice(len(pool), request.k1, replace=False))


def centre_crops(
    shapes: Mapping[str, tuple[int, int]], k1: int, seed: int, config: SelectionConfig
) -> tuple[Patch, ...]:
    """RndCenCrop: the centre of k1 random images (A41)."""
    if k1 > len(shapes):
        raise ValueError(f"random-centre-crop takes one patch an image: k1 = {k1} needs more than {len(shapes)} images")
    ids = list(shapes)
    chosen = [ids[i] for i in np.random.default_rng(seed).choice(len(ids), k1, replace=False)]
    return tuple(Patch(i, *((side - config.size) // 2 for side in shapes[i]), config.size) for i in chosen)


def centre_rows(pool: PatchFeatures, request: Request) -> Picks:
    """RndCenCrop as rows of a pool: the patch nearest to the centre of its image's grid (for `coverage` only)."""
    names, first = np.unique(pool.image_ids, return_index=True)
    names = names[np.argsort(first)]
    shapes = {}
    for name in names:
        mine = pool.image_ids == name
        shapes[str(name)] = tuple(int(v[mine].max()) + pool.size for v in (pool.rows, pool.cols))
    rows = []
    for patch in centre_crops(shapes, request.k1, request.seed, request.config):
        far = np.hypot(pool.rows - patch.row, pool.cols - patch.col)
        rows.append(int(np.argmin(np.where(pool.image_ids == patch.image_id, far, np.inf))))
    return Picks(np.asarray(rows))
