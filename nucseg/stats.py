"""Paired comparison of two systems over the same images (Sec. IV-C; REFERENCE 4.6, A40).

The paper prints P-values of paired t-tests. With one value per test image they are impossible (5.60e-29 at n = 14 needs
|t| = 478), so the unit must have been patches or nuclei, which are not independent. Here the unit is the image: average
a system's seeds per image first, then test. Every result carries its n.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

ROUNDING = 1e-12  # scores lie in [0, 1]; a smaller difference is floating-point noise, and noise must not be ranked


class PairedTests(NamedTuple):
    """The comparison of a with b over n images; differences are a - b."""

    mean_difference: float
    ci_low: float
    ci_high: float
    t_p: float
    wilcoxon_p: float
    n: int


def paired_tests(
    a: ArrayLike,
    b: ArrayLike,
    ids_a: Sequence[Hashable] | None = None,
    ids_b: Sequence[Hashable] | None = None,
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> PairedTests:
    """Compare two systems by their scores on the same images.

    Parameters
    ----------
    a, b
        One score per image, (n,), in [0, 1]. Average over seeds before the call: seeds are no further images.
    ids_a, ids_b
        The images' names, both or neither. With names the pairs are made by name, in any order; without them a[i] and
        b[i] must be the same image.
    level
        Coverage of the interval, in (0, 1).
    resamples, seed
        Bootstrap resamples of the images (percentile method, which is a little narrow at n around 14), and their seed.

    Returns
    -------
    PairedTests
        Mean of a - b, its bootstrap interval, the two-sided paired t and Wilcoxon signed-rank p (zero differences are
        left out of the ranking; exact for small n), and n. Special cases:

        - fewer than two images: the interval and both p are NaN (and so is the mean when there is none);
        - no difference on any image: both p are 1 and the interval is [0, 0];
        - the same non-zero difference on every image: the t p is NaN, for there is no spread to test it against.

    Raises
    ------
    ValueError
        If the lengths or names do not fit, a name occurs twice, or a score is NaN or infinite: metrics never give
        NaN, so one is a fault upstream, and leaving the image out would hide it.
    """
    difference = _differences(a, b, ids_a, ids_b)
    n = difference.size
    if not 0 < level < 1:
        raise ValueError(f"level: expected a number between 0 and 1, got {level}")
    if resamples < 1:
        raise ValueError(f"resamples: expected at least 1, got {resamples}")
    nan = float("nan")
    if n < 2:
        return PairedTests(float(difference[0]) if n else nan, nan, nan, nan, nan, n)
    if not difference.any():
        return PairedTests(0.0, 0.0, 0.0, 1.0, 1.0, n)
    draws = np.random.default_rng(seed).integers(0, n, size=(resamples, n))
    low, high = np.quantile(difference[draws].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    constant = np.ptp(difference) < ROUNDING
    t_p = nan if constant else float(stats.ttest_1samp(difference, 0.0).pvalue)
    wilcoxon_p = float(stats.wilcoxon(difference[difference != 0]).pvalue)
    return PairedTests(float(difference.mean()), float(low), float(high), t_p, wilcoxon_p, n)


def effect_size(
    a: ArrayLike,
    b: ArrayLike,
    ids_a: Sequence[Hashable] | None = None,
    ids_b: Sequence[Hashable] | None = None,
) -> float:
    """Return Cohen's d of paired scores: the mean of a - b over its standard deviation between images (n - 1).

    It is 0 when there is no difference at all, and NaN with fewer than two images or when every image differs by the
    same amount. Arguments and errors are those of `paired_tests`.
    """
    difference = _differences(a, b, ids_a, ids_b)
    if difference.size < 2:
        return float("nan")
    if not difference.any():
        return 0.0
    if np.ptp(difference) < ROUNDING:
        return float("nan")
    return float(difference.mean() / difference.std(ddof=1))


class SeedTest(NamedTuple):
    """The comparison of a with b over their seeds; the difference is a - b."""

    mean_difference: float
    ci_low: float
    ci_high: float
    t_p: float


def seed_test(a: ArrayLike, b: ArrayLike, *, same: bool = False, level: float = 0.95) -> SeedTest:
    """Compare two systems by the mean score of each of their seeds: would other seeds have given the same order?

    `paired_tests` asks about other images for the systems as they are trained; this asks about other choices of patches
    and other weights on the same images. With three or four seeds only large differences show.

    Parameters
    ----------
    a, b
        One mean score per seed, (n_a,) and (n_b,).
    same
        Whether a[i] and b[i] share their seed's choice of patches, which makes them pairs (paired t). Otherwise the
        seeds of one have nothing to do with those of the other (Welch's t).
    level
        Coverage of the interval, in (0, 1).

    Returns
    -------
    SeedTest
        Interval and p are NaN where a system has fewer than two seeds, or nothing varies between seeds.

    Raises
    ------
    ValueError
        If a score is NaN or infinite, or pairs are asked for and the numbers of seeds differ.
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    for name, scores in (("a", a), ("b", b)):
        if scores.ndim != 1 or not scores.size:
            raise ValueError(f"{name}: expected one score per seed, got shape {scores.shape}")
        _check_finite(name, scores, None)
    if same and a.size != b.size:
        raise ValueError(f"a and b: {a.size} and {b.size} seeds cannot be pairs")
    if not 0 < level < 1:
        raise ValueError(f"level: expected a number between 0 and 1, got {level}")
    difference = float(a.mean() - b.mean())
    spread = np.ptp(a - b) if same else max(np.ptp(a), np.ptp(b))
    if min(a.size, b.size) < 2 or spread < ROUNDING:
        return SeedTest(difference, *[float("nan")] * 3)
    test = stats.ttest_rel(a, b) if same else stats.ttest_ind(a, b, equal_var=False)
    low, high = test.confidence_interval(level)
    return SeedTest(difference, float(low), float(high), float(test.pvalue))


def crossed_bootstrap(
    a: ArrayLike, b: ArrayLike, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """Compare two systems over seeds and images at once: would other seeds on other images have given the same order?

    Seeds of a, seeds of b, and images, which both share, are drawn anew in every resample. The interval is wider than
    that over seeds (`seed_test`) or over images (`paired_tests`), for each of these holds the other as it is.

    Parameters
    ----------
    a, b
        One score per seed and image, (n_a, n) and (n_b, n), with the same images in the same columns.
    level
        Coverage of the interval, in (0, 1).
    resamples, seed
        Bootstrap resamples (percentile method), and their seed.

    Returns
    -------
    tuple of float
        The mean difference a - b, and the ends of its interval; NaN with fewer than two seeds or images.

    Raises
    ------
    ValueError
        If the numbers of images differ, or a score is NaN or infinite.
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or not a.size or not b.size:
        raise ValueError(f"a and b: expected (seeds, images) with equal images, got {a.shape} and {b.shape}")
    for name, scores in (("a", a), ("b", b)):
        _check_finite(name, scores.ravel(), None)
    difference = float(a.mean() - b.mean())
    if min(*a.shape, len(b)) < 2:
        return difference, float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    of_a, of_b, of_images = (_weights(rng, n, resamples) for n in (len(a), len(b), a.shape[1]))
    drawn = ((of_a @ a - of_b @ b) * of_images).sum(axis=1)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return difference, float(low), float(high)


def _weights(rng: np.random.Generator, n: int, resamples: int) -> np.ndarray:
    """Return how often each of n things is in each resample, as shares."""
    return rng.multinomial(n, np.full(n, 1 / n), size=resamples) / n


class RankTest(NamedTuple):
    """Several systems on the same images, compared by their ranks (Demsar 2006).

    Attributes
    ----------
    systems, mean_ranks
        Best first; rank 1 is the best system of an image, ties share their mean rank.
    friedman_p
        P of no difference between any of them.
    critical_difference
        Nemenyi's: mean ranks that are closer are not told apart at `level`.
    n
        Images.
    level
        Of significance, 0.05.
    groups
        First and last place of every longest run of systems that are not told apart.
    """

    systems: tuple[str, ...]
    mean_ranks: tuple[float, ...]
    friedman_p: float
    critical_difference: float
    n: int
    level: float
    groups: tuple[tuple[int, int], ...]


def friedman_nemenyi(
    scores: ArrayLike, systems: Sequence[str], ids: Sequence[Hashable] | None = None, *, level: float = 0.05
) -> RankTest:
    """Rank systems by their scores on the same images, with Friedman's test and Nemenyi's critical difference.

    Parameters
    ----------
    scores
        (n, k), one line per image and one column per system; higher is better. Average over seeds before the call.
    systems
        k names, k at least 3.
    ids
        The images' names, for error messages.
    level
        Of significance, in (0, 1).

    Raises
    ------
    ValueError
        If a score is NaN or infinite, there are fewer than three systems or two images, or lengths do not fit.
    """
    scores = np.asarray(scores, dtype=float)
    if scores.ndim != 2 or scores.shape[1] != len(systems):
        raise ValueError(f"scores: expected one column for each of {len(systems)} systems, got shape {scores.shape}")
    n, k = scores.shape
    if k < 3 or n < 2:
        raise ValueError(f"scores: expected at least 3 systems and 2 images, got {k} and {n}")
    if not 0 < level < 1:
        raise ValueError(f"level: expected a number between 0 and 1, got {level}")
    for i, name in enumerate(systems):
        _check_finite(name, scores[:, i], ids)
    scores = np.round(scores, 12)  # as in `_differences`: noise must not be ranked
    ranks = stats.rankdata(-scores, axis=1).mean(axis=0)
    # Where all systems tie on all images there is nothing to rank, and scipy divides by zero.
    p = 1.0 if (scores == scores[:, :1]).all() else float(stats.friedmanchisquare(*scores.T).pvalue)
    q = float(stats.studentized_range.isf(level, k, np.inf)) / np.sqrt(2)
    critical = q * float(np.sqrt(k * (k + 1) / (6 * n)))
    order = np.argsort(ranks, kind="stable")
    ordered = ranks[order]
    groups: list[tuple[int, int]] = []
    for first in range(k):
        last = int(np.flatnonzero(ordered <= ordered[first] + critical)[-1])
        if last > first and (not groups or last > groups[-1][1]):
            groups.append((first, last))
    named = tuple(systems[i] for i in order)
    return RankTest(named, tuple(map(float, ordered)), p, critical, n, level, tuple(groups))


def holm(p_values: ArrayLike) -> np.ndarray:
    """Return Holm's step-down adjusted p-values, (n,), in the order given.

    A NaN stands for a comparison that was not made: it stays NaN and does not count.

    Raises
    ------
    ValueError
        If a value is outside [0, 1].

    Examples
    --------
    The smallest of three is multiplied by 3, the next by 2, the last by 1, and none falls below the one before.

    >>> holm([0.04, 0.01, 0.03]).tolist()
    [0.06, 0.03, 0.06]
    """
    p = np.asarray(p_values, dtype=float)
    if p.ndim != 1:
        raise ValueError(f"p_values: expected one dimension, got shape {p.shape}")
    if ((p < 0) | (p > 1)).any():
        raise ValueError(f"p_values: expected values in [0, 1], got {p[(p < 0) | (p > 1)][0]}")
    adjusted = np.full(p.shape, np.nan)
    known = np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known], kind="stable")]
    steps = p[order] * np.arange(order.size, 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted


def _differences(a: ArrayLike, b: ArrayLike, ids_a: Sequence | None, ids_b: Sequence | None) -> np.ndarray:
    """Return a - b per image, checked and paired, differences that are floating-point noise set to 0."""
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if (ids_a is None) != (ids_b is None):
        raise ValueError("ids_a and ids_b: give both or neither")
    for name, scores, ids in (("a", a, ids_a), ("b", b, ids_b)):
        if scores.ndim != 1:
            raise ValueError(f"{name}: expected one score per image, got shape {scores.shape}")
        if ids is not None:
            _check_ids(name, scores, list(ids))
        _check_finite(name, scores, ids)
    if ids_a is not None and ids_b is not None:
        place = {name: i for i, name in enumerate(ids_b)}
        lonely = sorted(map(str, set(ids_a) ^ set(ids_b)))
        if lonely:
            raise ValueError(
                f"ids_a and ids_b: {len(lonely)} image(s) are in one only, such as {', '.join(lonely[:3])}; "
                "compare systems on the same images"
            )
        b = b[[place[name] for name in ids_a]]
    if a.size != b.size:
        raise ValueError(f"a and b: lengths differ, {a.size} and {b.size}; one score per image, the same images")
    difference = a - b
    difference[np.abs(difference) < ROUNDING] = 0.0
    # Equal differences must tie in the ranks although 0.3 - 0.2 and 0.2 - 0.1 differ in the last digit.
    return np.round(difference, 12)


def _check_finite(name: str, scores: np.ndarray, ids: Sequence | None) -> None:
    if not np.isfinite(scores).all():
        at = int(np.flatnonzero(~np.isfinite(scores))[0])
        image = f"image {list(ids)[at]!r}" if ids is not None else f"position {at}"
        raise ValueError(f"{name}: the score of {image} is {scores[at]}; score that image again")


def _check_ids(name: str, scores: np.ndarray, ids: list) -> None:
    if len(ids) != scores.size:
        raise ValueError(f"ids_{name}: {len(ids)} names for {scores.size} scores")
    if len(set(ids)) != len(ids):
        twice = next(i for i in ids if ids.count(i) > 1)
        raise ValueError(f"ids_{name}: image {twice!r} occurs more than once; average its seeds first")
