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
    for match in matches:
        _replace(graph, match)
    tidy(graph)


def tidy(graph: Graph) -> None:
    """Erases what has no effect and no user."""
    for node in reversed(graph.nodes):
        if not node.users and (node.op == "get_attr" or node.target in _PURE):
            graph.erase_node(node)
    graph.lint()


_PURE = (operator.getitem, getattr, "size", deferred_logits)


def _replace(graph: Graph, match: Match) -> None:
    with graph.inserting_before(_insertion_point(graph, match)):
        targets = match.pattern.replace
        if callable(targets):
            call = _call(graph, targets, match, match.outputs[0])
            new = [call] if len(match.outputs) == 1 else [
                graph.call_function(operator.getitem, (call, i)) for i in range(len(match.outputs))
            ]  # fmt: skip
        else:
            new = [_call(graph, t, match, out) for t, out in zip(targets, match.outputs, strict=True)]
    for old, node in zip(match.outputs, new, strict=True):
        node.meta.setdefault("val", old.meta["val"])
        old.replace_all_uses_with(node, delete_user_cb=lambda user, made=tuple(new): user not in made)
    for node in sorted(match.interior, key=list(graph.nodes).index, reverse=True):
        if not node.users:
            graph.erase_node(node)


def _insertion_point(graph: Graph, match: Match) -> Node:
    """The first use of an output outside the match; every input is there by then."""
    users = {u for out in match.outputs for u in out.users if u not in match.interior}
    return next(n for n in graph.nodes if n in users)


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
