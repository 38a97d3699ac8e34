"""How far a pattern is recognised at a place: its lines, those that the model has and those that it has not."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import sympy
from torch.fx import Graph, Node

from .graph_view import View
from .listing import listing
from .near_misses import UNPROVED, NearMiss, neighbourhood
from .pattern import Pattern, Variant
from .source import file_name
from .unifier import Unifier


@dataclass(frozen=True)
class PatternLine:
    """A line of a pattern. `found` is None for one that says nothing by itself: a view or cast of an input, or what
    follows from a line that is not found."""

    text: str
    found: bool | None


def lines_of(misses: Sequence[NearMiss | None], graph: Graph | None) -> list[list[PatternLine]]:
    """The lines of the pattern of each near miss in a graph; none for one whose place is not there any more."""
    view = View(graph) if any(misses) else None
    return [_pattern_lines(miss, view) if miss else [] for miss in misses]


def _pattern_lines(miss: NearMiss, view: View) -> list[PatternLine]:
    variant = _best_variant(miss, view)
    found = _found(variant, view, neighbourhood(miss.node, variant.size))
    if miss.share < UNPROVED and False not in found.values():
        # Each step is there, but not with one choice of inputs.
        found[[node for node, there in found.items() if there is not None][-1]] = False
    elif miss.share >= UNPROVED:
        found = {node: None if there is None else True for node, there in found.items()}
    return _lines(variant, found)


def closest(
    patterns: Sequence[Pattern], graph: Graph, nodes: Collection[Node]
) -> list[tuple[Pattern, list[PatternLine]]]:
    """The patterns of which at least half is recognised among `nodes`, the best of each idiom, best first."""
    view = View(graph)
    best: dict[tuple[str, ...], tuple[float, Pattern, list[PatternLine]]] = {}
    for pattern in patterns:
        variant = pattern.variants[0]
        found = _found(variant, view, nodes)
        told = [there for node, there in found.items() if there is not None]
        share = sum(told) / max(len(told), 1)
        # Few steps are soon found: a single product is in every model.
        if share >= 0.5 and sum(told) > 1 and share > best.get(pattern.idioms, (0.0,))[0]:
            best[pattern.idioms] = share, pattern, _lines(variant, found)
    return [(pattern, lines) for _, pattern, lines in sorted(best.values(), key=lambda b: -b[0])]


def _best_variant(miss: NearMiss, view: View) -> Variant:
    def count(variant: Variant) -> float:
        found = _found(variant, view, neighbourhood(miss.node, variant.size))
        told = [there for there in found.values() if there is not None]
        return sum(told) / max(len(told), 1)

    return max(miss.pattern.variants, key=count)


def _found(variant: Variant, view: View, nodes: Collection[Node]) -> dict[Node, bool | None]:
    """For each step of the pattern whether one of the nodes computes such a value; None where that says nothing."""
    values = dict.fromkeys(view.computed[n] for n in nodes if n in view.computed and n.op != "get_attr")
    return {
        node: None if _is_given(value, variant) else any(_unifies(variant, view, value, have) for have in values)
        for node, value in variant.values.items()
        if node.op != "placeholder"
    }


def _is_given(value: sympy.Expr, variant: Variant) -> bool:
    """Whether a value is an input, looked at in some way."""
    if value in variant.kinds:
        return True
    term = variant.terms.terms.get(value)
    return term is not None and term.op not in _TELLING and all(_is_given(arg, variant) for arg in term.args)


_TELLING = {"mean", "linear", "cross_entropy", "sum", "cat"}


def _unifies(variant: Variant, view: View, want: sympy.Expr, have: sympy.Expr) -> bool:
    idle = getattr(want.func, "identity", None)  # `x + eps` is any x where eps is 0: that step would be none
    for bindings in Unifier(variant, view).unify(want, have, {}):
        if all(value != idle for symbol, value in bindings.items() if variant.kinds[symbol] == "constant"):
            return True
    return False


def _lines(variant: Variant, found: dict[Node, bool | None]) -> list[PatternLine]:
    """The lines of the function where they are the pattern's own, and else what they were recorded as."""
    own = _own_lines(variant.pattern)
    steps: dict[str, bool | None] = {}
    astray: set[Node] = set()
    for node, there in found.items():
        follows = not astray.isdisjoint(node.all_input_nodes)
        steps[node.name] = None if follows and not there else there
        if follows or there is False:
            astray.add(node)
    shown: dict[str, tuple[str, list[bool]]] = {}
    for line in listing(variant.graph):
        if line.name in steps:
            key, text = (line.source, line.origin) if line.source in own else (line.name, line.text)
            shown.setdefault(key, (text, []))[1].append(steps[line.name])
    return [PatternLine(text, _together(states)) for text, states in shown.values()]


def _together(states: list[bool | None]) -> bool | None:
    told = [state for state in states if state is not None]
    return all(told) if told else None


def _own_lines(pattern: Pattern) -> set[str]:
    """`file:line` of the lines of the pattern's function."""
    try:
        lines, start = inspect.getsourcelines(pattern.function)
        file = inspect.getsourcefile(pattern.function) or ""
    except (OSError, TypeError):  # written at a prompt
        return set()
    return {f"{file_name(file)}:{start + offset}" for offset in range(len(lines))}
