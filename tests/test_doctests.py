"""The examples in docstrings say what comes out."""

import doctest
import importlib

import pytest

MODULES = ("metrics", "stats", "labels", "outcomes", "patches", "selection.selection")


@pytest.mark.parametrize("name", MODULES)
def test_every_example_gives_what_it_says(name):
    failed, tried = doctest.testmod(importlib.import_module(f"nucseg.{name}"))
    assert tried > 0
    assert failed == 0
