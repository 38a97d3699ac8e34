"""The examples in docstrings run, and every public function of this package has one."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import ligerfx

MODULES = [name for _, name, _ in pkgutil.iter_modules(ligerfx.__path__) if name not in ("__main__", "kernels")]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name, references):
    module = importlib.import_module(f"ligerfx.{name}")
    assert doctest.testmod(module, optionflags=doctest.ELLIPSIS).failed == 0


def test_public_functions_have_an_example():
    functions = {name for name in ligerfx.__all__ if inspect.isfunction(getattr(ligerfx, name))}
    assert functions >= {"optimize", "explain", "diff", "draw"}
    assert [name for name in sorted(functions - {"pattern"}) if ">>>" not in getattr(ligerfx, name).__doc__] == []
