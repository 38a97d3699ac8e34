"""The table of rules by which canonical values are made: what an operation computes, by its name.

A rule gets the canonicalizer, the node and the arguments of its call, and returns the value, or None where it does not
know such a call. `rules_arithmetic` and `rules_layout` fill the table.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import sympy
from torch.fx import Node

from .algebra import decimal, with_sigmoids

if TYPE_CHECKING:
    from .canonical import Canonicalizer

RULES: dict[str, Callable[..., sympy.Expr | None]] = {}


def rule(*names: str) -> Callable:
    def register(function: Callable) -> Callable:
        for name in names:
            RULES[name] = function
        return function

    return register


def pointwise(*names: str) -> Callable:
    """Registers arithmetic on operand values. A call with keyword arguments that the function does not have, or with
    other operands, is left opaque."""

    def register(function: Callable) -> Callable:
        takes = inspect.signature(function).parameters if inspect.isfunction(function) else ()

        def compute(c: Canonicalizer, node: Node, *args: Any, **kwargs: Any) -> sympy.Expr | None:
            kwargs = {name: value for name, value in kwargs.items() if value not in (None, False)}
            if not set(kwargs) <= set(takes):
                return None
            operands = [c.operand(node, a) for a in args]
            options = {name: c.operand(node, value) for name, value in kwargs.items()}
            val = node.meta["val"]
            if None in operands or None in options.values() or not (val.is_floating_point() or val.is_complex()):
                return None
            return with_sigmoids(decimal(function(*operands, **options)))

        for name in names:
            RULES[name] = compute
        return function

    return register
