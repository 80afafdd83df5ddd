import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from nucseg import models
from nucseg.config import ConfigError
from nucseg.encoders import EncoderError
from nucseg.experiments import grid
from nucseg.paper import TABLES
from nucseg.pipeline import Pipeline
from nucseg.plans import experiments
from nucseg.profiles import FOLDER, Mix, absolute_arguments, load_profile, names
from nucseg.selection import STRATEGIES

ROOT = Path(__file__).parent.parent
PROFILES = names()


def test_the_profiles_load_and_name_themselves():
    assert {"sample", "h100", "paper", "slides", "slides-cpu"} <= set(PROFILES)
    for name in PROFILES:
        profile = load_profile(name)
        assert profile.name == name
        assert profile.description


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_lays_out_experiments_for_its_dataset(name):
    profile = load_profile(name)
    found = experiments((*TABLES, "S"), profile.dataset, profile.grid)
    assert found
    if {"ours", "*"} & set(profile.grid.rows.get("III", ["*"])):  # others ask another question
        assert profile.ours(profile.dataset) in found
        assert profile.ours(profile.dataset).rounds > 0


def test_the_page_of_profiles_names_each_of_them():
    page = (ROOT / "docs" / "profiles.md").read_text(encoding="utf-8")
    assert [name for name in PROFILES if f"`{name}`" not in page] == []


def test_profiles_set_every_segmenter_that_their_rows_ask_for():
    for name in PROFILES:
        profile = load_profile(name)
        for experiment in grid(profile.dataset, profile.grid, TABLES):
            assert experiment.segmenter in profile.training, (name, experiment.segmenter)


def test_the_silent_teacher_differs_from_the_other_in_its_weight_alone():
    speaking, silent = load_profile("sample-teacher"), load_profile("sample-teacher-silent")
    assert speaking.pseudo.method == silent.pseudo.method == "mean-teacher"
    teacher = dataclasses.replace(silent.pseudo.teacher, weight=speaking.pseudo.teacher.weight)
    assert speaking.pseudo.teacher.weight > 0 == silent.pseudo.teacher.weight
    other = {"name": speaking.name, "description": speaking.description, "grid": speaking.grid}
    other["pseudo"] = dataclasses.replace(silent.pseudo, teacher=teacher)
    assert dataclasses.replace(silent, **other) == speaking
    assert set(silent.grid.rows["III"]) < set(speaking.grid.rows["III"])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("sample", "extends: sample", "'sample' is a profile that comes with nucseg, in whose tables"),
        ("mine", "extends: sample\nname: h100", "'h100' is a profile that comes with nucseg"),
        ("mine", "extends: sample\nname: ../../out", "the name '../../out' is to be a folder's"),
        ("mine", "extends: sample\nmix: {}\ngrid: {}\nmix: {real: 1}", "'mix' stands twice, in lines 2 and 4"),
        ("mine", "extends: sample\nweights: {efficientnet-lite0: a.pth}", "did you mean 'efficientnet_lite0'"),
        (
            "mine",
            "extends: sample\nsegmenter_encoder: efficientnet_lit0",
            "unknown encoder 'efficientnet_lit0'",
        ),
        ("mine", "extends: sample\ngrid: {seeds: [-1]}", "expected seeds of at least 0"),
        ("mine", "extends: sample\nmask_count: 0", "mask_count must be at least 1"),
        ("mine", "extends: sample\ntraining: {dist: {lr: 1e-3}}", "write 0.001 or 1.0e-3"),
        ("mine", "extends: ./other.yaml", "one of your own has to be copied"),
    ],
)
def test_what_would_be_lost_or_spoil_other_results_is_refused(tmp_path, name, text, message):
    path = tmp_path / f"{name}.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_profile(path)


def test_the_example_in_the_page_of_profiles_loads(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "profiles.md").read_text(encoding="utf-8")
    text = page.partition("```yaml\n")[2].partition("```")[0]
    monkeypatch.setitem(models.REGISTRY, "mynet", models.REGISTRY["dist"])
    monkeypatch.setitem(STRATEGIES, "mine", STRATEGIES["k-center"])
    (tmp_path / "mine.yaml").write_text(text)
    profile = load_profile(tmp_path / "mine.yaml")
    assert {each.segmenter for each in grid("lab", profile.grid, ["III"])} >= {"mynet"}
    assert profile.training_of("mynet").iterations == 300


def test_fixed_pseudo_labels_are_no_round_of_full_supervision():
    recipes = load_profile("sample-recipes")
    assert (recipes.grid.full_rounds, recipes.pseudo.method) == (1, "mean-teacher")
    rounds = dataclasses.replace(recipes.pseudo, method="rounds")
    with pytest.raises(ValueError, match="full_rounds: where every pixel is labelled"):
        dataclasses.replace(recipes, pseudo=rounds)
    untaught = dataclasses.replace(recipes.grid, substitutes={})
    with pytest.raises(ValueError, match="no mean teacher can teach maskrcnn"):
        dataclasses.replace(recipes, grid=untaught)


def test_an_empty_mapping_empties_that_of_the_profile_that_is_extended(tmp_path):
    assert load_profile("sample").grid.substitutes
    path = tmp_path / "mine.yaml"
    path.write_text("extends: sample\ndescription: mine\ngrid: {substitutes: {}}\n")
    mine = load_profile(path)
    assert mine.grid.substitutes == {}
    assert mine.grid.k1 == load_profile("sample").grid.k1


