import io
import json
import shutil
import unicodedata
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import tifffile
import torch
from PIL import Image
from typer.testing import CliRunner

from nucseg import annotations, workflow
from nucseg.checkpoints import Checkpoint
from nucseg.cli import app
from nucseg.data import Sample, load_dataset
from nucseg.data.sources import FileSource
from nucseg.data.tissue import generate_tissue
from nucseg.patches import Patch
from nucseg.profiles import load_profile
from nucseg.selection import Selection
from nucseg.workflow import WorkflowError
from nucseg.workflow.base import open_images
from nucseg.workflow.outlines import _outline_files
from nucseg.workflow.prediction import shows_something

PROFILE = load_profile(Path(__file__).parent / "tiny.yaml")
NAMES = ("slide_a", "slide_b")


class _Trained(NamedTuple):
    seconds: float
    curve: list


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    """Two unlabelled images, and what a pathologist would outline on them."""
    root = tmp_path_factory.mktemp("slides")
    truth = {}
    (root / "images").mkdir()
    for seed, name in enumerate(NAMES):
        image, truth[name] = generate_tissue("glandular", (160, 192), seed=seed)
        Image.fromarray(image).save(root / "images" / f"{name}.png")
    return root / "images", truth


@pytest.fixture(scope="module")
def picks(slides, tmp_path_factory):
    out = tmp_path_factory.mktemp("picks")
    return out, workflow.select_patches(slides[0], out, 3, "cps", PROFILE)


@pytest.fixture(scope="module")
def outlines(slides, tmp_path_factory):
    folder = tmp_path_factory.mktemp("outlines")
    for name, labels in slides[1].items():
        annotations.write_geojson(folder / f"{name}.geojson", labels)
    return folder


@pytest.fixture(scope="module")
def training_set(picks, outlines, tmp_path_factory):
    out = tmp_path_factory.mktemp("training")
    return out, workflow.import_annotations(picks[0], outlines, out)


def test_selected_patches_are_written_as_pictures_and_rectangles(picks, slides):
    out, selection = picks
    table = pd.read_csv(out / "patches.csv")
    assert len(table) == len(selection.patches) == 3
    for row, patch in zip(table.itertuples(), selection.patches, strict=True):
        image = np.asarray(Image.open(slides[0] / f"{Path(patch.image_id).name}.png"))
        assert np.array_equal(np.asarray(Image.open(out / row.file)), patch.crop(image))
    back = [p for path in sorted((out / "geojson").glob("*")) for p in annotations.read_geojson_patches(path)]
    assert {(p.row, p.col, p.size) for p in back} == {(p.row, p.col, p.size) for p in selection.patches}


def test_the_same_command_gives_the_same_selection(picks, slides, tmp_path):
    assert workflow.select_patches(slides[0], tmp_path, 3, "cps", PROFILE).patches == picks[1].patches


def test_outlines_come_back_as_the_label_maps_of_the_patches(training_set, picks, slides):
    out, table = training_set
    for row, patch in zip(table.itertuples(), picks[1].patches, strict=True):
        labels = np.asarray(Image.open(out / "labels" / row.file))
        true = patch.crop(slides[1][Path(patch.image_id).name])
        assert ((labels > 0) == (true > 0)).all()
        assert row.nuclei == np.unique(true[true > 0]).size


def test_missing_outlines_are_named(picks, tmp_path):
    (tmp_path / "slide_c.geojson").write_text("{}")
    images = sorted({Path(patch.image_id).name for patch in picks[1].patches})
    with pytest.raises(WorkflowError, match="images have no outlines in") as raised:
        workflow.import_annotations(picks[0], tmp_path, tmp_path / "out", partial=True)
    assert all(name in str(raised.value) for name in images)
    assert "of no chosen image are slide_c.geojson" in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_half_of_the_outlines_can_be_imported_where_it_is_asked(picks, outlines, tmp_path):
    images = sorted({Path(patch.image_id).name for patch in picks[1].patches})
    assert len(images) == 2
    (tmp_path / "some").mkdir()
    shutil.copy(outlines / f"{images[0]}.geojson", tmp_path / "some")
    (tmp_path / "some" / "other.geojson").write_text("{}")
    with pytest.raises(WorkflowError, match=f"1 of 2 images have no outlines .*{images[1]}.*--partial"):
        workflow.import_annotations(picks[0], tmp_path / "some", tmp_path / "out")
    with pytest.warns(UserWarning, match=f"{images[1]}; their patches are left out; of no .* are other.geojson"):
        table = workflow.import_annotations(picks[0], tmp_path / "some", tmp_path / "out", partial=True)
    assert {Path(name).name for name in table["image_id"]} == {images[0]}


def test_a_rectangle_that_was_moved_is_no_patch(picks, outlines, tmp_path):
    """What was outlined in it lies elsewhere, and the rest of the chosen patch would become background."""
    shutil.copytree(outlines, tmp_path / "moved")
    patch = picks[1].patches[0]
    path = tmp_path / "moved" / f"{Path(patch.image_id).name}.geojson"
    features = json.loads(path.read_text())
    annotations.write_geojson(tmp_path / "p.geojson", [patch])
    (rectangle,) = json.loads((tmp_path / "p.geojson").read_text())["features"]
    features["features"].append(rectangle)
    path.write_text(json.dumps(features))
    workflow.import_annotations(picks[0], tmp_path / "moved", tmp_path / "as_chosen")
    for corner in rectangle["geometry"]["coordinates"][0]:
        corner[0] += 3
    path.write_text(json.dumps(features))
    with pytest.raises(WorkflowError, match=f"column {patch.col + 3} .* none of the patches .* moved or resized"):
        workflow.import_annotations(picks[0], tmp_path / "moved", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_patches_are_not_mixed_with_the_files_of_another_training_set(picks, outlines, tmp_path):
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "mine.png").write_bytes(b"x")
    with pytest.raises(WorkflowError, match="labels holds files already"):
        workflow.import_annotations(picks[0], outlines, tmp_path)
    assert not (tmp_path / "images").exists()


def test_images_to_be_tested_on_are_not_chosen_from(slides, tmp_path):
    for split, name in (("train", "slide_a.png"), ("test", "slide_b.png")):
        (tmp_path / "all" / split).mkdir(parents=True)
        shutil.copy(slides[0] / name, tmp_path / "all" / split)
    with pytest.warns(UserWarning, match="1 images of val/ and test/ are left out"):
        chosen = workflow.select_patches(tmp_path / "all", tmp_path / "picks", 4, "random-crop", PROFILE, seed=1)
    assert {patch.image_id for patch in chosen.patches} == {"train/slide_a"}
    shutil.rmtree(tmp_path / "all" / "train")
    with pytest.raises(WorkflowError, match="all of its images are in val/ or test/"):
        workflow.select_patches(tmp_path / "all", tmp_path / "none", 4, "random-crop", PROFILE, seed=1)
    assert not (tmp_path / "none").exists()


