"""Dissolving module calls: the graph of the called module takes the place of the call.

Every module has a graph of its own, and most idioms lie inside one. Some do not: the norm of a decoder layer and
the projections that read it, a projection and the residual addition after it. For these the modules that a match
reaches into are dissolved into their caller, and only these; the caller's program is guarded against anything that
would have happened between the modules (hooks, adapters, another class).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import operator
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple

import sympy
import torch
from torch import nn
from torch.fx import Graph, Node, map_arg

from .capture import Capture, join, runs_its_forward
from .errors import CaptureError
from .operations import VIEWS, op_name
from .symbols import bind_sizes, expression, size_node
from .traced_numbers import TracedFloat, TracedInt

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def may_dissolve(path: str, module: nn.Module) -> bool:
    """Whether calls of the module, by this path from its caller, may be dissolved. The layers of a model, and
    models inside models, never are: they are the units of checkpointing, sharding and placement."""
    units = any(isinstance(m, _CONTAINERS) or hasattr(m, "gradient_checkpointing") for m in module.modules())
    return not units and "." not in path and runs_its_forward(module)


def scopes(capture: Capture) -> list[str]:
    """The paths of all modules inside whose calls may be dissolved, callers before callees."""
    calls = [node for node in capture.graph.nodes if "capture" in node.meta]
    unfit = {node.target for node in calls if not _fits(node, node.meta["capture"])}
    found = []
    for node in calls:
        if node.target not in unfit:
            found.append(node.target)
            found += [join(node.target, inner) for inner in scopes(node.meta["capture"])]
    return list(dict.fromkeys(found))


def _fits(node: Node, child: Capture) -> bool:
    if child.error is not None or child.grad_enabled is not None:
        return False
    (result,) = next(n for n in reversed(child.graph.nodes) if n.op == "output").args
    if isinstance(result, Node):
        return True
    unpacked = all(user.target is operator.getitem and isinstance(user.args[1], int) for user in node.users)
    return isinstance(result, (tuple, list)) and unpacked


def dissolved(capture: Capture, chosen: Collection[str] = ()) -> Capture:
    """A copy of the capture, with the calls of the chosen modules dissolved. Nodes know from which module they
    come (`meta["scope"]`)."""
    new = dataclasses.replace(
        capture,
        graph=Graph(),
        passed_on=set(capture.passed_on),
        reads=list(capture.reads),
        guards=list(capture.guards),
        names=dict(capture.names),
        absorbed=dict(capture.absorbed),
    )
    copier = _Copier(new, chosen)
    leaves = []
    for index, node in zip(capture.leaves, _placeholders(capture), strict=True):
        copy = new.graph.node_copy(node)
        copy.meta["leaf_index"] = index
        if isinstance(copy.meta["val"], torch.Tensor):
            bind_sizes(copy.meta["val"], copy, copier.sizes)
        leaves.append(copy)
    new.graph.output(copier.copy(capture, "", leaves))
    return new


def _placeholders(capture: Capture) -> list[Node]:
    return [n for n in capture.graph.nodes if n.op == "placeholder"]


class _Copier:
    def __init__(self, new: Capture, chosen: Collection[str]) -> None:
        self.new = new
        self.chosen = chosen
        self.sizes: dict[sympy.Expr, Any] = {}

    def copy(self, capture: Capture, scope: str, leaves: list) -> Any:
        """Copies the nodes of `capture`, those of the chosen modules inside included; gives what stands for its
        result."""
        values: dict[Node, Any] = dict(zip(_placeholders(capture), leaves, strict=True))

        def mapped(argument: Any) -> Any:
            return map_arg(argument, values.__getitem__)

        for node in capture.graph.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                return mapped(node.args[0])
            child = node.meta.get("capture")
            path = join(scope, node.target) if isinstance(node.target, str) else ""
            if child is not None and path in self.chosen:
                given = list(_leaves((mapped(node.args), mapped(node.kwargs))))
                self.new.absorbed[path] = node.meta["stands_for"]
                _merge(self.new, child, path, given)
                values[node] = self.copy(child, path, [given[i] for i in child.leaves])
            elif node.target is operator.getitem and isinstance(mapped(node.args[0]), (tuple, list)):
                values[node] = mapped(node.args[0])[node.args[1]]
            else:
                values[node] = self._size(node) or self._copy_node(node, scope, path, values)
        raise AssertionError("a graph without an output")

    def _size(self, node: Node) -> Node | int | None:
        """A size comes from the inputs, not from an intermediate result, which could then not be rewritten."""
        if node.target == "size" and isinstance(node.meta.get("val"), torch.SymInt):
            with contextlib.suppress(CaptureError):
                size = size_node(expression(node.meta["val"]), self.new.graph, self.sizes)
                if isinstance(size, Node):  # and no number, which a guard has made of it
                    size.meta.setdefault("val", node.meta["val"])
                return size
        return None

    def _copy_node(self, node: Node, scope: str, path: str, values: dict[Node, Any]) -> Node:
        copy = self.new.graph.node_copy(node, values.__getitem__)
        copy.meta["scope"] = scope
        if node.op in ("get_attr", "call_module"):
            copy.target = scope if node.target == "itself" and scope else path
        if "parameters" in node.meta:
            copy.meta["parameters"] = map_arg(node.meta["parameters"], values.__getitem__)
        return copy


def _leaves(value: Any) -> Iterator[Any]:
    """The variable parts of a call in a graph, in the order of `signature.call_key`."""
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, dict):
        yield from _leaves(list(value.values()))
    elif isinstance(value, Node) and value.target is torch.Size:
        yield from _leaves(value.args[0])
    elif isinstance(value, Node) or type(value) in (int, float):
        yield value


def _merge(new: Capture, child: Capture, path: str, given: list) -> None:
    """What the capture of a dissolved module rests on, its caller's now rests on."""
    new.reads += [type(read)(join(path, read.path), read.name, read.value) for read in child.reads]
    new.names |= child.names
    new.guards += child.guards
    new.absorbed |= {join(path, inner): known for inner, known in child.absorbed.items()}
    for index, (value, node) in enumerate(zip(child.leaf_values, given, strict=True)):
        position = node.meta.get("leaf_index") if isinstance(node, Node) else None
        if position is None:
            continue
        if isinstance(value, (TracedInt, TracedFloat)) and value.used:
            new.leaf_values[position].used = True
        if index not in child.passed_on:
            new.passed_on.discard(position)


