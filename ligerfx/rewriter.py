"""Stage 3: rewriting. Replaces proved matches by calls of their replacements."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable
from typing import Any

from torch.fx import Graph, Node

from .deferred import deferred_logits
from .matcher import Match


def rewrite(graph: Graph, matches: list[Match]) -> None:
    """Replaces each match in `graph` and erases what only it needed."""
    replaced: dict[Node, Node] = {}  # an output of one match may be an input of the next
    for match in matches:
        match.inputs = {name: replaced.get(node, node) for name, node in match.inputs.items()}
        replaced |= _replace(graph, match)
    tidy(graph)


def tidy(graph: Graph) -> None:
    """Erases what has no effect and no user."""
    for node in reversed(graph.nodes):
        if not node.users and (node.op == "get_attr" or node.target in _PURE):
            graph.erase_node(node)
    graph.lint()


_PURE = (operator.getitem, getattr, "size", deferred_logits)


def _replace(graph: Graph, match: Match) -> dict[Node, Node]:
    """Puts the replacement before the first use of what the match computes. What merely follows from an output
    (a view of it, say) and is used elsewhere stays, and moves behind the new nodes."""
    order = {node: position for position, node in enumerate(graph.nodes)}
    outputs = set(match.outputs)
    inside = sorted(match.interior, key=order.__getitem__)
    kept: list[Node] = []
    for node in reversed(inside):
        if node not in outputs and any(user not in match.interior or user in kept for user in node.users):
            kept.append(node)
    kept.reverse()
    point = min(
        (user for node in (*outputs, *kept) for user in node.users if user not in match.interior),
        key=order.__getitem__,
    )
    with graph.inserting_before(point):
        targets = match.pattern.replace
        if not callable(targets):
            new = [_call(graph, t, match, out) for t, out in zip(targets, match.outputs, strict=True)]
        else:
            new = [_call(graph, targets, match, match.outputs[0])]
            if len(match.outputs) > 1:
                new = [graph.call_function(operator.getitem, (new[0], i)) for i in range(len(match.outputs))]
    replaced = dict(zip(match.outputs, new, strict=True))
    for old, node in replaced.items():
        node.meta.setdefault("val", old.meta["val"])
        old.replace_all_uses_with(node, delete_user_cb=lambda user: user not in new)
    for node in kept:
        point.prepend(node)
    for node in reversed(inside):
        if not node.users and node not in kept:
            graph.erase_node(node)
    return replaced


def _call(graph: Graph, target: Callable, match: Match, output: Node) -> Node:
    fixed: dict[str, Any] = {}
    if isinstance(target, functools.partial):
        fixed, target = dict(target.keywords), target.func
    parameters = inspect.signature(target).parameters
    arguments = {**match.inputs, **match.constants, **fixed}
    args, kwargs = [], {}
    for name, parameter in parameters.items():
        if name not in arguments or arguments[name] == parameter.default:
            continue
        positional = isinstance(arguments[name], Node) and not kwargs and parameter.kind is not parameter.KEYWORD_ONLY
        if positional and len(args) == list(parameters).index(name):
            args.append(arguments[name])
        else:
            kwargs[name] = arguments[name]
    call = graph.call_function(target, tuple(args), kwargs)
    call.meta.update(
        pattern=match.pattern.name,
        source=output.meta.get("source", "?"),
        line=output.meta.get("line", ""),
    )
    return call
