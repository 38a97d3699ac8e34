"""Proofs: what patterns compute, rounding included, on exactly the inputs that were found for them.

A pattern's function is traced on fakes like the inputs, with their dtypes and symbolic shapes. What it computes is the
measure: a node of the model that has this value, and its dtype and shape, is an output of the pattern.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node

from .algebra import normal
from .canonical import Canonicalizer
from .errors import CaptureError
from .pattern import Variant
from .recorder import Recorder
from .symbols import FakeInputs, expression
from .terms import Terms, describe


class NoProof(Exception):
    def __init__(self, reason: str | Callable[[], str], share: float = 1.0) -> None:
        super().__init__()
        self.reason = reason
        self.share = share


class Proofs:
    """What patterns compute on inputs like those of one capture: what a proof compares with."""

    def __init__(self, fakes: FakeInputs) -> None:
        self.fakes = fakes
        self.terms = Terms()
        self._traced: dict[tuple, Graph | NoProof] = {}
        self._wanted: dict[tuple, list[tuple[Node, sympy.Expr]]] = {}

    def symbols(self, inputs: Iterable[Node]) -> dict[Node, sympy.Symbol]:
        """Inputs by number, so that their values elsewhere are not worked out again."""
        inputs = dict.fromkeys(inputs)
        return {n: self.terms.symbol("leaf", (i,), (), n.meta["val"].dtype) for i, n in enumerate(inputs)}

    def wanted(
        self, variant: Variant, tensors: dict[str, torch.Tensor], constants: dict[str, Any],
        symbols: dict[str, sympy.Symbol],
    ) -> list[tuple[Node, sympy.Expr]]:  # fmt: skip
        """The outputs of a pattern, nodes of its own graph, with their values. Raises NoProof where it does not run."""
        like = {
            name: (tuple(map(expression, (*v.shape, *v.stride()))), v.dtype, v.device) for name, v in tensors.items()
        }
        call = variant, tuple(like.items()), tuple(constants.items())
        key = call, tuple(symbols.items())
        if key not in self._wanted:
            if call not in self._traced:
                self._traced[call] = self._trace(variant, tensors, constants)
            graph = self._traced[call]
            if isinstance(graph, NoProof):
                raise graph
            values = Canonicalizer(self.terms, {n: symbols[n.target] for n in graph.nodes if n.op == "placeholder"})
            self._wanted[key] = [(node, normal(values.value(node))) for node in _results(graph)]
        return self._wanted[key]

    def _trace(self, variant: Variant, tensors: dict[str, torch.Tensor], constants: dict[str, Any]) -> Graph | NoProof:
        """The pattern's own graph on inputs like these."""
        # Each input is a tensor object of its own, also where the model passes one node twice.
        fakes = {name: self.fakes.like(v) for name, v in tensors.items()}
        arguments = dict.fromkeys(variant.absent) | constants | fakes
        pattern = variant.pattern
        ordered = {name: arguments[name] for name in (*pattern.tensors, *pattern.constants)}
        try:
            return Recorder(fakes=self.fakes).trace_function(pattern.function, ordered)
        except (CaptureError, RuntimeError, TypeError, ValueError, IndexError) as error:
            return NoProof(f"the pattern does not run on these inputs: {error}")


def _results(graph: Graph) -> list[Node]:
    result = next(n for n in reversed(graph.nodes) if n.op == "output").args[0]
    return list(result) if isinstance(result, tuple) else [result]


def difference(root: Node, want: Node, inputs: dict[str, Node]) -> str:
    """How a node differs from an output of a pattern that was traced on inputs like these."""
    a, b = want.meta["val"], root.meta["val"]
    if a.dtype != b.dtype:
        return f"expected a result in {a.dtype}, found {b.dtype}"
    if a.shape != b.shape:
        return f"expected a result of shape {list(a.shape)}, found {list(b.shape)}"
    terms = Terms()
    symbols = {node: terms.symbol("leaf", (node,), (), node.meta["val"].dtype) for node in inputs.values()}
    given = {n: symbols[inputs[n.target]] for n in want.graph.nodes if n.op == "placeholder"}
    values = Canonicalizer(terms, given).value(want), Canonicalizer(terms, dict(symbols)).value(root)
    expected, found = (describe(normal(value), terms) for value in values)
    return f"rounds at another place or differs in an attribute: expected {expected}, found {found}"
