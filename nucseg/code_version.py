"""What tells two versions of some code apart: results and generated images are named by the code that made them."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import sys
from pathlib import Path

_SHOW_EMPTY = {"show_empty": True} if sys.version_info >= (3, 13) else {}  # before, empty lists were always shown


@functools.cache
def code_version(*modules: str) -> str:
    """Return a hash of the modules' code, the same when only comments, docstrings or layout change.

    A package stands for all modules inside it. Nothing is imported. Every version of Python gives the same.
    """
    digest = hashlib.sha256()
    for name in modules:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"no module {name!r} to take the code version of")
        origin = Path(spec.origin)
        files = sorted(origin.parent.rglob("*.py")) if origin.name == "__init__.py" else [origin]
        for file in files:
            tree = ast.parse(file.read_text(encoding="utf-8"))
            for node in ast.walk(tree):
                if not getattr(node, "type_params", True):  # since 3.12 everything could have some
                    del node.type_params
                body = getattr(node, "body", None)
                if isinstance(body, list) and body and _is_docstring(body[0]):
                    del body[0]
            digest.update(ast.dump(tree, **_SHOW_EMPTY).encode())
    return digest.hexdigest()[:12]


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
