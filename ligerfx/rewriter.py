"""Stage 3: rewriting. Replaces proved matches by calls of their replacements."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

from .deferred import deferred_logits
from .leaves import is_mask_function
from .masks import skippable
from .matches import Match
from .operations import is_pure, mutates, op_name
from .pattern import bound_arguments


def rewrite(graph: Graph, matches: list[Match]) -> bool:
    """Replaces each match in `graph` and erases what only it needed. Gives whether anything was changed."""
    replaced: dict[Node, Node] = {}  # an output of one match may be an input of the next
    forks: list[tuple[Node, Match]] = []
    for match in matches:
        match.inputs = {name: replaced.get(node, node) for name, node in match.inputs.items()}
        call, new = _replace(graph, match)
        replaced |= new
        if match.pattern.forks is not None:
            forks.append((call, match))
    latest: dict[Node, Node] = {}  # an input may be forked again
    for call, match in sorted(forks, key=lambda fork: fork[0]):
        source = match.inputs[match.pattern.forks]
        latest[source] = _fork(graph, call, latest.get(source, source), len(match.outputs))
    waits_less = _say_that_nothing_is_packed(graph)
    _tidy(graph)
    return bool(matches) or waits_less


def _say_that_nothing_is_packed(graph: Graph) -> bool:
    """Leaves out the positions that a mask function is given where they count up by one.

    transformers looks in them for sequences that are packed one behind the other, and waits for the device to
    answer, at the start of each forward: the device then stands still until the first layers are queued anew.
    """
    masks = [n for n in graph.nodes if is_mask_function(n.target) and _counts_up(n.kwargs.get("position_ids"))]
    for node in masks:
        node.update_kwarg("position_ids", None)
        node.target = skippable(node.target)
    return bool(masks)


def _counts_up(value: Any) -> bool:
    """Whether a value is one row of consecutive integers, the same in each sequence of the batch."""
    if not isinstance(value, Node):
        return False
    name, args = op_name(value), value.args
    if name == "arange":
        return len(args) <= 2 and "step" not in value.kwargs
    if name == "add" and not value.kwargs:
        offset = args[1].meta.get("val") if isinstance(args[1], Node) else args[1]
        return isinstance(offset, (int, torch.SymInt)) and _counts_up(args[0])
    return name == "unsqueeze" and args[1:] == (0,) and _counts_up(args[0])


def _tidy(graph: Graph) -> None:
    """Erases what has no effect and no user."""
    for node in reversed(graph.nodes):
        if not node.users and (node.op == "get_attr" or node.target in _PURE):
            graph.erase_node(node)
    graph.lint()


_PURE = (operator.getitem, getattr, "size", torch.Size, deferred_logits)


def _fork(graph: Graph, call: Node, source: Node, position: int) -> Node:
    """Lets what uses `source` after `call` take it from there, where it comes back at `position`."""
    later = [user for user in source.users if user > call]
    if not later:
        return source
    with graph.inserting_after(call):
        passed = graph.call_function(operator.getitem, (call, position))
    passed.meta["val"] = source.meta["val"]
    for user in later:
        user.replace_input_with(source, passed)
    return passed


def _replace(graph: Graph, match: Match) -> tuple[Node, dict[Node, Node]]:
    """Puts the replacement before the first use of what the match computes. What merely follows from an output
    (a view of it, say) and is used elsewhere stays, and moves behind the new nodes. Gives the (last) call, and
    what takes the place of each output."""
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
    for node in match.inputs.values():
        if node.op == "get_attr" and node > point:
            point.prepend(node)
    with graph.inserting_before(point):
        targets, lender = match.pattern.replace, next((n for n in inside if n.meta.get("lends")), None)
        if lender is not None:
            targets = match.pattern.inside
            match.inputs["head"] = graph.create_node("get_attr", lender.target)
        if not callable(targets):
            new = [_call(graph, t, match, out) for t, out in zip(targets, match.outputs, strict=True)]
            call = new[-1]
            match.calls = list(new)
        else:
            call = _call(graph, targets, match, match.outputs[0])
            new = [call]
            match.calls = [call]
            if len(match.outputs) > 1 or match.pattern.forks is not None:
                new = [graph.call_function(operator.getitem, (call, i)) for i in range(len(match.outputs))]
    replaced = dict(zip(match.outputs, new, strict=True))
    for old, node in replaced.items():
        node.meta.setdefault("val", old.meta["val"])
        old.replace_all_uses_with(node, delete_user_cb=lambda user: user not in new)
        _allow_other_strides(node)
    for node in kept:
        point.prepend(node)
    for node in reversed(inside):
        if not node.users and node not in kept:
            graph.erase_node(node)
    return call, replaced


def _allow_other_strides(node: Node) -> None:
    """The result of a kernel may lie in memory in another order than the model's own, of which `view` was possible:
    `reshape` is the same where it still is, and else a copy."""
    for user in node.users:
        if user.op == "call_method" and user.target == "view" and not isinstance(user.args[1], torch.dtype):
            user.target = "reshape"
        elif user.op == "call_method" and user.target in ("transpose", "permute", "unsqueeze"):
            _allow_other_strides(user)


def _call(graph: Graph, target: Callable, match: Match, output: Node) -> Node:
    given = {**match.inputs, **match.constants}
    target, arguments = bound_arguments(target, given)
    for name, function in match.pattern.early.items():
        inputs = [node for n, node in match.inputs.items() if n in inspect.signature(function).parameters]
        wanted = name in inspect.signature(target).parameters
        start = _moved_to_the_start(graph, inputs) if wanted else None
        if start is not None:
            with graph.inserting_before(start):
                arguments[name] = _made(graph, *bound_arguments(function, given))
    call = _made(graph, target, arguments)
    call.meta.update(
        pattern=match.pattern.name,
        source=output.meta.get("source", "?"),
        line=output.meta.get("line", ""),
    )
    return call


def _made(graph: Graph, target: Callable, arguments: dict[str, Any]) -> Node:
    """A call of the function with those arguments that are not its defaults."""
    parameters = inspect.signature(target).parameters
    args, kwargs = [], {}
    for name, parameter in parameters.items():
        if name not in arguments or arguments[name] == parameter.default:
            continue
        positional = isinstance(arguments[name], Node) and not kwargs and parameter.kind is not parameter.KEYWORD_ONLY
        if positional and len(args) == list(parameters).index(name):
            args.append(arguments[name])
        else:
            kwargs[name] = arguments[name]
    kwargs |= {name: value for name, value in arguments.items() if name not in parameters}  # its **kwargs
    return graph.call_function(target, tuple(args), kwargs)


def _moved_to_the_start(graph: Graph, inputs: list[Node]) -> Node | None:
    """Moves the inputs, and all that they are made of, to the start of the graph; gives the node after them.
    None where they depend on more than the graph's own inputs, or something may change in place before."""
    needed: set[Node] = set()
    pending = list(inputs)
    while pending:
        node = pending.pop()
        if node.op != "placeholder" and node not in needed:
            needed.add(node)
            pending += node.all_input_nodes
    if not all(is_pure(node) for node in needed) or any(mutates(node) for node in graph.nodes):
        return None
    first = next(node for node in graph.nodes if node.op != "placeholder" and node not in needed)
    for node in sorted(needed):
        first.prepend(node)
    return first
