import numpy as np
import pytest

from nucseg.labels import IGNORE, check_label_map, relabel


def test_ids_are_renumbered_in_their_order_and_background_and_unknown_stay():
    labels = np.array([[7, 0, 3], [IGNORE, 7, 70000]])
    assert relabel(labels).tolist() == [[2, 0, 1], [IGNORE, 2, 3]]
    assert relabel(labels).dtype == np.int32


@pytest.mark.parametrize("labels", [np.zeros((2, 3), np.uint8), np.full((2, 2), IGNORE), np.zeros((0, 4), int)])
def test_a_map_without_nuclei_stays_as_it_is(labels):
    assert np.array_equal(relabel(labels), labels)


def test_ids_without_background_start_at_one():
    assert relabel(np.array([[9, 4]], dtype=np.uint16)).tolist() == [[2, 1]]


def test_unknown_pixels_are_refused_where_everything_must_be_known():
    labels = np.array([[IGNORE, 2]])
    with pytest.raises(ValueError, match=r"truth: ids must be >= 0, found -1"):
        check_label_map(labels, "truth")
    assert check_label_map(labels, unknown=True) is labels
    with pytest.raises(ValueError, match="ids must be >= -1, found -2"):
        check_label_map(labels - 1, unknown=True)


@pytest.mark.parametrize("wrong", [np.zeros((2, 2), bool), np.zeros((2, 2)), [[0, 1]]])
def test_what_is_no_array_of_integers_is_refused(wrong):
    with pytest.raises(TypeError, match="labels: "):
        check_label_map(wrong)
