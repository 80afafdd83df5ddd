"""Paired statistics against formulas written out, exhaustive sign flips and statistical properties."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, special

from nucseg.stats import crossed_bootstrap, effect_size, friedman_nemenyi, holm, paired_tests, seed_test


def student_p(t, degrees):
    """Two-sided p by integrating Student's density."""
    scale = special.gamma((degrees + 1) / 2) / (math.sqrt(degrees * math.pi) * special.gamma(degrees / 2))
    tail, _ = integrate.quad(lambda x: scale * (1 + x * x / degrees) ** (-(degrees + 1) / 2), abs(t), math.inf)
    return 2 * tail


def sign_flip_p(difference):
    """Two-sided Wilcoxon p from all 2^n sign patterns (no ties, no zeros)."""
    ranks = np.argsort(np.argsort(np.abs(difference))) + 1
    middle = ranks.sum() / 2
    observed = abs(ranks[difference > 0].sum() - middle)
    sums = [
        sum(r for r, s in zip(ranks, signs, strict=True) if s) for signs in itertools.product((0, 1), repeat=len(ranks))
    ]
    return np.mean([abs(s - middle) >= observed - 1e-9 for s in sums])


@pytest.fixture
def scores():
    rng = np.random.default_rng(4)
    a = rng.uniform(0.4, 0.7, 12)
    return a, a - rng.normal(0.02, 0.04, 12)


def test_the_t_test_is_the_formula_of_the_textbook(scores):
    a, b = scores
    d = a - b
    t = d.mean() / (d.std(ddof=1) / math.sqrt(d.size))
    assert paired_tests(a, b).t_p == pytest.approx(student_p(t, d.size - 1), rel=1e-6)


def test_the_wilcoxon_p_counts_all_sign_patterns(scores):
    a, b = scores
    assert paired_tests(a, b).wilcoxon_p == pytest.approx(sign_flip_p(a - b), rel=1e-9)


def test_the_mean_and_the_interval_follow_the_differences(scores):
    a, b = scores
    found = paired_tests(a, b)
    assert found.mean_difference == pytest.approx(np.mean(a - b))
    assert found.ci_low < found.mean_difference < found.ci_high
    # The interval of a mean of 12 is near +-1.96 standard errors (n - in place of n - 1), whatever the resampling.
    d = a - b
    half = 1.96 * d.std() / math.sqrt(d.size)
    assert (found.ci_high - found.ci_low) / 2 == pytest.approx(half, rel=0.12)
    assert found.n == 12


def test_swapping_the_systems_flips_the_sign_and_keeps_the_p_values(scores):
    a, b = scores
    forward, back = paired_tests(a, b), paired_tests(b, a)
    assert back.mean_difference == -forward.mean_difference
    assert (back.t_p, back.wilcoxon_p) == pytest.approx((forward.t_p, forward.wilcoxon_p))
    assert effect_size(b, a) == pytest.approx(-effect_size(a, b))


def test_the_interval_follows_the_seed_and_nothing_else(scores):
    assert paired_tests(*scores, seed=3) == paired_tests(*scores, seed=3)
    assert paired_tests(*scores, seed=3) != paired_tests(*scores, seed=4)


def test_a_wider_level_gives_a_wider_interval(scores):
    narrow, wide = paired_tests(*scores, level=0.5), paired_tests(*scores, level=0.99)
    assert wide.ci_low < narrow.ci_low < narrow.ci_high < wide.ci_high


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for repeat in range(300):
        d = rng.normal(0.02, 0.05, 14)
        found = paired_tests(0.5 + d, np.full(14, 0.5), resamples=500, seed=repeat)
        hits += found.ci_low <= 0.02 <= found.ci_high
    assert 0.86 <= hits / 300 <= 0.98  # percentile intervals are a little narrow at n = 14


def test_names_pair_the_images_whatever_their_order(scores):
    a, b = scores
    ids = [f"image {i}" for i in range(12)]
    order = np.random.default_rng(1).permutation(12)
    shuffled = paired_tests(a, b[order], ids, [ids[i] for i in order])
    assert shuffled == paired_tests(a, b)
    assert effect_size(a, b[order], ids, [ids[i] for i in order]) == effect_size(a, b)


