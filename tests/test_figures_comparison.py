"""What is drawn is what was computed: numbers are read back from the axes. All numbers here are made up."""

import io

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from PIL import Image

from nucseg.figures.comparison import BLUE, FAINT, VERMILION, budget_curves, forest_plot, png, rank_plot
from nucseg.figures.style import colour_of
from nucseg.outcomes import BudgetCurve
from nucseg.selection import STRATEGIES
from nucseg.stats import friedman_nemenyi


def curve(against="label_share", strategies=("cps", "kmeans", "random-crop"), left_out=0, scale=1.0):
    points = [
        {"selection": name, "k1": k1, "x": scale * 0.005 * k1, "mean": 0.4 + 0.01 * k1 + 0.02 * i, "seeds": 4}
        for i, name in enumerate(strategies)
        for k1 in (3, 6, 9)
    ]
    frame = pd.DataFrame(points, columns=["selection", "k1", "x", "mean", "seeds"])
    frame = frame.assign(low=frame["mean"] - 0.01, high=frame["mean"] + 0.01, sd=0.01)
    return BudgetCurve(against, frame, (0.58, 0.57, 0.59), 14, left_out)


def texts(figure):
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]


def panels(figure):
    return {axis.get_title("left"): axis for axis in figure.axes if axis.get_title("left")}


def test_every_strategy_has_a_panel_with_its_own_curve_beside_random_crops():
    figure = budget_curves([curve()])
    found = panels(figure)
    assert set(found) == {"cps", "kmeans"}  # random crops are in all of them
    lines = [
        (tuple(np.round(line.get_xdata(), 4)), tuple(np.round(line.get_ydata(), 4))) for line in found["cps"].lines
    ]
    assert ((0.015, 0.03, 0.045), (0.43, 0.46, 0.49)) in lines
    assert ((0.015, 0.03, 0.045), (0.47, 0.5, 0.53)) in lines
    assert any(set(line.get_ydata()) == {0.58} for line in found["cps"].lines)  # all labels
    low, high = found["cps"].collections[-1].get_paths()[0].vertices[:, 1].min(), found["cps"].get_ylim()[1]
    assert low == pytest.approx(0.42)
    assert high > 0.58
    assert found["cps"].get_xlim()[0] == 0


def test_pixels_stand_above_nuclei_and_what_is_left_out_is_said():
    figure = budget_curves([curve(), curve("label_nuclei", left_out=2, scale=8000)])
    assert len(figure.axes) == 4
    assert "annotated pixels, % of the training images" in texts(figure)
    assert "annotated nuclei (2 experiments left out: nuclei not counted)" in texts(figure)


def test_a_curve_without_points_is_a_line_of_text_and_none_at_all_is_no_figure():
    empty = curve("label_nuclei", strategies=(), left_out=9)
    assert any(
        "not drawn against annotated nuclei (9 experiments" in text for text in texts(budget_curves([curve(), empty]))
    )
    assert budget_curves([empty]) is None


def test_one_budget_makes_no_curve_and_thus_no_figure():
    one = curve()
    one = one._replace(points=one.points[one.points["k1"] == 9])
    assert budget_curves([one]) is None
    apart = one.points.assign(k1=[9, 6, 3])  # three strategies, each on a budget of its own
    assert budget_curves([one._replace(points=apart)]) is None


def test_strategies_on_one_budget_have_no_panel_but_a_faint_dot_that_the_legend_names():
    both = curve()
    single = both.points[(both.points["selection"] != "kmeans") | (both.points["k1"] == 6)]
    figure = budget_curves([both._replace(points=single)])
    assert set(panels(figure)) == {"cps"}
    assert "kmeans: on one budget only" in texts(figure)
    assert "the others" not in texts(figure)
    faint = [line for line in panels(figure)["cps"].lines if line.get_color() == FAINT]
    assert [(list(line.get_xdata()), line.get_marker()) for line in faint] == [([0.03], "o")]


def test_the_legend_names_the_others_only_where_there_are_some():
    found = texts(budget_curves([curve()]))
    assert "the others" in found
    assert not any("on one budget only" in text for text in found)
    assert "the others" not in texts(budget_curves([curve(strategies=("cps", "random-crop"))]))


def test_random_crops_alone_are_drawn_too():
    assert set(panels(budget_curves([curve(strategies=("random-crop",))]))) == {"random-crop"}


def forest(**changes):
    line = {"table": "II", "row": "NaiveAug", "id": "II.naive", "against": "CSinGAN", "mean difference": -0.03}
    line |= {"CI low": -0.05, "CI high": -0.01, "seeds CI low": np.nan, "seeds CI high": np.nan}
    line |= {"images": 14, "seeds": 4, "why": "", "repeats": ""}
    return {**line, **changes}


