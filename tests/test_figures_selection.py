"""Figures 3 and 6 and the coverage figure show what they are given."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from nucseg.data import Patch
from nucseg.figures.selection import figure3, figure6, figure_coverage, short_ids
from nucseg.selection import Selection, cps


def drawn(figure) -> np.ndarray:
    """Pixels of the figure, so that a fault in the layout shows as a warning."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def texts(figure) -> str:
    drawn(figure)
    return "\n".join(t.get_text() for t in figure.findobj(lambda a: hasattr(a, "get_text")))


@pytest.fixture
def clustered():
    generator = np.random.default_rng(0)
    x = np.repeat(generator.normal(0, 5, (3, 8)), 20, 0) + generator.normal(size=(60, 8))
    parts = x[:, None] + generator.normal(size=(60, 4, 8))
    return x, parts, cps(x, parts, 3, 2, 0)


def thumbnail(row: int) -> np.ndarray:
    return np.full((64, 64, 3), row, np.uint8)


def test_figure_3_marks_the_chosen_patches_and_those_nearest_to_the_centres(clustered):
    x, parts, result = clustered
    figure = figure3(x, parts, result, thumbnail, shown=1, note="synthetic tissue")
    assert drawn(figure).std() > 0
    panels = [axes for axes in figure.axes if axes.images]
    shown = [int(axes.images[0].get_array()[0, 0, 0]) for axes in panels]
    nearest = [int(np.flatnonzero(result.coarse == k)[result.terms[result.coarse == k, 0].argmin()]) for k in range(3)]
    assert shown == nearest + result.chosen.tolist()
    words = texts(figure)
    assert "60 patches, $K_1$ = 3" in words
    assert "fine, in cluster 1" in words
    assert "synthetic tissue" in words


def test_the_bars_of_figure_3_add_up_to_the_cost_of_the_patches(clustered):
    x, parts, result = clustered
    figure = figure3(x, parts, result, thumbnail)
    drawn(figure)
    bars = next(axes for axes in figure.axes if len(axes.patches) == 3 * 3 * 2)
    tops = {round(p.get_x() + p.get_width() / 2, 3): p.get_y() + p.get_height() for p in bars.patches}
    for k, row in enumerate(result.chosen):
        assert tops[k + 0.2] == pytest.approx(result.terms[row].sum())


def test_figure_3_refuses_a_cluster_that_is_not_there(clustered):
    with pytest.raises(ValueError, match=r"expected a coarse cluster in 0\.\.2, got 3"):
        figure3(*clustered, thumbnail, shown=3)


def test_figure_3_says_when_it_shows_some_of_many_clusters_only():
    x = np.random.default_rng(0).normal(size=(40, 5))
    parts = np.repeat(x[:, None], 4, 1) + 0.01 * np.random.default_rng(1).normal(size=(40, 4, 5))
    words = texts(figure3(x, parts, cps(x, parts, 14, 4, 0), thumbnail))
    assert "the first 12 of 14 clusters" in words


def test_figure_6_prints_redundancy_and_share_and_frames_the_twins():
    def made(strategy, count):
        patches = tuple(Patch(f"TCGA-AA-{i:04d}-01Z-00-DX1", i, 0, 32) for i in range(count))
        return Selection(strategy, patches, None, None, 0.0492)

    figure = figure6(made("random-crop", 3), made("cps", 2), lambda p: thumbnail(p.row), (0.91, 0.82), ((0, 2), (0, 1)))
    words = texts(figure)
    assert "random-crop: 3 patches of 3 images, 4.92% of the pixels, redundancy 0.910" in words
    assert "cps: 2 patches of 2 images, 4.92% of the pixels, redundancy 0.820" in words
    framed = [axes.spines["top"].get_linewidth() > 2 for axes in figure.axes if axes.images]
    assert framed == [True, False, True, True, True]
    assert "AA-0002" in words


def test_the_coverage_figure_orders_the_strategies_by_their_mean(tmp_path):
    table = pd.DataFrame(
        [
            {"strategy": s, "seed": seed, "coverage": c + 0.1 * seed, "redundancy": 0.5, "images": 3}
            for s, c in (("random-crop", 5.0), ("cps", 3.0), ("k-center", 4.0))
            for seed in range(3)
        ]
    )
    figure = figure_coverage({"kumar": table, "tnbc": table}, note="no training")
    words = texts(figure)
    labels = [t.get_text() for t in figure.axes[0].get_yticklabels()]
    assert labels == ["random-crop", "k-center", "cps"]
    assert "kumar distance to the nearest pick" in words
    assert "coverage" not in words  # which one would read as: more is better
    assert "lower is closer" in figure.axes[0].get_xlabel()
    assert "lower is more varied" in figure.axes[1].get_xlabel()
    assert "mean of 3 seeds; CPS and its variants share a colour. no training" in words
    points = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    np.testing.assert_allclose(points[2].get_xdata(), [3.0, 3.1, 3.2])


def test_a_tcga_barcode_is_shortened_to_what_tells_slides_apart():
    ids = ["TCGA-A7-A13E-01Z-00-DX1", "TCGA-A7-A13F-01Z-00-DX1"]
    assert short_ids(ids) == dict(zip(ids, ("A7-A13E", "A7-A13F"), strict=True))


@pytest.mark.parametrize(
    ("ids", "short"),
    [
        (["tissue-glandular-01", "tissue-glandular-02", "tissue-stromal-01"],
         ["glandular-01", "glandular-02", "stromal-01"]),
        (["Slide_01", "Slide_02"], ["Slide_01", "Slide_02"]),
        (["a-long-enough-name1", "a-long-enough-name2"], ["name1", "name2"]),  # "name" is no word of its own
        ([], []),
        (["tissue-glandular-02"] * 2, ["tissue…ular-02"]),
        (["x_the_very_same_start_01_b", "y"], ["x_the_…rt_01_b", "y"]),
        (["slide", "slide-2"], ["slide", "slide-2"]),
        (["a-name-0123456-end-0123456", "a-name-0123456-and-0123456"], ["end-0123456", "and-0123456"]),
        (["q.012345 6 012345.x", "q.012345 7 012345.x"], ["6 012345.x", "7 012345.x"]),
        (["abcdefgh1abcdefgh", "abcdefgh2abcdefgh"], ["abcdefgh1abcdefgh", "abcdefgh2abcdefgh"]),
    ],
)  # fmt: skip
def test_short_names_of_images_still_tell_them_apart(ids, short):
    found = short_ids(ids)
    assert sorted(found.values()) == sorted(short)
    assert set(found) == set(ids)