def test_identical_systems_show_no_difference_and_no_warning(scores):
    a, _ = scores
    assert paired_tests(a, a) == (0.0, 0.0, 0.0, 1.0, 1.0, 12)
    assert paired_tests(a, a + 1e-16) == (0.0, 0.0, 0.0, 1.0, 1.0, 12)
    assert effect_size(a, a) == 0.0


def test_a_single_image_has_a_difference_but_no_p_value():
    found = paired_tests([0.6], [0.5])
    assert found.mean_difference == pytest.approx(0.1)
    assert found.n == 1
    assert all(math.isnan(value) for value in (found.ci_low, found.ci_high, found.t_p, found.wilcoxon_p))
    assert math.isnan(effect_size([0.6], [0.5]))


def test_no_image_gives_nothing_but_n():
    found = paired_tests([], [])
    assert found.n == 0
    assert all(math.isnan(value) for value in found[:5])


def test_a_constant_difference_has_no_spread_to_test_against():
    found = paired_tests([0.3, 0.2, 0.5, 0.6], [0.2, 0.1, 0.4, 0.5])
    assert found.mean_difference == pytest.approx(0.1)
    assert math.isnan(found.t_p)
    assert math.isnan(effect_size([0.3, 0.2, 0.5], [0.2, 0.1, 0.4]))
    assert found.wilcoxon_p == pytest.approx(2 / 2**4)


def test_equal_differences_tie_although_floating_point_tells_them_apart():
    a, b = np.array([0.2, 0.2, 0.4, 0.6, 0.5]), np.array([0.3, 0.1, 0.3, 0.3, 0.2])
    assert len(np.unique(np.abs(a - b))) == 4  # there are two sizes, 0.1 and 0.3, and rounding makes four of them
    exact = np.array([-0.25, 0.25, 0.25, 0.75, 0.75])
    assert paired_tests(a, b).wilcoxon_p == paired_tests(exact, np.zeros(5)).wilcoxon_p


def test_the_smallest_wilcoxon_p_at_14_images_is_the_one_in_the_notes():
    a = 0.5 + np.arange(1, 15) / 100
    assert paired_tests(a, np.full(14, 0.5)).wilcoxon_p == pytest.approx(2 / 2**14)  # 1.2e-4


