"""Datasets: the counts, splits and pixels that they must have, laziness, and a plain reason for every bad image."""

from __future__ import annotations

import io
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nucseg.annotations import AnnotationWarning, LabelWarning, read_labels
from nucseg.annotations.errors import DataError
from nucseg.data import (
    Dataset,
    ImageError,
    ImageWarning,
    MissingData,
    Patch,
    Sample,
    images,
    load_dataset,
    read_image,
    read_region,
    sources,
)
from nucseg.data import dataset as dataset_module
from nucseg.data.kumar import REPLACED, find_samples, load, recognise
from nucseg.data.layouts import rows
from nucseg.data.tissue import SYNTHETIC_NOTE

RGB = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def _fresh_caches():
    sources.CACHE.clear()
    images._image_shape.cache_clear()


def _write(path: Path, array: np.ndarray, **how) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".tif":
        tifffile.imwrite(path, array, **how)
    else:
        Image.fromarray(array).save(path, **how)
    return path


# --- The split table --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "images", "nuclei"),
    [
        ("kumar", (12, 4, 14), (6843, 3065, 7051)),
        ("tnbc", (30, 7, 13), (2155, 1002, 871)),
        ("monuseg", (30, 0, 14), (16959, 0, 6697)),
    ],
)
def test_the_split_table_has_the_images_and_nuclei_of_the_reference(name, images, nuclei):
    table = rows(name)
    by_split = [[row for row in table if row.split == split] for split in ("train", "val", "test")]
    assert tuple(map(len, by_split)) == images
    assert tuple(sum(row.nuclei for row in part) for part in by_split) == nuclei
    assert len({row.id for row in table}) == len(table)


def test_no_patient_is_in_two_splits_of_a_dataset():
    for name in ("kumar", "tnbc", "monuseg"):
        split_of = {}
        for row in rows(name):
            assert split_of.setdefault(row.patient, row.split) == row.split


def test_kumar_tests_on_two_images_of_each_of_seven_organs_three_of_them_unseen():
    test = [row for row in rows("kumar") if row.split == "test"]
    train = {row.organ for row in rows("kumar") if row.split == "train"}
    organs = {row.organ for row in test}
    assert len(organs) == 7
    assert all(sum(row.organ == organ for row in test) == 2 for organ in organs)
    assert all(row.seen == (row.organ in train) for row in test)
    assert sum(row.nuclei for row in test if row.seen) == 3026


# --- The real data ----------------------------------------------------------------------------------------------------


def test_kumar_and_tnbc_describe_the_published_counts(real_data):
    kumar, tnbc = load_dataset("kumar", real_data), load_dataset("tnbc", real_data)
    for dataset, counts in ((kumar, (6843, 3065, 7051, 16959)), (tnbc, (2155, 1002, 871, 4028))):
        table = dataset.describe()
        assert list(table.index) == ["train", "val", "test", "total"]
        assert tuple(table["nuclei"]) == counts
        assert table["annotated_pixels"]["total"] == sum(s.shape[0] * s.shape[1] for s in dataset.samples)
        assert table["fingerprint"]["total"] == dataset.fingerprint
    assert kumar.describe()["foreground"].round(2).tolist()[:3] == [0.21, 0.29, 0.21]
    assert kumar.version.startswith("current release")
    assert {sample.organ for sample in kumar.test if not sample.seen} == {"bladder", "colon", "stomach"}
    assert {sample.patient for sample in tnbc.val} == {"07", "08"}


def test_the_official_layout_gives_the_same_samples_as_the_packed_one(real_data):
    official = load(real_data / "monuseg_original_layout", partial=True)
    packed = load_dataset("kumar", real_data)
    assert [len(official.train), len(official.val), len(official.test)] == [0, 0, 3]
    for sample in official.samples:
        twin = packed.sample(sample.id)
        np.testing.assert_array_equal(sample.image, twin.image)
        np.testing.assert_array_equal(sample.labels, twin.labels)
        assert sample.content_digest() == twin.content_digest()  # the fingerprint does not depend on the form


