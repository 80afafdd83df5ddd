import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from nucseg import stages
from nucseg.data import Dataset, MissingData, load_dataset
from nucseg.pipeline import Pipeline
from nucseg.profiles import load_profile
from nucseg.pseudo import PseudoLabels
from nucseg.results import RESULT_COLUMNS, RUN_COLUMNS, check_results
from nucseg.selection import STRATEGIES

PROFILE = load_profile(Path(__file__).parent / "tiny.yaml")


@pytest.fixture(scope="module")
def dataset():
    tissue = load_dataset("tissue")
    return Dataset("tiny", tissue.train[:3], tissue.val[:1], tissue.test[:2], synthetic=True, note=tissue.note)


@pytest.fixture(scope="module")
def pipeline(dataset, tmp_path_factory):
    return Pipeline(PROFILE, dataset, device="cpu", results=tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def ours(pipeline):
    return pipeline.experiment()


@pytest.fixture(scope="module")
def rows(pipeline, ours):
    return pipeline.run(ours)


def test_an_experiment_gives_one_line_per_test_image_and_reported_round(rows, dataset, ours):
    check_results(rows[list(RESULT_COLUMNS)])
    last = rows[rows["round"] == ours.rounds]
    assert sorted(last["image_id"]) == sorted(sample.id for sample in dataset.test)
    assert rows["best"].sum() == len(dataset.test)
    assert set(rows["supervision"]) == {"patches"}
    assert rows["label_share"].between(0, 1, inclusive="neither").all()


def test_a_nucleus_counts_as_annotated_once_however_many_patches_touch_it(pipeline, ours, rows, dataset, monkeypatch):
    def touched(patches):
        marked = {sample.id: np.zeros(sample.shape, bool) for sample in dataset.train}
        for patch in patches:
            marked[patch.image_id][patch.slices] = True
        return sum(len(set(s.labels[marked[s.id]].tolist()) - {0}) for s in dataset.train)

    selection = pipeline.selection(ours)
    assert set(rows["label_nuclei"]) == {touched(selection.patches)}
    first = selection.patches[0]
    beside = replace(first, col=first.col + 7 if first.col < 8 else first.col - 7)
    monkeypatch.setattr(pipeline, "selection", lambda _: replace(selection, patches=(first, beside)))
    assert set(pipeline.run(ours)["label_nuclei"]) == {touched([first, beside])}


def test_a_strategy_of_ones_own_sees_the_profiles_features_whatever_its_name(pipeline, ours, dataset, monkeypatch):
    monkeypatch.setitem(STRATEGIES, "random-of-clusters", STRATEGIES["k-center"])
    other = Pipeline(replace(PROFILE, encoder="efficientnet_lite2"), dataset, device="cpu", results=pipeline.store.root)
    mine = replace(ours, selection="random-of-clusters")
    assert pipeline.selected(mine).key != other.selected(mine).key
    assert other.selection(mine).switches["encoder"] == "efficientnet_lite2"
    random = replace(ours, selection="random-crop")
    assert pipeline.selected(random).key == other.selected(random).key


def test_every_reported_run_is_described(pipeline, ours, rows):
    runs = pipeline.runs(ours)
    assert list(runs.columns) == list(RUN_COLUMNS)
    assert set(runs["run_id"]) == set(rows["run_id"])
    assert (runs["seconds"] > 0).all()


def test_a_second_run_repeats_nothing(pipeline, ours, rows, dataset, monkeypatch):
    def no_training(*_, **__):
        raise AssertionError("trained again")

    for name in ("train", "pseudo_pairs", "synthesize_with_report", "select", "extract"):
        monkeypatch.setattr(f"nucseg.stages.{name}", no_training)
    again = Pipeline(PROFILE, dataset, device="cpu", results=pipeline.store.root)
    assert again.run(ours).equals(rows)


def test_the_same_experiment_elsewhere_gives_the_same_numbers(dataset, ours, rows, tmp_path):
    assert Pipeline(PROFILE, dataset, device="cpu", results=tmp_path).run(ours).equals(rows)


def test_arms_that_differ_only_in_synthesis_share_their_selection(pipeline, ours):
    naive = replace(ours, augmentation="naive", rounds=0)
    assert pipeline.selected(naive).key == pipeline.selected(ours).key
    assert pipeline.trained(naive).key != pipeline.trained(ours).key


def test_a_changed_schedule_trains_a_new_model(pipeline, ours, dataset):
    schedule = replace(PROFILE.training["hoverlite"], lr=0.5)
    other = Pipeline(
        replace(PROFILE, training={"hoverlite": schedule}), dataset, device="cpu", results=pipeline.store.root
    )
    assert other.masked(ours).key == pipeline.masked(ours).key
    assert other.trained(ours).key != pipeline.trained(ours).key


def test_only_the_chosen_patches_are_labelled(pipeline, ours, dataset):
    selection = pipeline.selection(ours)
    pairs = pipeline.annotated(ours)
    assert len(pairs) == len(selection.patches) == ours.k1
    for (image, labels), patch in zip(pairs, selection.patches, strict=True):
        sample = dataset.sample(patch.image_id)
        assert (image == patch.crop(sample.image)).all()
        assert (labels == patch.crop(sample.labels)).all()
    kinds = pipeline._pairs(ours, after=1)
    assert len(kinds["real"]) == ours.k1
    assert len(kinds["synthetic"]) == ours.k1 * PROFILE.mask_count
    assert len(kinds["pseudo"]) == PROFILE.pseudo.crops


def test_a_patch_without_nuclei_is_trained_on_but_nothing_is_painted_from_it(dataset, ours, tmp_path, monkeypatch):
    run = Pipeline(PROFILE, dataset, device="cpu", results=tmp_path)
    (image, labels), *others = run.annotated(ours)
    monkeypatch.setattr(run, "annotated", lambda _: [(image, np.zeros_like(labels)), *others])
    assert len(run.sources(ours)) == len(run.masks(ours)) == ours.k1 - 1
    assert run.masked(ours).meta["patches_without_nuclei"] == 1
    kinds = run._pairs(ours, after=0)
    assert len(kinds["real"]) == ours.k1
    assert len(kinds["synthetic"]) == (ours.k1 - 1) * PROFILE.mask_count
    monkeypatch.setattr(run, "annotated", lambda _: [(image, np.zeros_like(labels))])
    with pytest.raises(ValueError, match="no chosen patch holds a nucleus"):
        run.sources(ours)


def test_pseudo_labels_are_cut_from_training_images_alone(pipeline, ours, dataset, monkeypatch):
    seen = []
    real = pipeline.model

    def watched(experiment, after=0):
        model = real(experiment, after)
        predict = model.predict_instances
        model.predict_instances = lambda image: (seen.append(image.tobytes()), predict(image))[1]
        return model

    fresh = Pipeline(replace(PROFILE, pseudo=replace(PROFILE.pseudo, crops=5)), dataset, "", "cpu", pipeline.store.root)
    monkeypatch.setattr(fresh, "model", watched)
    assert len(fresh.pseudo(ours, 1)) == 5
    assert set(seen) == {sample.image.tobytes() for sample in dataset.train}


def with_pseudo(pipeline, dataset, **changes):
    profile = replace(PROFILE, pseudo=replace(PROFILE.pseudo, **changes))
    return Pipeline(profile, dataset, device="cpu", results=pipeline.store.root)


@pytest.mark.usefixtures("rows")
def test_a_mean_teacher_goes_on_from_the_round_before_without_pseudo_labels(pipeline, ours, dataset, monkeypatch):
    def no_labels(*_, **__):
        raise AssertionError("labelled crops")

    taught = with_pseudo(pipeline, dataset, method="mean-teacher")
    monkeypatch.setattr("nucseg.stages.pseudo_pairs", no_labels)
    frame = taught.run(ours)
    assert set(frame["round"]) <= {0, 1}
    assert taught.trained(ours).key == pipeline.trained(ours).key  # the round before is shared
    assert taught.trained(ours, 1).key != pipeline.trained(ours, 1).key
    assert "unlabelled_np_ce" in taught.curve(ours, 1)
    assert list(taught.runs(ours).columns) == list(RUN_COLUMNS)
    before, after = (taught.model(ours, r).encoder.net.conv_stem.weight for r in (0, 1))
    assert 0 < (after - before).abs().max() < 0.01  # three steps of a slow average away


def test_switches_of_the_pseudo_labels_change_no_key_but_their_own(pipeline, ours, dataset):
    other = with_pseudo(pipeline, dataset, teacher=replace(PROFILE.pseudo.teacher, decay=0.5))
    assert other.pseudo_labelled(ours, 1).key == pipeline.pseudo_labelled(ours, 1).key
    ignoring = with_pseudo(pipeline, dataset, unsure="ignore", confidence=0.99)
    assert ignoring.pseudo_labelled(ours, 1).key != pipeline.pseudo_labelled(ours, 1).key
    assert min(labels.min() for _, labels in ignoring.pseudo(ours, 1)) == -1
    assert min(labels.min() for _, labels in pipeline.pseudo(ours, 1)) == 0
    assert ignoring.curve(ours, 1)["total"].notna().all()


def test_a_segmenter_that_no_teacher_can_teach_leaves_out_what_is_unsure(pipeline, ours, dataset):
    taught = with_pseudo(pipeline, dataset, method="mean-teacher")
    assert taught.pseudo_config(ours).method == "mean-teacher"
    fallback = taught.pseudo_config(replace(ours, segmenter="maskrcnn"))
    assert (fallback.method, fallback.unsure) == ("rounds", "ignore")
    assert fallback.confidence == taught.profile.pseudo.teacher.sure


def test_a_network_that_starts_from_random_weights_says_so_in_every_row(pipeline, ours, rows, monkeypatch):
    assert set(rows["encoder"]) == {"efficientnet_lite0"}
    assert json.loads(pipeline.runs(ours)["config"][0])["initialised_from"] == "efficientnet_lite0 (ImageNet)"
    random = replace(pipeline.trained(ours), meta={"initialised_from": "random weights"})
    monkeypatch.setattr(pipeline, "trained", lambda *_: random)
    name = pipeline.encoder_name(replace(ours, segmenter="hovernet"))
    assert name == "preact-resnet50 (random weights)"


def test_hovernet_gets_the_weights_of_its_own_encoder(pipeline, ours, dataset, monkeypatch):
    files = {"efficientnet_lite0": "lite0.pth", "preact-resnet50": "preact.pth"}
    run = Pipeline(replace(PROFILE, weights=files), dataset, device="cpu", results=pipeline.store.root)
    given = []
    monkeypatch.setattr("nucseg.stages.models.build", lambda name, encoder, config, weights, _: given.append(weights))
    for segmenter in ("hovernet", "hoverlite", "maskrcnn"):
        run.build(replace(ours, segmenter=segmenter))
    assert given == ["preact.pth", "lite0.pth", "lite0.pth"]


def test_full_supervision_sees_every_label_and_needs_no_selection(pipeline, dataset, ours):
    full = replace(ours, selection="all", k1=0, k2=0, augmentation="naive", rounds=0)
    rows = pipeline.run(full)
    assert set(rows["label_share"]) == {1.0}
    assert set(rows["label_nuclei"]) == {sum(sample.labels.max() for sample in dataset.train)}
    assert len(pipeline._pairs(full, after=0)["real"]) == len(dataset.train)


def test_a_trained_model_is_read_back_as_it_was(pipeline, ours, dataset):
    model = pipeline.model(ours, after=1)
    sample = dataset.test[0]
    assert np.array_equal(model.predict(sample.image), pipeline.predictions(ours, after=1)[sample.id])


def test_figures_say_that_a_tissue_is_synthetic(pipeline):
    assert "synthetic" in pipeline.signature()


def test_a_patch_with_the_rim_of_a_nucleus_alone_is_not_laid_out_either(dataset, ours, tmp_path, monkeypatch):
    pipeline = Pipeline(PROFILE, dataset, device="cpu", results=tmp_path)
    (image, labels), *rest = pipeline.annotated(ours)
    sliver = np.zeros_like(labels)
    sliver[:2, :4] = 7
    monkeypatch.setattr(pipeline, "annotated", lambda _: [(image, sliver), *rest])
    assert len(pipeline.sources(ours)) == len(rest)
    assert len(pipeline.masks(ours)) == len(rest)


def test_pseudo_labelled_crops_may_differ_in_size(pipeline, ours, dataset, monkeypatch):
    places, heights = [(1, 5, 7), (0, 0, 3)], (32, 48)
    crops = [dataset.train[i].image[r : r + h, c : c + 40] for (i, r, c), h in zip(places, heights, strict=True)]
    pairs = [(crop, np.full(crop.shape[:2], crop.shape[0], np.int32)) for crop in crops]
    monkeypatch.setattr(stages, "pseudo_pairs", lambda *_: PseudoLabels(pairs, places, 2, {}))
    other = with_pseudo(pipeline, dataset, crops=3)
    found = other.pseudo(ours, 1)
    assert [labels.shape for _, labels in found] == [(32, 40), (48, 40)]
    assert all((a == b).all() for pair, made in zip(pairs, found, strict=True) for a, b in zip(pair, made, strict=True))


def test_a_selection_names_the_encoder_that_it_looked_through(pipeline, ours):
    assert pipeline.selection(ours).switches["encoder"] == PROFILE.encoder


def test_images_may_have_any_name(dataset, ours, tmp_path):
    named = [replace(sample, id=name) for sample, name in zip(dataset.test, ("NA", "file"), strict=True)]
    pipeline = Pipeline(PROFILE, replace(dataset, test=named), device="cpu", results=tmp_path)
    simple = replace(ours, rounds=0, augmentation="naive", selection="random-crop")
    assert list(pipeline.run(simple)["image_id"]) == ["NA", "file"]
    assert set(pipeline.predictions(simple)) == {"NA", "file"}


def test_without_test_images_nothing_is_made(dataset, ours, tmp_path):
    pipeline = Pipeline(PROFILE, replace(dataset, test=()), device="cpu", results=tmp_path)
    with pytest.raises(MissingData, match="tiny: no test images"):
        pipeline.run(ours)
    assert not list(tmp_path.iterdir())


def test_a_model_that_starts_from_found_weights_is_another_one(pipeline, ours, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(pipeline.store, "get", lambda stage, what, *_: made.append(what))
    hovernet = replace(ours, segmenter="hovernet", selection="all", augmentation="naive", rounds=0)
    pipeline.trained(hovernet)
    (tmp_path / "preact-resnet50.safetensors").write_bytes(b"weights")
    monkeypatch.setenv("NUCSEG_WEIGHTS", str(tmp_path))
    pipeline.trained(hovernet)
    assert [what.get("weights") for what in made] == [None, hashlib.sha256(b"weights").hexdigest()[:12]]


def test_the_best_weights_are_kept_beside_the_last_ones(dataset, ours, tmp_path, monkeypatch):
    schedule = replace(PROFILE.training_of(ours.segmenter), iterations=4, validate_every=1, log_every=1)
    profile = replace(PROFILE, training={**PROFILE.training, ours.segmenter: schedule})
    pipeline = Pipeline(profile, dataset, device="cpu", results=tmp_path)
    values = iter([0.1, 0.4, 0.2, 0.3])
    monkeypatch.setattr(pipeline, "_validate", lambda model: next(values))
    made = pipeline.trained(replace(ours, rounds=0, augmentation="naive", selection="random-crop"))
    assert (made.meta["best_iteration"], made.meta["best_validation_aji"], made.meta["validation_aji"]) == (2, 0.4, 0.3)
    last, best = (load_file(made.path / f"{name}.safetensors") for name in ("model", "best"))
    assert last.keys() == best.keys()
    assert any((last[name] != best[name]).any() for name in last)
