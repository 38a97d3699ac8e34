"""Guards: whether a capture serves a call that has the same key."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import nn
from torch.utils._sympy.printers import PythonPrinter

from .capture import Capture, Read, StandsFor
from .errors import CaptureError
from .names import Name, hold
from .symbols import expression, first_expression
from .traced_numbers import TracedFloat, TracedInt, plain


def size_conditions(capture: Capture, dissolved_some: bool) -> list[str]:
    """Conditions on the leaves `x` of a call, as Python code.

    Checked are the sizes of tensors that the graph itself works on, and numbers that the model computed with. Where
    calls were dissolved, a size of 1 stays 1: torch broadcasts it, and so a size of what lies between the modules, on
    which the graph of the next one rests, may be 1 as well. (By itself, that one compares the sizes that it is given.)

    Raises:
        CaptureError: the capture depends on a size that does not follow from those of its inputs.
    """
    conditions: list[str] = []
    sizes: dict[sympy.Expr, str] = {}
    before: dict[sympy.Expr, str] = {}  # the same, by what sizes were called until a guard named their value
    first: dict[int, int] = {}
    for index, value in enumerate(capture.leaf_values):
        if isinstance(value, (TracedInt, TracedFloat)):
            if value.used:
                conditions.append(f"x[{index}] == {plain(value)!r}")
        elif isinstance(value, torch.Tensor):
            if id(value) in first:
                conditions.append(f"x[{index}] is x[{first[id(value)]}]")
                continue
            first[id(value)] = index
            if index in capture.passed_on:
                continue  # whoever gets it looks at its sizes; a guard may still refer to them
            for dim, size in enumerate(value.shape):
                expr, here = expression(size), f"x[{index}].shape[{dim}]"
                before.setdefault(first_expression(size), here)
                if expr.is_Integer:
                    conditions.append(f"{here} == {int(expr)}")
                elif expr in sizes:
                    conditions.append(f"{here} == {sizes[expr]}")
                else:
                    sizes[expr] = here
                    if dissolved_some and size.node.hint == 1:
                        conditions.append(f"{here} == 1")
    for index in capture.passed_on:
        for dim, size in enumerate(getattr(capture.leaf_values[index], "shape", ())):
            sizes.setdefault(expression(size), f"x[{index}].shape[{dim}]")
            before.setdefault(first_expression(size), f"x[{index}].shape[{dim}]")
    sizes = before | sizes
    for expr in dict.fromkeys(capture.guards):
        if not expr.free_symbols <= sizes.keys():
            raise CaptureError(f"depends on {expr}, which does not follow from the sizes of its inputs")
        text = PythonPrinter().doprint(expr)
        arguments = ", ".join(str(s) for s in expr.free_symbols)
        conditions.append(f"(lambda {arguments}: {text})({', '.join(sizes[s] for s in expr.free_symbols)})")
    return conditions


def guard_of(
    conditions: list[str], checks: Sequence[StandsFor | Read], globals_read: Sequence[Name]
) -> Callable[[nn.Module, list], bool]:
    """A function of (module, leaves) that says whether a capture serves a call with the same key, by its
    `size_conditions`, its `module_checks`, and the global names that the Python code of the model read."""
    names: dict[str, Any] = {}
    known: dict[int, str] = {}

    def constant(value: Any) -> str:
        if id(value) not in known:
            known[id(value)] = name = f"c{len(known)}"
            names[name] = value
        return known[id(value)]

    modules = [check.code(_module(check.path), constant) for check in checks]
    if globals_read:
        traced = " and ".join(name.code(constant) for name in globals_read)
        others = f"{constant(hold)}({constant(tuple(globals_read))})"
        modules.append(f"({traced} if {constant(torch.compiler.is_compiling)}() else {others})")
    code = f"""
def guard(m, x):
    try:
        return {" and ".join(conditions + modules) or True}
    except (AttributeError, KeyError):  # a module inside is gone
        return False
"""
    exec(compile(code, "<ligerfx guard>", "exec"), names)
    return names["guard"]


def _module(path: str) -> str:
    return "m" + "".join(f"._modules[{name!r}]" for name in path.split(".") if name)
