"""Listings: the generated code of a graph, a line a node, each with the model's own line that it comes from."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch.fx import Graph

_FREED = re.compile(r";  \w+(?: = \w+)* = None$")
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class Line:
    """One line of generated code.

    Attributes:
        text: the code, without the indentation of the function.
        name: the node that the line computes; "" for the signature and the `return`.
        source: `file:line` of the model's code that asked for it, "" where that is not known.
        origin: the text of that line.
    """

    text: str
    name: str = ""
    source: str = ""
    origin: str = ""


def listing(graph: Graph, code: str | None = None) -> tuple[Line, ...]:
    """The generated code of `graph`, or `code`, if it was generated before.

    What torch.fx adds to free values after their last use is left out, and so are parameters that nothing uses.
    """
    nodes = {node.name: node for node in graph.nodes}
    lines = []
    for text in (graph.python_code("self").src if code is None else code).strip().splitlines():
        text = _FREED.sub("", text.strip())
        name = text.split(" ", 1)[0] if " = " in text else ""
        node = nodes.get(name)
        if node is None:
            if text and not text.startswith(("import ", "from ")):
                lines.append(Line(text))
        elif node.users or node.op != "get_attr":
            lines.append(Line(text, name, node.meta.get("source") or "", node.meta.get("line") or ""))
    return tuple(lines)


def folded(lines: Sequence[Line], same: Callable[[Line], object] = lambda line: None) -> Iterator[tuple[Line, int]]:
    """The lines, those of one layer after another once each: (first line, how many alike follow and are left out).

    Lines are alike if they differ in numbers alone, come from the same line of the model, and agree in `same`.
    """
    start = 0
    while start < len(lines):
        kind = _kind(lines[start]), same(lines[start])
        end = start + 1
        while end < len(lines) and (_kind(lines[end]), same(lines[end])) == kind and lines[start].source:
            end += 1
        if end - start > 3:
            yield lines[start], end - start - 1
        else:
            yield from ((line, 0) for line in lines[start:end])
        start = end


def _kind(line: Line) -> tuple[str, str]:
    # The first layer gets its input from another line than the rest do: names are numbers here, too.
    call = line.text.partition(" = ")[2]
    return _NUMBER.sub("#", re.sub(r"\((\w+),", "(#,", call, count=1) if "self" in call else call), line.source
