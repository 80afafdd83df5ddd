"""Images as microscopes' programs write them: channels on pages of their own, transparency, sizes of pixels."""

from __future__ import annotations

import re
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from nucseg.annotations import another_size
from nucseg.data import (
    DataError,
    ImageError,
    ImageWarning,
    Sample,
    check_pixel_sizes,
    images,
    load_dataset,
    pixel_size,
    read_image,
    read_region,
)
from nucseg.data.images import used_bits
from nucseg.data.tiff_headers import colour_pages
from nucseg.workflow.base import open_images

RGB = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
PLANES = np.moveaxis(RGB, -1, 0)
TAKEN = "three pages, one per channel, which are taken as its red, green and blue"
TILES = {"tile": (16, 16), "compression": "zlib"}


def channels(path: Path, planes: np.ndarray = PLANES, axes: str = "CYX", names=(), **how) -> Path:
    """Write channels on pages of their own, as OME or ImageJ does by the name."""
    about = {"axes": axes}
    if path.name.endswith(".ome.tif"):
        about |= {"Channel": {"Name": names}} if names else {}
    else:
        about |= {"Labels": names} if names else {}
    tifffile.imwrite(path, planes, photometric=how.pop("photometric", "minisblack"), metadata=about, **how)
    return path


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


# --- One page per channel ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("a.ome.tif", {}),
        ("a.ome.tif", TILES),
        ("a.ome.tif", {"rowsperstrip": 7, "compression": "lzw"}),
        ("a.ome.tif", {"names": ["Red", "Green", "Blue"]}),
        ("a.ome.tif", {"names": ["Channel 0", "Channel 1", "Channel 2"]}),
        ("a.ome.tif", {"bigtiff": True}),
        ("a.tif", {"imagej": True}),
        ("a.tif", {"imagej": True, "names": ["c:1/3 - x.tif", "c:2/3 - x.tif", "c:3/3 - x.tif"]}),
        ("a.tif", {}),
        ("a.tif", TILES),
    ],
)
def test_three_channels_on_pages_of_their_own_are_red_green_and_blue_whole_and_by_region(name, how, tmp_path):
    path = channels(tmp_path / name, **how)
    whole, region = whole_and_region(path, rf"{name}: has {TAKEN}")
    np.testing.assert_array_equal(whole, RGB)
    np.testing.assert_array_equal(region, RGB[3:33, 11:48])
    assert images.image_shape(path) == (40, 50)


def test_channels_that_are_called_by_colours_are_put_in_the_order_of_red_green_and_blue(tmp_path):
    path = channels(tmp_path / "a.ome.tif", PLANES[::-1], names=["blue", "green", "red"])
    for found, true in zip(whole_and_region(path, TAKEN), (RGB, RGB[3:33, 11:48]), strict=True):
        np.testing.assert_array_equal(found, true)


def test_of_a_pyramid_with_one_page_per_channel_the_first_level_is_read_and_only_the_tiles_that_are_met(
    tmp_path, monkeypatch
):
    path = tmp_path / "a.ome.tif"
    large = np.kron(PLANES, np.ones((1, 20, 20), np.uint8))
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(large, subifds=1, photometric="minisblack", metadata={"axes": "CYX"}, **TILES)
        tiff.write(large[:, ::2, ::2], subfiletype=1, photometric="minisblack", **TILES)
    assert images.image_shape(path) == (800, 1000)

    def forbidden(*args, **kwargs):
        raise AssertionError("a whole page was decoded")

    decoded = []
    original = tifffile.FileHandle.read
    monkeypatch.setattr(tifffile.FileHandle, "read", lambda self, size=-1: decoded.append(size) or original(self, size))
    with monkeypatch.context() as patch:
        patch.setattr(tifffile.TiffPage, "asarray", forbidden)
        with pytest.warns(ImageWarning, match=TAKEN):
            region = read_region(path, 130, 260, 60, 70)
    np.testing.assert_array_equal(region, np.moveaxis(large[:, 130:190, 260:330], 0, -1))
    assert sum(decoded) < path.stat().st_size / 4
    with pytest.warns(ImageWarning, match=TAKEN):
        np.testing.assert_array_equal(read_image(path), np.moveaxis(large, 0, -1))


def test_deep_channels_are_reduced_alike_whole_and_by_region(tmp_path):
    deep = PLANES.astype(np.uint16) << 4
    deep[2, 0, 0] = 4095  # the brightest pixel, in the last channel and not in the region
    path = channels(tmp_path / "a.ome.tif", deep)
    whole, region = whole_and_region(path, "their 12 significant bits")
    np.testing.assert_array_equal(whole[1:], RGB[1:])
    np.testing.assert_array_equal(region, RGB[3:33, 11:48])


