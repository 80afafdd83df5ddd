from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from nucseg import annotations, workflow
from nucseg.data.tissue import generate_tissue
from nucseg.profiles import load_profile
from nucseg.workflow import WorkflowError

PROFILE = load_profile(Path(__file__).parent / "tiny.yaml")
NAMES = ("slide_a", "slide_b")


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
    with pytest.raises(WorkflowError, match=r"no outlines of image 'slide_.' .* expected slide_.\.geojson"):
        workflow.import_annotations(picks[0], tmp_path, tmp_path / "out")


def test_outlines_of_other_images_are_an_error_and_not_an_empty_training_set(picks, slides, tmp_path):
    for name in NAMES:
        annotations.write_geojson(tmp_path / f"{name}.geojson", np.zeros((160, 192), np.int32))
    with pytest.raises(WorkflowError, match="no nucleus is outlined inside any chosen patch"):
        workflow.import_annotations(picks[0], tmp_path, tmp_path / "out")


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


def test_a_model_folder_with_an_unknown_setting_is_refused(training_set, tmp_path):
    workflow.train_folder(training_set[0], tmp_path, "hoverlite", PROFILE)
    record = tmp_path / "model.json"
    record.write_text(record.read_text().replace('"widths"', '"width"'))
    with pytest.raises(ValueError, match="unknown setting 'width'; did you mean 'widths'"):
        workflow.load_model(tmp_path)


def test_patches_are_never_larger_than_asked(slides, tmp_path):
    config = replace(PROFILE, selection=replace(PROFILE.selection, size=96, step=32))
    selection = workflow.select_patches(slides[0], tmp_path, 2, "random-crop", config, seed=5)
    assert {patch.size for patch in selection.patches} == {96}
