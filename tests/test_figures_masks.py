"""Figure 4 shows what it is given."""

from __future__ import annotations

import numpy as np
import pytest

from nucseg.figures import signed
from nucseg.figures.masks import colour_instances, figure4, figure_realism
from nucseg.masks import STATISTICS, hou_polygons, synthesis_steps, synthesize_masks


def blobs() -> np.ndarray:
    labels = np.zeros((96, 96), np.int32)
    for index, (row, col) in enumerate([(8, 8), (10, 50), (40, 30), (60, 70), (75, 10)], start=1):
        labels[row : row + 10, col : col + 13] = index
    return labels


def test_instances_are_bright_and_distinct_on_black():
    labels = np.arange(40, dtype=np.int32).reshape(5, 8)
    picture = colour_instances(labels)
    assert picture.shape == (5, 8, 3)
    assert picture.min() >= 0
    assert picture.max() <= 1
    colours = picture.reshape(-1, 3)
    assert (colours[0] == 0).all()
    assert (colours[1:].max(axis=1) > 0.5).all()
    assert len(np.unique(colours.round(4), axis=0)) == 40
    assert colour_instances(np.zeros((3, 3), np.int32)).max() == 0
    assert colour_instances(np.array([[0, 2**31 - 1]], np.int32))[0, 1].max() > 0.5  # no table of two billion colours


@pytest.mark.parametrize("with_image", [True, False])
def test_figure_4_shows_four_steps_and_both_methods_beside_the_real_mask(with_image, tmp_path):
    labels = blobs()
    ours, hou = synthesize_masks(labels, 2, 96), hou_polygons(4, 96, 1.0)
    image = np.full((96, 96, 3), 200, np.uint8) if with_image else None
    figure = figure4(labels, image, ours, hou, synthesis_steps(labels, iteration=4, size=96))
    titles = [axis.get_title() for axis in figure.axes]
    assert [t[:3] for t in titles if t.startswith("(")] == ["(1)", "(2)", "(3)", "(4)"]
    assert sum(t.startswith("ours") for t in titles) == 2
    assert sum(t.startswith("Hou") for t in titles) == 3
    assert ("real image" in titles) == with_image
    assert any(t.startswith("real mask: 5 nuclei") for t in titles)
    figure.savefig(tmp_path / "figure.png", dpi=40)


def test_figure_4_refuses_to_be_drawn_without_masks():
    labels = blobs()
    with pytest.raises(ValueError, match="at least one mask of each method"):
        figure4(labels, None, [], [labels], synthesis_steps(labels, iteration=2, size=96))


def test_the_realism_figure_shows_every_statistic_of_every_kind_with_its_distance():
    rng = np.random.default_rng(0)
    real = {name: rng.normal(10, 1, 200) for name in STATISTICS}
    shifted = {name: values + 2 for name, values in real.items()} | {"density": np.empty(0)}
    figure = figure_realism({"real": real, "ours": real, "Hou et al.": shifted})
    assert len(figure.axes) == len(STATISTICS)
    assert [line.get_label() for line in figure.axes[0].lines] == ["real", "ours", "Hou et al."]
    assert figure.axes[0].get_title() == "distance: ours 0, Hou et al. 2"
    assert figure.axes[-1].get_title() == "distance: ours 0"
    median = np.interp(0.5, *figure.axes[0].lines[2].get_xydata().T[::-1])
    assert median == pytest.approx(np.median(shifted["area"]), abs=0.2)
    figure.canvas.draw()


def test_signed_numbers_are_blue_below_nought_and_red_above():
    below, nought, above, far = signed(np.array([[-1.0, 0.0, 1.0, 9.0]]))[0]
    assert below[2] > below[0] + 0.2
    assert above[0] > above[2] + 0.2
    assert nought.min() > 0.95
    assert (far == above).all()