def test_outlines_drawn_on_the_picture_of_a_patch_are_no_background(slides, tmp_path):
    """Two patches of one image; the outlines of the second were drawn in its own coordinates."""
    (tmp_path / "images").mkdir()
    shutil.copy(slides[0] / "slide_a.png", tmp_path / "images")
    workflow.select_patches(tmp_path / "images", tmp_path / "picks", 2, "random-crop", PROFILE, seed=1)
    record = json.loads((tmp_path / "picks" / "selection.json").read_text())
    for patch, row in zip(record["patches"], (0, 96), strict=True):
        patch["row"], patch["col"] = row, 64
    (tmp_path / "picks" / "selection.json").write_text(json.dumps(record))
    labels = np.zeros((160, 192), np.int32)
    labels[10:20, 80:90], labels[100:110, 20:30] = 1, 2
    annotations.write_geojson(tmp_path / "slide_a.geojson", labels)
    with pytest.raises(
        WorkflowError, match=r"in patch 2 of .* but 1 outlines of the same images lie beyond .*PNG of a patch. --empty"
    ):
        workflow.import_annotations(tmp_path / "picks", tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.warns(UserWarning, match="patch 2 .* taken for background"):
        table = workflow.import_annotations(tmp_path / "picks", tmp_path, tmp_path / "out", empty=True)
    assert list(table["nuclei"]) == [1, 0]
    with pytest.warns(UserWarning, match=r"patch 2 .*left out"):
        table = workflow.import_annotations(tmp_path / "picks", tmp_path, tmp_path / "partly", partial=True)
    assert list(table["rank"]) == [1]
    assert len(list((tmp_path / "partly" / "labels").iterdir())) == 1
    with pytest.raises(WorkflowError, match="holds imported patches already"):
        workflow.import_annotations(tmp_path / "picks", tmp_path, tmp_path / "partly", partial=True)


@pytest.fixture
def one_patch(slides, tmp_path):
    """A selection of one patch, and a function that writes outlines and imports them."""
    (tmp_path / "images").mkdir()
    shutil.copy(slides[0] / "slide_a.png", tmp_path / "images")
    (patch,) = workflow.select_patches(tmp_path / "images", tmp_path / "picks", 1, "random-crop", PROFILE).patches
    (tmp_path / "outlines").mkdir()

    def read(labels=None, features=None, name="slide_a"):
        path = tmp_path / "outlines" / f"{name}.geojson"
        if labels is not None:
            annotations.write_geojson(path, labels)
        if features:
            found = json.loads(path.read_text()) if path.exists() else {"type": "FeatureCollection", "features": []}
            found["features"] += features
            path.write_text(json.dumps(found))
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        table = workflow.import_annotations(tmp_path / "picks", tmp_path / "outlines", tmp_path / "out")
        (file,) = (tmp_path / "out" / "labels").iterdir()
        return table, np.asarray(Image.open(file))

    return patch, read


def nuclei_in(patch, places=((4, 4), (20, 8), (30, 30))):
    labels = np.zeros((160, 192), np.int32)
    for number, (row, col) in enumerate(places, 1):
        labels[patch.row + row : patch.row + row + 6, patch.col + col : patch.col + col + 6] = number
    return labels


def test_ids_beyond_16_bits_stay_apart(one_patch, tmp_path):
    patch, read = one_patch
    labels = nuclei_in(patch)
    table, found = read(labels * 65_536)
    assert table["nuclei"].tolist() == [3]
    assert sorted(np.unique(found)) == [0, 1, 2, 3]
    assert np.array_equal(found > 0, patch.crop(labels) > 0)


@pytest.mark.parametrize("first", [True, False])
def test_a_region_of_tissue_is_no_nucleus(one_patch, first):
    patch, read = one_patch
    tissue = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [
        [[0, 0], [192, 0], [190, 160], [0, 160], [0, 0]]]}, "properties": {"objectType": "annotation"}}  # fmt: skip
    if first:
        with pytest.raises(WorkflowError, match=r"covers \d+% of patch 1"):
            read(features=[tissue])
    with pytest.raises(WorkflowError, match=r"covers \d+% of patch 1, from row 0 to 160 .*region of tissue"):
        read(labels=nuclei_in(patch), features=[tissue])


def test_a_nucleus_of_class_patch_and_one_in_parts_are_told(one_patch):
    patch, read = one_patch
    x, y = patch.col, patch.row

    def ring(col, row, more=0):
        return [[x + col, y + row], [x + col + 8, y + row], [x + col + 8 + more, y + row + 8], [x + col, y + row + 8],
                [x + col, y + row]]  # fmt: skip

    wrong = {"type": "Feature", "id": "wrong", "geometry": {"type": "Polygon", "coordinates": [ring(2, 2, 3)]},
             "properties": {"classification": {"name": "Patch"}}}  # fmt: skip
    parts = {"type": "Feature", "id": "parts", "properties": {},
             "geometry": {"type": "MultiPolygon", "coordinates": [[ring(20, 2)], [ring(20, 30)]]}}  # fmt: skip
    with pytest.warns(annotations.AnnotationWarning, match=r"of class Patch, but no rectangle.*wrong.*2 parts.*parts"):
        table, _ = read(features=[wrong, parts])
    assert table["nuclei"].tolist() == [1]


def test_images_of_one_name_in_two_folders_keep_their_outlines_apart(slides, tmp_path):
    for folder, name in (("", "slide_a"), ("sub", "slide_b")):
        (tmp_path / "images" / folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(slides[0] / f"{name}.png", tmp_path / "images" / folder / "same.png")
    chosen = workflow.select_patches(tmp_path / "images", tmp_path / "picks", 6, "random-crop", PROFILE, seed=2)
    assert {patch.image_id for patch in chosen.patches} == {"same", "sub/same"}
    files = sorted(
        p.relative_to(tmp_path / "picks/geojson").as_posix() for p in (tmp_path / "picks/geojson").rglob("*.geojson")
    )
    assert files == ["same.geojson", "sub/same.geojson"]
    for name, true in (("same", "slide_a"), ("sub/same", "slide_b")):
        path = tmp_path / "outlines" / f"{name}.geojson"
        path.parent.mkdir(exist_ok=True)
        annotations.write_geojson(path, slides[1][true])
    table = workflow.import_annotations(tmp_path / "picks", tmp_path / "outlines", tmp_path / "out", empty=True)
    for row, patch in zip(table.itertuples(), chosen.patches, strict=True):
        true = patch.crop(slides[1]["slide_a" if patch.image_id == "same" else "slide_b"])
        assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "labels" / row.file)) > 0, true > 0)


def test_an_image_of_the_same_name_that_comes_later_changes_no_name_of_a_selection(slides, tmp_path):
    for folder, name in (("x", "slide_a"), ("y", "slide_b")):
        (tmp_path / "images" / folder).mkdir(parents=True)
        shutil.copy(slides[0] / f"{name}.png", tmp_path / "images" / folder / "same.png")
        if folder == "x":
            workflow.select_patches(tmp_path / "images", tmp_path / "picks", 2, "random-crop", PROFILE)
    assert [path.name for path in (tmp_path / "picks" / "geojson").iterdir()] == ["same.geojson"]
    annotations.write_geojson(tmp_path / "outlines" / "same.geojson", slides[1]["slide_a"])
    table = workflow.import_annotations(tmp_path / "picks", tmp_path / "outlines", tmp_path / "out")
    assert list(table["image_id"]) == ["x/same"] * 2
    assert all((tmp_path / "picks" / "patches" / file).is_file() for file in table["file"])
    Image.open(slides[0] / "slide_a.png").rotate(180).save(tmp_path / "images" / "x" / "same.png")
    with pytest.raises(WorkflowError, match="is not the one that patches were chosen from"):
        workflow.import_annotations(tmp_path / "picks", tmp_path / "outlines", tmp_path / "again")


@pytest.mark.parametrize("name", ["slide_a.png.geojson", "slide_a_labels.TIF", "slide_a_cp_masks.tiff", "slide_a.JSON"])
def test_outlines_are_found_by_the_names_that_tools_give_them(one_patch, tmp_path, name):
    patch, _ = one_patch
    path = tmp_path / "outlines" / name
    if path.suffix.lower() in (".geojson", ".json"):
        annotations.write_geojson(path, nuclei_in(patch))
    else:
        annotations.write_labels(tmp_path / "a.tif", nuclei_in(patch))
        shutil.move(tmp_path / "a.tif", path)
    table = workflow.import_annotations(tmp_path / "picks", tmp_path / "outlines", tmp_path / "out")
    assert table["nuclei"].tolist() == [3]