class Borders(NamedTuple):
    """Where in a graph with dissolved calls a match can be on both sides of an edge between two modules."""

    behind: set[Node]  # what it may end in
    around: set[Node]  # what may take part in it


def borders(graph: Graph, steps: int) -> Borders:
    """The nodes that are at most so many operations away from an edge between two modules, views and casts not
    counted."""

    def distances(nodes: Iterable[Node], neighbours: Callable[[Node], Iterable[Node]]) -> dict[Node, float]:
        found: dict[Node, float] = {}
        for node in nodes:
            others = [other for other in neighbours(node) if isinstance(other.meta.get("val"), torch.Tensor)]
            if any(_scope(other) != _scope(node) for other in others):
                found[node] = 0
            else:
                found[node] = min((found[other] for other in others), default=math.inf) + (op_name(node) not in VIEWS)
        return found

    after = distances(graph.nodes, lambda node: node.all_input_nodes)
    before = distances(reversed(graph.nodes), lambda node: node.users)
    behind = {node for node in graph.nodes if after[node] <= steps}
    return Borders(behind, behind | {node for node in graph.nodes if before[node] <= steps})


def _scope(node: Node) -> str:
    return node.meta.get("scope", "")


def straddled(reaches: Iterable[set[str]], candidates: Collection[str]) -> set[str]:
    """Of the candidate modules (callers first) those that a match reaches into from outside.

    `reaches` holds for each match the scopes of the nodes that it takes part in.
    """
    chosen: set[str] = set()
    for path in candidates:
        caller = path.rpartition(".")[0]
        if caller and caller not in chosen:
            continue
        for reach in reaches:
            inside = {scope for scope in reach if scope == path or scope.startswith(path + ".")}
            if inside and inside != reach:
                chosen.add(path)
    return chosen
