"""A bundle runs alone: with its own code, data and weights, and without leaving a trace beside it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image
from small import small_data, small_profile

from nucseg.bundle import wheels
from nucseg.bundle.make import make_bundle
from nucseg.bundle.parts import BundleError, pack_data, pack_weights
from nucseg.data import load_dataset
from nucseg.data.layouts import rows
from nucseg.encoders import Encoder, Pyramid, read_weights
from nucseg.models import build
from nucseg.results import ResultsError, read_results
from nucseg.runs.plan import Plan

ENCODER = "efficientnet_lite0"


def wheel_of(folder, name="carried", **more):
    """Write a wheel with a module, a script, a data file and a library for every platform."""
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr(f"{name}.py", "where = __file__\n")
        zipped.writestr(f"{name}-1.0.dist-info/METADATA", f"Name: {name}\nVersion: 1.0\n")
        zipped.writestr(f"{name}-1.0.data/data/share/jupyter/{name}.txt", "data")
        zipped.writestr(f"{name}-1.0.data/purelib/{name}_more/__init__.py", "")
        zipped.writestr(f"{name}-1.0.data/scripts/{name}", "#!python")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_data(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    path = small_profile(tmp_path_factory.mktemp("profile") / "tiny.yaml", "{III: [rndcrop-naive]}")
    path.write_text(path.read_text() + "weights: {resnet50: /somewhere/resnet50.pth}\n")
    return path


@pytest.fixture(scope="module")
def bundle(data, profile, tmp_path_factory):
    folder = tmp_path_factory.mktemp("b") / "bundle"
    wheel = wheel_of(tmp_path_factory.mktemp("wheel"))
    return make_bundle(folder, profile, str(data), wheels=[str(wheel)], fresh=True)


# -- alone -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def started(bundle, tmp_path_factory):
    """The bundle on another machine: an empty environment, an empty home, another working folder."""
    folder = tmp_path_factory.mktemp("there")
    there = folder / "b"
    shutil.copytree(bundle.folder, there)
    # Whatever runs says in its results which code it was.
    (there / "nucseg" / "__init__.py").write_text('__version__ = "of the bundle"\n')
    for name in ("home", "tmp", "cwd"):
        (folder / name).mkdir()
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    environment |= {"HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp")}
    command = ["bash", str(there / "start.sh"), "--device", "cpu"]
    done = subprocess.run(command, env=environment, cwd=folder / "cwd", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return there, done.stdout


def test_started_alone_it_gives_the_rows_of_a_direct_run_through_its_own_code(
    started, bundle, data, profile, tmp_path, monkeypatch
):
    there, said = started
    assert all_done(said), said
    monkeypatch.setenv("NUCSEG_WEIGHTS", str(bundle.folder / "weights"))
    monkeypatch.setenv("NUCSEG_HOME", str(tmp_path / "direct"))
    assert not Plan(profile, str(data), device="cpu").run()
    monkeypatch.setenv("NUCSEG_HOME", str(tmp_path / "home"))
    from nucseg.results.add import add

    [added] = add([there / "results.zip"])
    assert (added.profile, added.new, added.equal) == ("tiny", 1, 0)
    tables = [tmp_path / name / "tables" / "tiny" for name in ("home", "direct")]
    ours, direct = (read_results(folder / "results.csv") for folder in tables)
    pd.testing.assert_frame_equal(ours, direct, check_exact=True)
    assert "of the bundle" in (tables[0] / "runs.csv").read_text()
    assert "of the bundle" not in (tables[1] / "runs.csv").read_text()
    [again] = add([there / "results.zip"])
    assert (again.new, again.equal) == (0, 1)
    assert len(list((tmp_path / "home" / "runs" / "tiny" / "received").rglob("*.png"))) == 3


def test_nothing_is_written_outside_the_folder(started):
    there, _ = started
    for name in ("home", "tmp", "cwd"):
        assert not list((there.parent / name).iterdir())
    assert sorted(path.name for path in there.parent.iterdir()) == ["b", "cwd", "home", "tmp"]


def test_the_start_names_no_other_folder_and_unpacks_the_wheels_into_its_own(started):
    there, _ = started
    assert (there / "site" / "carried.py").is_file()
    assert (there / "site" / "carried_more" / "__init__.py").is_file()
    assert (there / "site" / "share" / "jupyter" / "carried.txt").is_file()
    assert not list((there / "site").glob("*.data"))


def test_notebooks_are_refused_with_a_reason_where_the_wheels_are_for_another_python(bundle, tmp_path):
    shutil.copytree(bundle.folder, tmp_path / "b")
    start = (tmp_path / "b" / "start.sh").read_text().replace("wheels_python=3.12", "wheels_python=3.9")
    (tmp_path / "b" / "start.sh").write_text(start)
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable}
    command = ["bash", str(tmp_path / "b" / "start.sh"), "notebooks"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "for Python 3.9" in done.stderr
    assert f"--python {sys.version_info.major}.{sys.version_info.minor}" in done.stderr


def test_notebooks_are_refused_with_the_package_that_they_lack_before_anything_runs(bundle, tmp_path):
    shutil.copytree(bundle.folder, tmp_path / "b")
    here = f"wheels_python={sys.version_info.major}.{sys.version_info.minor}"
    start = (tmp_path / "b" / "start.sh").read_text().replace("wheels_python=3.12", here)
    (tmp_path / "b" / "start.sh").write_text(start)
    (tmp_path / "b" / "papermill.py").write_text("import no_such_package\n")
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable}
    command = ["bash", str(tmp_path / "b" / "start.sh"), "notebooks"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "neither this Python nor wheels/ has: ModuleNotFoundError: No module named 'no_such_package'" in done.stderr


def all_done(said):
    """Whether `nucseg run` ended with everything done."""
    found = {state: int(count) for count, state in re.findall(r"(\d+) (done|running|failed|missing)", said)}
    return found.pop("done") == 1 and not any(found.values())


# -- the folder ------------------------------------------------------------------------------------------------


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_same_inputs_give_the_same_bytes_which_name_no_machine(bundle, data, profile, tmp_path):
    wheel = next((bundle.folder / "wheels").glob("*.whl"))
    again = make_bundle(tmp_path / "again", profile, str(data), wheels=[str(wheel)], fresh=True)
    one, two = contents(bundle.folder), contents(again.folder)
    assert {name: one[name] == two.get(name) for name in one} == dict.fromkeys(two, True)
    for name, content in one.items():
        for text in (str(Path.home()), str(data.parent), str(bundle.folder), "/somewhere/", sys.prefix, os.getcwd()):
            assert text == "/" or text.encode() not in content, f"{name} holds {text}"


def test_sizes_are_those_of_the_files_and_the_sums_are_right(bundle):
    files = contents(bundle.folder)
    assert sum(bundle.sizes.values()) == sum(map(len, files.values()))
    assert "all" in bundle.describe()
    done = subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=bundle.folder, capture_output=True)
    assert done.returncode == 0
    assert len(files["SHA256SUMS"].splitlines()) == len(files) - 1


def test_everybody_may_read_and_only_the_owner_write(bundle):
    for path in (bundle.folder, *bundle.folder.rglob("*")):
        expected = 0o755 if path.is_dir() or path.name == "start.sh" else 0o644
        assert path.stat().st_mode & 0o777 == expected, path


def test_notebooks_travel_without_their_outputs(bundle):
    paths = sorted((bundle.folder / "notebooks").glob("*.ipynb"))
    assert len(paths) == 5
    for path in paths:
        cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        assert cells
        assert not [cell for cell in cells if cell["outputs"] or cell["execution_count"]]


def test_a_bundle_that_is_too_large_names_its_parts_and_leaves_nothing(data, profile, tmp_path):
    with pytest.raises(BundleError, match=r"larger than 2 MB:\n(.*\n)*weights +\d+\.\d\d MB"):
        make_bundle(tmp_path / "b", profile, str(data), wheels=(), limit_mb=2)
    assert not list(tmp_path.iterdir())


def test_a_profile_below_the_home_folder_travels_too(data, profile, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(profile.parent))
    made = make_bundle(tmp_path / "b", f"~/{profile.name}", str(data), wheels=(), fresh=True)
    assert (made.folder / "profiles" / profile.name).is_file()
    assert f"profile=profiles/{profile.name}\n" in (made.folder / "start.sh").read_text()


def test_a_new_bundle_keeps_what_an_older_one_has_run_and_spares_other_folders(data, profile, tmp_path):
    folder = tmp_path / "b"
    make_bundle(folder, profile, str(data), wheels=(), fresh=True)
    for name in ("runs/tiny/x", "tables/tiny/results.csv", "nucseg/left_over.py", "site/y"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("kept")
    make_bundle(folder, profile, str(data), wheels=(), fresh=True)
    assert (folder / "runs" / "tiny" / "x").is_file()
    assert (folder / "tables" / "tiny" / "results.csv").is_file()
    assert not (folder / "nucseg" / "left_over.py").exists()
    assert not (folder / "site").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    with pytest.raises(BundleError, match="holds other things than a bundle"):
        make_bundle(tmp_path / "other", profile, str(data), wheels=())
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["thesis.tex"]


def test_results_so_far_travel_along_so_that_they_are_not_run_again(data, profile, started, tmp_path, monkeypatch):
    monkeypatch.setenv("NUCSEG_HOME", str(started[0]))  # it has notebooks and tables, like a checkout
    made = make_bundle(tmp_path / "b", profile, str(data), wheels=())
    with zipfile.ZipFile(made.folder / "so-far.zip") as zipped:
        assert zipped.namelist() == ["tiny/results.csv", "tiny/runs.csv"]
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable}
    status = ["bash", str(made.folder / "start.sh"), "status", "--profile", str(profile), "--dataset", str(data)]
    done = subprocess.run(status, env=environment, capture_output=True, text=True)
    assert "tiny: 1 new" in done.stdout, done.stderr
    assert all_done(done.stdout), done.stdout
    assert not (made.folder / "so-far.zip").exists()


def test_damaged_results_are_an_error_and_not_left_out(data, profile, tmp_path, monkeypatch):
    monkeypatch.setenv("NUCSEG_HOME", str(tmp_path))
    monkeypatch.setattr("nucseg.bundle.make.pack_notebooks", lambda folder: None)
    damaged = tmp_path / "tables" / "tiny" / "results.csv"
    damaged.parent.mkdir(parents=True)
    damaged.write_text("profile,dataset\ntiny,tiny\n")
    with pytest.raises(ResultsError, match=r"results\.csv"):
        make_bundle(tmp_path / "b", profile, str(data), wheels=())
    assert not (tmp_path / "b").exists()
    assert make_bundle(tmp_path / "b", profile, str(data), wheels=(), fresh=True).sizes["results"] == 0


# -- data ------------------------------------------------------------------------------------------------------


def test_official_tiffs_and_outlines_become_small_files_with_the_same_pixels(tmp_path):
    rng = np.random.default_rng(0)
    official = tmp_path / "official" / "kumar" / "MoNuSeg 2018 Training Data"
    for name in ("Tissue Images", "Annotations"):
        (official / name).mkdir(parents=True)
    vertex = '<Vertex X="{}" Y="{}" Z="0"/>'
    for i, row in enumerate(rows("kumar")):
        image = np.repeat(np.repeat(rng.integers(0, 256, (6, 7, 3), dtype=np.uint8), 8, 0), 8, 1)
        tifffile.imwrite(official / "Tissue Images" / f"{row.id}.tif", image)
        regions = "".join(
            f'<Region Id="{k}"><Vertices>{"".join(vertex.format(x, y) for x, y in corners)}</Vertices></Region>'
            for k, corners in enumerate([[(2, 2), (12 + i, 2), (9, 20)], [(30, 5), (50, 5), (50, 40), (30, 30)]], 1)
        )
        xml = f"<Annotations><Annotation><Regions>{regions}</Regions></Annotation></Annotations>"
        (official / "Annotations" / f"{row.id}.xml").write_text(xml)
    dataset = load_dataset("kumar", tmp_path / "official")
    assert pack_data(dataset, "kumar", tmp_path / "packed") == "kumar"
    packed = load_dataset("kumar", tmp_path / "packed")
    assert packed.fingerprint == dataset.fingerprint
    for split in ("train", "val", "test"):
        assert [sample.id for sample in packed.splits[split]] == [sample.id for sample in dataset.splits[split]]
    for one, two in zip(dataset.samples, packed.samples, strict=True):
        assert np.array_equal(one.image, two.image)
        assert np.array_equal(one.labels, two.labels)
        assert len(np.unique(two.labels)) == 3
    suffixes = {path.suffix for path in (tmp_path / "packed").rglob("*") if path.is_file()}
    assert suffixes == {".webp", ".png"}


def test_binary_masks_become_label_maps_and_compact_files_stay_as_they_are(tmp_path):
    rng = np.random.default_rng(0)
    mask = np.zeros((24, 24), np.uint8)
    mask[2:8, 2:8] = mask[12:20, 12:20] = 255
    for row in rows("tnbc"):
        for kind, array in (("Slide", rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)), ("GT", mask)):
            folder = tmp_path / "official" / f"{kind}_{row.patient}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(folder / f"{row.id}.png")
    dataset = load_dataset("tnbc", tmp_path / "official")
    pack_data(dataset, "tnbc", tmp_path / "packed")
    once = load_dataset("tnbc", tmp_path / "packed")
    assert once.fingerprint == dataset.fingerprint
    assert np.array_equal(once.samples[0].labels, dataset.samples[0].labels)
    pack_data(once, "tnbc", tmp_path / "twice")
    assert contents(tmp_path / "twice") == contents(tmp_path / "packed")


def test_changed_pixels_are_an_error(tmp_path, data, monkeypatch):
    dataset = load_dataset(data)

    def damaged(path, content):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content + b"\0")

    monkeypatch.setattr("nucseg.bundle.parts.write", damaged)
    with pytest.raises(BundleError, match="packed images or labels differ"):
        pack_data(dataset, str(data), tmp_path)


def test_real_images_are_packed_byte_for_byte(real_data, tmp_path):
    dataset = load_dataset("tnbc", real_data)
    pack_data(dataset, "tnbc", tmp_path)
    for sample in dataset.samples:
        for path in (sample.source.image_path, sample.source.label_path):
            assert (tmp_path / path.relative_to(real_data)).read_bytes() == path.read_bytes()


# -- weights and wheels ----------------------------------------------------------------------------------------


def test_weights_from_the_bundle_are_the_rounded_ones_and_exact_ones_are_exact(tmp_path, monkeypatch):
    original = Encoder(ENCODER).net.state_dict()
    rounded = pack_weights(ENCODER, tmp_path / "16").stat().st_size
    exact = pack_weights(ENCODER, tmp_path / "32", exact=True).stat().st_size
    assert rounded < 0.55 * exact
    monkeypatch.setenv("NUCSEG_WEIGHTS", str(tmp_path / "16"))
    for net in (Encoder(ENCODER).net, Pyramid(ENCODER).net):
        for key, value in net.state_dict().items():
            expected = original[key].half().float() if original[key].ndim > 1 else original[key]
            assert torch.equal(value, expected), key
    monkeypatch.setenv("NUCSEG_WEIGHTS", str(tmp_path / "32"))
    assert all(torch.equal(value, original[key]) for key, value in Encoder(ENCODER).net.state_dict().items())


def test_weights_of_a_segmenters_own_encoder_travel_too(data, profile, tmp_path):
    file = tmp_path / "preact.pth"
    original = build("hovernet", pretrained=False).state_dict()
    torch.save({"desc": {f"module.{name}": value for name, value in original.items()}}, file)  # as published
    text = re.sub("(?m)^weights: .*$", f"weights: {{preact-resnet50: {file}}}", profile.read_text())
    (tmp_path / "with.yaml").write_text(text)
    made = make_bundle(tmp_path / "b", tmp_path / "with.yaml", str(data), wheels=(), fresh=True)
    weights = made.folder / "weights" / "preact-resnet50.safetensors"
    model = build("hovernet", weights=weights)
    assert model.initialised_from == "preact-resnet50.safetensors"
    assert not any(name.startswith(("np_", "hv_", "conv_bot")) for name in read_weights(weights))
    for name in ("conv0./.weight", "conv0.bn.running_var", "d3.units.0.conv1/bn.weight"):
        value = original[name].half().float() if original[name].ndim > 1 else original[name]
        assert torch.equal(model.state_dict()[name], value), name


def test_pip_is_asked_for_the_other_machines_python_and_the_versions_that_are_installed(tmp_path, monkeypatch):
    asked = []

    def pip(command, **_):
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    file = wheel_of(tmp_path)
    found = wheels.fetch(["papermill", "no-such-package", "wcwidth==0.2.14", str(file)], tmp_path / "w", "3.13")
    assert [path.name for path in found] == [file.name]
    [command] = asked
    version = importlib.metadata.version("papermill")
    assert command[-3:] == [f"papermill=={version}", "no-such-package", "wcwidth==0.2.14"]
    assert command[command.index("--python-version") + 1] == "3.13"
    assert {"--no-deps", "--only-binary=:all:"} <= set(command)


def test_without_a_network_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(wheels.WheelError, match=r"(?s)could not fetch .*papermill.*--wheel PATH\.whl.*--wheel none"):
        wheels.fetch(["papermill"], tmp_path / "w")
    with pytest.raises(wheels.WheelError, match="no wheel"):
        wheels.fetch([str(tmp_path / "none.whl")], tmp_path / "w")


def test_unpacked_is_unpacked(tmp_path):
    (tmp_path / "wheels").mkdir()
    wheel_of(tmp_path / "wheels")
    wheels.unpack(tmp_path / "wheels", tmp_path / "site")
    (tmp_path / "site" / "carried.py").write_text("changed")
    wheels.unpack(tmp_path / "wheels", tmp_path / "site")
    assert (tmp_path / "site" / "carried.py").read_text() == "changed"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["site", "wheels"]


# What an installation of torch, timm, scikit-image, scikit-learn, pandas, matplotlib, typer and pytest has anyway;
# attrs, requests (with what it needs) and psutil not always: docs/clusters.md asks for them.
THERE = {
    *("attrs", "certifi", "charset-normalizer", "click", "idna", "jinja2", "markupsafe", "packaging", "psutil"),
    *("pygments", "python-dateutil", "pyyaml", "requests", "six", "tqdm", "typing-extensions", "urllib3"),
}
LEFT_OUT = {"aiohttp", "debugpy", "jedi", "widgetsnbextension", "jupyterlab-widgets"}  # named, but never imported


def test_the_wheels_are_all_that_notebooks_need_beyond_what_is_there():
    node = {"python_version": "3.12", "python_full_version": "3.12.3", "sys_platform": "linux", "extra": ""}
    todo = ["papermill", "ipykernel", "ipywidgets", "nbconvert", "bleach[css]", "pooch", "defusedxml", "jaxtyping"]
    needed = set()
    while todo:
        wanted = Requirement(todo.pop())
        name = canonicalize_name(wanted.name)
        if name in THERE | LEFT_OUT:
            continue
        needed.add(name)
        for line in importlib.metadata.requires(name) or ():
            other = Requirement(line)
            extras = ["", *wanted.extras]
            if canonicalize_name(other.name) not in needed and (
                other.marker is None or any(other.marker.evaluate({**node, "extra": extra}) for extra in extras)
            ):
                todo.append(line)
    assert needed == {name.partition("==")[0] for name in wheels.DEFAULT}
