"""Near misses: what looks like a pattern and is not rewritten, how far it came, and which of many to tell of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import sympy
from torch.fx import Node

from .pattern import Pattern

if TYPE_CHECKING:
    from .unifier import Unifier


NEARLY = 0.5
"""The share of a pattern that must have been recognised for a failure to be reported."""

UNPROVED, MISFIT, OBSTRUCTED = 0.995, 1.1, 1.2
"""How far a match came that was proposed but could not be used if it were proved, one whose inputs do not fit, and one
that was proved but cannot be used."""


@dataclass(eq=False)
class NearMiss:
    """Something that looks like a pattern and is not rewritten."""

    pattern: Pattern
    node: Node
    reason: str
    share: float  # of the pattern that was recognised

    @property
    def source(self) -> str:
        return self.node.meta.get("source", "?")


def best_near_misses(misses: dict[Node, Unifier], taken: set[Node], values: dict[Node, sympy.Expr]) -> list[NearMiss]:
    """Near misses away from any match, one for each place: of neighbouring ones the most complete."""
    kept: list[NearMiss] = []
    computed = {values[node] for node in taken if node in values}
    covered = taken | {node for node, value in values.items() if value in computed}
    for node, miss in sorted(misses.items(), key=lambda item: -item[1].share):
        pattern = miss.variant.pattern
        place = neighbourhood(node, miss.size)
        if place & covered:
            continue
        pair = len(pattern.variants[0].outputs) > 1  # its outputs alone look alike
        reason = miss.reason
        if not (pair and any(k.pattern is pattern and k.reason == reason for k in kept)):
            kept.append(NearMiss(pattern, node, reason, miss.share))
            covered |= place
    return kept


def neighbourhood(node: Node, reach: int) -> set[Node]:
    """The node and the operations up to `reach` steps before it, inputs and parameters left out."""
    seen: set[Node] = set()
    front = {node}
    for _ in range(reach + 1):
        seen |= front
        front = {i for n in front for i in n.all_input_nodes if i.op in ("call_function", "call_method")} - seen
    return seen