def test_an_incomplete_official_layout_says_how_many_and_which_are_missing(real_data):
    with pytest.raises(MissingData, match=r"kumar: found 3 of 30 .*; missing: TCGA-A7-A13E.* and 23 more"):
        load_dataset("kumar", real_data / "monuseg_original_layout")


def test_monuseg_trains_on_kumar_and_says_what_to_get_when_its_test_images_are_asked_for(real_data):
    dataset = load_dataset("monuseg", real_data)
    assert len(dataset.train) == len(dataset.samples) == 30
    assert "never evaluate on Kumar" in dataset.note
    for look in (len, list, lambda split: split[0]):
        with pytest.raises(MissingData, match="MoNuSegTestData"):
            look(dataset.test)


def test_tnbc_opens_from_slide_and_gt_folders_with_components_as_nuclei(real_data, tmp_path):
    packed = load_dataset("tnbc", real_data)
    for sample in packed.samples:
        image = tmp_path / f"TNBC/Slide_{sample.patient}" / f"{sample.id}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(sample.source.image_path, image)  # a JPEG named .png, as mirrors have it
        mask = np.where(sample.labels > 0, np.uint8(255), np.uint8(0))
        _write(tmp_path / f"TNBC/GT_{sample.patient}" / f"{sample.id}.png", mask)
    official = load_dataset("tnbc", tmp_path)
    assert official.describe()["nuclei"].tolist() == [2155, 1002, 871, 4028]
    np.testing.assert_array_equal(official.test[0].image, packed.test[0].image)