def test_channels_of_inverted_grey_are_turned_round(tmp_path):
    path = channels(tmp_path / "a.ome.tif", 255 - PLANES, photometric="miniswhite")
    assert (whole_and_region(path, TAKEN)[0] == RGB).all()


@pytest.mark.parametrize(
    ("name", "count", "names", "reason"),
    [
        ("a.ome.tif", 3, ["DAPI", "FITC", "Texas Red"], r"\(DAPI, FITC, Texas Red\), .* looks like fluorescence"),
        ("a.ome.tif", 3, ["Cy3", "Cy5", "Cy7"], r"\(Cy3, Cy5, Cy7\), .* looks like fluorescence"),
        ("a.ome.tif", 3, ["Hematoxylin", "DAB", "Residual"], "which are not red, green and blue"),
        ("a.ome.tif", 3, ["green", "red", "far"], "which are not red, green and blue"),
        ("a.ome.tif", 3, ["green", "red", "1"], "which are not red, green and blue"),
        ("a.tif", 3, ["c:1/3 - DAPI", "c:2/3 - GFP", "c:3/3 - Cy5"], "looks like fluorescence"),
        ("a.ome.tif", 2, [], "2 channels on pages of their own: is it fluorescence"),
        ("a.tif", 4, [], "4 channels on pages of their own: is it fluorescence"),
        ("a.ome.tif", 5, ["DAPI", "CD3", "CD8", "CD20", "PanCK"], r"5 channels .* \(DAPI, CD3, CD8, CD20, PanCK\)"),
    ],
)
def test_channels_that_are_no_colours_are_refused_with_what_they_are_called(name, count, names, reason, tmp_path):
    how = {} if name.endswith(".ome.tif") else {"imagej": True}
    path = channels(tmp_path / name, np.concatenate([PLANES, PLANES])[:count], names=names, **how)
    for read in (read_image, images.image_shape, lambda path: read_region(path, 0, 0, 5, 5)):
        with pytest.raises(ImageError, match=rf"{name}: .*{reason}.* save it as 8-bit RGB"):
            read(path)


@pytest.mark.parametrize(("name", "axis"), [("a.ome.tif", "T"), ("a.ome.tif", "Z"), ("a.tif", "Z"), ("a.tif", "T")])
def test_a_stack_of_colour_images_in_channels_is_refused(name, axis, tmp_path):
    how = {} if name.endswith(".ome.tif") else {"imagej": True}
    path = channels(tmp_path / name, np.stack([PLANES, PLANES]), f"{axis}CYX", **how)
    with pytest.raises(ImageError, match=rf"a stack of colour images \(channels: 3, {axis} = 2\); save the plane"):
        images.image_shape(path)


def test_three_channels_in_one_page_of_imagej_that_lack_the_others_are_refused(tmp_path):
    path = channels(tmp_path / "a.tif", imagej=True)
    data = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as tiff:  # end the chain behind the first page, as ImageJ does above 4 GB
        first = tiff.pages[0].offset
        order = tiff.byteorder
    entries = struct.unpack_from(order + "H", data, first)[0]
    struct.pack_into(order + "I", data, first + 2 + 12 * entries, 0)
    path.write_bytes(data)
    with pytest.raises(ImageError, match="lack a page of their own; save it as 8-bit RGB"):
        read_image(path)


def test_channels_in_several_files_are_refused(tmp_path):
    uuids = [f"urn:uuid:00000000-0000-0000-0000-00000000000{number}" for number in range(3)]
    where = "".join(
        f'<TiffData FirstC="{c}" IFD="0" PlaneCount="1"><UUID FileName="{c}.ome.tif">{uuid}</UUID></TiffData>'
        for c, uuid in enumerate(uuids)
    )
    for number, uuid in enumerate(uuids):
        text = (
            f'<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="{uuid}"><Image ID="Image:0">'
            '<Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" SizeX="50" SizeY="40" SizeC="3" SizeZ="1" '
            f'SizeT="1">{where}</Pixels></Image></OME>'
        )
        tifffile.imwrite(
            tmp_path / f"{number}.ome.tif", PLANES[number], photometric="minisblack", description=text, metadata=None
        )
    with pytest.raises(ImageError, match="in other files"):
        images.image_shape(tmp_path / "0.ome.tif")


