"""The examples in docstrings run, and every public function has one, with the errors that it raises."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import ligerfx
from ligerfx import kernels, patterns

MODULES = [
    name
    for package in (ligerfx, kernels, patterns)
    for _, name, is_package in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
    if not is_package and not name.endswith("__main__")
]
FUNCTIONS = [
    getattr(package, name)
    for package, names in ((ligerfx, ligerfx.__all__), (kernels, kernels.__all__), (patterns, ["default_patterns"]))
    for name in names
    if inspect.isfunction(getattr(package, name))
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name, references):
    module = importlib.import_module(name)
    assert doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE).failed == 0


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f"{f.__module__}.{f.__name__}")
def test_public_functions_say_all(function):
    """Arguments by name, with what comes out and which errors, and an example."""
    text = inspect.getdoc(function)
    assert ">>>" in text
    if function.__name__.endswith("_reference"):
        assert f"are those of `{function.__name__.removesuffix('_reference')}`" in text
        return
    for name in inspect.signature(function).parameters:
        assert f"{name}:" in text or f"{name}," in text, name
    assert "Returns:" in text
    assert "Raises:" in text or function is patterns.default_patterns


def test_public_names_are_all_there():
    assert {"optimize", "explain", "diff", "draw", "pattern", "register"} <= {f.__name__ for f in FUNCTIONS}
    assert {"rope", "glu_linear", "rows_that_count"} <= {f.__name__ for f in FUNCTIONS}
    for name in ligerfx.__all__:
        assert inspect.getdoc(getattr(ligerfx, name)), name
