"""What a report keeps of a program: its code before and after, and the graph, without what it was made from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Graph, Node

from .listing import Line, listing
from .near_misses import NearMiss

if TYPE_CHECKING:
    from .module import Program


@dataclass(eq=False)
class Code:
    """The code of one module, or of several that are alike.

    Attributes:
        before, after: the listings.
        graph: what runs now; None where the module could not be captured.
        near_misses: places in `graph` that were nearly rewritten; None for one that is not there any more.
        dissolved: paths of the modules whose operations stand here.
    """

    before: tuple[Line, ...]
    after: tuple[Line, ...]
    graph: Graph | None
    near_misses: list[NearMiss | None]
    dissolved: frozenset[str]

    @staticmethod
    def of(program: Program) -> Code:
        if program.capture.error is not None:
            return Code((), (), None, [], program.dissolved)
        graph, copies = _copied(program.capture.graph)
        misses = [replace(m, node=copies[m.node]) if m.node in copies else None for m in program.near_misses]
        return Code(program.before, listing(program.capture.graph, program.code), graph, misses, program.dissolved)


def _copied(graph: Graph) -> tuple[Graph, dict[Node, Node]]:
    """A copy whose nodes know tensors and sizes alone: a report must not keep the model alive."""
    copy, copies = Graph(), {}

    def copied(node: Node) -> Node:
        new = copies[node] = copy.node_copy(node, copies.__getitem__)
        new.meta = {key: node.meta[key] for key in ("source", "line", "scope", "pattern") if key in node.meta}
        if _is_known(node.meta.get("val")):
            new.meta["val"] = node.meta["val"]
        return new

    for node in graph.nodes:
        # Those of a layer that nothing else reads are no longer in the graph.
        parameters = {name: copies.get(p) or copied(p) for name, p in node.meta.get("parameters", {}).items()}
        new = copied(node)
        if parameters:
            new.meta["parameters"] = parameters
    return copy, copies


def _is_known(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_known(item) for item in value)
    return isinstance(value, (torch.Tensor, torch.SymInt))
