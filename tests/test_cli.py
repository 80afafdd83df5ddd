import importlib
import pkgutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import nucseg as package
from nucseg import messages
from nucseg.annotations.sparse import SparseLabels
from nucseg.cli import _spread, app, main
from nucseg.commands.options import STRATEGY_HELP, chosen_tables
from nucseg.config import ConfigError
from nucseg.messages import one_line
from nucseg.models import REGISTRY
from nucseg.selection import STRATEGIES

COMMANDS = (
    "reproduce",
    "run",
    "status",
    "tables",
    "compare",
    "compare-choices",
    "compare-schedules",
    "compare-synthesis",
    "select",
    "import-annotations",
    "train",
    "predict",
    "evaluate",
    "fetch",
    "bundle",
    "results",
)


def test_every_command_of_the_design_is_there_and_explains_itself():
    runner = CliRunner()
    listed = runner.invoke(app, ["--help"]).output
    for name in COMMANDS:
        assert name in listed
        assert runner.invoke(app, [name, "--help"]).exit_code == 0


def test_help_names_every_strategy_and_every_segmenter():
    named = set(STRATEGY_HELP.rstrip(".").replace(" or ", ", ").split(", "))
    assert named == set(STRATEGIES), "STRATEGY_HELP in commands/options.py is written by hand: add the new name"
    shown = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "200"}).output
    missing = [name for name in REGISTRY if name not in shown]
    assert not missing, "the help of --segmenter in commands/slides.py is written by hand: add the new name"


def nucseg(*arguments, **environment):
    command = [sys.executable, "-m", "nucseg.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**__import__("os").environ, **environment})


def test_a_mistake_is_one_line_and_not_a_traceback(tmp_path):
    result = nucseg("reproduce", "--profile", "smaple")
    assert result.returncode == 1
    assert result.stderr.strip().endswith("(or give the path of a YAML file)")
    assert "did you mean 'sample'" in result.stderr
    assert "Traceback" not in result.stderr


def test_an_address_without_a_cluster_is_one_line_too():
    result = nucseg("run", "--address", "tcp://there:8786")
    assert result.returncode == 1
    assert result.stderr.strip().endswith("add --backend ray or --backend dask")
    assert "Traceback" not in result.stderr


def test_missing_data_are_reported_before_any_notebook_runs(tmp_path):
    result = nucseg("reproduce", "--dataset", "kumar", "--data-root", str(tmp_path))
    assert result.returncode == 1
    assert "kumar" in result.stderr
    assert str(tmp_path) in result.stderr
    assert "Traceback" not in result.stderr


def test_tables_are_named_by_roman_or_arabic_numbers():
    assert chosen_tables(["1", "iv", "IV"]) == ("I", "IV")
    assert chosen_tables(["1,3", "2 S"]) == ("I", "III", "II", "S")
    assert _spread(["run", "-t", "1", "iv", "--profile", "2"]) == ["run", "-t", "1", "-t", "iv", "--profile", "2"]
    assert _spread(["select", "1", "2", "--table", "S", "x"]) == ["select", "1", "2", "--table", "S", "x"]
    assert chosen_tables(None) == ("I", "II", "III", "IV", "V", "VI")
    with pytest.raises(ConfigError, match="no table '7'"):
        chosen_tables(["7"])


def test_values_that_our_own_code_refuses_are_one_line_and_warnings_name_no_code(tmp_path, monkeypatch, capsys):
    for arguments, message in (
        (["select", "slidez", "--out", str(tmp_path / "a")], "slidez: no such folder"),
        (["select", __file__, "--out", str(tmp_path / "a")], "is a file: name the folder that holds it"),
        (["train", str(tmp_path), "--out", str(tmp_path / "a"), "--segmenter", "distt"], "no image found"),
        (["tables", "--dataset", "kumr"], "no results of profile 'sample' on 'kumr'"),
    ):
        monkeypatch.setattr("sys.argv", ["nucseg", *arguments])
        with pytest.raises(SystemExit) as raised:
            main()
        assert str(raised.value.code).startswith("nucseg: ")
        assert message in str(raised.value.code)


def test_a_fault_in_other_peoples_code_keeps_its_traceback(monkeypatch):
    def broken():
        import numpy as np

        np.zeros(3).reshape(2)

    monkeypatch.setattr("nucseg.cli.app", broken)
    with pytest.raises(ValueError, match="cannot reshape"):
        main()


def test_a_fault_in_our_own_code_keeps_its_traceback(monkeypatch):
    three_ids_for_two_pixels = SparseLabels((2, 2), np.arange(2), np.arange(3))
    monkeypatch.setattr("nucseg.cli.app", three_ids_for_two_pixels.dense)
    with pytest.raises(ValueError, match=r"mismatch|broadcast"):
        main()


def test_warnings_of_ours_are_one_line():
    ours = one_line(warnings.formatwarning)
    assert ours("patch 2 is empty", UserWarning, str(Path(package.__file__).parent / "a.py"), 3) == (
        "nucseg: patch 2 is empty\n"
    )
    assert "other.py:3" in ours("deprecated", UserWarning, "/somewhere/other.py", 3)


def test_missing_test_images_are_told_before_hours_of_training(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    result = nucseg("reproduce", "--dataset", str(tmp_path))
    assert result.returncode == 1
    assert "train images without labels: a" in result.stderr
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        Image.new("RGB", (64, 64)).save(tmp_path / split / "a.png")
        Image.new("L", (64, 64)).save(tmp_path / split / "a_labels.PNG")
    (tmp_path / "test" / "a_labels.PNG").unlink()
    result = nucseg("reproduce", "--dataset", str(tmp_path))
    assert "test images without labels: test/a" in result.stderr
    assert "Traceback" not in result.stderr


def test_every_error_of_ours_is_one_line():
    found = [
        thing
        for module in pkgutil.walk_packages(package.__path__, "nucseg.")
        if not module.name.startswith(("nucseg.kernels.", "nucseg.__main__"))  # they need Triton; it runs the command
        for thing in vars(importlib.import_module(module.name)).values()
        if isinstance(thing, type) and issubclass(thing, Exception) and thing.__module__.startswith("nucseg.")
    ]
    errors = {thing for thing in found if not issubclass(thing, Warning)}
    assert len(errors) > 12
    for error in errors:
        assert issubclass(error, messages._expected()), error
