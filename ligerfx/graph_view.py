"""What a graph computes, seen by its values: the side that patterns are searched for in."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node

from .canonical import Canonicalizer
from .dissolve import Borders
from .operations import is_cast, op_name
from .pattern import FUNCTIONS, split
from .terms import SIZED, Terms


class View:
    """The canonical values of a graph, casts and roundings left out.

    With `cut`, arithmetic whose result is used more than once is taken as given: an input of the idiom may
    itself be a sum or a product, which would otherwise be multiplied out with the rest.

    With `within`, values are worked out only around the borders of modules, and others taken as given.
    """

    def __init__(self, graph: Graph, cut: bool = False, within: Borders | None = None) -> None:
        self.terms = Terms()
        self.values: dict[Node, sympy.Expr] = {}
        self.nodes_of: dict[sympy.Expr, list[Node]] = {}
        self.computed: dict[Node, sympy.Expr] = {}  # the same, but for the node itself, which is not cut
        self.inner: dict[sympy.Symbol, sympy.Expr] = {}  # what is behind the symbol of a cut node
        self.has_shared = False  # else the view is the same with `cut`
        canonical = Canonicalizer(self.terms, rounding=False)
        for node in graph.nodes:
            if node.op == "output" or not isinstance(node.meta.get("val"), torch.Tensor):
                continue
            if within is not None and node not in within.around:
                self.values[node] = canonical.take(node)
                self.nodes_of[self.values[node]] = [node]
                continue
            value = self.computed[node] = canonical.value(node)
            if _is_shared(node, value):
                self.has_shared = True
                if cut:
                    self.inner[symbol := canonical.take(node)] = value
                    value = symbol
            self.values[node] = value
            self.nodes_of.setdefault(value, []).append(node)
        self.computed_by: dict[Any, list[Node]] = {}  # by operation
        for node, value in self.computed.items():
            if node.op not in ("placeholder", "get_attr") and (within is None or node in within.behind):
                self.computed_by.setdefault(self.operation(value), []).append(node)
        self._made_of: dict[sympy.Expr, frozenset] = {}
        self._operands: dict[tuple, tuple[sympy.Expr, list[sympy.Expr]]] = {}
        self.alike: dict[tuple, list[sympy.Expr]] = {}  # slices of one value, or views of one
        for value in self.nodes_of:
            term = self.terms.terms.get(value)
            if term is not None and term.op in SIZED:
                self.alike.setdefault((term.op, term.args), []).append(value)

    def nodes_by(self, operation: Any) -> Iterator[Node]:
        """The nodes that an operation computes (any if it is None), last ones first."""
        if operation is None:
            return iter(sorted(itertools.chain(*self.computed_by.values()), reverse=True))
        return reversed(self.computed_by.get(operation, ()))

    def operation(self, value: sympy.Expr) -> Any:
        """What computes a value: the name of a term's operation, or a class of sympy."""
        value = self.inner.get(value, value)
        return self.terms.terms[value].op if value in self.terms.terms else value.func

    def made_of(self, value: sympy.Expr) -> frozenset:
        """The operations and functions that go into a value, through terms and what was taken as given."""
        if value not in self._made_of:
            found = {function.func for function in value.atoms(*FUNCTIONS)}
            if value in self.inner:
                found |= self.made_of(self.inner[value])
            elif value in self.terms.terms:
                term = self.terms.terms[value]
                found |= {term.op}.union(*map(self.made_of, term.args))
            elif not value.is_Symbol:
                found |= set().union(*map(self.made_of, value.free_symbols))
            self._made_of[value] = frozenset(found)
        return self._made_of[value]

    def operands(self, value: sympy.Expr, func: Any) -> tuple[sympy.Expr, list[sympy.Expr]]:
        """The constant and the other operands of a value, seen as a sum or a product."""
        if (value, func) not in self._operands:
            self._operands[value, func] = split(value, func, lambda e: e.is_number)
        constant, others = self._operands[value, func]
        return constant, list(others)


def _is_shared(node: Node, value: sympy.Expr) -> bool:
    """Whether a node is arithmetic whose result is used more than once."""
    return not value.is_Symbol and not is_cast(node) and _uses(node) > 1 and not _is_of_sigmoid(node, value)


def _is_of_sigmoid(node: Node, value: sympy.Expr) -> bool:
    """Whether a value is the exponential in `exp(a) / (1 + exp(a))`, and as such no input of an idiom."""
    return isinstance(value, sympy.exp) and any(op_name(user) == "add" and 1 in user.args for user in node.users)


def _uses(node: Node) -> int:
    """How often a value is used, casts of it aside. torch's own RMSNorm uses what it is given twice."""
    return sum(_uses(user) if is_cast(user) else 2 if op_name(user) == "rms_norm" else 1 for user in node.users)
