"""Strategies beyond the paper, at the same budget and from the same pool (REFERENCE section 8, item 7)."""

from __future__ import annotations

import numpy as np
from sklearn.metrics import pairwise_distances_argmin_min, pairwise_distances_chunked
from sklearn.preprocessing import normalize

from nucseg.selection.cps import candidates, choose
from nucseg.selection.features import PatchFeatures
from nucseg.selection.strategies import Picks, Request, levels, overlap_rule, waived


def standardised(pool: PatchFeatures, request: Request) -> Picks:
    """CPS with its terms z-scored inside each coarse cluster, spatial exclusion and a floor on nuclear content.

    The raw terms differ in scale, so the printed sum weighs them arbitrarily; and the most self-consistent patch of a
    cluster may hold hardly a nucleus. The floor is a quantile of the cluster's own content (haematoxylin, no labels).
    """
    if request.content is None:
        raise ValueError("cps-standardised needs the nuclear content of the patches, see nuclear_content")
    config = request.config
    coarse, fine, terms = levels(pool, request)
    scores, allowed = np.zeros_like(terms), candidates(coarse, fine, config)
    for k in range(request.k1):
        members = coarse == k
        spread = terms[members].std(0)
        scores[members] = (terms[members] - terms[members].mean(0)) / np.where(spread > 0, spread, 1)
        allowed[members] &= request.content[members] >= np.quantile(request.content[members], config.content_floor)
    limit = config.standard_exclusion if config.exclusion is None else config.exclusion
    rule = overlap_rule(pool, limit)
    rows = choose(scores.sum(1), coarse, request.k1, allowed, rule)
    return Picks(rows, coarse[rows], terms[rows], waived(rows, rule))


def typiclust(pool: PatchFeatures, request: Request) -> Picks:
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


def probcover(pool: PatchFeatures, request: Request) -> Picks:
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
    # The lower of the two neighbours, so that the purity is reached; one label alone leaves every ball pure.
    delta = np.quantile(enemy, 1 - request.config.ball_purity, method="lower") if np.isfinite(enemy).all() else np.inf
    inside = distances < delta
    np.fill_diagonal(inside, True)
    rows, open_ = [], np.ones(len(part), dtype=bool)
    for _ in range(request.k1):
        gain = (inside & open_).sum(1)
        gain[rows] = -1
        rows.append(int(gain.argmax()))
        open_ &= ~inside[rows[-1]]
    return Picks(part[rows], notes=(f"delta = {delta:.6f}, {1 - open_.mean():.1%} of the graph covered",))


def k_center(pool: PatchFeatures, request: Request) -> Picks:
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
