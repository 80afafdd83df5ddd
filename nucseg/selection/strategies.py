"""Selection strategies behind one function: those of Table I, and others at the same budget.

Table I: ``cps``; its ablations ``cps-no-2nd``, ``cps-no-3rd`` and ``kmeans`` (A44); ``random-crop`` and
``random-centre-crop`` (A41). Beyond the paper (REFERENCE section 8, item 7): ``typiclust``, ``probcover``, ``k-center``
and ``cps-standardised``. All draw from the same pool of sliding-window patches, but for ``random-centre-crop``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from sklearn.metrics import pairwise_distances_argmin_min, pairwise_distances_chunked
from sklearn.preprocessing import normalize
from torch import nn

from ..config import nearest, to_plain
from ..data import Patch
from ..encoders import Encoder
from .config import SelectionConfig
from .content import nuclear_content
from .cps import candidates, choose, cluster, total
from .features import PatchFeatures, check_image, default_device, extract, grid
from .kmeans import kmeans

CPS_TERMS = {"cps": (1, 2, 3), "cps-no-2nd": (1, 3), "cps-no-3rd": (1, 2), "kmeans": (1,)}


@dataclass(frozen=True)
class Selection:
    """The patches to annotate, and how they were found.

    Attributes
    ----------
    strategy
        Its name.
    patches
        k1 places, in the order of their coarse clusters (or as drawn).
    clusters
        Coarse cluster of each patch, or None where the strategy has none.
    terms
        (d1, d2, d3) of Eq. 1 of each patch, or None.
    label_share
        Pixels in the union of the patches over pixels in all images (A5).
    switches
        Every setting in force, by name, as plain values.
    notes
        What a reader should know: waived rules, picks that the released code would have made otherwise.
    """

    strategy: str
    patches: tuple[Patch, ...]
    clusters: tuple[int, ...] | None
    terms: tuple[tuple[float, float, float], ...] | None
    label_share: float
    switches: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that JSON can hold."""
        return to_plain(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Selection:
        """Undo `to_dict`."""
        return cls(
            strategy=values["strategy"],
            patches=tuple(Patch(**patch) for patch in values["patches"]),
            clusters=None if values["clusters"] is None else tuple(values["clusters"]),
            terms=None if values["terms"] is None else tuple(tuple(t) for t in values["terms"]),
            label_share=values["label_share"],
            switches=dict(values["switches"]),
            notes=tuple(values["notes"]),
        )


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


def select(
    samples: Sequence[Any],
    strategy: str,
    k1: int,
    k2: int = 4,
    size: int | None = None,
    step: int | None = None,
    encoder: str | nn.Module = "resnet50",
    seed: int = 0,
    config: SelectionConfig | None = None,
    features: PatchFeatures | None = None,
    device: str | torch.device | None = None,
) -> Selection:
    """Choose `k1` patches to annotate.

    Parameters
    ----------
    samples
        Training images: objects with ``.id`` (unique) and ``.image`` (H, W, 3) uint8. Labels are never read.
    strategy
        One of `STRATEGIES`.
    k1, k2
        Patches to choose, and fine clusters per coarse cluster (CPS only).
    size, step
        Override `config.size` (256) and `config.step` (15).
    encoder
        Name for `nucseg.encoders.Encoder`, or a module; not used when `features` are given or not needed.
    seed
        Seeds the random strategies and the k-means (`SelectionConfig.seeds`).
    config
        All other settings.
    features
        The pool of these samples from `extract`, so that strategies and seeds share it; it must fit size and step.
    device
        For features and clustering; None: CUDA where there is one.

    Raises
    ------
    ValueError
        For an unknown strategy, repeated ids, k1 larger than the pool (or, for ``random-centre-crop``, than the number
        of images), an image smaller than a patch, or features of another pool.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown strategy {strategy!r}; {nearest(strategy, STRATEGIES)}")
    config = config or SelectionConfig()
    config = dataclasses.replace(config, size=size or config.size, step=step or config.step)
    device = default_device(device)
    ids = [str(sample.id) for sample in samples]
    if len(set(ids)) != len(ids):
        raise ValueError("the ids of the images are not unique")
    shapes = {i: _shape(sample) for i, sample in zip(ids, samples, strict=True)}
    grids = {i: grid(i, *shapes[i], config) for i in ids}
    pool_ids = np.repeat(ids, [len(grids[i][0]) for i in ids])
    pool_rows, pool_cols = (np.concatenate([grids[i][axis] for i in ids]) for axis in (0, 1))
    if k1 < 1 or k1 > len(pool_ids):
        raise ValueError(f"k1 must lie in 1..{len(pool_ids)} (the number of patches in the pool), got {k1}")

    switches = {**to_plain(config), "k1": k1, "k2": k2, "seed": seed}
    if strategy == "random-centre-crop":
        patches, picks = _centre_crops(shapes, k1, seed, config), Picks(np.arange(0))
    else:
        if strategy == "random-crop":
            pool = PatchFeatures(pool_ids, pool_rows, pool_cols, config.size, *_no_features(len(pool_ids)))
        else:
            if features is None:
                net = Encoder(encoder, normalise=config.normalise) if isinstance(encoder, str) else encoder
                features = extract(samples, net, config, device)
            same = all(
                np.array_equal(a, b)
                for a, b in zip(
                    (features.image_ids, features.rows, features.cols), (pool_ids, pool_rows, pool_cols), strict=True
                )
            )
            if not same or features.size != config.size:
                raise ValueError(
                    f"features: made from another pool ({len(features)} patches of {features.size}) than these images "
                    f"with size {config.size} and step {config.step} give ({len(pool_ids)}); extract them again"
                )
            pool = features
            switches["encoder"] = encoder if isinstance(encoder, str) else getattr(encoder, "name", "own module")
        content = None
        if strategy == "cps-standardised":
            content = nuclear_content((s.image for s in samples), grids.values(), config.size)
        picks = STRATEGIES[strategy](pool, Request(k1, k2, seed, config, device, content))
        patches = tuple(
            Patch(str(pool.image_ids[i]), int(pool.rows[i]), int(pool.cols[i]), pool.size) for i in picks.rows
        )
    return Selection(
        strategy,
        patches,
        None if picks.clusters is None else tuple(int(c) for c in picks.clusters),
        None if picks.terms is None else tuple(tuple(float(v) for v in row) for row in picks.terms),
        label_share(patches, shapes),
        switches,
        picks.notes,
    )


def label_share(patches: Sequence[Patch], shapes: Mapping[str, tuple[int, int]]) -> float:
    """Pixels in the union of the patches over the pixels of all images (A5); `shapes` by image id."""
    covered = 0
    for image_id in {patch.image_id for patch in patches}:
        mask = np.zeros(shapes[image_id], dtype=bool)
        for patch in patches:
            if patch.image_id == image_id:
                mask[patch.row : patch.row + patch.size, patch.col : patch.col + patch.size] = True
        covered += int(mask.sum())
    return covered / sum(height * width for height, width in shapes.values())


def overlap_rule(pool: PatchFeatures, limit: float) -> Callable[[np.ndarray, list[int]], np.ndarray]:
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


def _consistency(which: tuple[int, ...]) -> Callable[[PatchFeatures, Request], Picks]:
    """CPS and its ablations: Eq. 1 with the terms in `which`."""

    def strategy(pool: PatchFeatures, request: Request) -> Picks:
        config, k1 = request.config, request.k1
        coarse, fine, terms = _levels(pool, request)
        cost = total(terms, which)
        rule = None if config.exclusion is None else overlap_rule(pool, config.exclusion)
        rows = choose(cost, coarse, k1, candidates(coarse, fine, config), rule)
        other = dataclasses.replace(config, candidates="with-largest" if config.candidates == "all" else "all")
        differ = int((rows != choose(cost, coarse, k1, candidates(coarse, fine, other), rule)).sum())
        notes = (f"candidates={other.candidates!r} would choose {differ} of {k1} otherwise",) if differ else ()
        return Picks(rows, coarse[rows], terms[rows], notes)

    return strategy


def _levels(pool: PatchFeatures, request: Request) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if request.clusters is not None:
        return request.clusters
    args = (request.k1, request.k2, request.seed, request.config, request.device)
    return cluster(pool.features, pool.sub_features, *args)


def _standardised(pool: PatchFeatures, request: Request) -> Picks:
    """CPS with its terms z-scored inside each coarse cluster, spatial exclusion and a floor on nuclear content.

    The raw terms differ in scale, so the printed sum weighs them arbitrarily; and the most self-consistent patch of a
    cluster may hold hardly a nucleus. The floor is a quantile of the cluster's own content (haematoxylin, no labels).
    """
    if request.content is None:
        raise ValueError("cps-standardised needs the nuclear content of the patches, see nuclear_content")
    config = request.config
    coarse, fine, terms = _levels(pool, request)
    scores, allowed = np.zeros_like(terms), candidates(coarse, fine, config)
    for k in range(request.k1):
        members = coarse == k
        spread = terms[members].std(0)
        scores[members] = (terms[members] - terms[members].mean(0)) / np.where(spread > 0, spread, 1)
        allowed[members] &= request.content[members] >= np.quantile(request.content[members], config.content_floor)
    limit = config.standard_exclusion if config.exclusion is None else config.exclusion
    rows = choose(scores.sum(1), coarse, request.k1, allowed, overlap_rule(pool, limit))
    return Picks(rows, coarse[rows], terms[rows])


def _random_crops(pool: PatchFeatures, request: Request) -> Picks:
    """RndCrop: k1 patches of the pool, each equally likely, no patch twice."""
    return Picks(np.random.default_rng(request.seed).choice(len(pool), request.k1, replace=False))


def _centre_crops(
    shapes: Mapping[str, tuple[int, int]], k1: int, seed: int, config: SelectionConfig
) -> tuple[Patch, ...]:
    """RndCenCrop: the centre of k1 random images (A41)."""
    if k1 > len(shapes):
        raise ValueError(f"random-centre-crop takes one patch an image: k1 = {k1} needs more than {len(shapes)} images")
    ids = list(shapes)
    chosen = [ids[i] for i in np.random.default_rng(seed).choice(len(ids), k1, replace=False)]
    return tuple(Patch(i, *((side - config.size) // 2 for side in shapes[i]), config.size) for i in chosen)


def _centre_rows(pool: PatchFeatures, request: Request) -> Picks:
    """RndCenCrop as rows of a pool: the patch nearest to the centre of its image's grid (for `coverage` only)."""
    names, first = np.unique(pool.image_ids, return_index=True)
    names = names[np.argsort(first)]
    shapes = {}
    for name in names:
        mine = pool.image_ids == name
        shapes[str(name)] = tuple(int(v[mine].max()) + pool.size for v in (pool.rows, pool.cols))
    rows = []
    for patch in _centre_crops(shapes, request.k1, request.seed, request.config):
        far = np.hypot(pool.rows - patch.row, pool.cols - patch.col)
        rows.append(int(np.argmin(np.where(pool.image_ids == patch.image_id, far, np.inf))))
    return Picks(np.asarray(rows))


def _typiclust(pool: PatchFeatures, request: Request) -> Picks:
    """TypiClust: of each of k1 clusters the patch with the smallest mean distance to its K nearest neighbours.

    Hacohen, Dekel, Weinshall, Active Learning on a Budget, ICML 2022, with an empty labelled set; normalised features,
    K = min(20, cluster size), neighbours inside the cluster, as in avihu111/TypiClust.
    """
    x = normalize(pool.features)
    coarse = request.kmeans(x)
    rows = []
    for k in np.unique(coarse):
        members = np.flatnonzero(coarse == k)
        near = min(request.config.typicality_neighbours, len(members) - 1)

        def mean_distance(block: np.ndarray, _start: int, near: int = near) -> np.ndarray:
            return np.partition(block, near, axis=1)[:, : near + 1].sum(1)  # the patch itself adds 0

        far = np.concatenate(
            list(pairwise_distances_chunked(x[members], reduce_func=mean_distance, working_memory=256))
        )
        rows.append(members[np.argmin(far)])
    if len(rows) < request.k1:
        raise ValueError(f"k1 = {request.k1}, but only {len(rows)} patches differ in their features")
    rows = np.asarray(rows)
    return Picks(rows, coarse[rows])


def _probcover(pool: PatchFeatures, request: Request) -> Picks:
    """ProbCover: greedily the patch whose ball of radius delta holds most patches not covered yet.

    Yehuda, Dekel, Hacohen, Weinshall, Active Learning Through a Covering Lens, NeurIPS 2022; normalised features. Delta
    is the largest radius at which 95 % of the balls hold one pseudo-label only (k-means with k1 clusters), as in its
    Sec. 3.3. Deviation: the graph is built on a random part of the pool, since neighbouring windows are near copies.
    """
    generator = np.random.default_rng(request.seed)
    part = np.sort(generator.permutation(len(pool))[: max(request.config.graph_patches, request.k1)])
    x = normalize(pool.features[part])
    labels = request.kmeans(x)
    products = np.clip(2 - 2 * (x @ x.T), 0, None)
    distances = np.sqrt(products, out=products)
    enemy = np.where(labels[:, None] != labels, distances, np.inf).min(1)  # a ball is pure up to its nearest enemy
    delta = np.quantile(enemy, 1 - request.config.ball_purity) if np.isfinite(enemy).all() else np.inf
    inside = distances < delta
    np.fill_diagonal(inside, True)
    rows, open_ = [], np.ones(len(part), dtype=bool)
    for _ in range(request.k1):
        gain = (inside & open_).sum(1)
        gain[rows] = -1
        rows.append(int(gain.argmax()))
        open_ &= ~inside[rows[-1]]
    return Picks(part[rows], notes=(f"delta = {delta:.4f}, {1 - open_.mean():.1%} of the graph covered",))


def _k_center(pool: PatchFeatures, request: Request) -> Picks:
    """k-center greedy: each time the patch farthest from all picks; the first at random.

    Sener, Savarese, Active Learning for Convolutional Neural Networks: A Core-Set Approach, ICLR 2018, algorithm 1.
    """
    x = pool.features
    rows = [int(np.random.default_rng(request.seed).integers(len(pool)))]
    far = np.full(len(pool), np.inf)
    for _ in range(request.k1 - 1):
        far = np.minimum(far, pairwise_distances_argmin_min(x, x[rows[-1:]])[1])
        far[rows] = -1
        rows.append(int(far.argmax()))
    return Picks(np.asarray(rows))


def _shape(sample: Any) -> tuple[int, int]:
    """(H, W) of an image, without decoding it where the sample knows."""
    shape = getattr(sample, "shape", None)
    return tuple(int(n) for n in (shape or check_image(sample.image, sample.id).shape)[:2])


def _no_features(n: int) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((n, 0), np.float32), np.zeros((n, 4, 0), np.float32)


# Each takes a pool and a request and returns picks.
STRATEGIES: dict[str, Callable[[PatchFeatures, Request], Picks]] = {
    **{name: _consistency(which) for name, which in CPS_TERMS.items()},
    "random-crop": _random_crops,
    "random-centre-crop": _centre_rows,
    "typiclust": _typiclust,
    "probcover": _probcover,
    "k-center": _k_center,
    "cps-standardised": _standardised,
}
