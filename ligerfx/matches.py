"""Matches: proved occurrences of patterns, and what else in a graph keeps one from being rewritten."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch.fx import Graph, Node

from .operations import VIEWS, mutates, op_name
from .pattern import Pattern

if TYPE_CHECKING:
    from .numerics import Verified


@dataclass(eq=False)
class Match:
    """A proved occurrence of a pattern."""

    pattern: Pattern
    inputs: dict[str, Node]
    constants: dict[str, Any]
    outputs: list[Node]
    interior: set[Node]
    source: tuple[tuple[str, str], ...] = ()  # where the model computes this: (file:line, text), in order
    verified: Verified | None = None  # how the replacement compared with the operations here, if it was asked
    calls: list[Node] = field(default_factory=list)  # what took its place, once it is rewritten

    @property
    def reach(self) -> set[str]:
        """The modules, by path from the one that is matched, whose graphs the match takes part in."""
        return {node.meta.get("scope", "") for node in (*self.interior, *self.later_users())}

    @property
    def is_idle(self) -> bool:
        """Whether all that it would do is to hand on an input that nothing takes."""
        return self.pattern.forks is not None and len(self.outputs) == 1 and not self.later_users()

    def later_users(self) -> list[Node]:
        """What uses the input that the pattern forks, besides the match."""
        if self.pattern.forks is None:
            return []
        users = self.inputs[self.pattern.forks].users
        first = min(self.outputs)
        return [user for user in users if user not in self.interior and user > first]


class Places:
    """Where the nodes of a graph stand, and what each depends on. A set of nodes is a number, a bit for each."""

    def __init__(self, graph: Graph) -> None:
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.mutating = [node for node in graph.nodes if mutates(node)]
        self._cones: dict[Node, int] = {}
        for node, place in self.order.items():
            cone = 1 << place
            for given in _given_to(node):
                cone |= self._cones[given]
            self._cones[node] = cone

    def cone_of(self, nodes: Iterable[Node]) -> int:
        """The nodes, and all that they depend on."""
        return functools.reduce(operator.or_, (self._cones[node] for node in nodes), 0)

    def has(self, cone: int, node: Node) -> bool:
        return bool(cone >> self.order[node] & 1)


def _given_to(node: Node) -> list[Node]:
    """What a node computes with; parameters of leaf layers included."""
    return [*node.all_input_nodes, *node.meta.get("parameters", {}).values()]


def between(outputs: Iterable[Node], inputs: set[Node]) -> set[Node]:
    """The nodes that the outputs depend on, themselves included, down to and without the inputs."""
    seen: set[Node] = set()
    pending = list(outputs)
    while pending:
        node = pending.pop()
        if node in seen or node in inputs:
            continue
        seen.add(node)
        pending += _given_to(node)
    return seen


def obstacle(match: Match, places: Places) -> str | None:
    """Why a proved match cannot be rewritten, None where it can."""
    order = places.order
    outputs = set(match.outputs)
    for node in sorted(match.interior, key=order.__getitem__):
        if mutates(node):
            return f"`{node}` works in place at {node.meta.get('source', '?')}"
        if node.meta.get("lends") and match.pattern.inside is None:
            return f"the weights of `{node.target}` are gathered by its hooks, for its own call"
        if node in outputs or _follows_from(node, outputs, match.interior):
            continue
        for user in node.users:
            if user not in match.interior:
                where = f" at {user.meta['source']}" if "source" in user.meta else ""
                return f"`{node}` has a second user, `{user}`{where}"
    # Parameters can be read anywhere.
    last_input = max((order[n] for n in match.inputs.values() if n.op != "get_attr"), default=0)
    before_inputs = places.cone_of(match.inputs.values())
    kept = [n for n in match.interior if n in outputs or _follows_from(n, outputs, match.interior)]
    for node in sorted(kept, key=order.__getitem__):
        outside = [user for user in node.users if user not in match.interior]
        if places.has(before_inputs, node) or any(order[user] < last_input for user in outside):
            return f"`{node}` is used before the last input is there"
    for node in match.inputs.values():
        if change := _change_in_place(node):
            return f"its input `{node}` is changed in place at {change.meta.get('source', '?')}"
    for node in match.outputs if callable(match.pattern.replace) else ():
        reused = any(user in match.interior for user in node.users)  # what the kernel keeps for its backward
        if reused and (change := _change_in_place(node)):
            return f"its output `{node}` is changed in place at {change.meta.get('source', '?')}"
    # The replacement runs later than what it replaces: nothing may change in place meanwhile.
    users = {user for node in kept for user in node.users if user not in match.interior}
    start, end = min(order[n] for n in match.interior), min((order[u] for u in users), default=0)
    for node in places.mutating:
        if start < order[node] < end:
            return f"`{node}` works in place at {node.meta.get('source', '?')}, before the result is used"
    return None


def _follows_from(node: Node, outputs: set[Node], interior: set[Node]) -> bool:
    """True if the node only looks at outputs of the match in another way, so that it can stay."""
    inside = [n for n in node.all_input_nodes if n in interior]
    return (
        op_name(node) in VIEWS
        and bool(inside)
        and all(n in outputs or _follows_from(n, outputs, interior) for n in inside)
    )


def _change_in_place(node: Node) -> Node | None:
    """What changes the node, or a view of it, in place."""
    for user in node.users:
        if mutates(user) and (node in user.args[:1] or node in user.kwargs.values()):
            return user
        if op_name(user) in VIEWS and (change := _change_in_place(user)):
            return change
    return None