def test_the_older_kumar_release_is_recognised_by_its_counts():
    def sample(row, nuclei):
        labels = np.zeros((40, 60), np.int32)
        labels.flat[:nuclei] = np.arange(1, nuclei + 1)
        return Sample.from_arrays(row.id, np.zeros((40, 60, 3), np.uint8), labels, patient=row.patient)

    table = rows("kumar")
    old = {f"TCGA-{code}" for code in REPLACED}
    assert recognise([sample(row, row.nuclei) for row in table]).startswith("current release")
    older = [sample(row, row.nuclei + 500 * (row.patient in old)) for row in table]
    assert recognise(older).startswith("older release (before September 2019")
    strange = [sample(row, row.nuclei // 2 if row.organ == "colon" else row.nuclei) for row in table]
    assert "counts differ from the current release in AY-A8YK, NH-A8F7" in recognise(strange)


# --- Missing data -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kumar", "monuseg", "tnbc"])
def test_missing_data_say_what_to_get_from_where_under_which_licence_and_where_to_put_it(name, tmp_path):
    with pytest.raises(MissingData) as caught:
        load_dataset(name, tmp_path)
    message = str(caught.value)
    for part in ("found 0 of", f"under {tmp_path}", "https://", "CC BY", "Unzip it into the data root", "NUCSEG_DATA"):
        assert part in message


def test_the_root_comes_from_the_environment_and_a_missing_one_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("NUCSEG_DATA", str(tmp_path / "absent"))
    with pytest.raises(MissingData, match=f"no folder {tmp_path / 'absent'}"):
        load_dataset("kumar")


def test_an_unknown_name_gets_the_nearest_one_and_an_unknown_folder_its_path():
    with pytest.raises(ValueError, match="did you mean 'kumar'"):
        load_dataset("kumr")
    with pytest.raises(MissingData, match="no such folder"):
        load_dataset("./absent")


# --- The built-in tissue ----------------------------------------------------------------------------------------------


def test_the_tissue_is_marked_synthetic_and_generated_only_when_looked_at(monkeypatch):
    from nucseg.data import builtin

    builtin._generate.cache_clear()
    calls = []

    def generate(kind, shape, seed):
        calls.append(kind)
        return builtin.Tissue(np.full((*shape, 3), seed, np.uint8), np.ones(shape, np.int32))

    monkeypatch.setattr(builtin, "generate_tissue", generate)
    dataset = load_dataset("tissue")
    assert dataset.synthetic
    assert dataset.note == SYNTHETIC_NOTE
    assert dataset.train[0].shape == (512, 512)
    assert len(dataset.fingerprint) == 12
    assert calls == []
    assert dataset.train[0].labels.max() == 1
    assert (dataset.train[0].image == dataset.train[0].image).all()
    assert calls == [dataset.train[0].organ]
    assert {sample.organ for sample in dataset.test} > {sample.organ for sample in dataset.train}
    assert pickle.loads(pickle.dumps(dataset)).fingerprint == dataset.fingerprint
    builtin._generate.cache_clear()


# --- Samples, patches, datasets ---------------------------------------------------------------------------------------


def test_a_patch_cuts_its_square_and_refuses_to_leave_the_image():
    patch = Patch("a", 3, 5, 7)
    np.testing.assert_array_equal(patch.crop(RGB), RGB[3:10, 5:12])
    assert patch.slices == (slice(3, 10), slice(5, 12))
    with pytest.raises(ValueError, match="does not lie inside"):
        Patch("a", 34, 0, 7).crop(RGB)
    with pytest.raises(ValueError, match="row=-1"):
        Patch("a", -1, 0, 7)


def test_what_a_caller_does_to_an_image_does_not_reach_the_next_caller(tmp_path):
    _write(tmp_path / "images" / "a.png", RGB)
    _write(tmp_path / "labels" / "a.png", np.full((40, 50), 3, np.uint16))
    sample = load_dataset(tmp_path).train[0]
    sample.image[:] = 0
    sample.labels[:] = 0
    sample.region(0, 0, 5, 5)[:] = 0
    np.testing.assert_array_equal(sample.image, RGB)
    assert sample.labels.dtype == np.int32
    assert (sample.labels == 3).all()


def test_an_image_is_decoded_once_while_it_is_in_use(tmp_path, monkeypatch):
    _write(tmp_path / "a.png", RGB)
    calls = []
    monkeypatch.setattr(sources, "read_image", lambda path: calls.append(path) or RGB)
    sample = load_dataset(tmp_path).train[0]
    for _ in range(5):
        sample.image, sample.region(1, 2, 3, 4)
    assert len(calls) == 1


def test_annotations_that_were_corrected_on_disk_are_read_again(tmp_path):
    _write(tmp_path / "images" / "a.png", RGB)
    path = _write(tmp_path / "labels" / "a.png", np.full((40, 50), 3, np.uint16))
    dataset = load_dataset(tmp_path)
    assert dataset.train[0].labels.max() == 3
    before = dataset.fingerprint
    corrected = np.full((40, 50), 3, np.uint16)
    corrected[:9] = 300
    _write(path, corrected)
    assert dataset.train[0].labels.max() == 300
    again = load_dataset(tmp_path)
    assert again.fingerprint != before
    assert again.describe()["nuclei"]["total"] == 2


def test_large_images_without_regions_are_decoded_once_for_many_crops(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_module, "WHOLE_IMAGE_PIXELS", 10)
    _write(tmp_path / "a.png", RGB)
    calls = []
    monkeypatch.setattr(sources, "read_image", lambda path: calls.append(path) or RGB)
    for _ in range(3):
        load_dataset(tmp_path).train[0].region(1, 2, 3, 4)
    assert len(calls) == 1


def test_the_cache_stays_below_its_limit_and_drops_what_was_used_longest_ago():
    cache = sources._Cache(limit=250)
    made = []

    def get(key):
        return cache.get(key, lambda: made.append(key) or np.zeros(100, np.uint8))

    for key in "aba":
        get(key)
    get("c")  # drops b
    get("a")
    assert made == ["a", "b", "c"]
    get("b")
    assert made == ["a", "b", "c", "b"]
    assert cache.size <= 250
    cache.get("large", lambda: np.zeros(1000, np.uint8))
    assert "large" not in cache.arrays


def test_regions_are_the_same_as_crops(tmp_path):
    _write(tmp_path / "images" / "a.png", RGB)
    labels = np.arange(2000).reshape(40, 50)
    _write(tmp_path / "labels" / "a.tif", labels.astype(np.uint16))
    sample = load_dataset(tmp_path).train[0]
    np.testing.assert_array_equal(sample.region(5, 6, 7, 8), RGB[5:12, 6:14])
    for bad in ((-1, 0, 5, 5), (0, 0, 41, 5), (0, 46, 5, 5), (0, 0, 0, 5)):
        with pytest.raises(ImageError, match="does not lie inside"):
            sample.region(*bad)


def test_samples_can_be_made_of_arrays_and_are_checked():
    sample = Sample.from_arrays("a", RGB, np.ones((40, 50), np.uint8), organ="skin")
    assert sample.labels.dtype == np.int32
    assert sample.shape == (40, 50)
    with pytest.raises(DataError, match=r"label map is .40, 51.; they must be of one size"):
        Sample.from_arrays("a", RGB, np.ones((40, 51), np.uint8))
    with pytest.raises(ImageError, match="uint8"):
        Sample.from_arrays("a", RGB.astype(float))


def test_two_samples_of_one_id_are_refused():
    sample = Sample.from_arrays("a", RGB)
    with pytest.raises(DataError, match="two images have the id a"):
        dataset_module.Dataset("x", (sample,), (), (sample,))


def test_a_dataset_names_the_nearest_id(tmp_path):
    _write(tmp_path / "slide-01.png", RGB)
    with pytest.raises(KeyError, match="did you mean 'slide-01'"):
        load_dataset(tmp_path).sample("slide-1")


# --- Folders ----------------------------------------------------------------------------------------------------------


def test_a_folder_without_labels_is_an_unlabelled_training_set(tmp_path):
    _write(tmp_path / "a.png", RGB)
    _write(tmp_path / "deep" / "b.jpg", RGB)
    dataset = load_dataset(tmp_path)
    assert [sample.id for sample in dataset.train] == ["a", "deep/b"]
    assert dataset.train[0].labels is None
    assert not dataset.val
    assert dataset.describe().loc["total", ["images", "labelled", "nuclei"]].tolist() == [2, 0, 0]


def test_experiments_need_labels_of_every_split_that_is_there():
    labels = np.ones((40, 50), np.int32)
    good, bare = Sample.from_arrays("a", RGB, labels), Sample.from_arrays("b", RGB)
    other = Sample.from_arrays("c", RGB, labels)
    Dataset("d", [good], test=[other]).check_experiments()
    with pytest.raises(MissingData, match="d: val images without labels: b"):
        Dataset("d", [good], [bare], [other]).check_experiments()


def test_sub_folders_named_train_val_test_are_the_splits(tmp_path):
    for split, count in (("train", 3), ("val", 1), ("test", 2)):
        for number in range(count):
            _write(tmp_path / split / "images" / f"{number}.png", RGB)
            _write(tmp_path / split / "labels" / f"{number}.png", np.full((40, 50), 1 + number, np.uint16))
    dataset = load_dataset(tmp_path)
    assert [len(dataset.train), len(dataset.val), len(dataset.test)] == [3, 1, 2]
    assert dataset.test[1].id == "test/1"
    assert dataset.test[1].labels.max() == 2


def test_every_kind_of_label_file_beside_an_image_is_found_and_read(tmp_path):
    labels = np.zeros((40, 50), np.int32)
    labels[2:9, 3:11], labels[20:30, 20:25] = 1, 2
    for stem in ("png", "tif", "npy", "seg", "xml", "geojson"):
        _write(tmp_path / f"{stem}.png", RGB)
    _write(tmp_path / "png_labels.png", labels.astype(np.uint16))
    _write(tmp_path / "tif_labels.tif", labels.astype(np.uint32))
    np.save(tmp_path / "npy.npy", labels)
    np.save(tmp_path / "seg_seg.npy", {"masks": labels})
    region = '<Region Id="{}"><Vertices>{}</Vertices></Region>'
    corners = [[(3, 2), (11, 2), (11, 9), (3, 9)], [(20, 20), (25, 20), (25, 30), (20, 30)]]
    vertices = ["".join(f'<Vertex X="{x}" Y="{y}"/>' for x, y in ring) for ring in corners]
    regions = "".join(region.format(*pair) for pair in enumerate(vertices, 1))
    (tmp_path / "xml.xml").write_text(f"<Annotations><Regions>{regions}</Regions></Annotations>")
    from nucseg.annotations import write_geojson

    write_geojson(tmp_path / "geojson.geojson", labels)
    dataset = load_dataset(tmp_path)
    assert [sample.id for sample in dataset.train] == ["geojson", "npy", "png", "seg", "tif", "xml"]
    for sample in dataset.train:
        np.testing.assert_array_equal(sample.labels, labels, err_msg=sample.id)


def test_slide_and_gt_folders_of_any_names_open_as_pairs(tmp_path):
    mask = np.zeros((40, 50), np.uint8)
    mask[1:5, 1:5] = 255
    for patient in ("21", "22"):
        _write(tmp_path / f"Slide_{patient}" / f"{patient}_1.png", RGB)
        _write(tmp_path / f"GT_{patient}" / f"{patient}_1.png", mask)
    dataset = load_dataset(tmp_path)
    assert [sample.id for sample in dataset.train] == ["21_1", "22_1"]
    assert all(sample.labelled for sample in dataset.train)


def test_a_folder_without_images_says_what_counts_as_one(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(MissingData, match="no image found"):
        load_dataset(tmp_path)


def test_two_images_of_one_name_are_refused(tmp_path):
    _write(tmp_path / "a.png", RGB)
    _write(tmp_path / "a.jpg", RGB)
    with pytest.raises(DataError, match="two images of one name"):
        load_dataset(tmp_path)


def test_labels_of_another_size_are_an_error_that_names_both_files(tmp_path):
    _write(tmp_path / "images" / "a.png", RGB)
    _write(tmp_path / "labels" / "a.png", np.zeros((9, 8), np.uint16))
    with pytest.raises(DataError, match=r"images.a.png has 40 x 50 pixels .* label map .*labels.a.png has 9 x 8; they"):
        _ = load_dataset(tmp_path).train[0].labels


def test_opening_a_folder_decodes_nothing(tmp_path):
    for number in range(30):
        (tmp_path / f"{number}.png").write_bytes(b"not even an image")
    assert len(load_dataset(tmp_path).train) == 30


def test_the_fingerprint_changes_with_a_pixel_a_label_and_a_split(tmp_path):
    def fingerprint(split="train", pixel=0, label=1):
        shutil.rmtree(tmp_path / "d", ignore_errors=True)
        image = RGB.copy()
        image[0, 0, 0] = pixel
        _write(tmp_path / "d" / split / "images" / "a.png", image)
        _write(tmp_path / "d" / split / "labels" / "a.png", np.full((40, 50), label, np.uint16))
        return load_dataset(tmp_path / "d").fingerprint

    assert fingerprint() == fingerprint()
    assert len({fingerprint(), fingerprint("test"), fingerprint(pixel=1), fingerprint(label=2)}) == 4


# --- Images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("a.png", {}),
        ("a.bmp", {}),
        ("a.webp", {"lossless": True}),
        ("a.tif", {"photometric": "rgb"}),
        ("a.tif", {"photometric": "rgb", "compression": "zlib", "predictor": True}),
        ("a.tif", {"photometric": "rgb", "compression": "lzw", "tile": (16, 16)}),
        ("a.tif", {"photometric": "rgb", "rowsperstrip": 7}),
        ("a.tif", {"photometric": "rgb", "rowsperstrip": 7, "compression": "deflate"}),
    ],
)
def test_8_bit_rgb_is_read_as_it_is_from_every_format_whole_and_by_region(name, how, tmp_path):
    path = _write(tmp_path / name, RGB, **how)
    np.testing.assert_array_equal(read_image(path), RGB)
    assert images.image_shape(path) == (40, 50)
    np.testing.assert_array_equal(read_region(path, 3, 11, 30, 37), RGB[3:33, 11:48])


def test_planes_one_after_the_other_are_read_like_any_image(tmp_path):
    path = _write(tmp_path / "a.tif", np.moveaxis(RGB, -1, 0), photometric="rgb", planarconfig="separate")
    np.testing.assert_array_equal(read_image(path), RGB)
    np.testing.assert_array_equal(read_region(path, 3, 4, 3, 6), RGB[3:6, 4:10])


def test_images_of_other_kinds_are_left_out_and_named(tmp_path):
    _write(tmp_path / "a.png", RGB)
    for name in ("b.gif", "c.JP2", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.warns(ImageWarning, match=r"left out, of a kind that cannot be read here: b.gif, c.JP2$"):
        found = load_dataset(str(tmp_path))
    assert [sample.id for sample in found.samples] == ["a"]


def test_what_is_transparent_is_white_and_the_rest_as_it_is(tmp_path):
    opaque = np.full((40, 50), 255, np.uint8)
    opaque[:, :10], opaque[:, 10:20] = 0, 128
    alpha = np.dstack([RGB, opaque])
    for name, how in (("a.png", {}), ("a.tif", {"photometric": "rgb", "extrasamples": ["unassalpha"]})):
        for read in (read_image, lambda path: read_region(path, 0, 0, 40, 50)):
            found = read(_write(tmp_path / name, alpha, **how))
            assert (found[:, :10] == 255).all()
            np.testing.assert_allclose(found[:, 10:20], (RGB[:, 10:20] + 255.0) / 2, atol=1.5)
            np.testing.assert_array_equal(found[:, 20:], RGB[:, 20:])


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_grey_is_copied_to_three_channels_with_a_warning(name, tmp_path):
    path = _write(tmp_path / name, RGB[..., 0])
    with pytest.warns(ImageWarning, match=rf"{name}: is grey"):
        image = read_image(path)
    np.testing.assert_array_equal(image, np.repeat(RGB[..., :1], 3, axis=2))


@settings(max_examples=12, deadline=None)
@given(st.sampled_from([10, 12, 14, 16]))
def test_16_bit_rgb_is_reduced_to_8_by_its_significant_bits_with_a_warning(tmp_path_factory, bits):
    deep = RGB.astype(np.uint16) << (bits - 8)
    deep[0, 0, 0] = 2**bits - 1
    path = _write(tmp_path_factory.mktemp("deep") / "a.tif", deep, photometric="rgb")
    with pytest.warns(ImageWarning, match=f"16-bit pixels; their {bits} significant bits"):
        image = read_image(path)
    np.testing.assert_array_equal(image[1:], RGB[1:])
    with pytest.warns(ImageWarning, match=f"their {bits} significant bits"):  # though this part may be dim
        np.testing.assert_array_equal(read_region(path, 5, 5, 1, 1), RGB[5:6, 5:6])


def test_palette_images_are_converted_with_a_warning(tmp_path):
    palette = Image.fromarray(RGB).quantize(16)
    palette.save(tmp_path / "a.png")
    with pytest.warns(ImageWarning, match="from palette colours to RGB"):
        image = read_image(tmp_path / "a.png")
    np.testing.assert_array_equal(image, np.asarray(palette.convert("RGB")))


def test_an_orientation_tag_is_ignored_with_a_warning(tmp_path):
    exif = Image.Exif()
    exif[images.ORIENTATION_TAG] = 6
    Image.fromarray(RGB).save(tmp_path / "a.jpg", exif=exif)
    with pytest.warns(ImageWarning, match="orientation tag"):
        assert read_image(tmp_path / "a.jpg").shape == RGB.shape


def _truncated(suffix: str) -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, suffix, **({"compression": "tiff_lzw"} if suffix == "tiff" else {}))
    return buffer.getvalue()[: len(buffer.getvalue()) // 2]


BAD = {
    "empty.png": (lambda: b"", "empty"),
    "empty.tif": (lambda: b"", "empty"),
    "text.png": (lambda: b"this is a text", "not an image"),
    "text.tif": (lambda: b"this is a text", "not a TIFF"),
    "html.jpg": (lambda: b"<html>404</html>", "not an image"),
    "cut.png": (lambda: _truncated("png"), "damaged or truncated"),
    "cut.jpg": (lambda: _truncated("jpeg"), "damaged or truncated"),
    "cut.webp": (lambda: _truncated("webp"), "damaged or truncated|not an image"),
    "cut.tif": (lambda: _truncated("tiff"), "not a TIFF|damaged"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_is_no_whole_image_is_an_error_that_names_file_and_reason(name, tmp_path):
    make, reason = BAD[name]
    (tmp_path / name).write_bytes(make())
    with pytest.raises(ImageError, match=rf"{name}: .*({reason})"):
        read_image(tmp_path / name)


def test_cmyk_and_float_images_are_refused(tmp_path):
    Image.fromarray(RGB).convert("CMYK").save(tmp_path / "a.jpg")
    _write(tmp_path / "a.tif", np.zeros((9, 9, 4), np.uint8), photometric="separated")
    for name in ("a.jpg", "a.tif"):
        with pytest.raises(ImageError, match=rf"{name}: CMYK"):
            read_image(tmp_path / name)
    _write(tmp_path / "f.tif", np.zeros((9, 9, 3), np.float32), photometric="rgb")
    with pytest.raises(ImageError, match="floating-point"):
        read_image(tmp_path / "f.tif")
    with pytest.raises(ImageError, match="no such file"):
        read_image(tmp_path / "absent.png")


def test_a_label_map_given_as_an_image_is_refused(tmp_path):
    _write(tmp_path / "a.tif", np.full((9, 9), 70_000, np.uint32))
    with pytest.raises(ImageError, match="is it a label map"):
        read_image(tmp_path / "a.tif")


# --- Large images -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pyramid(tmp_path_factory) -> tuple[Path, np.ndarray]:
    """A tiled, compressed TIFF with two smaller levels below its main page."""
    path = tmp_path_factory.mktemp("slides") / "slide.tif"
    rng = np.random.default_rng(0)
    image = np.kron(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8), np.ones((50, 50, 1), np.uint8))
    with tifffile.TiffWriter(path) as tiff:
        how = {"tile": (128, 128), "compression": "jpeg", "photometric": "ycbcr", "subsampling": (2, 2)}
        tiff.write(image, subifds=2, **how)
        tiff.write(image[::2, ::2], subfiletype=1, **how)
        tiff.write(image[::4, ::4], subfiletype=1, **how)
    return path, read_image(path)


def test_a_region_of_a_pyramidal_jpeg_tiff_is_the_crop_of_the_whole(pyramid):
    path, whole = pyramid
    assert whole.shape == (1000, 1500, 3)
    for row, col, height, width in ((0, 0, 128, 128), (100, 200, 300, 77), (990, 1490, 10, 10)):
        region = read_region(path, row, col, height, width)
        np.testing.assert_array_equal(region, whole[row : row + height, col : col + width])


def test_only_the_tiles_that_a_region_meets_are_decoded(pyramid, monkeypatch, tmp_path):
    path, whole = pyramid
    shutil.copy(path, tmp_path / "a.tif")
    monkeypatch.setattr(dataset_module, "WHOLE_IMAGE_PIXELS", 1000)

    def forbidden(path):
        raise AssertionError("the whole image was decoded")

    monkeypatch.setattr(sources, "read_image", forbidden)
    monkeypatch.setattr(images, "read_image", forbidden)
    monkeypatch.setattr(tifffile.TiffPage, "asarray", lambda *args, **kwargs: forbidden(path))
    read = []
    original = tifffile.FileHandle.read
    monkeypatch.setattr(tifffile.FileHandle, "read", lambda self, size=-1: read.append(size) or original(self, size))
    sample = load_dataset(tmp_path).train[0]
    np.testing.assert_array_equal(sample.region(130, 260, 60, 60), whole[130:190, 260:320])
    assert sum(read) < (tmp_path / "a.tif").stat().st_size / 10


def test_a_slide_is_read_through_the_optional_reader(pyramid, tmp_path):
    pytest.importorskip("tiffslide")
    path, whole = pyramid
    shutil.copy(path, tmp_path / "slide.svs")
    region = read_region(tmp_path / "slide.svs", 100, 200, 50, 60)
    assert np.abs(region.astype(int) - whole[100:150, 200:260]).max() <= 2


def test_a_slide_without_a_reader_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(images.importlib.util, "find_spec", lambda name: None)
    (tmp_path / "a.mrxs").write_bytes(b"slide")
    with pytest.raises(ImageError, match=r"pip install nucseg\[slides\]"):
        read_region(tmp_path / "a.mrxs", 0, 0, 5, 5)


def test_warnings_about_labels_reach_the_user_of_a_folder(tmp_path):
    mask = np.zeros((40, 50), np.uint8)
    mask[1:5, 1:5] = mask[10:15, 10:15] = 255
    _write(tmp_path / "images" / "a.png", RGB)
    _write(tmp_path / "labels" / "a.png", mask)
    with pytest.warns(LabelWarning, match="binary mask"):
        assert load_dataset(tmp_path).train[0].labels.max() == 2
    (tmp_path / "images" / "a.xml").write_text('<Annotations><Region Id="9"></Region></Annotations>')
    with pytest.warns(AnnotationWarning, match="no vertices"):
        assert load_dataset(tmp_path).train[0].labels.max() == 0
    assert read_labels(tmp_path / "labels" / "a.png", binary=True).max() == 2


def test_the_packed_form_is_preferred_and_forms_are_never_mixed(real_data, tmp_path):
    source = next((real_data / "monuseg_original_layout").iterdir())
    shutil.copytree(source, tmp_path / "official")
    row = next(row for row in rows("kumar") if row.patient == "TCGA-CH-5767")
    (tmp_path / "packed" / "images").mkdir(parents=True)
    (tmp_path / "packed" / "labels").mkdir()
    shutil.copy(real_data / "kumar" / "images" / f"{row.id}.webp", tmp_path / "packed" / "images")
    (tmp_path / "coloured").mkdir()
    _write(tmp_path / "coloured" / f"{row.id}.png", RGB)  # a picture of the labels, say: never before the TIFF
    found = find_samples("kumar", [row], tmp_path)[row.id].source
    assert (found.image_path.suffix, found.label_path.suffix) == (".tif", ".xml")  # packed has no labels yet
    shutil.copy(real_data / "kumar" / "labels" / f"{row.id}.png", tmp_path / "packed" / "labels")
    found = find_samples("kumar", [row], tmp_path)[row.id].source
    assert (found.image_path.suffix, found.label_path.suffix) == (".webp", ".png")


def test_images_that_a_folder_leaves_out_are_named(tmp_path):
    def put(*names):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8, 3), 200, np.uint8)).save(tmp_path / name, format="png")

    def said():
        with pytest.warns(ImageWarning) as caught:
            found = [sample.id for sample in load_dataset(tmp_path).samples]
        return found, [str(warning.message).split("left out, ")[1] for warning in caught]

    put("plain.png", "tumour_seg.png", "tray_labels.tif", "a/b/c/d/deep.png", "x.jfif")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert said() == (
        ["plain", "x"],
        [
            "label maps by their names or their folder's, but there are no images of these names: tray_labels.tif, "
            "tumour_seg.png",
            "folders that are links, or more than 3 deep: link, a/b/c/d",
        ],
    )
    put("test/t.png", "train/u.png")
    found, why = said()
    assert found == ["train/u", "test/t"]
    assert why == ["beside the splits train, test: plain.png, tray_labels.tif, tumour_seg.png, x.jfif"]