def test_the_paper_profile_has_the_printed_sizes_and_schedules():
    paper = load_profile("paper")
    assert (paper.selection.size, paper.selection.step, paper.grid.k2, paper.mask_count) == (256, 15, 4, 50)
    assert {"kumar": 9, "tnbc": 6, "monuseg": 18}.items() <= paper.grid.k1.items()
    assert paper.encoder == "resnet50"
    schedule = paper.training_of("maskrcnn")
    assert (schedule.optimiser, schedule.lr, schedule.momentum, schedule.weight_decay) == ("sgd", 0.005, 0.9, 1e-4)
    assert (schedule.batch, schedule.crop) == (6, 256)
    assert paper.training_of("hovernet").lr == 1e-4
    gan = paper.synthesiser("csingan")
    assert (gan.beta, gan.gamma, gan.delta) == (1.0, 1.0, 1.0)
    assert paper.pseudo.crops == 600
    assert not paper.grid.substitutes


def test_csingan_without_its_critics_shares_every_other_setting():
    profile = load_profile("sample")
    full, single = profile.synthesiser("csingan"), profile.synthesiser("csingan-no-cwd")
    assert dataclasses.replace(single, gamma=full.gamma, delta=full.delta) == full


def write(tmp_path, **changes):
    values = yaml.safe_load((FOLDER / "sample.yaml").read_text())
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**values, **changes}))
    return path


def test_a_profile_of_ones_own_is_read_from_its_file(tmp_path):
    assert load_profile(write(tmp_path, mask_count=3)).mask_count == 3


def test_a_profile_in_the_home_folder_is_found_by_its_tilde(tmp_path, monkeypatch):
    path = write(tmp_path, mask_count=3)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_profile("~/mine.yaml").mask_count == 3
    assert absolute_arguments("~/mine.yaml", "tissue", "")[0] == str(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"selektion": {}}, "unknown setting 'selektion'; did you mean 'selection'"),
        ({"selection": {"stepp": 3}}, r"selection: unknown setting 'stepp'; did you mean 'step'"),
        ({"training": {"maskrcnn": {"lr": "fast"}}}, r"training\.maskrcnn\.lr: expected float"),
        ({"segmenters": {"maskrcn": {}}}, r"segmenters: unknown name 'maskrcn'; did you mean 'maskrcnn'"),
        ({"synthesisers": {"csingan": {"alfa": 1.0}}}, r"synthesisers\.csingan: unknown setting 'alfa'"),
        ({"mix": {"real": 1.0}}, "shares must be all 0 or all above 0"),
        ({"mask_count": 2.5}, "mask_count: expected int"),
    ],
)
def test_a_mistyped_setting_is_refused_with_its_place(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        load_profile(write(tmp_path, **changes))


def test_an_unknown_profile_is_refused_with_the_nearest_one():
    with pytest.raises(ConfigError, match="no profile 'smaple'; did you mean 'sample'"):
        load_profile("smaple")


def test_the_mix_gives_each_kind_its_share_whatever_its_size():
    weights = Mix(real=0.5, synthetic=0.5, pseudo=1.0).weights({"real": 2, "synthetic": 8})
    assert sum(weights[:2]) == pytest.approx(sum(weights[2:]))
    assert Mix().weights({"real": 2, "synthetic": 8}) is None


def test_a_profile_that_extends_another_differs_only_where_it_says():
    base, lighter = load_profile("h100"), load_profile("h100-hoverlite")
    grid = dataclasses.replace(lighter.grid, substitutes=base.grid.substitutes)
    assert dataclasses.replace(lighter, name=base.name, description=base.description, grid=grid) == base


def test_a_profile_cannot_extend_what_does_not_exist(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("extends: h10\n")
    with pytest.raises(ConfigError, match="extends an unknown profile 'h10'; did you mean 'h100'"):
        load_profile(path)


def test_the_file_of_an_encoders_weights_is_used(tmp_path):
    profile = dataclasses.replace(load_profile("sample"), weights={"efficientnet_lite0": str(tmp_path / "none.pth")})
    with pytest.raises(EncoderError, match=r"no weights file .*none\.pth"):
        Pipeline(profile, results=tmp_path).build(profile.ours("tissue"))


def test_a_misspelt_name_is_no_schedule_that_nobody_reads(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("extends: sample\ntraining: {hovrlite: {iterations: 7}}\n")
    with pytest.raises(ConfigError, match=r"unknown name 'hovrlite'.*hoverlite"):
        load_profile(path)


def test_files_of_weights_are_looked_for_beside_the_profile(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("extends: sample\nweights: {resnet50: r.pth, preact-resnet50: /else/p.pth}\n")
    assert load_profile(path).weights == {"resnet50": str(tmp_path / "r.pth"), "preact-resnet50": "/else/p.pth"}


def test_arguments_mean_the_same_in_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NUCSEG_DATA", "sets")
    (tmp_path / "img").mkdir()
    (tmp_path / "tissue").mkdir()  # a name wins over a folder
    assert absolute_arguments("my.yaml", "img", "") == (*(str(tmp_path / n) for n in ("my.yaml", "img", "sets")),)
    assert absolute_arguments("sample", "tissue", "d") == ("sample", "tissue", str(tmp_path / "d"))
    assert absolute_arguments("sample", "./tissue", "")[1] == str(tmp_path / "tissue")
    assert absolute_arguments("sample", "", "")[1] == ""
