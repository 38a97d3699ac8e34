"""What replaced code costs in memory and bandwidth, told from the shapes in its graph.

Nothing is measured here. Figures are bytes for one token: sizes that come from the inputs (batch, sequence) count as 1.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from dataclasses import astuple, dataclass

import torch
from torch.fx import Node

from .deferred import deferred_logits
from .matches import Match
from .operations import CASTS, op_name
from .symbols import expression

_VIEWS = {
    "view", "reshape", "flatten", "unflatten", "view_as", "reshape_as", "transpose", "permute", "t", "swapaxes",
    "expand", "expand_as", "broadcast_to", "unsqueeze", "squeeze", "getitem", "select", "narrow", "chunk", "split",
    "unbind", "detach", "contiguous",
}  # fmt: skip
_PRODUCTS = {"linear", "linear_module", "matmul", "mm", "bmm", "addmm"}
_KEEP_INPUTS = {"pow", "square", "silu", "gelu", *_PRODUCTS}
_KEEP_FACTORS = {"mul", "truediv", "div"}  # each for the gradient of the other
_KEEP_RESULT = {"rsqrt", "sqrt", "reciprocal", "sigmoid", "tanh", "exp", "relu"}
_KEEP_AS_MUCH = {"cross_entropy"}  # the log-probabilities, as large as the logits
"""What autograd keeps for the backward of an operation."""


@dataclass(frozen=True)
class Cost:
    """Bytes a token, in the forward pass, of the replaced code and of what replaces it.

    Attributes:
        written_before, written_after: intermediate results that are written as a whole. Of what replaces it, these are
            what matrix products inside multiply, and their own results.
        kept_before, kept_after: those of them that are kept for the backward. A few numbers a row are not counted.
        moved_before, moved_after: what is read and written, by each of the replaced operations on its own; and if
            inputs are read once and outputs are written once, but matrix products inside still read and write what
            they did.
    """

    written_before: int = 0
    written_after: int = 0
    kept_before: int = 0
    kept_after: int = 0
    moved_before: int = 0
    moved_after: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, tokens: int) -> Cost:
        return Cost(*(value * tokens for value in astuple(self)))


def cost(match: Match) -> Cost:
    """The cost of what a match replaces. Only before it is rewritten does the graph tell."""
    replace = match.pattern.replace
    outputs = dict(zip(match.outputs, [replace] * len(match.outputs) if callable(replace) else replace, strict=True))
    made = [node for node, function in outputs.items() if function is not deferred_logits]
    inside = match.interior - set(made)
    kept: set[Node] = set()
    multiplied: set[Node] = set()
    last: set[Node] = set()
    # Kernels that end in a matrix product say by `recompute=False` that they keep what it multiplies. The results of
    # other products, which are not computed twice, are kept in any case.
    recomputes = getattr(replace, "keywords", {}).get("recompute") is not False
    log_probabilities = before = after = 0
    for node in match.interior:
        name = op_name(node) or ""
        inputs = [i for i in node.all_input_nodes if i.op != "get_attr"]  # reading parameters costs both the same
        is_product_of_tensors = name in _KEEP_FACTORS and sum(isinstance(arg, Node) for arg in node.args) > 1
        if is_product_of_tensors or name in _KEEP_INPUTS:
            kept |= {_base(i, match.interior) for i in inputs}
        if name in _KEEP_RESULT:
            kept.add(node)
        if name in _KEEP_AS_MUCH:
            log_probabilities += size(inputs[:1])
        if not _is_free(node):
            before += size([*inputs, node])
        if name in _PRODUCTS:
            factors = {_base(i, match.interior) for i in inputs} & inside
            multiplied |= factors
            last |= factors if node in made else set()
            after += size(inputs)  # read
            used_inside = not node.users.keys().isdisjoint(match.interior)
            after += size([node]) * ((node in inside) + used_inside)  # written; read
    after += size(multiplied) + size(dict.fromkeys([*match.inputs.values(), *made]))
    written = size(n for n in inside if not _is_free(n))
    products = {n for n in inside if op_name(n) in _PRODUCTS} if last else set()
    kept_after = size(products | (set() if recomputes else last))
    written_after = size(products | multiplied)
    return Cost(written, written_after, size(kept & inside) + log_probabilities, kept_after, before, after)


def _is_free(node: Node) -> bool:
    name = op_name(node)
    if name in CASTS:
        source, val = node.args[0].meta.get("val"), node.meta["val"]
        return isinstance(source, torch.Tensor) and source.dtype == val.dtype
    return name in _VIEWS


def _base(node: Node, interior: set[Node]) -> Node:
    """What a node is a view of."""
    while node in interior and _is_free(node) and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def size(nodes: Iterable[Node]) -> int:
    """Bytes a token of the floating-point tensors that nodes stand for, parameters left out."""
    total = 0
    for node in nodes:
        val = node.meta.get("val")
        if node.op != "get_attr" and isinstance(val, torch.Tensor) and val.is_floating_point():
            with contextlib.suppress(ZeroDivisionError):  # a division of sizes, of which one token has none
                total += math.prod(_for_one_token(s) for s in val.shape) * val.element_size()
    return total


def _for_one_token(size: int | torch.SymInt) -> int:
    expr = expression(size)
    return int(expr.subs(dict.fromkeys(expr.free_symbols, 1))) if expr.args else 1 if expr.is_Symbol else int(expr)