def test_of_two_files_for_one_image_the_one_that_is_not_read_is_told(one_patch, tmp_path):
    patch, read = one_patch
    annotations.write_labels(tmp_path / "outlines" / "slide_a.tif", nuclei_in(patch, [(4, 4)]))
    with pytest.warns(UserWarning, match=r"taken from slide_a.geojson, not from slide_a.tif"):
        table, _ = read(nuclei_in(patch))
    assert table["nuclei"].tolist() == [3]


def test_a_selection_finds_its_images_from_any_folder_and_where_they_have_moved(
    one_patch, slides, tmp_path, monkeypatch
):
    patch, _ = one_patch
    annotations.write_geojson(tmp_path / "outlines" / "slide_a.geojson", nuclei_in(patch))
    monkeypatch.chdir(tmp_path)
    workflow.select_patches("images", "relative", 1, "random-crop", PROFILE)
    monkeypatch.chdir("/")
    workflow.import_annotations(tmp_path / "relative", tmp_path / "outlines", tmp_path / "a")
    shutil.move(tmp_path / "images", tmp_path / "moved")
    with pytest.raises(WorkflowError, match=r"selection.json; --images names another place"):
        workflow.import_annotations(tmp_path / "relative", tmp_path / "outlines", tmp_path / "b")
    workflow.import_annotations(tmp_path / "relative", tmp_path / "outlines", tmp_path / "b", images=tmp_path / "moved")


def test_a_damaged_selection_or_model_says_so(picks, training_set, slides, tmp_path):
    shutil.copytree(picks[0], tmp_path / "picks")
    path = tmp_path / "picks" / "selection.json"
    path.write_text(path.read_text()[:50])
    with pytest.raises(WorkflowError, match=r"selection.json: not complete JSON"):
        workflow.import_annotations(tmp_path / "picks", tmp_path, tmp_path / "out")
    workflow.train_folder(training_set[0], tmp_path / "model", "hoverlite", PROFILE)
    path = tmp_path / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(WorkflowError, match=r"model.safetensors: damaged"):
        workflow.load_model(tmp_path / "model")


def test_a_mask_in_the_place_of_a_prediction_and_predictions_too_many_are_told(slides, tmp_path):
    for folder in ("true", "predicted"):
        (tmp_path / folder).mkdir()
    labels = slides[1]["slide_a"]
    annotations.write_labels(tmp_path / "true" / "a.tif", labels)
    annotations.write_labels(tmp_path / "predicted" / "b.tif", labels)
    Image.fromarray(((labels > 0) * 255).astype(np.uint8)).save(tmp_path / "predicted" / "a.png")
    with (
        pytest.warns(UserWarning, match="one id, 255, in"),
        pytest.warns(UserWarning, match="no truth for 1 predictions, left out: b"),
    ):
        workflow.evaluate_folders(tmp_path / "true", tmp_path / "predicted")
    with pytest.raises(WorkflowError, match="no such folder"):
        workflow.evaluate_folders(tmp_path / "absent", tmp_path / "predicted")


def test_a_folder_with_a_selection_takes_no_second_one(picks, slides):
    with pytest.raises(WorkflowError, match="holds a selection already"):
        workflow.select_patches(slides[0], picks[0], 2, "random-crop", PROFILE)


def test_label_maps_without_a_nucleus_teach_nothing(slides, tmp_path):
    for name in ("images", "labels"):
        (tmp_path / "set" / name).mkdir(parents=True)
    shutil.copy(slides[0] / "slide_a.png", tmp_path / "set" / "images" / "a.png")
    Image.fromarray(np.zeros((160, 192), np.uint16)).save(tmp_path / "set" / "labels" / "a.png")
    with pytest.raises(WorkflowError, match="no label map holds a nucleus"):
        workflow.train_folder(tmp_path / "set", tmp_path / "model", "hoverlite", PROFILE)


