import subprocess
import sys

import pytest
from typer.testing import CliRunner

from nucseg.cli import _tables, app
from nucseg.config import ConfigError

COMMANDS = (
    "reproduce",
    "run",
    "status",
    "tables",
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
    assert _tables(["1", "iv", "IV"]) == ("I", "IV")
    assert _tables(None) == ("I", "II", "III", "IV", "V", "VI")
    with pytest.raises(ConfigError, match="no table '7'"):
        _tables(["7"])
