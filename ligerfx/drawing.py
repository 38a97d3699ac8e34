"""`draw`: the graph of a module as SVG."""

from __future__ import annotations

import html
import operator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

from .errors import LigerfxError
from .layout import Point, layout
from .operations import op_name
from .size_names import SizeNames

_LETTER, _LINE, _PADDING = 7.3, 15.0, 9.0
_MARGIN = 10.0

_LIGHT = (
    "--page: #fff; --box: #f6f7f9; --text: #1c2128; --muted: #667080; --edge: #8a94a3; --fused: #dcebff; "
    "--fused-edge: #2f6fd0; --module: #eef4e8; --module-edge: #6f9a4a"
)
_DARK = (
    "--page: #15181d; --box: #22272e; --text: #dfe3ea; --muted: #98a2b1; --edge: #6b7686; --fused: #1a3356; "
    "--fused-edge: #7fb0ff; --module: #26331d; --module-edge: #8fbf66"
)
# Notebooks and sites have themes of their own, which count more than the system's.
_STYLE = f"""
.lfx-graph {{ {_LIGHT} }}
@media (prefers-color-scheme: dark) {{ .lfx-graph {{ {_DARK} }} }}
[data-jp-theme-light="true"] .lfx-graph, .vscode-light .lfx-graph {{ {_LIGHT} }}
[data-jp-theme-light="false"] .lfx-graph, .vscode-dark .lfx-graph {{ {_DARK} }}
[data-md-color-scheme="default"] .lfx-graph {{ {_LIGHT} }}
[data-md-color-scheme="slate"] .lfx-graph {{ {_DARK} }}
.lfx-graph {{ background: var(--page) }}
.lfx-graph text {{ font: 12px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; fill: var(--text);
  text-anchor: middle }}
.lfx-graph .small {{ font-size: 11px; fill: var(--muted) }}
.lfx-graph rect {{ fill: var(--box); stroke: var(--edge) }}
.lfx-graph .fused rect {{ fill: var(--fused); stroke: var(--fused-edge); stroke-width: 2 }}
.lfx-graph .module rect {{ fill: var(--module); stroke: var(--module-edge) }}
.lfx-graph path {{ fill: none; stroke: var(--edge); stroke-width: 1.3 }} .lfx-graph marker path {{ fill: var(--edge) }}
"""


@dataclass(frozen=True, repr=False)
class Drawing:
    """The graph of a module as SVG; shows itself in a notebook."""

    svg: str

    def __repr__(self) -> str:
        return f"<Drawing, {len(self.svg)} characters of SVG: to_svg(path) writes it>"

    def _repr_html_(self) -> str:
        return f'<div style="overflow-x: auto">{self.svg}</div>'

    def to_svg(self, path: str | Path) -> None:
        """Writes the drawing to a file."""
        Path(path).write_text(self.svg, encoding="utf-8")


@dataclass
class _Box:
    kind: str
    lines: list[str]

    @property
    def size(self) -> Point:
        return max(map(len, self.lines)) * _LETTER + 2 * _PADDING, len(self.lines) * _LINE + _PADDING


def draw(model: nn.Module, module: str = "") -> Drawing:
    """Draws the graph of a module, from its inputs down to its result. Fused calls are blue, modules green.

    Parameters are named in the box of the call that reads them. Taking one result out of several is no box, nor is
    asking for a size. Made for graphs of a dozen to fifty operations, such as a decoder layer's.

    Args:
        model: what `optimize` returned, or any `torch.fx.GraphModule`.
        module: path of a module in it; "" is the model itself.

    Returns:
        The drawing: shows in a notebook; `svg` is its text, and `to_svg(path)` writes it.

    Raises:
        LigerfxError: the module has no graph.

    Examples:
        >>> import torch, ligerfx
        >>> gm = ligerfx.optimize(torch.nn.Sequential(torch.nn.RMSNorm(64)), torch.randn(2, 64))
        >>> ligerfx.draw(gm, "0").svg.count('class="fused"')
        1
    """
    named = dict(model.named_modules())
    target = named.get(module)
    if not isinstance(target, GraphModule):
        have = ", ".join(repr(path) for path, m in named.items() if isinstance(m, GraphModule)) or "none"
        what = f"{type(target).__name__} {module!r}" if target is not None else f"{module!r}"
        raise LigerfxError(f"{what} has no graph to draw; those with one: {have[:300]}")
    boxes, edges = _boxes(target.graph)
    return Drawing(_svg(boxes, edges))