def test_outlines_of_other_images_are_an_error_and_not_an_empty_training_set(picks, slides, tmp_path):
    for name in NAMES:
        annotations.write_geojson(tmp_path / f"{name}.geojson", np.zeros((160, 192), np.int32))
    with pytest.raises(WorkflowError, match=r"no nucleus is outlined inside any chosen patch.* holds no outline"):
        workflow.import_annotations(picks[0], tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_label_map_of_another_size_names_both_sizes(picks, slides, tmp_path):
    for name in NAMES:
        annotations.write_labels(tmp_path / f"{name}.tif", np.ones((10, 10), np.int32))
    with pytest.raises((WorkflowError, ValueError), match=r"(?s)10.*160"):
        workflow.import_annotations(picks[0], tmp_path, tmp_path / "out")


def test_from_patches_to_label_maps_of_whole_images(training_set, slides, tmp_path):
    workflow.train_folder(training_set[0], tmp_path / "model", "hoverlite", PROFILE)
    table = workflow.predict_folder(tmp_path / "model", slides[0], tmp_path / "out")
    assert sorted(Path(name).name for name in table["image_id"]) == list(NAMES)
    for name in NAMES:
        labels = annotations.read_labels(tmp_path / "out" / "labels" / f"{name}.tif", binary=False)
        assert labels.shape == (160, 192)
        outlined = annotations.read_geojson(tmp_path / "out" / "geojson" / f"{name}.geojson", labels.shape)
        assert np.array_equal(outlined > 0, labels > 0)


# -- whole slides ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def segmenter(training_set, tmp_path_factory):
    out = tmp_path_factory.mktemp("model")
    workflow.train_folder(training_set[0], out, "hoverlite", PROFILE)
    model = workflow.load_model(out)
    model.inference = replace(model.inference, tile=64, overlap=32, block=128)
    return model


@pytest.fixture
def slide(slides, tmp_path):
    """An image three blocks wide whose last one is glass, as a tiled TIFF."""
    image = np.asarray(Image.open(slides[0] / "slide_a.png"))
    image = np.concatenate([image, np.full((160, 160, 3), 236, np.uint8)], axis=1)
    (tmp_path / "slide").mkdir()
    tifffile.imwrite(tmp_path / "slide" / "s.tif", image, tile=(64, 64), photometric="rgb")
    return tmp_path / "slide", image


def test_a_slide_in_blocks_has_the_nuclei_of_the_image_in_memory(segmenter, slide, tmp_path, monkeypatch):
    [sample] = load_dataset(str(slide[0])).samples
    whole = segmenter.predict_instances(slide[1])
    assert whole.labels.max() > 3
    monkeypatch.setattr(FileSource, "image", lambda self: pytest.fail("read whole"))
    monkeypatch.setattr("nucseg.data.dataset.WHOLE_IMAGE_PIXELS", 0)
    canvas = np.memmap(tmp_path / "canvas", np.int32, "w+", shape=sample.shape)
    found = workflow.segment_slide(segmenter, sample, canvas)
    assert found.labels is canvas
    kept = whole.labels[:, :192]  # nothing was looked for on the glass
    assert np.array_equal(canvas[:, :192] > 0, kept > 0)
    assert np.array_equal(np.asarray(canvas), np.where(np.isin(whole.labels, np.unique(canvas)), whole.labels, 0))


def test_blocks_of_glass_are_left_out_and_one_nucleus_is_enough_to_be_looked_at(segmenter, monkeypatch):
    glass = np.random.default_rng(0).normal(236, 8, (128, 128, 3)).clip(0, 255).astype(np.uint8)
    assert glass.min() < 210  # single pixels are as dark as tissue
    assert not shows_something(glass)
    glass[101:114, 101:114] = (120, 70, 150)
    assert shows_something(glass)
    asked = []
    monkeypatch.setattr(
        segmenter, "begin", lambda pixels: asked.append(pixels) or type(segmenter).begin(segmenter, pixels)
    )
    image = np.full((128, 320, 3), 240, np.uint8)
    image[:, 192:] = glass
    sample = Sample.from_arrays("s", image)
    workflow.segment_slide(segmenter, sample, np.zeros(sample.shape, np.int32))
    assert len(asked) == 1
    assert np.array_equal(asked[0], glass)


def test_a_folder_with_a_slide_is_segmented_and_nothing_else_is_left(training_set, slides, slide, tmp_path):
    workflow.train_folder(training_set[0], tmp_path / "model", "hoverlite", PROFILE)
    shutil.copy(slides[0] / "slide_b.png", slide[0])
    # Without the glass, on which this model, hardly trained, sees nuclei when it is asked to look.
    tifffile.imwrite(slide[0] / "s.tif", slide[1][:, :192], tile=(64, 64), photometric="rgb")
    at_once = workflow.predict_folder(tmp_path / "model", slide[0], tmp_path / "a")
    in_blocks = workflow.predict_folder(tmp_path / "model", slide[0], tmp_path / "b", large=160 * 192 - 1)
    pd.testing.assert_frame_equal(at_once, in_blocks)
    for name in ("s", "slide_b"):  # numbered in another order, since these blocks are the whole image
        a, b = (annotations.read_labels(tmp_path / out / "labels" / f"{name}.tif") for out in "ab")
        assert a.max() == b.max() == len(np.unique(a.astype(np.int64) * 10_000 + b)) - 1
        outlined = annotations.read_geojson(tmp_path / "b" / "geojson" / f"{name}.geojson", b.shape)
        assert np.array_equal(outlined, b)
    left = sorted(path.name for path in (tmp_path / "b").iterdir())
    assert left == ["geojson", "images.csv", "labels", "predictions.json"]


def test_a_disk_without_room_is_an_error_before_the_first_image(training_set, slide, tmp_path, monkeypatch):
    workflow.train_folder(training_set[0], tmp_path / "model", "hoverlite", PROFILE)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(WorkflowError, match=r"s: .*has room for 0.0 GB.*write to another disk"):
        workflow.predict_folder(tmp_path / "model", slide[0], tmp_path / "out", large=1000)


# -- what was there before, and what was meant ----------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(training_set, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    workflow.train_folder(training_set[0], out, "hoverlite", PROFILE)
    return out


def test_predictions_go_on_where_they_stopped_and_with_images_that_came_later(trained, slides, tmp_path, monkeypatch):
    (tmp_path / "s").mkdir()
    shutil.copy(slides[0] / "slide_a.png", tmp_path / "s")
    workflow.predict_folder(trained, tmp_path / "s", tmp_path / "out")
    first = (tmp_path / "out" / "labels" / "slide_a.tif").stat().st_mtime_ns
    shutil.copy(slides[0] / "slide_b.png", tmp_path / "s")
    table = workflow.predict_folder(trained, tmp_path / "s", tmp_path / "out")
    assert list(table["image_id"]) == list(NAMES)
    assert (tmp_path / "out" / "labels" / "slide_a.tif").stat().st_mtime_ns == first
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "out" / "images.csv"), table)
    shutil.copy(slides[0] / "slide_b.png", tmp_path / "s" / "slide_a.png")  # another image of the same name
    again = workflow.predict_folder(trained, tmp_path / "s", tmp_path / "out")
    assert again["nuclei"].tolist() == [table["nuclei"][1]] * 2


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("a_half.png", 4000, "damaged or truncated"),  # the first so many bytes of another
        ("b.png", b"", "the file is empty"),
        ("text.png", b"the image is on the other disk", "not an image"),
        ("page.tif", b"<html><body>Log in</body></html>", "not a TIFF"),
        ("z_header.png", 20, "damaged or truncated"),
    ],
    ids=["half", "empty", "text", "page", "header"],
)
def test_an_image_that_cannot_be_read_does_not_hold_up_the_others(trained, slides, tmp_path, file, content, said):
    shutil.copytree(slides[0], tmp_path / "s")
    whole = (slides[0] / "slide_a.png").read_bytes()
    (tmp_path / "s" / file).write_bytes(whole[:content] if isinstance(content, int) else content)
    with pytest.raises(WorkflowError, match=rf"(?s)1 of 3 images could not be segmented:.*{file}: {said}"):
        workflow.predict_folder(trained, tmp_path / "s", tmp_path / "out")
    assert list(pd.read_csv(tmp_path / "out" / "images.csv")["image_id"]) == list(NAMES)


def test_an_image_too_small_for_a_segmenter_does_not_hold_up_the_others(trained, slides, tmp_path):
    shutil.copytree(slides[0], tmp_path / "s")
    Image.fromarray(np.zeros((20, 40, 3), np.uint8)).save(tmp_path / "s" / "a_tiny.png")
    with pytest.raises(WorkflowError, match=r"1 of 3 .*:\na_tiny: at least 32 pixels a side, got 20 x 40"):
        workflow.predict_folder(trained, tmp_path / "s", tmp_path / "out")
    assert list(pd.read_csv(tmp_path / "out" / "images.csv")["image_id"]) == list(NAMES)


