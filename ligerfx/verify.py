"""Verification: each distinct rewrite is run against the operations that it would replace.

The inputs are random, with the shapes, strides, dtypes and devices that the capture found at this place. The global
random state is neither read nor changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from .check import reference, replacement
from .matches import Match
from .module import compile_graph
from .numerics import Verified, compare, evaluate, random_tensor, widest, worst
from .source import describe_error


class Verifier:
    """Remembers what was found of each distinct rewrite."""

    def __init__(self) -> None:
        self._found: dict[tuple, tuple[Verified, str | None]] = {}

    @torch.inference_mode(False)
    def refuse(self, match: Match) -> str | None:
        """Runs the match, unless one like it was run before, and says why it must not be rewritten."""
        try:
            function, code, inputs = original(match)
            key = (match.pattern, code, tuple(match.constants.items()), *map(_kind, inputs.items()))
            if key not in self._found:
                self._found[key] = _verify(match, function, inputs)
            match.verified, reason = self._found[key]
        except _Unverified as error:
            match.verified, reason = Verified(problem=f"not verified: {error}"), None
        return reason and f"verify: {reason}"


class _Unverified(Exception):
    """Why a rewrite could not be compared with what it replaces."""


def original(match: Match) -> tuple[Callable, str, dict[str, Node]]:
    """What the model computes where the pattern was found: a function of the match's inputs by name, its source, and
    the nodes that the inputs are. Further values that it needs are sizes, which are those of the captured call."""
    graph = Graph()
    copies: dict[Node, Any] = {}
    names: dict[str, Node] = {}
    for name, node in match.inputs.items():
        if node not in copies:
            copies[node] = graph.placeholder(name)
            names[name] = node

    def copied(node: Node) -> Any:
        if node not in copies:
            value = node.meta.get("val")
            if not isinstance(value, torch.SymInt):
                raise _Unverified(f"`{node}` is needed, too")
            copies[node] = int(value.node.hint)
        return copies[node]

    for node in sorted(match.interior):
        if node.op == "call_module":  # a plain linear layer, whose parameters are inputs of the match or read here
            weights = {name: copied(parameter) for name, parameter in node.meta["parameters"].items()}
            copies[node] = graph.call_function(F.linear, (copied(node.args[0]),), weights)
        else:
            copies[node] = graph.node_copy(node, copied)
    graph.output(tuple(copied(node) for node in match.outputs))
    run, code = compile_graph(graph)
    return lambda **tensors: run(None, *(tensors[name] for name in names)), code, names


def _kind(item: tuple[str, Node]) -> tuple:
    name, node = item
    value = node.meta["val"]
    return name, tuple(map(_hint, value.shape)), tuple(map(_hint, value.stride())), value.dtype, value.device


def _hint(size: int | torch.SymInt) -> int:
    return int(size.node.hint) if isinstance(size, torch.SymInt) else size


def _verify(match: Match, function: Callable, inputs: dict[str, Node]) -> tuple[Verified, str | None]:
    """How the replacement compares, and why it must not be used."""
    device = next(iter(inputs.values())).meta["val"].device
    if device.type == "meta":
        raise _Unverified("the model is on the meta device")
    generator = torch.Generator(device).manual_seed(0)
    below = min((_hint(s) for node in inputs.values() for s in node.meta["val"].shape), default=2)
    tensors = {name: _random(node, generator, below) for name, node in inputs.items()}
    alias = {name: next(n for n, other in inputs.items() if other is node) for name, node in match.inputs.items()}
    forks = match.pattern.forks

    def expected_of(**given: torch.Tensor) -> Any:
        return (*function(**given), *([given[alias[forks]]] if forks else ()))

    def found_of(**given: torch.Tensor) -> Any:
        given = {name: given[alias[name]] for name in match.inputs}
        return replacement(match.pattern, given, match.constants, early=True)

    def truth_of(**given: torch.Tensor) -> Any:
        return reference(match.pattern, {name: given[alias[name]] for name in match.inputs}, match.constants)

    try:
        expected, upstream = evaluate(
            expected_of, tensors, lambda output: random_tensor(output.shape, output.dtype, generator, 2)
        )
    except Exception as error:
        raise _Unverified(f"the model's operations do not run on random inputs ({describe_error(error)})") from error
    try:
        found, _ = evaluate(found_of, tensors, upstream)
    except Exception as error:
        return Verified(), f"the replacement fails: {describe_error(error)}"
    differences = compare(found, expected, widest(truth_of, tensors, upstream))
    largest = worst(differences)
    shares = {
        kind: max((d.relative for d in differences if d.where.startswith(kind)), default=None)
        for kind in ("output", "gradient")
    }
    return Verified(shares["output"], shares["gradient"]), None if largest.passes else str(largest)


def _random(node: Node, generator: torch.Generator, below: int) -> torch.Tensor:
    """A random tensor like a node's value; one that is a matrix of weights, scaled to keep what it multiplies."""
    value = node.meta["val"]
    shape, stride = tuple(map(_hint, value.shape)), tuple(map(_hint, value.stride()))
    made = random_tensor(shape, value.dtype, generator, below)
    if node.op == "get_attr" and len(shape) > 1 and value.dtype.is_floating_point:
        made = made / math.sqrt(shape[-1])
    return torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device).copy_(made)
