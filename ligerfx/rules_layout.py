"""Rules for layout: operations that only move elements, as slices, concatenations and views.

Dimensions count from the end, slices of slices are one, and a view is described by what it does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch.fx import Node

from .operations import op_name
from .rules import rule
from .symbols import expression

if TYPE_CHECKING:
    from .canonical import Canonicalizer

_RESHAPES = ("view", "reshape", "flatten", "unflatten", "view_as", "reshape_as")


@rule("pad")
def _pad(c: Canonicalizer, node: Node, x: Node, pad: Sequence, mode: str = "constant", value: Any = None) -> Any:
    return c.term(node, "pad", (tuple(pad), mode, value or 0), c.value(x))


@rule("cat", "concat", "concatenate")
def _cat(c: Canonicalizer, node: Node, tensors: Sequence[Node], dim: int = 0) -> sympy.Expr | None:
    rank = node.meta["val"].ndim
    dtype = node.meta["val"].dtype
    if any(t.meta["val"].ndim != rank for t in tensors):
        return None
    tensors = [t for t in tensors if expression(t.meta["val"].shape[dim]) != 0]
    values = [c.widened(c.value(t), t.meta["val"].dtype, dtype) for t in tensors]
    return values[0] if len(values) == 1 else c.term(node, "cat", (dim % rank - rank,), *values)


def _slice(
    c: Canonicalizer, node: Node, value: sympy.Expr, size: Any, dim: int, start: Any, stop: Any, step: int = 1
) -> sympy.Expr:
    """`value[..., start:stop:step]` in dimension `dim` (from the end), of length `size`; slices of slices are one."""
    start, stop, size = expression(start), expression(stop), expression(size)
    if start == 0 and stop == size and step == 1:
        return value
    term = c.terms.terms.get(value)
    if term is not None and term.op == "slice" and term.attrs[:2] == (dim, 1):
        offset, value = term.attrs[2], term.args[0]
        start, stop = start + offset, stop + offset
    return c.term(node, "slice", (dim, step, start, stop), value)


def _bound(index: Any, size: Any, default: Any) -> Any:
    if isinstance(index, Node):
        index = index.meta["val"]
    if index is None:
        return default
    if isinstance(index, int) and index < 0:
        return index + size
    if isinstance(index, int) and isinstance(size, int):
        return min(index, size)
    return index


@rule("getitem")
def _getitem(c: Canonicalizer, node: Node, x: Node, index: Any) -> sympy.Expr | None:
    source = x.meta.get("val")
    if not isinstance(source, torch.Tensor):
        return _piece(c, node, x, index)
    index = index if isinstance(index, tuple) else (index,)
    if index[0] is Ellipsis and len(index) == 2 and type(index[1]) is int:
        return _select(c, node, x, -1, index[1])
    if not all(i is None or i is Ellipsis or isinstance(i, slice) for i in index):
        return None
    if Ellipsis in index:
        at = index.index(Ellipsis)
        missing = source.ndim - sum(isinstance(i, slice) for i in index)
        index = index[:at] + (slice(None),) * missing + index[at + 1 :]
    index = index + (slice(None),) * (source.ndim - sum(isinstance(i, slice) for i in index))
    value, dim, inserted = c.value(x), 0, []
    for position, item in enumerate(index):
        if item is None:
            inserted.append(position)
            continue
        if item.step not in (None, 1) and item.stop is None:
            if type(item.step) is not int:
                return None
            value = c.term(node, "strided", (dim - source.ndim, item.start or 0, item.step), value)
            dim += 1
            continue
        step = 1 if item.step is None else item.step
        if type(step) is not int:
            return None
        size = source.shape[dim]
        start, stop = _bound(item.start, size, 0), _bound(item.stop, size, size)
        value = _slice(c, node, value, size, dim - source.ndim, start, stop, step)
        dim += 1
    for position in inserted:
        value = _unsqueezed(c, node, value, position - len(index))
    return value


def _piece(c: Canonicalizer, node: Node, pieces: Node, index: int) -> sympy.Expr | None:
    """Element `index` of what chunk, split or unbind gave."""
    if op_name(pieces) == "unbind":
        dim = pieces.kwargs.get("dim", pieces.args[1] if len(pieces.args) > 1 else 0)
        return _select(c, node, pieces.args[0], dim, index)
    if op_name(pieces) not in ("chunk", "split"):
        return None
    source, outs = pieces.args[0], pieces.meta["val"]
    dim = pieces.kwargs.get("dim", pieces.args[2] if len(pieces.args) > 2 else 0)
    x = source.meta["val"]
    dim = dim % x.ndim - x.ndim
    start = sum(outs[i].shape[dim] for i in range(index))
    return _slice(c, node, c.value(source), x.shape[dim], dim, start, start + outs[index].shape[dim])


@rule("select")
def _select(c: Canonicalizer, node: Node, x: Node, dim: int, index: int) -> sympy.Expr:
    """One index of a dimension. Where the last dimension was split into two, a part of what was split."""
    rank = x.meta["val"].ndim
    dim, source = dim % rank - rank, _before_split(x)
    size = x.meta["val"].shape[dim]
    if source is not None and dim == -1:
        return c.term(node, "strided", (-1, index % size, size), c.value(source))
    if source is not None and dim == -2:
        width = x.meta["val"].shape[-1]
        start = (index % size) * width
        return _slice(c, node, c.value(source), source.meta["val"].shape[-1], -1, start, start + width)
    return c.term(node, "select", (dim, index), c.value(x))


def _before_split(x: Node) -> Node | None:
    """What a view whose two last dimensions are one dimension of its source is made from."""
    if op_name(x) not in _RESHAPES or not isinstance(x.args[0], Node):
        return None
    shape, source = x.meta["val"].shape, x.args[0].meta["val"].shape
    split = len(shape) == len(source) + 1 and all(isinstance(s, int) for s in (*shape[-2:], source[-1]))
    same = split and list(map(expression, shape[:-2])) == list(map(expression, source[:-1]))
    return x.args[0] if same else None


@rule("view_as_complex")
def _view_as_complex(c: Canonicalizer, node: Node, x: Node) -> sympy.Expr:
    term = c.terms.terms.get(c.value(x))
    if term is not None and term.op == "stack" and term.attrs == (-1,):
        real, imaginary = term.args
    else:
        real, imaginary = (_select(c, x, x, -1, index) for index in (0, 1))
    return real + sympy.I * imaginary


@rule("view_as_real")
def _view_as_real(c: Canonicalizer, node: Node, x: Node) -> sympy.Expr:
    terms = sympy.Add.make_args(sympy.expand(c.parts(c.value(x))))
    real = sympy.Add(*(t for t in terms if not t.has(sympy.I)))
    imaginary = sympy.Add(*(t / sympy.I for t in terms if t.has(sympy.I)))
    return c.term(node, "stack", (-1,), real, imaginary)


@rule("narrow")
def _narrow(c: Canonicalizer, node: Node, x: Node, dim: int, start: Any, length: Any) -> sympy.Expr:
    val = x.meta["val"]
    start, length = (n.meta["val"] if isinstance(n, Node) else n for n in (start, length))
    return _slice(c, node, c.value(x), val.shape[dim], dim % val.ndim - val.ndim, start, start + length)


def _unsqueezed(c: Canonicalizer, node: Node, value: sympy.Expr, dim: int) -> sympy.Expr:
    term = c.terms.terms.get(value)
    if term is not None and term.op == "squeeze" and term.attrs == ((dim,),):
        return term.args[0]
    return c.term(node, "unsqueeze", (dim,), value)


@rule("unsqueeze")
def _unsqueeze(c: Canonicalizer, node: Node, x: Node, dim: int) -> sympy.Expr:
    rank = node.meta["val"].ndim
    return _unsqueezed(c, node, c.value(x), dim % rank - rank)


@rule(*_RESHAPES)
def _reshape(c: Canonicalizer, node: Node, x: Node, *args: Any, **kwargs: Any) -> sympy.Expr | None:
    if args and isinstance(args[0], torch.dtype):
        return None
    shape = tuple(expression(s) for s in node.meta["val"].shape)
    if shape == tuple(expression(s) for s in x.meta["val"].shape):
        return c.value(x)
    source = x
    while op_name(source) in _RESHAPES:  # a chain of views is what its end looks like
        source = source.args[0]
        if shape == tuple(expression(s) for s in source.meta["val"].shape):
            return c.value(source)
    value = c.value(x)
    term = c.terms.terms.get(value)
    before = tuple(expression(s) for s in x.meta["val"].shape)
    if term is not None and term.op == "stack" and shape == (*before[:-2], before[-2] * before[-1]):
        if term.attrs == (-1,):  # pairs, one after the other
            return c.term(node, "interleave", (), *term.args)
        if term.attrs == (-2,):
            return c.term(node, "cat", (-1,), *term.args)
    return c.term(node, "reshape", (shape,), term.args[0] if term is not None and term.op == "reshape" else value)


@rule("transpose", "permute", "t", "swapaxes")
def _permute(c: Canonicalizer, node: Node, x: Node, *args: Any) -> sympy.Expr:
    rank = x.meta["val"].ndim
    order = list(range(rank))
    if op_name(node) == "permute":
        dims = args[0] if isinstance(args[0], (tuple, list)) else args
        order = [d % rank for d in dims]
    else:
        a, b = (args[0] % rank, args[1] % rank) if args else (0, rank - 1)
        order[a], order[b] = order[b], order[a]
    return c.term(node, "permute", (tuple(d - rank for d in order),), c.value(x))


@rule("stack")
def _stack(c: Canonicalizer, node: Node, tensors: Sequence[Node], dim: int = 0) -> sympy.Expr:
    val = node.meta["val"]
    values = [c.widened(c.value(t), t.meta["val"].dtype, val.dtype) for t in tensors]
    return c.term(node, "stack", (dim % val.ndim - val.ndim,), *values)


@rule("repeat_interleave")
def _repeat_interleave(c: Canonicalizer, node: Node, x: Node, repeats: Any, dim: Any = None, **_: Any) -> Any:
    if type(repeats) is not int or type(dim) is not int:
        return None
    rank = node.meta["val"].ndim
    return c.term(node, "repeat_interleave", (repeats, dim % rank - rank), c.value(x))


@rule("expand", "expand_as", "broadcast_to")
def _expand(c: Canonicalizer, node: Node, x: Node, *args: Any) -> sympy.Expr:
    return c.term(node, "expand", (tuple(expression(s) for s in node.meta["val"].shape),), c.value(x))
