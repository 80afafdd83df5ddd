"""Images as microscopes' programs write them: transparency, label maps of another size."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from nucseg.annotations import another_size
from nucseg.data import (
    DataError,
    Sample,
    load_dataset,
)

RGB = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)


# --- Label maps of another size ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((50, 40), "40 x 50 .* has 50 x 40; its sides are swapped: it was saved turned"),
        ((20, 25), "1/2 of the resolution of the image; export it at full resolution"),
        ((10, 13), "1/4 of the resolution"),
        ((10, 12), "1/4 of the resolution"),
        ((80, 100), "2 times the resolution of the image"),
        ((123, 150), "they must be of one size"),
        ((41, 50), "they must be of one size"),
        ((20, 24), "they must be of one size"),
    ],
)
def test_a_label_map_of_another_size_is_refused_with_how_it_probably_came_to_it(shape, reason, tmp_path):
    for name, array in (("images", RGB), ("labels", np.zeros(shape, np.uint16))):
        (tmp_path / name).mkdir()
        Image.fromarray(array).save(tmp_path / name / "a.png")
    with pytest.raises(DataError, match=reason):
        _ = load_dataset(tmp_path).train[0].labels
    with pytest.raises(DataError, match=reason.split(" has ")[-1].split("; ")[-1]):
        Sample.from_arrays("a", RGB, np.zeros(shape, np.uint16))


def test_an_empty_label_map_is_of_another_size():
    assert another_size((40, 50), (0, 0)) == "they must be of one size"