def test_each_row_of_the_forest_has_its_interval_in_its_colour_and_its_numbers_beside_it():
    none = dict.fromkeys(("mean difference", "CI low", "CI high"), np.nan)
    frame = pd.DataFrame(
        [
            forest(),
            forest(row="SinGAN", **{"mean difference": 0.02, "CI low": 0.01, "CI high": 0.03}),
            forest(row="cycleGAN", **{"mean difference": 0.0, "CI low": -0.0004, "CI high": 0.01}),
            forest(row="CSinGAN [run with hoverlite]", why="reference", **none),
            forest(row="pix2pix", why="not run yet", images=0, seeds=0, **none),
            forest(row="no such row", why="not run in this profile", images=0, seeds=0, **none),
            forest(table="VI", row="K1 = 6", repeats="II", **{"CI low": np.nan, "CI high": np.nan}),
        ]
    )
    figure = forest_plot(frame)
    (axis,) = figure.axes
    drawn = [c for c in axis.collections if isinstance(c, LineCollection)]
    ends = [(c.get_segments()[0][0][0], c.get_segments()[0][-1][0]) for c in drawn[:3]]
    assert ends == [(-0.05, -0.01), (0.01, 0.03), (-0.0004, 0.01)]
    from matplotlib.colors import to_hex

    assert [to_hex(c.get_color()[0]).upper() for c in drawn[:2]] == [VERMILION, BLUE]
    found = texts(figure)
    for text in (
        *("II · Augmentation", "VI · K1 and K2", "NaiveAug", "14 × 4", "reference"),
        *("−0.030  [−0.050, −0.010]", "+0.020  [+0.010, +0.030]", "as II", "0  [−0.0004, +0.010]", "−0.030"),
        "CSinGAN [hoverlite]",
    ):
        assert text in found, text
    assert not {"no such row", "pix2pix"} & set(found)
    assert "\nnot run yet: 1 more; not run in this profile: 1 more" in axis.get_xlabel()
    assert -0.05 > axis.get_xlim()[0] == -axis.get_xlim()[1]


def test_the_interval_over_seeds_stands_pale_behind_and_may_leave_the_picture():
    ends = ((-0.07, 0.01), (-3.0, 3.0))
    figure = forest_plot(pd.DataFrame([forest(**{"seeds CI low": low, "seeds CI high": high}) for low, high in ends]))
    (axis,) = figure.axes
    pale, thin = [c for c in axis.collections if isinstance(c, LineCollection)][:2]
    assert pale.get_segments()[0][:, 0].tolist() == [-0.07, 0.01]
    assert pale.get_zorder() < thin.get_zorder()
    assert axis.get_xlim()[1] == pytest.approx(1.08 * 2 * 0.05)
    assert "pale: interval over seeds; in colour only where both exclude 0" in axis.get_xlabel()
    alone = forest_plot(pd.DataFrame([forest()])).axes[0].get_xlabel()
    assert "over seeds" not in alone
    assert "in colour where it excludes 0" in alone


@pytest.mark.parametrize(
    ("seeds", "colour"),
    [((-0.06, -0.005), VERMILION), ((-0.07, 0.01), None), ((-0.07, 0.0), None), ((np.nan, np.nan), VERMILION)],
)
def test_a_row_whose_interval_over_seeds_holds_0_is_grey_however_clear_the_images_are(seeds, colour):
    figure = forest_plot(pd.DataFrame([forest(**dict(zip(("seeds CI low", "seeds CI high"), seeds, strict=True)))]))
    (dot,) = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert dot.get_color() == (colour or "0.45")


def test_a_forest_of_rows_that_were_not_run_is_drawn_all_the_same():
    none = dict.fromkeys(("mean difference", "CI low", "CI high"), np.nan)
    frame = pd.DataFrame([forest(why="not run yet", images=0, seeds=0, **none)])
    assert "not run yet" in texts(forest_plot(frame))
    png(forest_plot(frame))


def test_the_rank_plot_shows_ranks_groups_and_the_critical_difference():
    scores = np.random.default_rng(0).normal(size=(20, 4)) + np.array([3.0, 0, 0.2, 0.1])
    test = friedman_nemenyi(scores, ["cps", "kmeans", "random-crop", "typiclust"])
    (axis,) = rank_plot(test).axes
    dots = [float(line.get_xdata()[0]) for line in axis.lines if line.get_marker() == "o"]
    assert dots == pytest.approx(test.mean_ranks)
    assert [label.get_text() for label in axis.get_yticklabels()] == list(test.systems)
    bars = [line for line in axis.lines if line.get_linewidth() == 3]
    assert len(bars) == len(test.groups) + 1
    assert np.ptp(bars[-1].get_xdata()) == pytest.approx(test.critical_difference)
    first, last = test.groups[0]
    assert list(bars[0].get_ydata()) == [first - 0.25, last + 0.25]
    assert any(f"critical difference {test.critical_difference:.2f}" in text.get_text() for text in axis.texts)


def test_families_keep_their_colour():
    assert colour_of("cps") == colour_of("cps-no-2nd") == BLUE
    assert colour_of("random-crop") == colour_of("random-centre-crop")
    assert len({colour_of(name) for name in STRATEGIES}) == 6  # no two alike but for these families


def test_a_picture_for_a_notebook_is_small_and_looks_the_same():
    figure = budget_curves([curve()])
    whole = io.BytesIO()
    figure.savefig(whole, format="png", dpi=100, bbox_inches="tight")
    light = png(figure)
    assert len(light) < 0.6 * len(whole.getvalue())
    one, other = (np.asarray(Image.open(io.BytesIO(b)).convert("RGB"), float) for b in (whole.getvalue(), light))
    assert np.abs(one - other).mean() < 1.0


def test_thin_lines_keep_their_colour_in_a_notebook():
    rows = [forest(row=f"row {i}", **{"mean difference": 0.001 * i}) for i in range(30)]
    rows += [forest(**{"mean difference": 0.02, "CI low": 0.01, "CI high": 0.03})]
    found = np.asarray(Image.open(io.BytesIO(png(forest_plot(pd.DataFrame(rows))))).convert("RGB")).reshape(-1, 3)
    for colour in (BLUE, VERMILION):
        assert (np.abs(found - np.array(to_rgb(colour)) * 255).max(axis=1) < 3).sum() > 20, colour