def test_images_unfit_to_be_chosen_from_are_left_out_and_named(slides, outlines, tmp_path):
    shutil.copytree(slides[0], tmp_path / "s")
    Image.fromarray(np.zeros((20, 40, 3), np.uint8)).save(tmp_path / "s" / "a_tiny.png")
    (tmp_path / "s" / "half.png").write_bytes((slides[0] / "slide_a.png").read_bytes()[:4000])  # a whole header
    (tmp_path / "s" / "empty.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="3 of 5 images are left out") as said:
        chosen = workflow.select_patches(tmp_path / "s", tmp_path / "picks", 3, "cps", PROFILE)
    assert {patch.image_id for patch in chosen.patches} <= set(NAMES)
    reasons = {"a_tiny": "at least 64 pixels a side, got 20 x 40", "half": "damaged", "empty": "the file is empty"}
    left_out = json.loads((tmp_path / "picks" / "selection.json").read_text())["left_out"]
    for name, reason in reasons.items():
        assert reason in left_out[name]
        assert left_out[name] in str(said[0].message)
    assert len(workflow.import_annotations(tmp_path / "picks", outlines, tmp_path / "out")) == 3
    for name in NAMES:
        (tmp_path / "s" / f"{name}.png").unlink()
    with pytest.raises(WorkflowError, match=r"(?s)64 pixels can be chosen from none of its images:.*a_tiny: at least"):
        workflow.select_patches(tmp_path / "s", tmp_path / "again", 3, "cps", PROFILE)


def test_a_large_image_that_turns_out_to_be_damaged_is_named(slides, tmp_path, monkeypatch):
    shutil.copytree(slides[0], tmp_path / "s")
    image = np.asarray(Image.open(slides[0] / "slide_a.png"))
    tifffile.imwrite(tmp_path / "s" / "t.tif", image, tile=(64, 64), compression="deflate", photometric="rgb")
    with tifffile.TiffFile(tmp_path / "s" / "t.tif") as tiff:
        start = tiff.pages[0].dataoffsets[3]
    with open(tmp_path / "s" / "t.tif", "r+b") as file:
        file.seek(start)
        file.write(b"\0" * 500)
    for name in ("workflow.selecting.BAND_PIXELS", "selection.pool.BAND_PIXELS", "data.dataset.WHOLE_IMAGE_PIXELS"):
        monkeypatch.setattr(f"nucseg.{name}", 0)
    with pytest.raises(WorkflowError, match=r"t.tif: damaged .*; or take it out of .*s and select again"):
        workflow.select_patches(tmp_path / "s", tmp_path / "picks", 3, "cps", PROFILE)


@pytest.mark.parametrize(
    ("images", "out"),
    [("s", "s"), ("s", "s/../s"), ("s/images", "s"), ("s", "s/core"), ("s", "s/core/labels")],
    ids=["same", "same by another name", "beside images", "a folder of images", "a folder of labels"],
)
def test_nothing_is_written_where_it_would_become_the_labels_of_the_images(
    trained, slides, picks, outlines, tmp_path, images, out
):
    for folder, name in (("images", "slide_a"), ("core/images", "slide_b")):
        (tmp_path / "s" / folder).mkdir(parents=True)
        shutil.copy(slides[0] / f"{name}.png", tmp_path / "s" / folder)
    annotations.write_labels(tmp_path / "s" / "core" / "labels" / "slide_b.png", slides[1]["slide_b"])
    before = sorted(tmp_path.rglob("*"))
    for step in (
        lambda place: workflow.predict_folder(trained, tmp_path / images, place),
        lambda place: workflow.select_patches(tmp_path / images, place, 2, "random-crop", PROFILE),
        lambda place: workflow.import_annotations(picks[0], outlines, place, images=tmp_path / images),
    ):
        with pytest.raises(WorkflowError, match=r"holds the images or .*; name another --out|; name a new"):
            step(tmp_path / out)
    assert sorted(tmp_path.rglob("*")) == before


def test_predictions_in_a_folder_among_the_images_are_no_images_and_no_labels(trained, slides, tmp_path, monkeypatch):
    shutil.copytree(slides[0], tmp_path / "s")

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    predict = partial(workflow.predict_folder, trained, tmp_path / "s", tmp_path / "s" / "out")
    with monkeypatch.context() as patch:
        patch.setattr("nucseg.annotations.write_geojson", stop)  # when the first label map is there already
        with pytest.raises(KeyboardInterrupt):
            predict()
    for _ in range(2):
        found = open_images(tmp_path / "s").samples
        assert [(sample.id, sample.labelled) for sample in found] == [(name, False) for name in NAMES]
        predict()


@pytest.mark.parametrize("strategy", ["cps", "k-center"])
def test_how_many_patches_there_are_is_told_before_they_are_compared(slides, tmp_path, monkeypatch, strategy):
    said = []
    monkeypatch.setattr("nucseg.workflow.selecting.say", said.append)
    workflow.select_patches(slides[0], tmp_path / "few", 2, strategy, PROFILE)
    assert said == ["12 windows of 64 px, 64 px apart, in 2 images", "12 of them show enough tissue and are compared"]
    monkeypatch.setattr("nucseg.workflow.selecting.MANY", 11)
    with pytest.warns(UserWarning, match="12 patches take long .* with --step 128 there are about a quarter"):
        workflow.select_patches(slides[0], tmp_path / "many", 2, strategy, PROFILE)


@pytest.mark.parametrize(("strategy", "rule"), [("cps", " do not, or .exclusion: 0"), ("random-crop", " do not$")])
def test_patches_that_show_the_same_tissue_are_told(slides, tmp_path, monkeypatch, strategy, rule):
    places = [("slide_a", 0, 0), ("slide_a", 31, 0), ("slide_b", 31, 0), ("slide_a", 63, 0), ("slide_a", 64, 40)]
    patches = tuple(Patch(*place, 64) for place in places)
    chosen = Selection(strategy, patches, None, None, 0.1)
    monkeypatch.setattr("nucseg.workflow.selecting.select", lambda *a, **k: chosen)
    with pytest.warns(UserWarning, match=rf"patches, 1 and 2 \(52%\) show .* --step 32 for patches that{rule}"):
        workflow.select_patches(slides[0], tmp_path / "out", 5, strategy, PROFILE)


def test_a_segmenter_without_a_schedule_says_how_long_it_will_train(training_set, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "nucseg.workflow.segmenter.models.build", lambda *a: (_ for _ in ()).throw(RuntimeError("begun"))
    )
    assert "dist" not in PROFILE.training
    said = (
        r"no schedule for dist: 5,000 iterations of 6 crops of 256 px; .*`training: \{dist: \{iterations: \.\.\.\}\}`"
    )
    with pytest.warns(UserWarning, match=said), pytest.raises(RuntimeError, match="begun"):
        workflow.train_folder(training_set[0], tmp_path / "model", "dist", PROFILE)


def test_notes_on_a_selection_are_in_plain_words():
    notes = {
        "candidates='with-largest' would choose 3 of 9 otherwise": [
            "3 of 9 have a nearly equal substitute, which a slightly different rule would take; nothing to do"
        ],
        "delta = 0.123456, 92.1% of the graph covered": ["92.1% of the windows look like one of these"],
        "exclusion waived for 2 of 9 picks": ["2 of 9 overlap others: there is nothing else of their kind"],
        "0 windows with less than 50% tissue left out": [],
        "10 windows with less than 50% tissue left out": ["10 windows with less than 50% tissue left out"],
        "0 windows with less than 50% tissue left out; 5 windows with least nuclear content left out": [
            "5 windows with least nuclear content left out"
        ],
    }
    for note, words in notes.items():
        assert workflow.notes_for_reading(Selection("cps", (), None, None, 0.1, notes=(note,))) == words


def test_predictions_lie_as_the_images_do_and_stay_where_they_are_when_another_of_the_name_comes(
    trained, slides, tmp_path
):
    for folder, name in (("x", "slide_a"), ("y", "slide_b")):
        annotations.write_labels(tmp_path / "truth" / folder / "s.tif", slides[1][name])
    (tmp_path / "images" / "x").mkdir(parents=True)
    shutil.copy(slides[0] / "slide_a.png", tmp_path / "images" / "x" / "s.png")
    shutil.copy(slides[0] / "slide_b.png", tmp_path / "images" / "t.png")
    annotations.write_labels(tmp_path / "first" / "x" / "s.tif", slides[1]["slide_a"])
    predict = partial(workflow.predict_folder, trained, tmp_path / "images", tmp_path / "out")
    predict()
    with pytest.warns(UserWarning, match="no truth for 1 predictions, left out: t"):
        assert list(workflow.evaluate_folders(tmp_path / "first", tmp_path / "out")["image_id"]) == ["x/s", "mean"]
    before = (tmp_path / "out" / "labels" / "x" / "s.tif").stat().st_mtime_ns
    (tmp_path / "images" / "t.png").unlink()
    (tmp_path / "out" / "labels" / "t.tif").unlink()
    (tmp_path / "images" / "y").mkdir()
    shutil.copy(slides[0] / "slide_b.png", tmp_path / "images" / "y" / "s.png")
    predict()
    labels = tmp_path / "out" / "labels"
    assert sorted(path.relative_to(labels).as_posix() for path in labels.rglob("*.tif")) == ["x/s.tif", "y/s.tif"]
    assert (labels / "x" / "s.tif").stat().st_mtime_ns == before
    assert len(workflow.evaluate_folders(tmp_path / "truth", tmp_path / "out")) == 3


def test_predictions_of_another_model_and_finished_models_are_not_written_over(trained, training_set, slides, tmp_path):
    with pytest.raises(WorkflowError, match="holds a model already"):
        workflow.train_folder(training_set[0], trained, "hoverlite", PROFILE, seed=3)
    workflow.predict_folder(trained, slides[0], tmp_path / "out")
    workflow.train_folder(training_set[0], tmp_path / "other", "hoverlite", PROFILE, seed=3)
    with pytest.raises(WorkflowError, match="holds predictions of another model"):
        workflow.predict_folder(tmp_path / "other", slides[0], tmp_path / "out")
    (tmp_path / "mine" / "labels").mkdir(parents=True)
    with pytest.raises(WorkflowError, match=r"holds labels/ or geojson/ of something else"):
        workflow.predict_folder(trained, slides[0], tmp_path / "mine")


def test_a_folder_wins_over_a_public_dataset_of_its_name(slides, tmp_path, monkeypatch):
    shutil.copytree(slides[0], tmp_path / "tissue")
    monkeypatch.chdir(tmp_path)
    for place in ("tissue", Path("tissue"), "./tissue"):
        assert [sample.id for sample in open_images(place).samples] == list(NAMES)
    with pytest.raises(WorkflowError, match="nowhere: no such folder"):
        open_images("nowhere")


def test_a_tilde_is_the_home_folder_wherever_it_stands(slides, picks, outlines, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(slides[0], tmp_path / "s")
    workflow.select_patches("~/s", "~/p", 2, "random-crop", PROFILE)
    workflow.import_annotations("~/p", outlines, "~/t")
    workflow.train_folder("~/t", "~/m", "hoverlite", PROFILE)
    workflow.predict_folder("~/m", "~/s", "~/o")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "o", "p", "s", "t"]
    assert (tmp_path / "m" / "model.safetensors").stat().st_mode & 0o044  # colleagues may read it


def test_what_the_commands_wrote_into_the_folder_of_images_is_no_image(slides, tmp_path):
    shutil.copytree(slides[0], tmp_path / "s")
    workflow.select_patches(tmp_path / "s", tmp_path / "s" / "picks", 2, "random-crop", PROFILE)
    assert [sample.id for sample in open_images(tmp_path / "s").samples] == list(NAMES)


def test_rounds_of_outlining_are_trained_on_together(training_set, picks, slides, tmp_path):
    for name in ("round1", "round2"):
        shutil.copytree(training_set[0], tmp_path / "all" / name)
    shutil.copytree(picks[0], tmp_path / "all" / "picks")  # not outlined yet
    workflow.train_folder(tmp_path / "all", tmp_path / "model", "hoverlite", PROFILE)
    found = open_images(tmp_path / "all").samples
    stems = sorted(path.stem for path in (training_set[0] / "images").iterdir())
    assert [sample.id for sample in found] == [f"round{number}/{stem}" for number in (1, 2) for stem in stems]
    assert all(sample.labelled for sample in found)
    assert json.loads((tmp_path / "model" / "model.json").read_text())["data"]["images"] == 2 * len(stems)


def test_imported_patches_beside_other_images_are_left_out_and_it_is_said_how_to_train_on_them(
    training_set, slides, tmp_path
):
    shutil.copytree(slides[0], tmp_path / "s")
    shutil.copytree(training_set[0], tmp_path / "s" / "round1")
    assert [sample.id for sample in open_images(tmp_path / "s").samples] == list(NAMES)
    with (
        pytest.warns(UserWarning, match=r"patches are left out, .*: round1. To train on these, name one of them"),
        pytest.raises(WorkflowError, match="no image has a label map"),
    ):
        workflow.train_folder(tmp_path / "s", tmp_path / "model", "hoverlite", PROFILE)


def test_a_folder_with_patches_to_outline_and_nothing_else_has_no_image(picks, tmp_path):
    shutil.copytree(picks[0], tmp_path / "s" / "picks")
    with pytest.raises(ValueError, match=r"no image found .*, nor what nucseg wrote without outlines: picks"):
        open_images(tmp_path / "s")


def test_patches_are_compared_with_the_images_that_they_come_back_to(slides, picks, outlines, tmp_path):
    shutil.copytree(slides[0], tmp_path / "s")
    for name in NAMES:
        Image.open(slides[0] / f"{name}.png").rotate(180).save(tmp_path / "s" / f"{name}.png")
    with pytest.raises(WorkflowError, match=r"is not the one that patches were chosen from: .*01_slide_.*--images"):
        workflow.import_annotations(picks[0], outlines, tmp_path / "out", images=tmp_path / "s")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [{"empty": True}, {"partial": True}])
