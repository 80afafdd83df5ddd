"""The figure of schedule lengths: means, seeds, seconds apart from the curves. All numbers here are made up."""

import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from nucseg.figures.schedules import schedule_plot


def made_up(rows=("patches", "all labels"), seeds=(1, 2), skip=()):
    lines = []
    for k, row in enumerate(rows):
        for part, iterations in ((0.5, 100), (1, 200), (2, 400)):
            for seed in seeds:
                aji = 0.4 + 0.1 * k + iterations / 10_000 + 0.02 * seed
                line = {"row": row, "part": part, "iterations": iterations, "seed": seed, "validation AJI": aji}
                lines += [] if (k, iterations, seed) in skip else [{**line, "seconds": iterations / 5 + k + seed}]
    return pd.DataFrame(lines)


def parts(figure):
    (axis,) = figure.axes
    FigureCanvasAgg(figure).draw()
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    return axis, legend


def opened(axis):
    return [(line.get_color(), list(line.get_xdata())) for line in axis.lines if line.get_markerfacecolor() == "white"]


def test_a_line_holds_the_means_of_seeds_and_every_seed_is_a_dot():
    axis, legend = parts(schedule_plot(made_up()))
    lines = {line.get_label(): list(line.get_ydata()) for line in axis.lines}
    assert lines["patches"] == pytest.approx([0.44, 0.45, 0.47])
    assert sum(len(dots.get_offsets()) for dots in axis.collections) == 12
    assert legend == ["patches", "all labels", "one seed"]
    assert not any(points for _, points in opened(axis))


def test_a_mean_of_fewer_seeds_than_its_neighbours_is_an_open_marker_that_the_legend_names():
    axis, legend = parts(schedule_plot(made_up(seeds=(1, 2, 3, 4), skip={(1, 400, 2), (1, 400, 3)})))
    assert legend[-1] == "fewer seeds (2 of 4)"
    colours = {line.get_label(): line.get_color() for line in axis.lines}
    assert [each for each in opened(axis) if each[1]] == [(colours["all labels"], [400])]


def test_the_seconds_stand_below_the_axis_in_the_colours_of_the_lines_and_nothing_overlaps():
    figure = schedule_plot(made_up(rows=("a", "b", "c")))
    axis, _ = parts(figure)
    assert [text.get_text() for text in axis.texts] == [
        f"{100 * 2**i / 5 + k + 1.5:.0f} s" for k in range(3) for i in range(3)
    ]
    assert [text.get_color() for text in axis.texts[::3]] == [line.get_color() for line in axis.lines[:6:2]]
    below = [text.get_window_extent() for text in axis.texts]
    others = [label.get_window_extent() for label in axis.get_xticklabels()] + [axis.xaxis.label.get_window_extent()]
    for i, box in enumerate(below):
        assert box.y1 < axis.get_window_extent().y0
        assert not any(box.overlaps(other) for other in below[:i] + others)
    assert "seconds of training" in axis.get_xlabel()


def test_one_seed_makes_no_dots():
    axis, legend = parts(schedule_plot(made_up(seeds=(7,))))
    assert not len(axis.collections)
    assert legend == ["patches", "all labels"]