def _boxes(graph: Graph) -> tuple[dict[Node, _Box], list[tuple[Node, Node]]]:
    """What is drawn: a box for each operation, and an edge for each value that goes from one to another."""
    names = SizeNames(graph)
    boxes: dict[Node, _Box] = {}
    sources: dict[Node, list[Node]] = {}  # the boxes that a node's value comes from
    edges: list[tuple[Node, Node]] = []
    for node in graph.nodes:
        if _is_no_box(node):
            taken = node.target is operator.getitem
            sources[node] = [] if not taken else [s for i in node.all_input_nodes for s in sources[i]]
            continue
        parameters = [str(i.target) for i in node.all_input_nodes if i.op == "get_attr"]
        kind = "fused" if "pattern" in node.meta else "module" if node.op == "call_module" else node.op
        boxes[node] = _Box(kind, [_title(node), *parameters, *_shape(node, names)])
        sources[node] = [node]
        edges += dict.fromkeys((s, node) for i in node.all_input_nodes for s in sources[i])
    drawn = {end for edge in edges for end in edge}
    return {node: box for node, box in boxes.items() if node in drawn or node.op == "output"}, edges


def _is_no_box(node: Node) -> bool:
    if node.op == "get_attr" or node.target == "size" or isinstance(node.meta.get("val"), torch.SymInt):
        return True
    return (
        node.target is operator.getitem
        and isinstance(node.args[1], int)
        and not isinstance(node.args[0].meta.get("val"), torch.Tensor)
    )


def _title(node: Node) -> str:
    if node.op in ("placeholder", "output"):
        return node.name
    if node.op == "call_module":
        return str(node.target)
    return op_name(node) or getattr(node.target, "__name__", str(node.target))


def _shape(node: Node, names: SizeNames) -> list[str]:
    val = node.meta.get("val")
    return [] if node.op == "output" or not isinstance(val, torch.Tensor) else [names.shape(val)]


def _svg(boxes: dict[Node, _Box], edges: list[tuple[Node, Node]]) -> str:
    places, routes, (width, height) = layout({node: box.size for node, box in boxes.items()}, edges)
    width, height = width + 2 * _MARGIN, height + 2 * _MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="lfx-graph" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="{-_MARGIN:.0f} {-_MARGIN:.0f} {width:.0f} {height:.0f}"><style>{_STYLE}</style>'
        '<defs><marker id="lfx-arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><path d="M0 0L8 4L0 8z"/></marker></defs>'
    ]
    parts += [f'<path d="{_curve(route)}" marker-end="url(#lfx-arrow)"/>' for route in routes]
    for node, box in boxes.items():
        (x, y), (w, h) = places[node], box.size
        radius = h / 2 if box.kind in ("placeholder", "output") else 4
        parts.append(f'<g class="{box.kind}"><title>{html.escape(_tooltip(node))}</title>')
        parts.append(
            f'<rect x="{x - w / 2:.1f}" y="{y - h / 2:.1f}" width="{w:.1f}" height="{h:.1f}" rx="{radius:.0f}"/>'
        )
        for number, line in enumerate(box.lines):
            below = y - h / 2 + _PADDING / 2 + number * _LINE + 11
            small = ' class="small"' if number else ""
            parts.append(f'<text x="{x:.1f}" y="{below:.1f}"{small}>{html.escape(line)}</text>')
        parts.append("</g>")
    return "".join([*parts, "</svg>"])


def _curve(points: list[Point]) -> str:
    path = f"M{points[0][0]:.1f} {points[0][1]:.1f}"
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        middle = (y0 + y1) / 2
        if abs(x0 - x1) < 0.1:
            path += f"L{x1:.1f} {y1:.1f}"
            continue
        path += f"C{x0:.1f} {middle:.1f} {x1:.1f} {middle:.1f} {x1:.1f} {y1:.1f}"
    return path


def _tooltip(node: Node) -> str:
    source, line = node.meta.get("source") or "", node.meta.get("line") or ""
    return f"{node.name}\n{source}  {line}".strip()