def test_outlines_in_other_coordinates_are_an_error_whatever_the_flags(picks, slides, tmp_path, flags):
    images = sorted({Path(patch.image_id).name for patch in picks[1].patches})
    for name in images:
        labels = slides[1][name].copy()
        if name == images[0]:  # none of it in a patch
            for patch in picks[1].patches:
                if Path(patch.image_id).name == name:
                    labels[np.isin(labels, np.unique(labels[patch.slices]))] = 0
            assert labels.any()
        annotations.write_geojson(tmp_path / f"{name}.geojson", labels)
    with pytest.raises(WorkflowError, match="lie beyond its patches; outlines count on the whole image"):
        workflow.import_annotations(picks[0], tmp_path, tmp_path / "out", **flags)


def test_outlines_are_found_by_names_that_look_the_same(slides, tmp_path):
    names = {"slide1.svs": "slide1.svs", "core_label": "core_label", "Präp B": unicodedata.normalize("NFD", "präp b")}
    for file in names.values():
        annotations.write_geojson(tmp_path / "o" / f"{file}.geojson", slides[1]["slide_a"])
    found = _outline_files(tmp_path / "o", {name: name for name in names}, partial=False)
    assert {name: path.stem for name, path in found.items()} == names


@pytest.mark.parametrize("full", [False, True], ids=["no folder", "full disk"])
def test_a_place_that_cannot_be_written_to_is_told_before_the_work(
    training_set, trained, slides, picks, outlines, tmp_path, monkeypatch, full
):
    out = tmp_path / "file" / "out"
    if full:
        monkeypatch.setattr("nucseg.workflow.base.tempfile.TemporaryFile", lambda dir: io.FileIO("/dev/full", "w"))
    else:
        (tmp_path / "file").write_text("")
    for place, work in (
        ("selecting.select", lambda: workflow.select_patches(slides[0], out, 2, "random-crop", PROFILE)),
        ("outlines.read_json", lambda: workflow.import_annotations(picks[0], outlines, out)),
        ("segmenter.train", lambda: workflow.train_folder(training_set[0], out, "hoverlite", PROFILE)),
        ("prediction.run_ahead", lambda: workflow.predict_folder(trained, slides[0], out)),
        ("scores._truth", lambda: workflow.evaluate_folders(outlines, outlines, out / "scores.csv")),
    ):
        monkeypatch.setattr(f"nucseg.workflow.{place}", lambda *a, **k: pytest.fail("worked first"))
        said = "No space left" if full else "Not a directory"
        with pytest.raises(WorkflowError, match=rf"file/out: cannot be written to \({said}"):
            work()
        assert not out.exists()


def test_scores_are_written_to_a_file_and_not_to_a_folder(slides, tmp_path):
    for folder in ("truth", "predicted"):
        annotations.write_labels(tmp_path / folder / "a.tif", slides[1]["slide_a"])
    with pytest.raises(WorkflowError, match=r"is a folder; name a file for the table, such as .*scores.csv"):
        workflow.evaluate_folders(tmp_path / "truth", tmp_path / "predicted", tmp_path)
    table = workflow.evaluate_folders(tmp_path / "truth", tmp_path / "predicted", tmp_path / "new" / "scores.csv")
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "new" / "scores.csv"), table, check_dtype=False)


def test_json_of_something_else_is_named(slides, outlines, tmp_path):
    for name, read in (
        ("selection.json", lambda: workflow.import_annotations(tmp_path, outlines, tmp_path / "out")),
        ("model.json", lambda: workflow.load_model(tmp_path)),
    ):
        (tmp_path / name).write_text("{}")
        with pytest.raises(WorkflowError, match=f"{name}: not what nucseg writes, it lacks"):
            read()