def test_grey_stacks_and_pages_of_unknown_meaning_give_the_first_with_a_warning_whole_and_by_region(tmp_path):
    stacks = {
        "z.ome.tif": {"metadata": {"axes": "ZYX"}},
        "t.tif": {"imagej": True, "metadata": {"axes": "TYX"}},
        "plain.tif": {"metadata": None},
    }
    for name, how in stacks.items():
        tifffile.imwrite(tmp_path / name, PLANES, photometric="minisblack", **how)
        whole, region = whole_and_region(tmp_path / name, "3 pages of one size; only the first is read .if they are")
        np.testing.assert_array_equal(whole, np.repeat(RGB[..., :1], 3, axis=2))
        np.testing.assert_array_equal(region, whole[3:33, 11:48])


def test_stacks_of_colour_pages_give_the_first_with_a_warning_and_a_smaller_second_page_gives_none(tmp_path):
    tifffile.imwrite(tmp_path / "a.ome.tif", np.stack([RGB, 255 - RGB]), photometric="rgb", metadata={"axes": "ZYXS"})
    whole, region = whole_and_region(tmp_path / "a.ome.tif", "has 2 pages of one size; only the first is read$")
    np.testing.assert_array_equal(whole, RGB)
    np.testing.assert_array_equal(region, RGB[3:33, 11:48])
    with tifffile.TiffWriter(tmp_path / "b.tif") as tiff:
        tiff.write(RGB, photometric="rgb")
        tiff.write(RGB[::2, ::2], photometric="rgb")
    np.testing.assert_array_equal(read_image(tmp_path / "b.tif"), RGB)


def test_a_description_that_is_damaged_leaves_what_the_pages_say(tmp_path):
    path = channels(tmp_path / "a.ome.tif")
    path.write_bytes(path.read_bytes().replace(b"<Pixels", b"<Pixel<"))
    whole, _ = whole_and_region(path, "3 pages of one size; only the first is read")
    np.testing.assert_array_equal(whole, np.repeat(RGB[..., :1], 3, axis=2))


def test_pages_are_looked_at_once_for_many_regions(tmp_path, monkeypatch):
    path = channels(tmp_path / "a.ome.tif")
    looked = []
    monkeypatch.setattr(images, "colour_pages", lambda tiff: looked.append(tiff) or colour_pages(tiff))
    for _ in range(3):
        with pytest.warns(ImageWarning, match=TAKEN):
            read_region(path, 0, 0, 5, 5)
    assert len(looked) == 1


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


# --- Pixel sizes ------------------------------------------------------------------------------------------------------


APERIO = "Aperio Image Library v11\n46000x32914 [0,100 46000x32814] (240x240) JPEG/RGB Q=30|AppMag = 40|MPP = 0.2520"


@pytest.mark.parametrize(
    ("name", "how", "size"),
    [
        ("a.tif", {"resolution": (40000, 40000), "resolutionunit": "centimeter"}, 0.25),
        ("a.tif", {"resolution": (50800, 50800), "resolutionunit": "inch"}, 0.5),
        ("a.tif", {"resolution": (72, 72), "resolutionunit": "inch"}, None),
        ("a.tif", {"resolution": (1, 1), "resolutionunit": "none"}, None),
        ("a.tif", {"resolution": (4, 4), "resolutionunit": "none"}, None),
        ("a.tif", {}, None),
        ("a.ome.tif", {"metadata": {"PhysicalSizeX": 0.23, "PhysicalSizeXUnit": "µm"}}, 0.23),
        ("a.ome.tif", {"metadata": {"PhysicalSizeX": 230.0, "PhysicalSizeXUnit": "nm"}}, 0.23),
        ("a.ome.tif", {"metadata": {"PhysicalSizeX": 0.5}}, 0.5),
        ("a.ome.tif", {"metadata": {"PhysicalSizeX": 1.0, "PhysicalSizeXUnit": "pixel"}}, None),
        ("a.ome.tif", {"metadata": {}, "resolution": (20000, 20000), "resolutionunit": "centimeter"}, 0.5),
        ("a.tif", {"imagej": True, "resolution": (4, 4), "metadata": {"unit": "um"}}, 0.25),
        ("a.tif", {"imagej": True, "resolution": (2, 2), "metadata": {"unit": "\\u00B5m"}}, 0.5),
        ("a.tif", {"imagej": True, "resolution": (4000, 4000), "metadata": {"unit": "mm"}}, 0.25),
        ("a.tif", {"imagej": True, "resolution": (4, 4), "metadata": {"unit": "pixel"}}, None),
        ("a.svs", {"description": APERIO, "metadata": None}, 0.252),
        ("a.svs", {"description": APERIO.replace("0.2520", "."), "metadata": None}, None),
        ("a.png", {"dpi": (101600, 101600)}, 0.25),
        ("a.png", {"dpi": (96, 96)}, None),
        ("a.png", {}, None),
        ("a.jpg", {"dpi": (300, 300)}, None),
        ("a.jpg", {"dpi": (50800, 50800)}, 0.5),
        ("a.webp", {}, None),
    ],
)
def test_the_size_of_a_pixel_is_what_the_header_states_where_a_microscope_can_have_it(name, how, size, tmp_path):
    path = tmp_path / name
    if path.suffix in (".tif", ".svs"):
        tifffile.imwrite(path, RGB, photometric="rgb", **how)
    else:
        Image.fromarray(RGB).save(path, **how)
    assert pixel_size(path) == (None if size is None else pytest.approx(size, rel=0.001))