def test_images_without_difference_are_left_out_of_the_ranking_only():
    a = np.array([0.51, 0.52, 0.53, 0.54, 0.55, 0.56, 0.5, 0.5])
    found = paired_tests(a, np.full(8, 0.5))
    assert found.n == 8
    assert found.wilcoxon_p == pytest.approx(2 / 2**6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_missing_score_is_an_error_that_names_the_image(bad):
    with pytest.raises(ValueError, match=f"b: the score of image 'y' is {bad}"):
        paired_tests([0.1, 0.2], [0.1, bad], ["x", "y"], ["x", "y"])
    with pytest.raises(ValueError, match="a: the score of position 0 is"):
        paired_tests([bad, 0.2], [0.1, 0.2])


def test_images_that_do_not_fit_are_an_error_that_names_them():
    with pytest.raises(ValueError, match="2 image\\(s\\) are in one only, such as y, z"):
        paired_tests([0.1, 0.2], [0.1, 0.2], ["x", "y"], ["x", "z"])
    with pytest.raises(ValueError, match="ids_a: image 'x' occurs more than once"):
        paired_tests([0.1, 0.2], [0.1, 0.2], ["x", "x"], ["x", "y"])
    with pytest.raises(ValueError, match="give both or neither"):
        paired_tests([0.1], [0.2], ids_a=["x"])
    with pytest.raises(ValueError, match="ids_b: 1 names for 2 scores"):
        paired_tests([0.1, 0.2], [0.1, 0.2], ["x", "y"], ["x"])
    with pytest.raises(ValueError, match="lengths differ, 2 and 3"):
        paired_tests([0.1, 0.2], [0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match=r"a: expected one score per image, got shape \(1, 2\)"):
        paired_tests([[0.1, 0.2]], [0.1, 0.2])


@pytest.mark.parametrize(("name", "value"), [("level", 0.0), ("level", 1.0), ("resamples", 0)])
def test_impossible_settings_are_refused(name, value, scores):
    with pytest.raises(ValueError, match=f"{name}: expected"):
        paired_tests(*scores, **{name: value})


def test_the_effect_size_is_the_mean_in_standard_deviations():
    assert effect_size([0.1, 0.3], [0.0, 0.0]) == pytest.approx(0.2 / math.sqrt(0.02))


@pytest.mark.parametrize("same", [True, False])
def test_the_test_over_seeds_is_the_formula_of_the_textbook(same):
    a, b = np.array([0.43, 0.47, 0.42, 0.48]), np.array([0.45, 0.44, 0.39, 0.40])
    if same:
        error, freedom = (a - b).std(ddof=1) / 2, 3
    else:  # Welch 1947
        parts = np.array([a.var(ddof=1), b.var(ddof=1)]) / 4
        error, freedom = math.sqrt(parts.sum()), parts.sum() ** 2 / (parts**2 / 3).sum()
    found = seed_test(a, b, same=same)
    t = (a - b).mean() / error
    assert found.mean_difference == pytest.approx((a - b).mean())
    assert found.t_p == pytest.approx(special.betainc(freedom / 2, 0.5, freedom / (freedom + t**2)))
    half = special.stdtrit(freedom, 0.975) * error
    assert (found.ci_low, found.ci_high) == pytest.approx(((a - b).mean() - half, (a - b).mean() + half))


def test_seeds_of_different_arms_may_differ_in_number_and_in_order():
    found = seed_test([0.5, 0.6, 0.7], [0.4, 0.3])
    assert found == pytest.approx(seed_test([0.7, 0.5, 0.6], [0.3, 0.4]))
    assert found.ci_low < found.mean_difference < found.ci_high


@pytest.mark.parametrize(("a", "b"), [([0.5], [0.4, 0.3]), ([0.5, 0.5], [0.25, 0.25])])
def test_one_seed_or_none_that_varies_has_a_difference_but_no_p_value(a, b):
    found = seed_test(a, b)
    assert found.mean_difference == pytest.approx(np.mean(a) - np.mean(b))
    assert np.isnan(found[1:]).all()


def test_seeds_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="2 and 3 seeds cannot be pairs"):
        seed_test([0.1, 0.2], [0.1, 0.2, 0.3], same=True)
    with pytest.raises(ValueError, match="the score of position 1 is nan"):
        seed_test([0.1, math.nan], [0.1, 0.2])
    with pytest.raises(ValueError, match="one score per seed"):
        seed_test([], [0.1])
    with pytest.raises(ValueError, match="level"):
        seed_test([0.1, 0.3], [0.1, 0.2], level=1.0)


def test_the_bootstrap_over_seeds_and_images_is_as_wide_as_both_together():
    rng = np.random.default_rng(3)
    of_seeds, of_images = rng.normal(0, 0.03, (2, 12, 1)), rng.normal(0, 0.04, (2, 1, 14))
    a, b = 0.5 + of_seeds + of_images
    difference, low, high = crossed_bootstrap(a + 0.02, b)
    assert difference == pytest.approx(a.mean() + 0.02 - b.mean())
    expected = math.sqrt(of_seeds[:, :, 0].var(axis=1).sum() / 12 + (of_images[0] - of_images[1]).var() / 14)
    assert (high - low) / (2 * 1.96) == pytest.approx(expected, rel=0.05)
    assert crossed_bootstrap(a + 0.02, b) == (difference, low, high)
    over_images = paired_tests(a.mean(axis=0), b.mean(axis=0))
    assert high - low > over_images.ci_high - over_images.ci_low


def test_the_bootstrap_over_seeds_and_images_needs_both_and_the_same_images():
    one = np.full((1, 5), 0.5)
    assert crossed_bootstrap(one + 0.1, one)[0] == pytest.approx(0.1)
    assert np.isnan(crossed_bootstrap(one, one)[1:]).all()
    with pytest.raises(ValueError, match="equal images, got \\(1, 5\\) and \\(1, 4\\)"):
        crossed_bootstrap(one, one[:, :4])
    with pytest.raises(ValueError, match="a"):
        crossed_bootstrap(one * np.nan, one)


def test_holm_of_a_worked_example():
    # 0.01 x 4; 0.02 x 3; max(0.03 x 2, 0.06); max(0.04 x 1, 0.06)
    np.testing.assert_allclose(holm([0.04, 0.01, 0.03, 0.02]), [0.06, 0.04, 0.06, 0.06])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), max_size=6), st.floats(0.01, 0.99))