def test_a_damaged_image_without_outlines_is_told_before_a_training(training_set, slides, tmp_path, monkeypatch):
    shutil.copytree(slides[0], tmp_path / "s")
    (tmp_path / "s" / "half.png").write_bytes((slides[0] / "slide_a.png").read_bytes()[:4000])
    monkeypatch.setattr("nucseg.workflow.segmenter.train", lambda *a, **k: pytest.fail("trained first"))
    with pytest.raises(ValueError, match=r"half.png: damaged"):
        workflow.train_folder(training_set[0], tmp_path / "m", "hoverlite", PROFILE, unlabelled=tmp_path / "s")


@pytest.mark.parametrize("twice", ["truth", "predicted"])
def test_of_two_label_maps_of_one_name_none_is_taken_in_silence(slides, tmp_path, twice):
    for folder in ("truth", "predicted"):
        annotations.write_labels(tmp_path / folder / "a.png", slides[1]["slide_a"])
    annotations.write_labels(tmp_path / twice / "a.tif", np.zeros((160, 192), np.int32))
    with pytest.raises(WorkflowError, match=rf"{twice}/a.png and .*{twice}/a.tif are two .*; rename or remove one"):
        workflow.evaluate_folders(tmp_path / "truth", tmp_path / "predicted")


def test_label_maps_in_folders_are_evaluated_too(slides, tmp_path):
    for name in ("slide_a", "deep/slide_a"):
        for folder in ("truth", "predicted/labels"):
            annotations.write_labels(tmp_path / folder / f"{name}.tif", slides[1]["slide_a"])
    table = workflow.evaluate_folders(tmp_path / "truth", tmp_path / "predicted")
    assert list(table["image_id"]) == ["deep/slide_a", "slide_a", "mean"]
    assert (table["aji"] == 1).all()


def test_images_without_outlines_change_the_model_and_are_named_in_its_record(training_set, slides, tmp_path):
    for name, unlabelled in (("without", ""), ("with", slides[0]), ("again", slides[0])):
        workflow.train_folder(training_set[0], tmp_path / name, "hoverlite", PROFILE, unlabelled=unlabelled)
    weights = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in ("without", "with", "again")}
    assert weights["with"] == weights["again"] != weights["without"]
    record = json.loads((tmp_path / "with" / "model.json").read_text())
    assert [Path(name).name for name in record["unlabelled"]["images"]] == list(NAMES)
    assert json.loads((tmp_path / "without" / "model.json").read_text())["unlabelled"] is None
    assert workflow.load_model(tmp_path / "with").predict(np.zeros((64, 64, 3), np.uint8)).shape == (64, 64)


@pytest.mark.parametrize("stop_at", [2, 4, 5])  # in the first training, between the two, in the second
def test_a_stopped_training_goes_on_to_the_same_model(training_set, slides, tmp_path, monkeypatch, stop_at):
    monkeypatch.setattr(Checkpoint.__init__, "__defaults__", (0.0,))  # seconds between two writings
    schedule = replace(PROFILE.training_of("hoverlite"), iterations=4, log_every=1)
    profile = replace(PROFILE, training={**PROFILE.training, "hoverlite": schedule})
    run = partial(workflow.train_folder, training_set[0], segmenter="hoverlite", profile=profile, unlabelled=slides[0])
    run(tmp_path / "whole")
    rows, real = [], Checkpoint.__call__

    def stop(self, snapshot):
        rows.append(self.path)
        if len(rows) == stop_at:
            raise KeyboardInterrupt
        real(self, snapshot)

    monkeypatch.setattr(Checkpoint, "__call__", stop)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped")
    assert not (tmp_path / "stopped" / "model.safetensors").exists()
    run(tmp_path / "stopped")
    assert len(rows) == 7  # three rows of each training, one of them twice
    for name in ("model.safetensors", "model.json"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "stopped").iterdir()) == ["model.json", "model.safetensors"]


def test_images_without_labels_are_named_and_left_out(training_set, slides, tmp_path):
    shutil.copytree(training_set[0], tmp_path / "set")
    shutil.copy(slides[0] / "slide_a.png", tmp_path / "set" / "images" / "later.png")
    with pytest.warns(UserWarning, match="1 images have no label map and are left out: later"):
        workflow.train_folder(tmp_path / "set", tmp_path / "model", "hoverlite", PROFILE)
    record = json.loads((tmp_path / "model" / "model.json").read_text())
    assert record["data"]["images"] == 3


def test_without_a_profile_the_one_for_slides_is_taken_and_named(training_set, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(workflow, "train_folder", lambda *a: asked.append(a[3].name) or _Trained(1.0, [{"total": 1.0}]))
    for cuda, options, name in (
        (False, [], "slides-cpu"),
        (True, [], "slides"),
        (True, ["--device", "cpu"], "slides-cpu"),
        (True, ["--profile", "sample"], "sample"),
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        shown = CliRunner().invoke(app, ["train", str(training_set[0]), "--out", str(tmp_path), *options])
        assert shown.exit_code == 0, shown.output
        assert f"Profile {name}." in shown.output
        assert asked[-1] == name


@pytest.mark.parametrize(
    ("command", "stopped", "kept", "goes_on"),
    [
        (["select", "s", "--out", "out"], "select_patches", "", False),
        (["train", "s", "--out", "out"], "train_folder", "", False),
        (["train", "s", "--out", "out"], "train_folder", "out/.0123456789ab.labelled.state", True),
        (["predict", "m", "s", "--out", "out"], "predict_folder", "out/predictions.json", False),
        (["predict", "m", "s", "--out", "out"], "predict_folder", "out/images.csv", True),
    ],
)
def test_a_command_that_is_stopped_says_whether_it_goes_on(tmp_path, monkeypatch, command, stopped, kept, goes_on):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(workflow, stopped, stop)
    if kept:
        (tmp_path / "out").mkdir()
        (tmp_path / kept).write_text("")
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 130
    said = "goes on where it was" if goes_on else "begins anew"
    assert shown.stderr.strip().splitlines() == [f"nucseg: stopped; the same command {said}"]
    assert "Then:" not in shown.stdout


def test_the_profiles_for_slides_differ_in_size_and_not_in_what_is_changed():
    gpu, cpu = load_profile("slides"), load_profile("slides-cpu")
    assert gpu.augment == cpu.augment
    assert gpu.segmenter_encoder == cpu.segmenter_encoder
    assert gpu.training_of("hoverlite").crop == cpu.training_of("hoverlite").crop == 256
    assert gpu.training_of("hoverlite").iterations > cpu.training_of("hoverlite").iterations
    assert cpu.segmenter("hoverlite").frozen == 0


def test_other_settings_begin_anew(training_set, tmp_path, monkeypatch):
    monkeypatch.setattr(Checkpoint.__init__, "__defaults__", (0.0,))  # seconds between two writings
    real = Checkpoint.__call__

    def stop(self, snapshot):
        real(self, snapshot)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "__call__", stop)
        schedule = replace(PROFILE.training_of("hoverlite"), log_every=1)
        profile = replace(PROFILE, training={**PROFILE.training, "hoverlite": schedule})
        with pytest.raises(KeyboardInterrupt):
            workflow.train_folder(training_set[0], tmp_path / "a", "hoverlite", profile, seed=1)
    assert list((tmp_path / "a").glob(".*.state"))
    workflow.train_folder(training_set[0], tmp_path / "a", "hoverlite", profile, seed=2)
    workflow.train_folder(training_set[0], tmp_path / "b", "hoverlite", profile, seed=2)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]
    assert not list((tmp_path / "a").glob(".*"))


