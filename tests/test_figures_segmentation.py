"""Figure 7: outlines where they belong, and no silent gap."""

import numpy as np
import pytest

from nucseg.figures.segmentation import BOTH, COLUMNS, PREDICTION, TRUTH, figure7, outlines, overlay


def square(size=40, at=10, side=12):
    labels = np.zeros((size, size), dtype=np.int32)
    labels[at : at + side, at : at + side] = 5
    return labels


def test_outlines_are_the_rim_of_each_nucleus_also_where_two_touch():
    labels = square()
    labels[10:22, 16:22] = 9
    rim = outlines(labels)
    assert not rim[labels == 0].any()
    assert not rim[11:21, 11:15].any()
    assert rim[10:22, 15:17].all()
    assert rim[10, 10:22].all()


def test_a_nucleus_cut_by_the_image_stays_open_there():
    labels = square(at=0)
    rim = outlines(labels)
    assert not rim[0, :10].any()
    assert rim[:12, 11].all()


def test_missed_truth_is_green_a_false_prediction_red_and_what_agrees_yellow():
    image = np.full((60, 60, 3), 128, dtype=np.uint8)
    true, pred = square(60), square(60, at=40)  # the one missed, the other invented
    true[30:38, 5:13], pred[31:39, 5:13] = 7, 8  # found, one pixel lower
    drawn = overlay(image, true, pred)
    assert drawn.shape == (120, 120, 3)
    assert (drawn[20, 20:44] == TRUTH).all()
    assert (drawn[80, 80:104] == PREDICTION).all()
    assert (drawn[62, 10:26] == BOTH).all()
    assert not (drawn[60:80, :40] == TRUTH).all(axis=-1).any()
    assert (drawn[:18] == 128).all()
    assert (image == 128).all()


def test_a_system_that_was_not_run_has_no_column_but_is_named_below():
    image = np.zeros((40, 40, 3), dtype=np.uint8)
    ours = "HoVer-Net + Ours\n[hoverlite]"
    columns = (ours, *COLUMNS[1:5], "pix2pix + MRCNN\n[hoverlite]")
    rows = [(image, square(), {ours: square(), "MRCNN": square(at=9)}, "a test image")] * 2
    figure = figure7(rows, columns, scores={"MRCNN": [1.0, 0.5]})
    panels = [axis for axis in figure.axes if axis.get_subplotspec() is not None]
    assert [axis.get_title() for axis in panels] == [ours, "MRCNN", "", ""]
    assert all(axis.images for axis in panels)
    assert panels[3].get_xlabel() == "AJI 0.500"
    missing = "MRCNN + Ours, HoVer-Net, NaiveAug + Plabel, pix2pix + MRCNN"
    assert figure.get_supxlabel() == f"not run in this profile: {missing}"
    figure.canvas.draw()


def test_one_run_that_stands_for_two_systems_has_one_column_with_both_names():
    image = np.zeros((40, 40, 3), dtype=np.uint8)
    rows = [(image, square(), dict.fromkeys(COLUMNS[2:4], square()) | {COLUMNS[0]: square(at=a)}) for a in (10, 11)]
    figure = figure7(rows, (COLUMNS[0], *COLUMNS[2:4]))
    assert [axis.get_title() for axis in figure.axes] == [COLUMNS[0], "HoVer-Net, MRCNN", "", ""]
    assert figure.get_supxlabel() == ""
    names = {f"{COLUMNS[2]}\n[lite]": square(), f"{COLUMNS[3]}\n[lite]": square()}
    assert figure7([(image, square(), names)], tuple(names)).axes[0].get_title() == "HoVer-Net, MRCNN\n[lite]"
    names = {f"{COLUMNS[2]}\n[lite]": square(), COLUMNS[3]: square()}
    assert figure7([(image, square(), names)], tuple(names)).axes[0].get_title() == "HoVer-Net [lite],\nMRCNN"
    scores = {COLUMNS[2]: [0.5, 0.6], COLUMNS[3]: [0.5, 0.7], COLUMNS[0]: [0.1, 0.1]}  # of whole images: two runs
    figure = figure7(rows, (COLUMNS[0], *COLUMNS[2:4]), scores)
    assert [axis.get_title() for axis in figure.axes[:3]] == [COLUMNS[0], *COLUMNS[2:4]]
    everything = {name: square(at=9 + i) for i, name in enumerate(COLUMNS)}
    assert sum(bool(axis.images) for axis in figure7([(image, square(), everything)]).axes) == len(COLUMNS)


def test_a_system_that_lacks_one_of_the_crops_has_a_panel_that_says_so():
    image = np.zeros((40, 40, 3), dtype=np.uint8)
    rows = [(image, square(), {"MRCNN": square(), "HoVer-Net": square()}), (image, square(), {"MRCNN": square()})]
    panels = [axis for axis in figure7(rows).axes if axis.get_subplotspec() is not None]
    assert ["not run" in "".join(t.get_text() for t in axis.texts) for axis in panels] == [0, 0, 1, 0]


def test_wrong_input_is_named():
    image = np.zeros((40, 40, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="no crop"):
        figure7([])
    with pytest.raises(ValueError, match="no prediction of any system"):
        figure7([(image, square(), {})])
    with pytest.raises(ValueError, match=r"\['MaskRCNN'\], which are not among the columns"):
        figure7([(image, square(), {"MaskRCNN": square()})])
    with pytest.raises(ValueError, match="shapes differ"):
        overlay(image, square(), square(size=30))
