"""Layered drawing of a directed acyclic graph (Sugiyama, Tagawa and Toda 1981): ranks, order, coordinates."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence

Point = tuple[float, float]
_GAP, _RANK_GAP = 22.0, 34.0
_SWEEPS = 12


def layout(
    sizes: dict[Hashable, Point], edges: Sequence[tuple[Hashable, Hashable]]
) -> tuple[dict[Hashable, Point], list[list[Point]], Point]:
    """Places boxes so that every edge goes down.

    Args:
        sizes: width and height of each box, in a topological order.
        edges: (from, to), each from a box to a later one.

    Returns:
        The centre of each box; for each edge the points that it goes through, from box to box; width and height.
    """
    rank = _ranks(list(sizes), edges)
    box = dict(sizes)
    chains: list[list[Hashable]] = []
    layers: dict[int, list[Hashable]] = defaultdict(list)
    for node in sizes:
        layers[rank[node]].append(node)
    for number, (source, target) in enumerate(edges):  # an edge over several ranks goes through a point in each
        chain = [source]
        for between in range(rank[source] + 1, rank[target]):
            point = ("point", number, between)
            box[point] = (6.0, 0.0)
            layers[between].append(point)
            chain.append(point)
        chains.append([*chain, target])
    above, below = defaultdict(list), defaultdict(list)
    for chain in chains:
        for upper, lower in zip(chain, chain[1:], strict=False):
            above[lower].append(upper)
            below[upper].append(lower)
    order = [layers[r] for r in sorted(layers)]
    _reduce_crossings(order, above, below)
    x = _columns(order, box, above, below)
    left = min(x[node] - box[node][0] / 2 for node in box)
    width = max(x[node] + box[node][0] / 2 for node in box) - left
    places: dict[Hashable, Point] = {}
    through: dict[Hashable, list[Point]] = {}  # an edge passes a layer straight down: it bends between layers only
    bottom = 0.0
    for layer in order:
        height = max(box[node][1] for node in layer)
        for node in layer:
            at = x[node] - left
            places[node] = at, bottom + height / 2
            through[node] = [(at, bottom), (at, bottom + height)]
        bottom += height + _RANK_GAP
    routes = []
    for first, *between, last in chains:
        (x0, y0), (x1, y1) = places[first], places[last]
        start = [(x0, y0 + box[first][1] / 2), through[first][1]]
        end = [through[last][0], (x1, y1 - box[last][1] / 2)]
        route = [*start, *(point for node in between for point in through[node]), *end]
        routes.append([point for point, before in zip(route, [None, *route], strict=False) if point != before])
    return {node: places[node] for node in sizes}, routes, (width, bottom - _RANK_GAP)


def _ranks(nodes: list[Hashable], edges: Sequence[tuple[Hashable, Hashable]]) -> dict[Hashable, int]:
    """Each node below all that lead to it; one that nothing leads to (an input) just above its first use."""
    before, after = defaultdict(list), defaultdict(list)
    for source, target in edges:
        before[target].append(source)
        after[source].append(target)
    rank: dict[Hashable, int] = {}
    for node in nodes:
        rank[node] = max((rank[b] + 1 for b in before[node]), default=0)
    for node in reversed(nodes):
        if not before[node] and after[node]:
            rank[node] = min(rank[a] for a in after[node]) - 1
    return rank


def _reduce_crossings(order: list[list[Hashable]], above: dict, below: dict) -> None:
    """Sorts each layer by the mean position of what it is connected to, down and up in turn."""
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        linked = above if down else below
        for index in range(1, len(order)) if down else range(len(order) - 2, -1, -1):
            other = {node: i for i, node in enumerate(order[index - 1 if down else index + 1])}
            own = {node: i for i, node in enumerate(order[index])}

            def position(node: Hashable, other: dict = other, own: dict = own, linked: dict = linked) -> float:
                places = [other[n] for n in linked[node]]
                return sum(places) / len(places) if places else own[node]

            order[index].sort(key=position)


def _columns(order: list[list[Hashable]], box: dict, above: dict, below: dict) -> dict[Hashable, float]:
    """Where each node of a layer stands: near what it is connected to, without overlap."""
    x: dict[Hashable, float] = {}
    for layer in order:
        _spread(layer, dict.fromkeys(layer, 0.0), box, x)
    for sweep in range(_SWEEPS):
        for layer in order if sweep % 2 == 0 else reversed(order):
            wanted = {}
            for node in layer:
                near = above[node] + below[node]
                wanted[node] = sum(x[n] for n in near) / len(near) if near else x[node]
            _spread(layer, wanted, box, x)
    return x


def _spread(layer: list[Hashable], wanted: dict, box: dict, x: dict[Hashable, float]) -> None:
    """Places a layer near the wanted positions in its order: the mean of pushing to the right and to the left."""
    right, left = {}, {}
    edge = float("-inf")
    for node in layer:
        right[node] = max(wanted[node], edge + box[node][0] / 2)
        edge = right[node] + box[node][0] / 2 + _GAP
    edge = float("inf")
    for node in reversed(layer):
        left[node] = min(wanted[node], edge - box[node][0] / 2)
        edge = left[node] - box[node][0] / 2 - _GAP
    for node in layer:
        x[node] = (right[node] + left[node]) / 2
