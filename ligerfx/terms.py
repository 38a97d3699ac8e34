"""Terms: what values are made of besides pointwise arithmetic.

A term is an operation (a reduction, a slice, a linear layer) on canonical values, and stands in expressions as a sympy
symbol. A table holds the terms of one graph or pattern, equal ones once; with it, a value can be told as text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from .algebra import ConstantStr, normal


@dataclass(frozen=True)
class Term:
    """An operation that is not pointwise arithmetic: `op` with static `attrs` on canonical `args`.

    Leaves of a graph (inputs, parameters, calls that nothing is known about) are terms with op "leaf".
    """

    op: str
    attrs: tuple
    args: tuple[sympy.Expr, ...]


class Terms:
    """Table of terms: equal terms share a symbol."""

    def __init__(self, prefix: str = "t") -> None:
        self.prefix = prefix
        self.symbols: dict[Term, sympy.Symbol] = {}
        self.terms: dict[sympy.Symbol, Term] = {}
        self.dtypes: dict[sympy.Symbol, torch.dtype | None] = {}
        self.written: dict[sympy.Expr, sympy.Expr] = {}  # what arguments of terms were before they were multiplied out

    def symbol(self, op: str, attrs: tuple, args: Sequence[sympy.Expr], dtype: torch.dtype | None) -> sympy.Symbol:
        term = Term(op, attrs, tuple(args))
        if term not in self.symbols:
            symbol = sympy.Symbol(f"{self.prefix}{len(self.symbols)}", real=True)
            self.symbols[term] = symbol
            self.terms[symbol] = term
            self.dtypes[symbol] = dtype
        return self.symbols[term]

    def argument(self, value: sympy.Expr) -> sympy.Expr:
        """The form in which a value is an argument of a term."""
        form = normal(value)
        self.written.setdefault(form, value)
        return form

    def are_related(self, a: sympy.Expr, b: sympy.Expr) -> bool:
        """Whether all that one of two values is made of goes into the other, itself or inside a term."""
        return any(y.free_symbols and y.free_symbols <= self._inside(x) for x, y in ((a, b), (b, a)))

    def _inside(self, value: sympy.Expr) -> set[sympy.Symbol]:
        seen: set[sympy.Symbol] = set()
        pending = set(value.free_symbols)
        while pending:
            seen.add(symbol := pending.pop())
            for arg in self.terms[symbol].args if symbol in self.terms else ():
                pending |= arg.free_symbols - seen
        return seen


SIZED = {"slice": 2, "reshape": 0, "expand": 0}
"""Terms whose attributes are sizes, with the number of leading attributes that are not."""


def describe(expr: sympy.Expr, terms: Terms, depth: int = 6) -> str:
    """A value as readable text. What is deeper inside is left out: written out, a value that is used twice is there
    twice, and so a graph of many layers has no end."""
    if depth == 0:
        return "..."
    names = {s: sympy.Symbol(_term_text(terms.terms[s], terms, depth)) for s in expr.free_symbols if s in terms.terms}
    text = sympy.sstr(expr.xreplace(names), full_prec=False)
    return text if len(text) <= 160 else text[:157] + "..."


def _term_text(term: Any, terms: Terms, depth: int) -> str:
    if term.op == "leaf":
        return str(term.attrs[0])
    inner = [describe(a, terms, depth - 1) for a in term.args]
    if term.op == "linear" and len(inner[0]) > 24:  # whose weight says which it is
        inner[0] = "..."
    attrs = [attribute_text(a) for a in term.attrs]
    return f"{term.op}({', '.join(inner + attrs)})"


def attribute_text(value: Any) -> str:
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str):
        return f"{value[0]}={attribute_text(value[1])}"
    if isinstance(value, tuple):
        return f"({', '.join(attribute_text(v) for v in value)})"
    if isinstance(value, ConstantStr) or hasattr(value, "symbol"):
        return str(value.symbol)
    return str(value)
