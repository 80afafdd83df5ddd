"""Sec. III-A: Eq. 1 against a brute-force loop, every strategy, and what bad or degenerate input does."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import pytest
import timm
import torch
from sklearn.cluster import KMeans
from torch import nn

from nucseg.config import ConfigError, from_mapping
from nucseg.encoders import Encoder
from nucseg.patches import Patch
from nucseg.selection import (
    STRATEGIES,
    PatchFeatures,
    Selection,
    SelectionConfig,
    coverage,
    coverage_table,
    cps,
    extract,
    label_share,
    most_alike,
    nuclear_content,
    redundancy,
    select,
)
from nucseg.selection.cps import choose
from nucseg.selection.kmeans import _lloyd, _means, kmeans
from nucseg.selection.pool import grid, positions
from nucseg.selection.strategies import overlap_rule

SUBSETS = {"cps": (1, 2, 3), "cps-no-2nd": (1, 3), "cps-no-3rd": (1, 2), "kmeans": (1,)}
SMALL = SelectionConfig(size=32, step=16, n_init=2, graph_patches=60, typicality_neighbours=5)


@dataclass
class Image:
    """What `select` needs of a sample."""

    id: str
    image: np.ndarray


class MeanAndSpread(nn.Module):
    """A stand-in for a network: mean and standard deviation of each colour, and one texture measure."""

    def forward(self, x):
        edge = (x[..., 1:] - x[..., :-1]).abs().mean((1, 2, 3))
        return torch.cat([x.mean((2, 3)), x.std((2, 3)), edge[:, None]], dim=1)


def vectors(n: int, d: int = 6, seed: int = 0, groups: int = 5) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    centres = 4 * generator.normal(size=(groups, d))
    x = centres[generator.integers(groups, size=n)] + generator.normal(size=(n, d))
    return x.astype(np.float32), (x[:, None] + generator.normal(size=(n, 4, d))).astype(np.float32)


def images(count: int = 3, seed: int = 0) -> list[Image]:
    generator = np.random.default_rng(seed)
    made = []
    for i in range(count):
        coarse = generator.integers(90, 255, size=(7, 8, 3)).astype(float)
        smooth = np.kron(coarse, np.ones((14, 12, 1))) + generator.normal(0, 10, size=(98, 96, 3))
        made.append(Image(f"slide-{i}", smooth.clip(0, 255).astype(np.uint8)))
    return made


@pytest.fixture(scope="module")
def slides() -> list[Image]:
    return images()


@pytest.fixture(scope="module")
def pool(slides) -> PatchFeatures:
    return extract(slides, MeanAndSpread(), SMALL, "cpu")


def equation_1(x, parts, k1, k2, seeds, terms, restricted=False):
    """Algorithm 1 as one would write it on paper: loops, scikit-learn, no shared code."""
    how = {"init": "random", "n_init": 10}
    coarse = KMeans(k1, random_state=seeds[0], max_iter=10_000, **how).fit_predict(x)
    chosen, costs = [], np.zeros((len(x), 3))
    for k in range(k1):
        members = [i for i in range(len(x)) if coarse[i] == k]
        centre = np.mean([x[i].astype(float) for i in members], axis=0)
        flat = np.array([parts[i, p] for i in members for p in range(4)])
        labels = KMeans(k2, random_state=seeds[1], max_iter=50_000, **how).fit_predict(flat)
        sizes = [int((labels == c).sum()) for c in range(k2)]
        largest = sizes.index(max(sizes))
        typical = np.mean([f.astype(float) for f, c in zip(flat, labels, strict=True) if c == largest], axis=0)
        best, best_cost = None, math.inf
        for place, i in enumerate(members):
            d1 = math.dist(x[i], centre)
            d2 = sum(math.dist(parts[i, p], typical) for p in range(4)) / 4
            d3 = max(math.dist(parts[i, p], parts[i, q]) for p, q in combinations(range(4), 2))
            costs[i] = d1, d2, d3
            if restricted and largest not in labels[4 * place : 4 * place + 4]:
                continue
            cost = sum((d1, d2, d3)[t - 1] for t in terms)
            if cost < best_cost:
                best, best_cost = i, cost
        chosen.append(best)
    return np.array(chosen), coarse, costs


@pytest.mark.parametrize("terms", list(SUBSETS.values()), ids=list(SUBSETS))
@pytest.mark.parametrize("seed", [42, 3])
def test_cps_equals_a_brute_force_loop_over_equation_1(terms, seed):
    x, parts = vectors(90, seed=seed)
    found = cps(x, parts, 4, 3, seed, terms)
    chosen, coarse, costs = equation_1(x, parts, 4, 3, (seed, seed + 458), terms)
    np.testing.assert_array_equal(found.chosen, chosen)
    np.testing.assert_array_equal(found.coarse, coarse)
    np.testing.assert_allclose(found.terms, costs, rtol=1e-5)
    assert found.fine.shape == (90, 4)
    assert set(found.fine.ravel()) == {0, 1, 2}


def test_the_subsets_of_terms_disagree_where_the_terms_do():
    x, parts = vectors(90)
    picks = {name: tuple(cps(x, parts, 4, 3, 0, terms).chosen) for name, terms in SUBSETS.items()}
    assert len(set(picks.values())) > 1


def test_with_largest_keeps_only_patches_that_have_a_sub_region_in_the_largest_fine_cluster():
    differed = 0
    for seed in range(6):
        x, parts = vectors(60, seed=seed)
        parts += np.random.default_rng(seed).normal(0, 4, parts.shape).astype(np.float32)
        found = cps(x, parts, 3, 8, seed, (1,), SelectionConfig(candidates="with-largest"))
        chosen, _, _ = equation_1(x, parts, 3, 8, (seed, seed + 458), (1,), restricted=True)
        np.testing.assert_array_equal(found.chosen, chosen)
        differed += (chosen != cps(x, parts, 3, 8, seed, (1,)).chosen).any()
    assert differed, "the restriction never changed a pick, so this test shows nothing"


def test_seed_42_is_the_pair_of_seeds_of_the_released_code():
    assert SelectionConfig().seeds(42) == (42, 500)
    assert SelectionConfig(coarse_seed=7, fine_seed=8).seeds(42) == (7, 8)


def test_a_cluster_with_fewer_sub_regions_than_k2_has_a_fine_cluster_for_each():
    x, parts = vectors(3)
    found = cps(x, parts, 3, 9, 0)
    assert sorted(found.chosen) == [0, 1, 2]
    for row in found.fine:
        assert sorted(row) == [0, 1, 2, 3]
    np.testing.assert_allclose(found.terms[:, 0], 0, atol=1e-5)


def test_identical_patches_give_the_first_of_them_and_no_cost():
    x, parts = np.ones((5, 3), np.float32), np.ones((5, 4, 3), np.float32)
    found = cps(x, parts, 1, 4, 0)
    assert found.chosen.tolist() == [0]
    assert not found.terms.any()
    with pytest.raises(ValueError, match="only 1 patches differ"):
        cps(x, parts, 2, 4, 0)


def test_a_tie_goes_to_the_lowest_index():
    x, parts = vectors(40)
    once = cps(x, parts, 3, 2, 1)
    order = np.r_[np.arange(40), once.chosen]  # the winners again at the end
    twice = cps(x[order], parts[order], 3, 2, 1)
    assert (twice.chosen < 40).all()
    for extra, row in enumerate(once.chosen):
        np.testing.assert_array_equal(twice.terms[40 + extra], twice.terms[row])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k1": 0}, r"k1 must lie in 1\.\.20 .*, got 0"),
        ({"k1": 21}, r"k1 must lie in 1\.\.20 .*, got 21"),
        ({"k2": 0}, "k2 must be at least 1, got 0"),
        ({"terms": ()}, r"subset of \(1, 2, 3\)"),
        ({"terms": (1, 4)}, r"subset of \(1, 2, 3\)"),
        ({"features": np.zeros((20, 3, 2))}, "features: expected a non-empty array of 2 dimensions"),
        ({"sub_features": np.zeros((20, 3, 6))}, r"expected shape \(20, 4, 6\)"),
    ],
)
def test_cps_says_what_is_wrong_with_its_arguments(change, message):
    x, parts = vectors(20)
    arguments = {"features": x, "sub_features": parts, "k1": 3, "k2": 2, "seed": 0, **change}
    with pytest.raises(ValueError, match=message):
        cps(**arguments)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["features", "sub_features"])
def test_values_that_are_not_finite_are_named_by_array_and_row(name, value):
    arrays = dict(zip(("features", "sub_features"), vectors(20), strict=True))
    arrays[name][7].flat[-1] = value
    with pytest.raises(ValueError, match=rf"^{name}: NaN or infinite values in 1 of 20 rows, first row 7"):
        cps(**arrays, k1=3, k2=2, seed=0)


@pytest.mark.parametrize("init", ["random", "k-means++"])
@pytest.mark.parametrize("seed", [0, 42, 500])
def test_the_kmeans_of_the_gpu_path_is_scikit_learns(init, seed):
    x = vectors(300, d=12, seed=seed, groups=9)[0] + 10
    expected = KMeans(7, init=init, n_init=5, random_state=seed, tol=1e-4, max_iter=300).fit_predict(x)
    found = _lloyd(torch.from_numpy(x), 7, seed, init, 5, 300, 1e-4)
    np.testing.assert_array_equal(found, expected)


def test_the_kmeans_of_the_gpu_path_stops_early_where_scikit_learn_does():
    x = vectors(300, d=4, seed=1, groups=1)[0]
    for max_iter, tol in ((1, 1e-4), (3, 1e-4), (300, 0.5)):
        expected = KMeans(6, init="random", n_init=3, random_state=5, tol=tol, max_iter=max_iter)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = expected.fit_predict(x)
        np.testing.assert_array_equal(_lloyd(torch.from_numpy(x), 6, 5, "random", 3, max_iter, tol), expected)


def test_an_empty_cluster_takes_the_row_that_is_farthest_from_its_centre():
    x = torch.tensor([[0.0], [1.0], [2.0], [9.0]])
    labels, centres = torch.tensor([[0, 0, 0, 0]]), torch.tensor([[[1.0], [50.0]]])
    moved = _means(x, labels, ((x - 1) ** 2).T, 2, centres)
    assert moved.flatten().tolist() == [1.0, 9.0]


def test_kmeans_with_fewer_different_rows_than_clusters_warns_nobody():
    labels = kmeans(torch.ones(6, 2), 3, 0, init="random", n_init=1, max_iter=10, tol=1e-4)
    assert len(set(labels)) == 1


@pytest.mark.gpu
def test_cps_on_a_gpu_chooses_what_it_chooses_on_a_cpu():
    x, parts = vectors(2000, d=64)
    host, gpu = (cps(x, parts, 9, 4, 42, device=device) for device in ("cpu", "cuda"))
    np.testing.assert_array_equal(host.coarse, gpu.coarse)
    np.testing.assert_array_equal(host.chosen, gpu.chosen)
    np.testing.assert_allclose(host.terms, gpu.terms, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "limit"), [("bfloat16", 0.05), ("float16", 0.005), ("float32", 0.002)])
def test_features_of_a_gpu_are_close_to_those_of_a_cpu(precision, limit, slides, tmp_path):
    torch.manual_seed(0)
    torch.save(timm.create_model("resnet18", pretrained=False).state_dict(), tmp_path / "random.pth")
    encoder = Encoder("resnet18", weights=tmp_path / "random.pth")
    config = replace(SMALL, precision=precision)
    host, gpu = (extract(slides, encoder, config, device) for device in ("cpu", "cuda"))
    error = np.linalg.norm(host.features - gpu.features, axis=1) / np.linalg.norm(host.features, axis=1)
    assert np.median(error) < limit


def test_a_kumar_image_has_50_x_50_positions_and_the_border_only_if_asked():
    starts = positions(1000, 256, 15)
    assert len(starts) == 50
    assert starts[-1] == 735
    assert positions(1000, 256, 15, cover_border=True)[-1] == 744
    assert positions(991, 256, 15, cover_border=True).tolist() == positions(991, 256, 15).tolist()
    assert len(positions(512, 256, 15)) == 18


@pytest.mark.parametrize(("size", "step", "border"), [(32, 16, False), (32, 15, True), (48, 7, False)])
def test_extract_equals_a_patch_by_patch_loop(size, step, border):
    slides = images(2)
    slides[1].image = slides[1].image[:70, :81].copy()
    encoder = MeanAndSpread()
    config = replace(SMALL, size=size, step=step, cover_border=border, cpu_batch=5)
    seen = []
    found = extract(slides, encoder, config, "cpu", progress=lambda done, total: seen.append((done, total)))
    row, half = 0, size // 2
    for slide in slides:
        height, width = slide.image.shape[:2]
        for r in positions(height, size, step, border):
            for c in positions(width, size, step, border):
                crop = torch.from_numpy(slide.image[r : r + size, c : c + size]).permute(2, 0, 1)[None] / 255
                parts = [crop[..., y : y + half, x : x + half] for y in (0, half) for x in (0, half)]
                assert (found.image_ids[row], found.rows[row], found.cols[row]) == (slide.id, r, c)
                np.testing.assert_allclose(found.features[row], encoder(crop)[0], rtol=1e-4, atol=1e-6)
                np.testing.assert_allclose(found.sub_features[row], encoder(torch.cat(parts)), rtol=1e-4, atol=1e-6)
                row += 1
    assert row == len(found)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (2 * row, 2 * row)  # every patch, and every patch's parts
    assert len(seen) > 4


class Region:
    """An image that is read by its parts."""

    def __init__(self, image_id, image):
        self.id, self.whole, self.shape, self.read = image_id, image, image.shape[:2], []

    @property
    def image(self):
        raise AssertionError("a large image is not read as a whole")

    def region(self, row, col, height, width):
        self.read.append((row, row + height))
        return self.whole[row : row + height, col : col + width]


def test_a_large_image_is_read_in_bands_and_gives_the_same_patches(monkeypatch):
    image = np.random.default_rng(0).integers(0, 256, (150, 90, 3)).astype(np.uint8)
    image[:, 60:] = 245  # glass
    image[:40, :30] = 3  # never scanned
    config = replace(SMALL, size=32, step=8, tissue=0.5, cpu_batch=7)
    encoder = MeanAndSpread()
    (small,) = images(1)
    small.image = image
    whole = extract([small], encoder, config, "cpu")
    monkeypatch.setattr("nucseg.selection.pool.BAND_PIXELS", 50 * 90)
    large = Region(small.id, image)
    banded = extract([large], encoder, config, "cpu")
    assert len(whole) > 20
    for name in ("image_ids", "rows", "cols"):
        np.testing.assert_array_equal(getattr(banded, name), getattr(whole, name))
    for name in ("features", "sub_features"):
        np.testing.assert_allclose(getattr(banded, name), getattr(whole, name), rtol=1e-5, atol=1e-6)
    assert len(large.read) > 4
    assert max(bottom - top for top, bottom in large.read) <= 50
    assert not ((whole.rows < 20) & (whole.cols == 0)).any()  # black is no tissue
    chosen = [select([s], "kmeans", 3, 2, encoder=encoder, config=config, device="cpu") for s in (large, small)]
    assert chosen[0].patches == chosen[1].patches


def test_the_share_of_overlapping_patches_needs_no_mask_of_the_image():
    patches = [Patch("a", 0, 0, 10), Patch("a", 5, 5, 10), Patch("a", 30, 2, 10), Patch("b", 1, 1, 10)]
    shapes = {"a": (10**6, 10**6), "b": (20, 20)}
    assert label_share(patches, shapes) == pytest.approx((100 + 75 + 100 + 100) / (10**12 + 400))


def test_extract_leaves_the_encoder_as_it_was_and_uses_it_in_evaluation_mode(slides):
    encoder = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.9), MeanAndSpread()).train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    first, second = (extract(slides[:1], encoder, SMALL, "cpu").features for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert encoder.training
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_normalisation_is_the_encoders_own_and_applied_once(slides):
    class WithNormalise(nn.Module):
        def __init__(self):
            super().__init__()
            self.normalise, self.net = nn.Hardtanh(0.2, 0.6), MeanAndSpread()

        def forward(self, x):
            return self.net(self.normalise(x))

    encoder = WithNormalise()
    found = extract(slides[:1], encoder, SMALL, "cpu")
    crop = torch.from_numpy(slides[0].image[:32, 16:48]).permute(2, 0, 1)[None] / 255
    np.testing.assert_allclose(found.features[1], encoder(crop)[0], rtol=1e-4)


def test_an_image_smaller_than_a_patch_or_of_another_kind_is_named():
    with pytest.raises(ValueError, match=r"image tiny: 20 x 40 pixels hold no patch of 32"):
        extract([Image("tiny", np.zeros((20, 40, 3), np.uint8))], MeanAndSpread(), SMALL, "cpu")
    with pytest.raises(ValueError, match=r"image grey: expected \(H, W, 3\) uint8"):
        extract([Image("grey", np.zeros((40, 40), np.uint8))], MeanAndSpread(), SMALL, "cpu")
    with pytest.raises(ValueError, match="no images"):
        extract([], MeanAndSpread(), SMALL, "cpu")


def half_glass(seed=0, size=128):
    """An image whose left half is bare glass, with some stain in a corner of it."""
    image = np.random.default_rng(seed).integers(60, 200, (size, size, 3), dtype=np.uint8)
    image[:, : size // 2] = 243
    image[:10, :10] = (150, 90, 160)
    return Image(f"half {seed}", image)


def test_patches_of_glass_are_left_out_where_it_is_asked(slides):
    samples = [half_glass(0), Image("glass", np.full((128, 128, 3), 250, np.uint8)), half_glass(1)]
    whole = extract(samples, MeanAndSpread(), SMALL, "cpu")
    config = replace(SMALL, tissue=0.5)
    tissue = extract(samples, MeanAndSpread(), config, "cpu")
    assert len(whole) == 3 * 49
    assert set(tissue.image_ids) == {"half 0", "half 1"}
    assert set(tissue.cols) == {48, 64, 80, 96}  # half of the patch at 48 is tissue
    kept = [
        (i, r, c) for i, r, c in zip(whole.image_ids, whole.rows, whole.cols, strict=True) if i != "glass" and c >= 48
    ]
    assert list(zip(tissue.image_ids, tissue.rows, tissue.cols, strict=True)) == kept
    for strategy in ("cps", "k-center", "random-crop"):
        chosen = select(samples, strategy, 4, 2, config=config, encoder=MeanAndSpread(), device="cpu")
        assert all(patch.col >= 48 for patch in chosen.patches)
        assert "91 windows with less than 50% tissue left out" in chosen.notes
    assert select(slides, "k-center", 3, config=SMALL, encoder=MeanAndSpread()).notes == ()


def test_slides_of_glass_alone_are_an_error_that_says_so():
    glass = [Image("glass", np.full((128, 128, 3), 250, np.uint8))]
    with pytest.raises(ValueError, match="49 windows with less than 30% tissue left out"):
        select(glass, "random-crop", 1, config=replace(SMALL, tissue=0.3))
    with pytest.raises(ValueError, match="shows tissue in at least 30%"):
        extract(glass, MeanAndSpread(), replace(SMALL, tissue=0.3), "cpu")


def test_features_survive_a_file_without_pickling(pool, tmp_path):
    np.savez(tmp_path / "pool.npz", **pool.to_arrays())
    with np.load(tmp_path / "pool.npz", allow_pickle=False) as arrays:
        back = PatchFeatures.from_arrays(arrays)
    assert back.size == pool.size
    for name in ("image_ids", "rows", "cols", "features", "sub_features"):
        np.testing.assert_array_equal(getattr(back, name), getattr(pool, name))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_sub_regions_are_computed_only_for_strategies_that_look_at_them(strategy, slides, pool):
    class Watched(MeanAndSpread):
        def forward(self, x):
            sides.add(x.shape[-1])
            return super().forward(x)

    sides = set()
    alone = select(slides, strategy, 3, 2, seed=5, config=SMALL, encoder=Watched(), device="cpu")
    shared = select(slides, strategy, 3, 2, seed=5, config=SMALL, features=pool, device="cpu")
    assert alone.patches == shared.patches
    assert (16 in sides) == (strategy in {"cps", "cps-no-2nd", "cps-no-3rd", "kmeans", "cps-standardised"})
    assert (32 in sides) == (not strategy.startswith("random"))


def test_two_levels_of_clusters_need_the_sub_regions(slides):
    without = extract(slides, MeanAndSpread(), SMALL, "cpu", parts=False)
    assert without.sub_features.shape == (len(without), 0, without.features.shape[1])
    with pytest.raises(ValueError, match="sub_features"):
        select(slides, "cps", 3, 2, config=SMALL, features=without)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_chooses_k1_different_patches_again_and_again(strategy, slides, pool):
    first, second = (select(slides, strategy, 3, 2, seed=5, config=SMALL, features=pool) for _ in range(2))
    assert first == second
    assert len(set(first.patches)) == 3
    for patch in first.patches:
        height, width = next(s.image.shape[:2] for s in slides if s.id == patch.image_id)
        assert patch.size == 32
        assert patch.row + 32 <= height
        assert patch.col + 32 <= width
    assert 0 < first.label_share <= 3 * 32**2 / (3 * 98 * 96)
    assert first.switches["seed"] == 5
    assert first.switches["step"] == 16
    assert Selection.from_dict(json.loads(json.dumps(first.to_dict()))) == first


@pytest.mark.parametrize("strategy", SUBSETS)
def test_select_reports_the_patches_clusters_and_terms_of_cps(strategy, slides, pool):
    found = select(slides, strategy, 4, 3, seed=1, config=SMALL, features=pool)
    result = cps(pool.features, pool.sub_features, 4, 3, 1, SUBSETS[strategy], SMALL)
    places = [(p.image_id, p.row, p.col) for p in found.patches]
    assert places == [(pool.image_ids[i], pool.rows[i], pool.cols[i]) for i in result.chosen]
    assert found.clusters == (0, 1, 2, 3)
    np.testing.assert_array_equal(found.terms, result.terms[result.chosen])


def test_select_extracts_features_itself_when_none_are_given(slides, pool):
    alone = select(slides, "cps", 3, 2, 32, 16, MeanAndSpread(), 5, replace(SMALL, size=64, step=9), device="cpu")
    assert alone.patches == select(slides, "cps", 3, 2, seed=5, config=SMALL, features=pool).patches


@pytest.mark.parametrize("strategy", ["random-crop", "random-centre-crop"])
def test_the_random_strategies_need_no_encoder_and_follow_their_seed(strategy, slides):
    picks = [select(slides, strategy, 2, encoder="no such", config=SMALL, seed=s).patches for s in (21, 100, 500, 1000)]
    assert len({frozenset(p) for p in picks}) > 1


def test_random_centre_crops_come_from_different_images_and_their_centres(slides):
    found = select(slides, "random-centre-crop", 3, config=SMALL, seed=0)
    assert {p.image_id for p in found.patches} == {s.id for s in slides}
    assert {(p.row, p.col) for p in found.patches} == {((98 - 32) // 2, (96 - 32) // 2)}
    with pytest.raises(ValueError, match="k1 = 4 needs more than 3 images"):
        select(slides, "random-centre-crop", 4, config=SMALL)


def test_label_share_counts_the_union_of_overlapping_patches():
    from nucseg.data import Patch

    patches = (Patch("a", 0, 0, 10), Patch("a", 5, 5, 10), Patch("b", 0, 0, 10))
    assert label_share(patches, {"a": (20, 20), "b": (10, 30)}) == (100 + 75 + 100) / 700


def test_exclusion_takes_the_next_best_patch_that_does_not_overlap(pool):
    generator = np.random.default_rng(0)
    rule = overlap_rule(pool, 0.1)

    def iou(i, j):
        masks = np.zeros((2, 120, 120), bool)
        for mask, p in zip(masks, (i, j), strict=True):
            mask[pool.rows[p] : pool.rows[p] + 32, pool.cols[p] : pool.cols[p] + 32] = True
        return (
            (masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum() if pool.image_ids[i] == pool.image_ids[j] else 0
        )

    changed = 0
    for _ in range(20):
        cost, coarse = generator.random(len(pool)), generator.integers(4, size=len(pool))
        everyone = np.ones(len(pool), bool)
        found = choose(cost, coarse, 4, everyone, rule)
        expected = []
        for k in range(4):
            order = [i for i in np.argsort(cost, kind="stable") if coarse[i] == k]
            expected.append(next(i for i in order if all(iou(i, j) <= 0.1 for j in expected)))
        assert found.tolist() == expected
        changed += (found != choose(cost, coarse, 4, everyone)).any()
    assert changed, "no overlap ever occurred, so this test shows nothing"


def test_exclusion_is_waived_and_said_so_where_every_patch_of_a_cluster_overlaps(slides):
    one = [Image("one", slides[0].image[:40, :40].copy())]
    config = replace(SMALL, step=2, exclusion=0.0)
    found = select(one, "cps", 3, 2, encoder=MeanAndSpread(), config=config, device="cpu")
    assert "exclusion waived for 2 of 3 picks" in found.notes


def test_a_note_says_when_the_released_code_would_have_chosen_otherwise(slides, pool):
    notes = []
    for k2 in (4, 8, 12):
        for seed in range(4):
            mine = select(slides, "kmeans", 4, k2, seed=seed, config=SMALL, features=pool)
            theirs = select(
                slides, "kmeans", 4, k2, seed=seed, config=replace(SMALL, candidates="with-largest"), features=pool
            )
            differ = sum(a != b for a, b in zip(mine.patches, theirs.patches, strict=True))
            expected = (f"candidates='with-largest' would choose {differ} of 4 otherwise",) if differ else ()
            assert mine.notes == expected
            notes += mine.notes
    assert notes, "the rules never differed, so this test shows nothing"


def test_k_center_takes_the_farthest_patch_each_time(slides, pool):
    found = select(slides, "k-center", 5, config=SMALL, features=pool, seed=3)
    rows = [_row(pool, p) for p in found.patches]
    for step in range(1, 5):
        far = [min(math.dist(f, pool.features[i]) for i in rows[:step]) for f in pool.features]
        assert far[rows[step]] == pytest.approx(max(far), rel=1e-4)


def test_typiclust_takes_the_patch_nearest_to_its_neighbours_in_each_cluster(slides, pool):
    found = select(slides, "typiclust", 3, config=SMALL, features=pool, seed=3)
    x = pool.features / np.linalg.norm(pool.features, axis=1, keepdims=True)
    labels = KMeans(3, init="random", n_init=2, max_iter=10_000, random_state=3).fit_predict(x)
    for k, patch in enumerate(found.patches):
        members = np.flatnonzero(labels == k)
        mean = [sorted(math.dist(x[i], x[j]) for j in members if j != i)[:5] for i in members]
        assert _row(pool, patch) == members[np.argmin([sum(m) for m in mean])]


def test_probcover_covers_greedily_with_balls_of_the_largest_pure_radius(slides, pool):
    config = replace(SMALL, graph_patches=10_000)
    found = select(slides, "probcover", 4, config=config, features=pool, seed=3)
    delta = float(found.notes[0].split()[2].rstrip(","))
    x = pool.features / np.linalg.norm(pool.features, axis=1, keepdims=True)
    far = np.array([[math.dist(a, b) for b in x] for a in x])
    labels = KMeans(4, init="random", n_init=2, max_iter=10_000, random_state=3).fit_predict(x)
    enemy = np.array([far[i][labels != labels[i]].min() for i in range(len(x))])
    assert (enemy >= delta - 2e-6).mean() >= 0.95 > (enemy > delta + 2e-6).mean()
    left = set(range(len(x)))
    for patch in found.patches:
        gains = [len({j for j in left if far[i, j] < delta or j == i}) for i in range(len(x))]
        row = _row(pool, patch)
        assert gains[row] >= max(gains) - 1  # delta is printed with six digits
        left -= {j for j in range(len(x)) if far[row, j] < delta}


def test_standardised_picks_do_not_overlap_and_hold_at_least_the_median_content_of_their_cluster(slides, pool):
    found = select(slides, "cps-standardised", 4, 2, config=SMALL, features=pool, seed=2)
    grids = [(pool.rows[pool.image_ids == s.id], pool.cols[pool.image_ids == s.id]) for s in slides]
    content = nuclear_content(slides, grids, 32)
    coarse = cps(pool.features, pool.sub_features, 4, 2, 2, config=SMALL).coarse
    rows = [_row(pool, p) for p in found.patches]
    for k, row in enumerate(rows):
        assert coarse[row] == k
        assert content[row] >= np.median(content[coarse == k])
    assert found.label_share == pytest.approx(4 * 32**2 / (3 * 98 * 96))


def test_nuclear_content_is_the_share_of_blue_stain_in_each_patch():
    pink, purple = (236, 190, 215), (90, 60, 140)
    image = np.full((96, 96, 3), pink, np.uint8)
    image[:48, :48] = purple
    rows, cols = np.array([0, 0, 48, 24]), np.array([0, 48, 48, 24])
    found = nuclear_content([Image("a", image)], [(rows, cols)], 48)
    np.testing.assert_allclose(found, [1, 0, 0, 0.25], atol=0.06)
    assert nuclear_content([Image("white", np.full((48, 48, 3), 255, np.uint8))], [([0], [0])], 48) == [0]


def test_the_nuclear_content_of_a_large_image_is_measured_in_bands(monkeypatch):
    rng = np.random.default_rng(0)
    image = np.full((150, 90, 3), (236, 190, 215), np.uint8)
    image[rng.random((30, 18)).repeat(5, 0).repeat(5, 1) < 0.3] = (90, 60, 140)
    rows, cols = grid("a", 150, 90, replace(SMALL, step=8))
    whole = nuclear_content([Image("a", image)], [(rows, cols)], 32)
    monkeypatch.setattr("nucseg.selection.pool.BAND_PIXELS", 50 * 90)
    large = Region("a", image)
    banded = nuclear_content([large], [(rows, cols)], 32)
    assert max(bottom - top for top, bottom in large.read) <= 50
    assert np.abs(banded - whole).max() < 0.03
    assert whole.std() > 0.03


@pytest.mark.parametrize("strategy", ["kmeans", "cps", "random-crop", "cps-standardised"])
def test_what_holds_least_nuclei_is_left_out_of_the_pool_whatever_the_strategy(strategy):
    pale, dark = images(2)
    dark.image[:, :48] = (90, 60, 140)  # its left half is nuclei
    config = replace(SMALL, nuclei=0.6)
    found = select([pale, dark], strategy, 3, 2, encoder=MeanAndSpread(), config=config, device="cpu", seed=3)
    pool = extract([pale, dark], MeanAndSpread(), SMALL, "cpu")
    grids = [(pool.rows[pool.image_ids == s.id], pool.cols[pool.image_ids == s.id]) for s in (pale, dark)]
    content = nuclear_content([pale, dark], grids, 32)
    assert all(content[row] >= np.quantile(content, 0.55) for row in pool.rows_of(found.patches))
    assert "windows with least nuclear content left out" in " ".join(found.notes)
    assert found.switches["nuclei"] == 0.6


def test_enough_patches_stay_for_the_budget_however_many_are_to_be_left_out(slides):
    config = replace(SMALL, nuclei=0.99)
    assert len(select(slides, "random-crop", 7, config=config, device="cpu").patches) == 7


def test_coverage_is_the_mean_distance_to_the_nearest_pick():
    x, _ = vectors(50)
    picks = [3, 17, 40]
    assert coverage(x, picks) == pytest.approx(np.mean([min(math.dist(a, x[p]) for p in picks) for a in x]), rel=1e-4)


def test_redundancy_is_one_for_twins_and_zero_for_orthogonal_picks():
    assert redundancy(np.array([[1.0, 0], [2.0, 0], [3.0, 0]])) == pytest.approx(1)
    assert redundancy(np.eye(4)) == pytest.approx(0)
    with pytest.raises(ValueError, match="at least 2 picks"):
        redundancy(np.eye(1))


def test_the_two_picks_that_are_most_alike_are_found():
    assert most_alike(np.array([[1.0, 0, 0], [0, 1, 0], [0, 0.1, 1], [0, 2, 0.1]])) == (1, 3)
    assert most_alike(-np.eye(2)) == (0, 1)


def test_the_coverage_table_has_every_strategy_and_seed_and_agrees_with_select(slides, pool):
    content = np.linspace(0, 1, len(pool))
    table = coverage_table(pool, 3, 2, seeds=(1, 2), config=SMALL, content=content)
    assert len(table) == 2 * len(STRATEGIES)
    assert set(coverage_table(pool, 3, 2, seeds=(1,), config=SMALL).strategy) == set(STRATEGIES) - {"cps-standardised"}
    for strategy in ("cps", "kmeans", "random-crop", "k-center"):
        rows = [_row(pool, p) for p in select(slides, strategy, 3, 2, seed=2, config=SMALL, features=pool).patches]
        line = table[(table.strategy == strategy) & (table.seed == 2)].iloc[0]
        assert line.coverage == coverage(pool.features, rows)
        assert line.images == len({pool.image_ids[r] for r in rows})


def test_select_refuses_what_cannot_be_meant(slides, pool):
    with pytest.raises(ValueError, match=r"unknown strategy 'cps-no-2n'; did you mean 'cps-no-2nd'"):
        select(slides, "cps-no-2n", 3)
    with pytest.raises(ValueError, match=r"k1 must lie in 1\.\.75"):
        select(slides, "random-crop", 1000, config=SMALL)
    with pytest.raises(ValueError, match="made from another pool"):
        select(slides, "cps", 3, step=8, config=SMALL, features=pool)
    with pytest.raises(ValueError, match="not unique"):
        select([slides[0], slides[0]], "random-crop", 1, config=SMALL)
    with pytest.raises(ValueError, match="image slide-0: 98 x 96 pixels hold no patch of 256"):
        select(slides, "random-crop", 1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("size", 31),
        ("step", 0),
        ("n_init", 0),
        ("tol", -1.0),
        ("exclusion", 1.5),
        ("content_floor", -0.1),
        ("nuclei", 1.0),
        ("fine_seed", -1),
    ],
)
def test_the_configuration_refuses_values_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"^{name} .*{value}"):
        SelectionConfig(**{name: value})


def test_a_profile_sets_the_configuration_by_name():
    assert from_mapping(SelectionConfig, {"exclusion": 0, "init": "k-means++"}, "selection").exclusion == 0.0
    with pytest.raises(ConfigError, match="did you mean 'n_init'"):
        from_mapping(SelectionConfig, {"n_inits": 3}, "selection")


def test_real_slides_are_selected_from_with_the_embedded_encoder(real_data):
    from nucseg.data import load_dataset

    samples = list(load_dataset("tnbc", real_data).train)[:2]
    found = select(samples, "cps", 2, 2, size=128, step=128, encoder="efficientnet_lite0", seed=42, device="cpu")
    assert found.label_share == pytest.approx(2 * 128**2 / (2 * 512**2))
    assert found.switches["encoder"] == "efficientnet_lite0"


def _row(pool: PatchFeatures, patch) -> int:
    return int(
        np.flatnonzero((pool.image_ids == patch.image_id) & (pool.rows == patch.row) & (pool.cols == patch.col))[0]
    )
