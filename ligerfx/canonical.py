"""Canonical values: what a node computes, however it is spelled.

Pointwise arithmetic becomes a sympy expression, so operand order, methods against operators, `rsqrt` against
`1 / sqrt`, `silu` against `x * sigmoid(x)` are all one. Everything else (reductions, slices, `cat`, linear
layers) becomes a term, a sympy symbol that stands for an operation on canonical values; equal terms are one
symbol. Dimensions count from the end, and views are described by what they do, not by how they were asked for.

Rounding is part of the value: where bf16 arithmetic is followed by fp32 arithmetic, or a value is cast down,
there is a `round` term. A cast that changes no value (fp32 to fp32, or an input widened) leaves none.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import sympy
import torch
from torch.fx import Node

from . import rules_arithmetic, rules_layout  # noqa: F401  they fill RULES
from .algebra import LARGEST, expanded_size, normal, number
from .capture import works_in_place
from .operations import IMPURE, op_name
from .rules import RULES
from .symbols import expression
from .terms import Terms

_PRECISION = {torch.float16: 16, torch.bfloat16: 16, torch.float32: 32, torch.float64: 64}


class Canonicalizer:
    """Canonical values of the nodes of one graph.

    Args:
        terms: the table that the values refer to.
        cuts: nodes whose value is taken as given, with the symbol that stands for it.
        rounding: False drops every cast and rounding, for a first, approximate comparison.
    """

    def __init__(self, terms: Terms, cuts: dict[Node, sympy.Symbol] | None = None, rounding: bool = True) -> None:
        self.terms = terms
        self.rounding = rounding
        self._values: dict[Node, sympy.Expr] = dict(cuts or {})

    def value(self, node: Node) -> sympy.Expr:
        if node not in self._values:
            value = self._compute(node)
            self._values[node] = self.leaf(node) if expanded_size(value) > LARGEST else value
        return self._values[node]

    def _compute(self, node: Node) -> sympy.Expr:
        result = None
        if isinstance(node.meta.get("val"), torch.Tensor):
            name = op_name(node)
            rule = RULES.get(name) if name else None
            if rule is not None:
                result = rule(self, node, *node.args, **node.kwargs)
            if result is None and name and node.op != "call_module" and name not in IMPURE:
                result = self._call(node, name)
        return self.leaf(node) if result is None else result

    def _call(self, node: Node, name: str) -> sympy.Expr | None:
        """An operation without a rule of its own: the same call on the same values is the same value."""
        if works_in_place(name, node.kwargs):
            return None
        operands: list[sympy.Expr] = []

        def attribute(value: Any) -> Any:
            if isinstance(value, Node):
                operands.append(self.value(value))
                return "operand", len(operands)
            if isinstance(value, (tuple, list)):
                return tuple(attribute(v) for v in value)
            return value if isinstance(value, Hashable) else repr(value)

        args = tuple(attribute(a) for a in node.args)
        kwargs = tuple((key, attribute(node.kwargs[key])) for key in sorted(node.kwargs))
        return self.term(node, name, (args, kwargs), *operands)

    def take(self, node: Node) -> sympy.Symbol:
        """From here on, the value of `node` is taken as given."""
        self._values[node] = self.leaf(node)
        return self._values[node]

    def leaf(self, node: Node) -> sympy.Symbol:
        val = node.meta.get("val")
        return self.terms.symbol("leaf", (node,), (), val.dtype if isinstance(val, torch.Tensor) else None)

    def term(self, node: Node, op: str, attrs: tuple, *args: sympy.Expr) -> sympy.Symbol:
        return self.terms.symbol(op, attrs, [self.terms.argument(a) for a in args], node.meta["val"].dtype)

    def operand(self, node: Node, value: Any) -> sympy.Expr | None:
        """The value of an operand of the pointwise `node`, rounded where its own dtype is the narrower one."""
        if isinstance(value, Node):
            val = value.meta.get("val")
            if isinstance(val, torch.SymInt):
                return expression(val)
            if not isinstance(val, torch.Tensor):
                return self.leaf(value)
            expr = self.value(value)
            if val.is_complex():
                return self.parts(expr)
            return self.widened(expr, val.dtype, node.meta["val"].dtype)
        return number(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None

    def parts(self, expr: sympy.Expr) -> sympy.Expr:
        """A complex value as arithmetic on real ones."""
        if not expr.is_Symbol:
            return expr
        real, imaginary = (self.terms.symbol(part, (), (expr,), None) for part in ("real", "imag"))
        return real + sympy.I * imaginary

    def widened(self, expr: sympy.Expr, source: torch.dtype, target: torch.dtype) -> sympy.Expr:
        """`expr`, computed in `source`, seen from arithmetic in `target`."""
        narrower = _PRECISION.get(source, 64) < _PRECISION.get(target, 0)
        if narrower and self.rounding and not expr.is_Symbol and not expr.is_number:
            return self.terms.symbol("round", (source,), [normal(expr)], source)
        return expr

    def cast(self, expr: sympy.Expr, source: torch.dtype, target: torch.dtype, node: Node) -> sympy.Expr:
        if source == target:
            return expr
        if source not in _PRECISION or target not in _PRECISION:
            return self.term(node, "cast", (target,), expr)
        if not self.rounding:
            return expr
        if _PRECISION[source] < _PRECISION[target]:
            return self.widened(expr, source, target)
        exact = expr.is_Symbol and self.terms.dtypes.get(expr) == target
        return expr if exact else self.terms.symbol("round", (target,), [normal(expr)], target)
