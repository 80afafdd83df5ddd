"""The built-in tissue: exact labels, kinds that differ, a task no threshold solves, splits without leaks."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage
from skimage.color import rgb2hed
from skimage.filters import threshold_otsu
from skimage.measure import label, regionprops_table

from nucseg.data.tissue import KINDS, SYNTHETIC_NOTE, UNSEEN_KIND, Tissue, generate_tissue, splits
from nucseg.labels import check_label_map


@pytest.fixture(scope="module")
def images() -> dict[str, Tissue]:
    return {spec.id: generate_tissue(spec.kind, (256, 256), spec.seed) for spec in splits()}


@pytest.fixture(scope="module")
def by_kind(images) -> dict[str, list[Tissue]]:
    return {kind: [images[spec.id] for spec in splits() if spec.kind == kind] for kind in KINDS}


def _equal_area_diameters(labels: np.ndarray) -> np.ndarray:
    return np.sqrt(4 * np.bincount(labels.ravel())[1:] / np.pi)


def _touching(labels: np.ndarray) -> set[int]:
    """Ids of nuclei with a pixel beside a pixel of another nucleus."""
    ids: set[int] = set()
    for a, b in ((labels[1:], labels[:-1]), (labels[:, 1:], labels[:, :-1])):
        meet = (a != b) & (a > 0) & (b > 0)
        ids |= set(a[meet]) | set(b[meet])
    return ids


def _in_windows(labels: np.ndarray, size: int = 128, step: int = 64) -> list[int]:
    """Number of nuclei in each window."""
    rows, cols = (range(0, side - size + 1, step) for side in labels.shape)
    return [np.unique(labels[r : r + size, c : c + size]).size - 1 for r in rows for c in cols]


def test_an_image_is_uint8_rgb_with_a_label_map_of_ids_one_to_n(images):
    for image, labels in images.values():
        assert image.shape == (256, 256, 3)
        assert image.dtype == np.uint8
        assert labels.dtype == np.int32
        check_label_map(labels)
        assert np.array_equal(np.unique(labels), np.arange(labels.max() + 1))


@pytest.mark.parametrize("kind", KINDS)
def test_each_nucleus_is_one_piece_of_at_least_25_pixels(by_kind, kind):
    labels = by_kind[kind][0].labels
    assert label(labels, connectivity=1).max() == labels.max()
    assert np.bincount(labels.ravel()).min() >= 25


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_image_and_another_seed_another(kind):
    first, again, other = (generate_tissue(kind, (96, 128), seed) for seed in (5, 5, 6))
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.labels, again.labels)
    assert not np.array_equal(first.labels, other.labels)
    assert np.mean(first.image != other.image) > 0.5


def test_generating_does_not_touch_the_global_random_state():
    before = np.random.get_state()[1].copy()  # noqa: NPY002 - the state that must stay as it was
    generate_tissue("stromal", (64, 64), 1)
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002


def test_two_kinds_with_one_seed_share_no_random_numbers():
    glandular, stromal = (generate_tissue(kind, (128, 128), 3).labels > 0 for kind in ("glandular", "stromal"))
    assert abs(np.corrcoef(glandular.ravel(), stromal.ravel())[0, 1]) < 0.25


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(64, 64), (65, 131), (200, 96)])
def test_any_shape_from_64_pixels_on_is_made_exactly(kind, shape):
    image, labels = generate_tissue(kind, shape, 2)
    assert image.shape == (*shape, 3)
    assert labels.shape == shape


@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_exact_nuclei_are_darker_in_haematoxylin_than_their_rings(by_kind, kind):
    darker, moved_darker = [], []
    for image, labels in by_kind[kind]:
        red = 255.0 - image[..., 0]  # haematoxylin absorbs red, eosin and blood hardly do
        rest = (labels == 0) & ~ndimage.binary_dilation(labels > 0, iterations=1)

        def contrast(moved, red=red, rest=rest):
            found = []
            for i, box in enumerate(ndimage.find_objects(moved), start=1):
                wide = tuple(slice(max(0, s.start - 4), s.stop + 4) for s in box)
                mask = moved[wide] == i
                ring = ndimage.binary_dilation(mask, iterations=4) & rest[wide]
                if ring.sum() >= 10:
                    found.append(red[wide][mask].mean() - red[wide][ring].mean())
            return found

        darker += contrast(labels)
        moved_darker += contrast(np.roll(labels, (7, 7), (0, 1)))
    assert np.mean(np.array(darker) > 0) > 0.97
    assert np.median(darker) > 25
    assert np.median(moved_darker) < np.median(darker) / 2, "labels moved by 7 pixels fit half as well or more"


@pytest.mark.parametrize("kind", KINDS)
def test_outlines_lie_on_the_steepest_place_not_a_pixel_beside(by_kind, kind):
    gain = {}
    for shift in (-2, 0, 2):
        steps = []
        for image, labels in by_kind[kind]:
            red = 255.0 - ndimage.gaussian_filter(image[..., 0].astype(float), 0.5)
            inside = ndimage.distance_transform_edt(labels > 0)
            signed = inside - ndimage.distance_transform_edt(labels == 0)
            within, without = (signed > shift) & (signed <= shift + 1), (signed <= shift) & (signed > shift - 1.5)
            steps.append(red[within].mean() - red[without].mean())
        gain[shift] = np.mean(steps)
    assert gain[0] > gain[-2]
    assert gain[0] > gain[2]


@pytest.mark.parametrize(
    ("kind", "per_window", "diameter", "covered", "touching"),
    [
        ("glandular", (19, 34), (12.0, 15.5), (0.13, 0.28), (0.25, 0.65)),
        ("lymphoid", (32, 46), (10.0, 12.5), (0.18, 0.30), (0.25, 0.60)),
        ("stromal", (8, 19), (10.5, 13.0), (0.06, 0.14), (0.15, 0.55)),
        ("squamous", (13, 24), (13.0, 18.0), (0.12, 0.24), (0.05, 0.45)),
    ],
)
def test_density_size_cover_and_touching_of_a_kind_stay_in_range(
    by_kind, kind, per_window, diameter, covered, touching
):
    tissues = by_kind[kind]
    measured = {
        "nuclei in a 128 pixel window": (np.mean([_in_windows(t.labels) for t in tissues]), per_window),
        "median diameter": (np.median(np.concatenate([_equal_area_diameters(t.labels) for t in tissues])), diameter),
        "share covered": (np.mean([t.labels > 0 for t in tissues]), covered),
        "share touching": (np.mean([len(_touching(t.labels)) / t.labels.max() for t in tissues]), touching),
    }
    for what, (value, (low, high)) in measured.items():
        assert low < value < high, f"{kind}: {what} is {value:.3f}"


def test_kinds_differ_in_density_size_shape_and_colour(by_kind):
    count = {kind: np.mean([t.labels.max() for t in tissues]) for kind, tissues in by_kind.items()}
    area, elongation, colour = {}, {}, {}
    for kind, tissues in by_kind.items():
        wanted = ("area", "axis_major_length", "axis_minor_length")
        props = [regionprops_table(t.labels, properties=wanted) for t in tissues]
        area[kind] = np.mean(np.concatenate([p["area"] for p in props]))
        elongation[kind] = np.median(np.concatenate([p["axis_major_length"] / p["axis_minor_length"] for p in props]))
        colour[kind] = np.mean([t.image[t.labels == 0].mean(axis=0) for t in tissues], axis=0)
    assert count["lymphoid"] > 1.3 * count["glandular"] > 1.3 * 1.3 * count["stromal"]
    assert min(area["squamous"], area["glandular"]) > 1.25 * max(area["lymphoid"], area["stromal"])
    assert elongation["stromal"] > 1.3 * max(elongation[kind] for kind in KINDS if kind != "stromal")
    names = list(KINDS)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            assert np.linalg.norm(colour[one] - colour[other]) > 15, f"{one} and {other} have the same background"


def test_stain_varies_between_images_of_one_kind(by_kind):
    for kind, tissues in by_kind.items():
        background = [t.image[t.labels == 0].mean(axis=0) for t in tissues]
        assert np.ptp(background, axis=0).max() > 5, kind


def test_cellularity_varies_inside_an_image_so_that_the_choice_of_patch_matters(images):
    ratios = []
    for spec in splits():
        if spec.split == "train":
            counts = _in_windows(images[spec.id].labels, size=96, step=32)
            ratios.append(max(counts) / max(1, min(counts)))
    assert min(ratios) > 1.4
    assert np.median(ratios) > 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_haematoxylin_threshold_does_not_solve_the_task_but_is_better_than_chance(by_kind, kind):
    found = []
    for image, labels in by_kind[kind]:
        haematoxylin = ndimage.gaussian_filter(rgb2hed(image)[..., 0], 1)
        components = label(ndimage.binary_fill_holes(haematoxylin > threshold_otsu(haematoxylin)))
        overlap = np.zeros((labels.max() + 1, components.max() + 1))
        np.add.at(overlap, (labels.ravel(), components.ravel()), 1)
        union = overlap.sum(1)[1:, None] + overlap.sum(0)[None, 1:] - overlap[1:, 1:]
        found.append(np.mean((overlap[1:, 1:] / union).max(axis=1) > 0.5))
    assert 0.25 < np.mean(found) < 0.85, f"share of nuclei that a threshold finds at IoU 0.5: {np.mean(found):.2f}"


def test_the_table_has_8_2_8_images_with_unique_ids_seeds_and_patients():
    specs = splits()
    assert [sum(s.split == name for s in specs) for name in ("train", "val", "test")] == [8, 2, 8]
    assert len({s.id for s in specs}) == len({s.patient for s in specs}) == len({(s.kind, s.seed) for s in specs}) == 18
    assert specs[0].id == "tissue-glandular-01"
    assert all(s.id == f"tissue-{s.kind}-{s.seed:02d}" for s in specs)
    assert {(s.split, s.shape) for s in specs} == {("train", (512, 512)), ("val", (256, 256)), ("test", (256, 256))}


def test_a_larger_image_is_as_dense_as_a_small_one():
    small, large = (generate_tissue("lymphoid", (side, side), 4).labels for side in (256, 512))
    assert (large > 0).mean() == pytest.approx((small > 0).mean(), rel=0.35)


def test_the_unseen_kind_occurs_twice_and_in_test_only():
    specs = splits()
    assert [s.split for s in specs if s.kind == UNSEEN_KIND] == ["test", "test"]
    assert {s.kind for s in specs if s.split == "train"} == set(KINDS) - {UNSEEN_KIND}
    assert all(s.seen == (s.kind != UNSEEN_KIND) for s in specs)


def test_the_note_for_figures_says_synthetic():
    assert "synthetic" in SYNTHETIC_NOTE


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "glandulr"}, "no tissue called 'glandulr'; choose one of glandular"),
        ({"kind": "stromal", "shape": (63, 256)}, r"at least 64 pixels each, got \(63, 256\)"),
        ({"kind": "stromal", "shape": (256, 256, 3)}, "height, width"),
        ({"kind": "stromal", "seed": -1}, ">= 0, got -1"),
    ],
)
def test_bad_arguments_are_refused_with_what_to_give_instead(arguments, message):
    with pytest.raises(ValueError, match=message):
        generate_tissue(**arguments)