def test_another_image_of_the_same_name_and_size_begins_anew(training_set, slides, tmp_path, monkeypatch):
    monkeypatch.setattr(Checkpoint.__init__, "__defaults__", (0.0,))  # seconds between two writings
    shutil.copytree(slides[0], tmp_path / "s")
    schedule = replace(PROFILE.training_of("hoverlite"), log_every=1)
    profile = replace(PROFILE, training={**PROFILE.training, "hoverlite": schedule})
    run = partial(workflow.train_folder, training_set[0], segmenter="hoverlite", profile=profile)
    real = Checkpoint.__call__

    def stop(self, snapshot):
        real(self, snapshot)
        if ".unlabelled." in self.path.name:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "__call__", stop)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "a", unlabelled=tmp_path / "s")
    assert list((tmp_path / "a").glob(".*.unlabelled.state"))
    Image.fromarray(generate_tissue("glandular", (160, 192), seed=7)[0]).save(tmp_path / "s" / "slide_b.png")
    for name in "ab":
        run(tmp_path / name, unlabelled=tmp_path / "s")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]


def test_a_label_map_is_asked_for_once(training_set, tmp_path, monkeypatch):
    asked, labels = [], Sample.labels.fget
    monkeypatch.setattr(Sample, "labels", property(lambda self: asked.append(self.id) or labels(self)))
    workflow.train_folder(training_set[0], tmp_path, "hoverlite", PROFILE)
    assert len(asked) == len(set(asked)) == 3


def test_a_segmenter_that_cannot_be_taught_says_which_can(training_set, slides, tmp_path):
    with pytest.raises(WorkflowError, match="dist cannot learn from images without outlines, only hoverlite, hovernet"):
        workflow.train_folder(training_set[0], tmp_path, "dist", PROFILE, unlabelled=slides[0])
    assert not any(tmp_path.iterdir())


class Slide:
    """A slide of which only regions can be read: tissue on the left, glass on the right."""

    def __init__(self, height, width, tissue):
        self.shape, self.tissue, self.read = (height, width), tissue, 0
        self.source = SimpleNamespace(by_region=True)

    @property
    def image(self):
        raise AssertionError("a large image is not read as a whole")

    def region(self, row, col, height, width):
        self.read += height * width
        shown = np.full((height, width, 3), 245, np.uint8)
        shown[:, : max(self.tissue - col, 0)] = (200, 120, 180)
        return shown


def test_of_large_images_windows_are_read_by_their_area_and_glass_is_mostly_avoided():
    large, small = Slide(8000, 12000, tissue=6000), Slide(2000, 1000, tissue=1000)
    views = workflow.unlabelled_views([large, small], 8_000_000, seed=1, side=400)
    assert {view.shape for view in views} == {(400, 400, 3)}
    assert len(views) == 50
    assert small.read == 400 * 400
    assert sum((view < 245).any() for view in views) >= 49
    again = workflow.unlabelled_views([large, small], 8_000_000, seed=1, side=400)
    assert all(np.array_equal(a, b) for a, b in zip(views, again, strict=True))


def test_small_images_are_looked_at_whole(slides):
    samples = list(load_dataset(str(slides[0])).samples)
    assert [view.shape for view in workflow.unlabelled_views(samples, 1_000_000)] == [(160, 192, 3)] * 2


def test_the_same_seed_trains_the_same_model(training_set, tmp_path):
    for name in "ab":
        workflow.train_folder(training_set[0], tmp_path / name, "hoverlite", PROFILE, seed=3)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]


def test_unlabelled_images_cannot_be_trained_on(slides, tmp_path):
    with pytest.raises(WorkflowError, match="no image has a label map"):
        workflow.train_folder(slides[0], tmp_path, "hoverlite", PROFILE)


def test_evaluation_compares_by_name_and_ends_with_the_mean(slides, tmp_path):
    for folder, change in (("true", 0), ("predicted", 1)):
        (tmp_path / folder).mkdir()
        for name, labels in slides[1].items():
            annotations.write_labels(tmp_path / folder / f"{name}.tif", np.roll(labels, change, axis=1))
    table = workflow.evaluate_folders(tmp_path / "true", tmp_path / "predicted")
    assert list(table["image_id"]) == [*NAMES, "mean"]
    assert table["aji"].between(0.3, 0.99).all()
    assert table["aji"].iloc[2] == pytest.approx(table["aji"].iloc[:2].mean())
    (tmp_path / "predicted" / "slide_b.tif").unlink()
    with pytest.raises(WorkflowError, match="no prediction for slide_b"):
        workflow.evaluate_folders(tmp_path / "true", tmp_path / "predicted")


@pytest.mark.parametrize(
    ("image", "drawn"),
    [
        ("{name}.png", "{name}.geojson"),
        ("{name}.png", "{name}_labels.png"),
        ("Tissue Images/{name}.png", "Annotations/{name}.geojson"),
        ("images/{name}.png", "labels/{name}.tif"),
        ("test/deep/{name}.png", "test/deep/{name}_mask.tif"),
    ],
)
def test_the_truth_may_lie_as_one_trains_from_it(trained, slides, tmp_path, image, drawn):
    for name in NAMES:
        path, other = (tmp_path / "s" / place.format(name=name) for place in (image, drawn))
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(slides[0] / f"{name}.png", path)
        write = annotations.write_geojson if other.suffix == ".geojson" else annotations.write_labels
        write(other, slides[1][name])
    workflow.predict_folder(trained, tmp_path / "s", tmp_path / "out")
    table = workflow.evaluate_folders(tmp_path / "s", tmp_path / "out")
    ids = [sample.id for sample in open_images(tmp_path / "s").samples]
    assert list(table["image_id"]) == [*ids, "mean"]
    for name, image_id in zip(NAMES, ids, strict=True):
        annotations.write_labels(tmp_path / "out" / "labels" / f"{image_id}.tif", slides[1][name])
    assert (workflow.evaluate_folders(tmp_path / "s", tmp_path / "out")["aji"] == 1).all()


@pytest.mark.parametrize("name", ["{name}.png", "{name}_labels.png", "labels/{name}.tif"])
def test_bare_label_maps_are_a_truth_and_no_images(slides, tmp_path, name):
    for folder in ("truth", "predicted"):
        for each in NAMES:
            annotations.write_labels(tmp_path / folder / name.format(name=each), slides[1][each])
    assert (workflow.evaluate_folders(tmp_path / "truth", tmp_path / "predicted")["aji"] == 1).all()


def test_an_image_without_outlines_among_the_truth_is_told(slides, tmp_path):
    (tmp_path / "s").mkdir()
    for name in NAMES:
        shutil.copy(slides[0] / f"{name}.png", tmp_path / "s")
        annotations.write_labels(tmp_path / "out" / "labels" / f"{name}.tif", slides[1][name])
    annotations.write_labels(tmp_path / "s" / "slide_a_labels.png", slides[1]["slide_a"])
    with pytest.warns(UserWarning, match="no truth for 1 predictions, left out: slide_b"):
        table = workflow.evaluate_folders(tmp_path / "s", tmp_path / "out")
    assert list(table["image_id"]) == ["slide_a", "mean"]


def test_a_model_folder_with_an_unknown_setting_is_refused(training_set, tmp_path):
    workflow.train_folder(training_set[0], tmp_path, "hoverlite", PROFILE)
    record = tmp_path / "model.json"
    record.write_text(record.read_text().replace('"widths"', '"width"'))
    with pytest.raises(ValueError, match="unknown setting 'width'; did you mean 'widths'"):
        workflow.load_model(tmp_path)


def test_patches_are_never_larger_than_asked(slides, tmp_path):
    config = replace(PROFILE, selection=replace(PROFILE.selection, size=96, step=48))
    selection = workflow.select_patches(slides[0], tmp_path, 2, "random-crop", config, seed=5)
    assert {patch.size for patch in selection.patches} == {96}
