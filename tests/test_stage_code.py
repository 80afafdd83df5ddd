"""A stage's key names the modules whose code makes its result; what these import must be named too."""

import ast
from pathlib import Path

import pytest

import nucseg
from nucseg import stages, synthesis_quality

ROOT = Path(nucseg.__file__).parent
# What can change no number: messages, checks of settings, progress bars, types, and where things lie.
NEUTRAL = {
    *("nucseg", "nucseg.config", "nucseg.progress", "nucseg.messages", "nucseg.store", "nucseg.checkpoints"),
    *("nucseg.patches", "nucseg.annotations.errors"),
}
STAGES = {
    "selection": stages.SELECTION_CODE,
    "masks": stages.MASK_CODE,
    "synthesis": stages.SYNTHESIS_CODE,
    "model": stages.MODEL_CODE,
    "taught model": stages.TEACHER_CODE,
    "pseudo": stages.PSEUDO_CODE,
    "evaluation": stages.EVALUATION_CODE,
    "synthesis quality": synthesis_quality.CODE,
}
# Its module also draws and writes, and asks for its inputs, whose keys (with their code) are part of its own.
NEUTRAL_TO = {
    "synthesis quality": {
        *("nucseg.figures.synthesis", "nucseg.tables.formats", "nucseg.tables.publish"),
        *("nucseg.pipeline", "nucseg.stages", "nucseg.experiments", "nucseg.paper", "nucseg.paper.rows"),
        *("nucseg.encoders", "nucseg.gan"),
    }
}


def modules_of(name):
    """Return a module or, for a package, all modules in it."""
    path = ROOT.joinpath(*name.split(".")[1:])
    if path.is_dir():
        files = sorted(path.rglob("*.py"))
        return {
            ".".join(("nucseg", *f.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__") for f in files
        }
    return {name} if path.with_suffix(".py").is_file() else set()


def imported_by(name):
    """Return the modules of nucseg that a module imports, at its top or inside a function."""
    path = ROOT.joinpath(*name.split(".")[1:])
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []  # walked later: names for type checkers only
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {each for each in inside if modules_of(each)} or {node.module}
    return {each for each in found if each.split(".")[0] == "nucseg"}


@pytest.mark.parametrize("stage", STAGES)
def test_whatever_a_stages_code_imports_is_part_of_its_key(stage):
    named = set().union(*(modules_of(name) for name in STAGES[stage]))
    assert named, "the list names no module"
    missing = {}
    for module in sorted(named):
        beyond = imported_by(module) - named - NEUTRAL - NEUTRAL_TO.get(stage, set())
        if beyond:
            missing[module] = sorted(beyond)
    assert not missing, f"add these to the code of {stage!r}, or to NEUTRAL here: {missing}"


def test_the_search_sees_imports_of_packages_modules_and_names():
    assert {"nucseg.labels", "nucseg.models.base"} <= imported_by("nucseg.pseudo")
    assert "nucseg.kernels.batch_norm" in imported_by("nucseg.norm_act")
    assert "nucseg.models.base" in modules_of("nucseg.models")