def test_the_size_of_a_pixel_is_read_again_when_the_file_has_changed(tmp_path):
    for size in (0.25, 0.5):
        write(tmp_path / "a.tif", size)
        assert pixel_size(tmp_path / "a.tif") == pytest.approx(size)


def write(path: Path, size: float | None) -> None:
    stated = {} if size is None else {"resolution": (10_000 / size,) * 2, "resolutionunit": "centimeter"}
    side = 40 if size is None else int(100 * size)  # another size of file, whatever the clock says
    tifffile.imwrite(path, np.zeros((side, side, 3), np.uint8), photometric="rgb", **stated)


def test_images_of_different_magnifications_are_named_once_with_how_many_have_which(tmp_path):
    for name, size in {"a": 0.25, "b": 0.252, "c": 0.23, "d": 0.25, "e": 0.5, "f": None}.items():
        write(tmp_path / f"{name}.tif", size)
    (tmp_path / "damaged.tif").write_bytes(b"no TIFF")
    said = r"4 of 0.25 µm \(c, a, d and 1 more\); 1 of 0.5 µm \(e\)\. .* bring the images to one pixel size"
    with pytest.warns(ImageWarning, match=said) as caught:
        open_images(tmp_path)
    assert len(caught) == 1


def test_images_of_one_magnification_or_without_a_stated_one_give_no_warning(tmp_path):
    for name, size in {"a": 0.25, "b": 0.29, "c": None}.items():
        write(tmp_path / f"{name}.tif", size)
    check_pixel_sizes(load_dataset(tmp_path).samples)
    check_pixel_sizes([Sample.from_arrays("x", RGB)])
    check_pixel_sizes([])


def deep(path: Path, brightest: int, **more) -> None:
    pixels = np.full((40, 40, 3), 900, np.uint16)
    pixels[0, 0, 0] = brightest
    tifffile.imwrite(path, pixels, photometric="rgb", **more)


def test_the_bits_that_a_header_states_count_and_not_the_brightest_pixel(tmp_path):
    tag = (281, "H", 1, 2**14 - 1, True)  # MaxSampleValue
    for name, brightest, stated in (("plain", 1000, ()), ("stated", 1000, [tag]), ("wrong", 2**14, [tag])):
        deep(tmp_path / f"{name}.tif", brightest, extratags=stated)
    read = {}
    for name, bits in (("plain", 10), ("stated", 14), ("wrong", 16)):
        with pytest.warns(ImageWarning, match=f"their {bits} significant bits"):
            read[name] = read_image(tmp_path / f"{name}.tif")[1, 1, 0]
    assert read == {"plain": 900 >> 2, "stated": 900 >> 6, "wrong": 900 >> 8}
    deep(tmp_path / "a.ome.tif", 1000, metadata={"axes": "YXS", "SignificantBits": 12})
    assert used_bits(tmp_path / "a.ome.tif") == 12
    assert used_bits(tmp_path / "plain.tif") == 10


def test_images_whose_guessed_bits_differ_are_named(tmp_path):
    for name, brightest in (("a", 1000), ("b", 1020), ("c", 1030)):
        deep(tmp_path / f"{name}.tif", brightest)
    with pytest.warns(ImageWarning, match=r"darker than others: 2 use 10 \(a, b\); 1 use 12 \(c\)\. If one camera"):
        open_images(tmp_path)
    (tmp_path / "c.tif").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_images(tmp_path)
