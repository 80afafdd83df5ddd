"""Images as microscopes' programs write them: transparency, label maps of another size."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from nucseg.annotations import another_size
from nucseg.data import (
    DataError,
    ImageWarning,
    Sample,
    load_dataset,
    read_image,
    read_region,
)

RGB = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)


def whole_and_region(path: Path, say: str) -> tuple[np.ndarray, np.ndarray]:
    """Read an image whole and from row 3, column 11 on, both with a warning that says this, whatever others say."""
    found = []
    for read in (read_image, lambda path: read_region(path, 3, 11, 30, 37)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found.append(read(path))
        assert all(warning.category is ImageWarning for warning in caught)
        assert any(re.search(say, str(warning.message)) for warning in caught), [str(each.message) for each in caught]
    return found[0], found[1]


# --- Transparency -----------------------------------------------------------------------------------------------------


def test_what_is_transparent_is_white_in_palette_images(tmp_path):
    palette = Image.fromarray(np.array([[0, 1], [2, 2]], np.uint8), mode="P")
    palette.putpalette([0, 0, 0, 10, 20, 30, 200, 100, 50])
    for name, transparency in (("one", 0), ("each", bytes([0, 255, 128]))):
        palette.save(tmp_path / f"{name}.png", transparency=transparency)
        with pytest.warns(ImageWarning, match=r"from palette colours to RGB") as caught:
            found = read_image(tmp_path / f"{name}.png")
        assert len(caught) == 1
        half = [200, 100, 50] if name == "one" else [227, 177, 152]
        assert found.tolist() == [[[255, 255, 255], [10, 20, 30]], [half, half]]


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_what_is_transparent_is_white_where_a_png_names_a_colour_for_it(mode, tmp_path):
    Image.new(mode, (3, 2)).save(tmp_path / "a.png", transparency=0 if mode == "L" else (0, 0, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImageWarning)
        assert (read_image(tmp_path / "a.png") == 255).all()


@pytest.mark.parametrize("name", ["a.png", "a.tif", "zlib.tif", "deep.tif", "inverted.tif"])
def test_what_is_transparent_is_white_in_grey_images(name, tmp_path):
    grey = np.dstack([np.full((40, 50), 100, np.uint8), np.full((40, 50), 255, np.uint8)])
    grey[:, :10], grey[:, 10:20, 1] = 0, 128
    path = tmp_path / name
    if name == "a.png":
        Image.fromarray(grey, mode="LA").save(path)
    else:
        if name == "inverted.tif":
            grey[..., 0] = 255 - grey[..., 0]
        tifffile.imwrite(
            path,
            grey.astype(np.uint16) * 257 if name == "deep.tif" else grey,
            photometric="miniswhite" if name == "inverted.tif" else "minisblack",
            planarconfig="contig",
            extrasamples=["unassalpha"],
            compression="zlib" if name == "zlib.tif" else None,
        )
    for found in whole_and_region(path, "is grey"):
        found = found[:, -30:]  # columns 20 to 50 of the image or 18 to 48 of it
        assert (found[:, 2:] == 100).all()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImageWarning)
        found = read_region(path, 0, 5, 40, 20)
    assert (found[:, :5] == 255).all()
    assert (np.abs(found[:, 5:15].astype(int) - 177) <= 1).all()
    assert (found[:, 15:] == 100).all()


def test_a_second_sample_that_is_no_transparency_is_left_out(tmp_path):
    two = np.dstack([RGB[..., 0], np.zeros((40, 50), np.uint8)])
    how = {"photometric": "minisblack", "planarconfig": "contig", "extrasamples": ["unspecified"]}
    tifffile.imwrite(tmp_path / "a.tif", two, **how)
    np.testing.assert_array_equal(whole_and_region(tmp_path / "a.tif", "is grey")[0][..., 0], RGB[..., 0])


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
