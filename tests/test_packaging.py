import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
CONDA_NAMES = {"pytorch": "torch"}


def requirement(text):
    name, rest = re.fullmatch(r"([A-Za-z0-9_.-]+?)\s*([<>=!~].*)?", text).groups()
    return CONDA_NAMES.get(name, name), rest or ""


def test_the_conda_environment_agrees_with_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = dict(requirement(line) for line in project["dependencies"])
    lines = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    pip = next(line["pip"] for line in lines if isinstance(line, dict))
    named = dict(requirement(line) for line in lines if isinstance(line, str) and line != "pip")
    assert named.pop("python").startswith(project["requires-python"])
    assert "--editable=." in pip
    named |= dict(requirement(line) for line in pip if not line.startswith("-"))
    assert named == wanted


def test_every_profile_and_table_of_numbers_travels_with_the_package():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = settings["package-data"]["nucseg"]
    suffixes = {Path(pattern).suffix for pattern in patterns}
    data = {p.suffix for p in (ROOT / "nucseg").rglob("*") if p.is_file() and p.suffix in {".csv", ".yaml", ".md"}}
    assert data - suffixes <= {".md"}


def test_the_ci_runs_the_command_that_the_readme_names():
    assert "make test" in (ROOT / "README.md").read_text()
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith("make test")