def test_holm_rejects_what_the_step_down_procedure_rejects(p, alpha):
    rejected = set()
    for step, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        if p[i] * (len(p) - step) > alpha:
            break
        rejected.add(i)
    assert {i for i, value in enumerate(holm(p)) if value <= alpha} == rejected


def test_holm_passes_over_comparisons_that_were_not_made():
    np.testing.assert_allclose(holm([0.02, np.nan, 0.03]), [0.04, np.nan, 0.04])
    assert holm([]).size == 0
    assert np.isnan(holm([np.nan])).all()


@pytest.mark.parametrize("value", [-0.1, 1.1])
def test_holm_refuses_what_is_no_probability(value):
    with pytest.raises(ValueError, match=r"p_values: expected values in \[0, 1\]"):
        holm([0.5, value])


def test_ranks_are_means_over_the_images_and_ties_share_theirs():
    scores = [[0.9, 0.5, 0.1], [0.8, 0.8, 0.2], [0.3, 0.4, 0.2], [0.1, 0.2, 0.0]]
    found = friedman_nemenyi(scores, ["a", "b", "c"])  # ranks 1 2 3, 1.5 1.5 3, 2 1 3, 2 1 3
    assert found.systems == ("b", "a", "c")
    np.testing.assert_allclose(found.mean_ranks, [5.5 / 4, 6.5 / 4, 3])
    assert found.n == 4


@pytest.mark.parametrize(("k", "q"), [(3, 2.343), (5, 2.728), (10, 3.164)])  # Demsar 2006, Table 5a
def test_the_critical_difference_is_the_printed_one(k, q):
    scores = np.random.default_rng(k).uniform(size=(14, k))
    found = friedman_nemenyi(scores, [str(i) for i in range(k)])
    assert found.critical_difference == pytest.approx(q * math.sqrt(k * (k + 1) / (6 * 14)), rel=1e-3)


def test_the_friedman_p_follows_from_the_formula_of_the_textbook():
    scores = np.random.default_rng(2).uniform(size=(12, 4)) + np.array([0.0, 0.1, 0.2, 0.5])
    found = friedman_nemenyi(scores, list("abcd"))
    n, k = scores.shape
    chi = 12 * n / (k * (k + 1)) * (sum(r * r for r in found.mean_ranks) - k * (k + 1) ** 2 / 4)
    assert found.friedman_p == pytest.approx(special.gammaincc((k - 1) / 2, chi / 2))
    assert found.systems[0] == "d"


def test_groups_hold_exactly_the_pairs_that_are_closer_than_the_critical_difference():
    rng = np.random.default_rng(5)
    scores = rng.normal(size=(30, 7)) + np.arange(7) * 0.5
    found = friedman_nemenyi(scores, list("abcdefg"))
    assert len(found.groups) > 1
    for i, j in itertools.combinations(range(7), 2):
        together = any(first <= i and j <= last for first, last in found.groups)
        assert together == (found.mean_ranks[j] - found.mean_ranks[i] <= found.critical_difference)


def test_equal_systems_share_one_group_and_no_p():
    found = friedman_nemenyi(np.full((6, 3), 0.5) + 1e-15, ["a", "b", "c"])
    assert (found.friedman_p, found.groups, set(found.mean_ranks)) == (1.0, ((0, 2),), {2.0})


def test_ranking_refuses_what_cannot_be_ranked():
    with pytest.raises(ValueError, match="c: the score of image 'y' is nan"):
        friedman_nemenyi([[1, 2, 3], [1, 2, np.nan]], ["a", "b", "c"], ["x", "y"])
    with pytest.raises(ValueError, match="at least 3 systems and 2 images, got 2 and 2"):
        friedman_nemenyi([[1, 2], [1, 2]], ["a", "b"])
    with pytest.raises(ValueError, match=r"one column for each of 3 systems, got shape \(2, 2\)"):
        friedman_nemenyi([[1, 2], [1, 2]], ["a", "b", "c"])
    with pytest.raises(ValueError, match="level: expected"):
        friedman_nemenyi(np.eye(3), ["a", "b", "c"], level=0)
