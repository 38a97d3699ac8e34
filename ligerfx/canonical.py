"""Canonical values: what a node computes, however it is spelled.

Pointwise arithmetic becomes a sympy expression, so operand order, methods against operators, `rsqrt` against
`1 / sqrt`, `silu` against `x * sigmoid(x)` are all one. Everything else (reductions, slices, `cat`, linear
layers) becomes a term, a sympy symbol that stands for an operation on canonical values; equal terms are one
symbol. Dimensions count from the end, and views are described by what they do, not by how they were asked for.

Rounding is part of the value: where bf16 arithmetic is followed by fp32 arithmetic, or a value is cast down,
there is a `round` term. A cast that changes no value (fp32 to fp32, or an input widened) leaves none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import Node

from .capture import works_in_place
from .symbols import expression

_PRECISION = {torch.float16: 16, torch.bfloat16: 16, torch.float32: 32, torch.float64: 64}


class Constant:
    """A captured constant of a pattern, while the pattern is traced: an ordinary number or string with a name."""

    symbol: sympy.Symbol


class ConstantFloat(float, Constant):
    pass


class ConstantInt(int, Constant):
    pass


class ConstantStr(str, Constant):
    pass


def constant(symbol: sympy.Symbol, value: float | int | str) -> Any:
    """`value`, marked so that the canonical form shows `symbol` in its place."""
    cls = {float: ConstantFloat, int: ConstantInt, str: ConstantStr}[type(value)]
    marked = cls(value)
    marked.symbol = symbol
    return marked


@dataclass(frozen=True)
class Term:
    """An operation that is not pointwise arithmetic: `op` with static `attrs` on canonical `args`.

    Leaves of a graph (inputs, parameters, calls that nothing is known about) are terms with op "leaf".
    """

    op: str
    attrs: tuple
    args: tuple[sympy.Expr, ...]


class Terms:
    """Table of terms: equal terms share a symbol."""

    def __init__(self, prefix: str = "t") -> None:
        self.prefix = prefix
        self.symbols: dict[Term, sympy.Symbol] = {}
        self.terms: dict[sympy.Symbol, Term] = {}
        self.dtypes: dict[sympy.Symbol, torch.dtype | None] = {}

    def symbol(self, op: str, attrs: tuple, args: Sequence[sympy.Expr], dtype: torch.dtype | None) -> sympy.Symbol:
        term = Term(op, attrs, tuple(args))
        if term not in self.symbols:
            symbol = sympy.Symbol(f"{self.prefix}{len(self.symbols)}", real=True)
            self.symbols[term] = symbol
            self.terms[symbol] = term
            self.dtypes[symbol] = dtype
        return self.symbols[term]


def normal(expr: sympy.Expr) -> sympy.Expr:
    """One form for algebraically equal expressions: multiplied out, floats rounded beyond fp32 resolution."""
    expanded = decimal(sympy.expand(expr, power_base=False, power_exp=False, log=False))
    return expanded.xreplace({f: number(float(f"{float(f):.9g}")) for f in expanded.atoms(sympy.Float)})


def decimal(expr: sympy.Expr) -> sympy.Expr:
    """`expr` with every fraction as a float and every whole float as an integer: one spelling of constants."""
    constants = {a for a in expr.atoms(sympy.Rational, sympy.Float) if not a.is_Integer}
    return expr.xreplace({c: number(float(c)) for c in constants}) if constants else expr


def number(value: float | int) -> sympy.Expr:
    if isinstance(value, Constant):
        return value.symbol
    if isinstance(value, float) and not value.is_integer():
        return sympy.Float(value) if math.isfinite(value) else sympy.Symbol(f"number_{value}")
    return sympy.Integer(int(value))


class Canonicalizer:
    """Canonical values of the nodes of one graph.

    Args:
        terms: the table that the values refer to.
        cuts: nodes whose value is taken as given, with the symbol that stands for it.
        rounding: False drops every cast and rounding, for a first, approximate comparison.
    """

    def __init__(self, terms: Terms, cuts: dict[Node, sympy.Symbol] | None = None, rounding: bool = True) -> None:
        self.terms = terms
        self.rounding = rounding
        self._values: dict[Node, sympy.Expr] = dict(cuts or {})

    def value(self, node: Node) -> sympy.Expr:
        if node not in self._values:
            self._values[node] = self._compute(node)
        return self._values[node]

    def _compute(self, node: Node) -> sympy.Expr:
        result = None
        if isinstance(node.meta.get("val"), torch.Tensor):
            name = op_name(node)
            rule = _RULES.get(name) if name else None
            if rule is not None:
                result = rule(self, node, *node.args, **node.kwargs)
            if result is None and name and node.op != "call_module" and name not in _IMPURE:
                result = self._call(node, name)
        return self.leaf(node) if result is None else result

    def _call(self, node: Node, name: str) -> sympy.Expr | None:
        """An operation without a rule of its own: the same call on the same values is the same value."""
        if works_in_place(name, node.kwargs):
            return None
        operands: list[sympy.Expr] = []

        def attribute(value: Any) -> Any:
            if isinstance(value, Node):
                operands.append(self.value(value))
                return "operand", len(operands)
            if isinstance(value, (tuple, list)):
                return tuple(attribute(v) for v in value)
            return value if isinstance(value, Hashable) else repr(value)

        args = tuple(attribute(a) for a in node.args)
        kwargs = tuple((key, attribute(node.kwargs[key])) for key in sorted(node.kwargs))
        return self.term(node, name, (args, kwargs), *operands)

    def take(self, node: Node) -> sympy.Symbol:
        """From here on, the value of `node` is taken as given."""
        self._values[node] = self.leaf(node)
        return self._values[node]

    def leaf(self, node: Node) -> sympy.Symbol:
        val = node.meta.get("val")
        return self.terms.symbol("leaf", (node,), (), val.dtype if isinstance(val, torch.Tensor) else None)

    def term(self, node: Node, op: str, attrs: tuple, *args: sympy.Expr) -> sympy.Symbol:
        return self.terms.symbol(op, attrs, [normal(a) for a in args], node.meta["val"].dtype)

    def operand(self, node: Node, value: Any) -> sympy.Expr | None:
        """The value of an operand of the pointwise `node`, rounded where its own dtype is the narrower one."""
        if isinstance(value, Node):
            val = value.meta.get("val")
            if isinstance(val, torch.SymInt):
                return expression(val)
            if not isinstance(val, torch.Tensor):
                return self.leaf(value)
            return self.widened(self.value(value), val.dtype, node.meta["val"].dtype)
        return number(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None

    def widened(self, expr: sympy.Expr, source: torch.dtype, target: torch.dtype) -> sympy.Expr:
        """`expr`, computed in `source`, seen from arithmetic in `target`."""
        narrower = _PRECISION.get(source, 64) < _PRECISION.get(target, 0)
        if narrower and self.rounding and not expr.is_Symbol and not expr.is_number:
            return self.terms.symbol("round", (source,), [normal(expr)], source)
        return expr

    def cast(self, expr: sympy.Expr, source: torch.dtype, target: torch.dtype, node: Node) -> sympy.Expr:
        if source == target:
            return expr
        if source not in _PRECISION or target not in _PRECISION:
            return self.term(node, "cast", (target,), expr)
        if not self.rounding:
            return expr
        if _PRECISION[source] < _PRECISION[target]:
            return self.widened(expr, source, target)
        exact = expr.is_Symbol and self.terms.dtypes.get(expr) == target
        return expr if exact else self.terms.symbol("round", (target,), [normal(expr)], target)


def is_cast(node: Node) -> bool:
    return _RULES.get(op_name(node) or "") is _cast


def op_name(node: Node) -> str | None:
    """The operation of a node by its common name, None for what has none."""
    if node.op == "call_method":
        return node.target
    if node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        module = getattr(node.target, "__module__", "") or ""
        from_torch = module.split(".")[0] in ("torch", "_operator") or node.target in vars(torch).values()
        return name if from_torch else None
    if node.op == "call_module" and "parameters" in node.meta:
        return "linear_module"
    return None


def is_pure(node: Node) -> bool:
    """Whether the node is an operation of torch that gives the same wherever in the graph it stands."""
    name = op_name(node)
    return name is not None and node.op != "call_module" and name not in _IMPURE


_RULES: dict[str, Callable[..., sympy.Expr | None]] = {}
_IMPURE = {
    "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "rrelu",
    "gumbel_softmax", "scaled_dot_product_attention", "multi_head_attention_forward", "bernoulli", "multinomial",
    "normal", "poisson", "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "empty",
    "empty_like", "setitem",
}  # fmt: skip
"""Operations that may give another result for the same arguments, or whose effect is elsewhere."""


def _rule(*names: str) -> Callable:
    def register(function: Callable) -> Callable:
        for name in names:
            _RULES[name] = function
        return function

    return register


def _pointwise(*names: str) -> Callable:
    """Registers arithmetic on operand values. A call with keyword arguments or other operands is left opaque."""

    def register(function: Callable) -> Callable:
        def rule(c: Canonicalizer, node: Node, *args: Any, **kwargs: Any) -> sympy.Expr | None:
            if any(v not in (None, False) for v in kwargs.values()):
                return None
            operands = [c.operand(node, a) for a in args]
            if None in operands or not node.meta["val"].is_floating_point():
                return None
            return decimal(function(*operands))

        for name in names:
            _RULES[name] = rule
        return function

    return register


_pointwise("add")(lambda a, b: a + b)
_pointwise("sub")(lambda a, b: a - b)
_pointwise("mul", "multiply")(lambda a, b: a * b)
_pointwise("truediv", "div", "divide", "true_divide")(lambda a, b: a / b)
_pointwise("neg", "negative")(lambda a: -a)
_pointwise("pow")(lambda a, b: a**b)
_pointwise("square")(lambda a: a**2)
_pointwise("sqrt")(lambda a: a ** sympy.Float(0.5))
_pointwise("rsqrt")(lambda a: a ** sympy.Float(-0.5))
_pointwise("reciprocal")(lambda a: 1 / a)
_pointwise("exp")(lambda a: sympy.exp(normal(a)))
_pointwise("tanh")(lambda a: sympy.tanh(normal(a)))
_pointwise("erf")(lambda a: sympy.erf(normal(a)))
_pointwise("cos")(sympy.cos)
_pointwise("sin")(sympy.sin)
_pointwise("sigmoid")(lambda a: 1 / (1 + sympy.exp(-a)))
_pointwise("silu")(lambda a: a / (1 + sympy.exp(-a)))
_pointwise("relu")(lambda a: sympy.Max(a, 0))


@_rule("gelu")
def _gelu(c: Canonicalizer, node: Node, x: Node, approximate: str = "none") -> sympy.Expr | None:
    a = c.operand(node, x)
    if approximate == "none":
        return a * (1 + sympy.erf(a * number(math.sqrt(0.5)))) * number(0.5)
    inner = normal(number(math.sqrt(2 / math.pi)) * (a + number(0.044715) * a**3))
    return a * (1 + sympy.tanh(inner)) * number(0.5)


@_rule("to", "float", "half", "bfloat16", "double", "type", "type_as")
def _cast(c: Canonicalizer, node: Node, x: Node, *args: Any, **kwargs: Any) -> sympy.Expr | None:
    source, result = x.meta["val"], node.meta["val"]
    if source.device != result.device:
        return None
    return c.cast(c.value(x), source.dtype, result.dtype, node)


@_rule("contiguous")
def _same_value(c: Canonicalizer, node: Node, x: Node, **_: Any) -> sympy.Expr:
    return c.value(x)


@_rule("mean", "sum")
def _reduce(
    c: Canonicalizer, node: Node, x: Node, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> sympy.Expr | None:
    source, result = x.meta["val"], node.meta["val"]
    if not source.is_floating_point():
        return None
    rank = source.ndim
    dims = range(rank) if dim is None else (dim if isinstance(dim, (tuple, list)) else (dim,))
    dims = tuple(sorted(d % rank - rank for d in dims))
    value = c.widened(c.value(x), source.dtype, result.dtype)
    out = c.term(node, "mean", (dims,), value)
    if not keepdim:
        out = c.term(node, "squeeze", (dims,), out)
    if op_name(node) == "sum":
        return decimal(out * sympy.Mul(*(expression(source.shape[d]) for d in dims)))
    return out


@_rule("rms_norm")
def _rms_norm(
    c: Canonicalizer,
    node: Node,
    x: Node,
    shape: Sequence[int],
    weight: Node | None = None,
    eps: float | None = None,
) -> sympy.Expr | None:
    """torch's own RMSNorm: everything in fp32, rounded once at the end."""
    val = x.meta["val"]
    if len(shape) != 1:
        return None
    inner = torch.promote_types(val.dtype, torch.float32)
    value = c.value(x)
    eps = torch.finfo(inner).eps if eps is None else eps  # what torch computes with, whatever its docs say
    mean = c.terms.symbol("mean", ((-1,),), [normal(c.widened(value, val.dtype, inner) ** 2)], inner)
    value = c.widened(value, val.dtype, inner) * (mean + number(eps)) ** sympy.Float(-0.5)
    if weight is not None:
        value = value * c.value(weight)
    return c.cast(value, inner, node.meta["val"].dtype, node)


@_rule("linear")
def _linear(c: Canonicalizer, node: Node, x: Node, weight: Node, bias: Node | None = None) -> sympy.Expr:
    return c.term(node, "linear", (), *(c.value(a) for a in (x, weight, bias) if a is not None))


@_rule("linear_module")
def _linear_module(c: Canonicalizer, node: Node, x: Node) -> sympy.Expr:
    parameters = node.meta["parameters"]
    return _linear(c, node, x, parameters["weight"], parameters.get("bias"))


@_rule("cross_entropy")
def _cross_entropy(
    c: Canonicalizer, node: Node, logits: Node, target: Node, weight: Node | None = None, size_average: Any = None,
    ignore_index: int = -100, reduce: Any = None, reduction: str = "mean", label_smoothing: float = 0.0,
) -> sympy.Expr | None:  # fmt: skip
    if size_average is not None or reduce is not None:
        return None
    args = [c.value(a) for a in (logits, target, weight) if a is not None]
    attrs = (("ignore_index", ignore_index), ("reduction", reduction), ("label_smoothing", label_smoothing))
    return c.term(node, "cross_entropy", attrs, *args)


@_rule("pad")
def _pad(c: Canonicalizer, node: Node, x: Node, pad: Sequence, mode: str = "constant", value: Any = None) -> Any:
    return c.term(node, "pad", (tuple(pad), mode, value or 0), c.value(x))


@_rule("cat", "concat", "concatenate")
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


@_rule("getitem")
def _getitem(c: Canonicalizer, node: Node, x: Node, index: Any) -> sympy.Expr | None:
    source = x.meta.get("val")
    if not isinstance(source, torch.Tensor):
        return _piece(c, node, x, index)
    index = index if isinstance(index, tuple) else (index,)
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
    if op_name(pieces) not in ("chunk", "split"):
        return None
    source, outs = pieces.args[0], pieces.meta["val"]
    dim = pieces.kwargs.get("dim", pieces.args[2] if len(pieces.args) > 2 else 0)
    x = source.meta["val"]
    dim = dim % x.ndim - x.ndim
    start = sum(outs[i].shape[dim] for i in range(index))
    return _slice(c, node, c.value(source), x.shape[dim], dim, start, start + outs[index].shape[dim])


@_rule("narrow")
def _narrow(c: Canonicalizer, node: Node, x: Node, dim: int, start: Any, length: Any) -> sympy.Expr:
    val = x.meta["val"]
    start, length = (n.meta["val"] if isinstance(n, Node) else n for n in (start, length))
    return _slice(c, node, c.value(x), val.shape[dim], dim % val.ndim - val.ndim, start, start + length)


def _unsqueezed(c: Canonicalizer, node: Node, value: sympy.Expr, dim: int) -> sympy.Expr:
    term = c.terms.terms.get(value)
    if term is not None and term.op == "squeeze" and term.attrs == ((dim,),):
        return term.args[0]
    return c.term(node, "unsqueeze", (dim,), value)


@_rule("unsqueeze")
def _unsqueeze(c: Canonicalizer, node: Node, x: Node, dim: int) -> sympy.Expr:
    rank = node.meta["val"].ndim
    return _unsqueezed(c, node, c.value(x), dim % rank - rank)


@_rule("view", "reshape", "flatten", "unflatten", "view_as", "reshape_as")
def _reshape(c: Canonicalizer, node: Node, x: Node, *args: Any, **kwargs: Any) -> sympy.Expr | None:
    if args and isinstance(args[0], torch.dtype):
        return None
    shape = tuple(expression(s) for s in node.meta["val"].shape)
    if shape == tuple(expression(s) for s in x.meta["val"].shape):
        return c.value(x)
    source = x
    while _RULES.get(op_name(source) or "") is _reshape:  # a chain of views is what its end looks like
        source = source.args[0]
        if shape == tuple(expression(s) for s in source.meta["val"].shape):
            return c.value(source)
    value = c.value(x)
    term = c.terms.terms.get(value)
    return c.term(node, "reshape", (shape,), term.args[0] if term is not None and term.op == "reshape" else value)


@_rule("transpose", "permute", "t", "swapaxes")
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


@_rule("stack")
def _stack(c: Canonicalizer, node: Node, tensors: Sequence[Node], dim: int = 0) -> sympy.Expr:
    val = node.meta["val"]
    values = [c.widened(c.value(t), t.meta["val"].dtype, val.dtype) for t in tensors]
    return c.term(node, "stack", (dim % val.ndim - val.ndim,), *values)


@_rule("repeat_interleave")
def _repeat_interleave(c: Canonicalizer, node: Node, x: Node, repeats: Any, dim: Any = None, **_: Any) -> Any:
    if type(repeats) is not int or type(dim) is not int:
        return None
    rank = node.meta["val"].ndim
    return c.term(node, "repeat_interleave", (repeats, dim % rank - rank), c.value(x))


@_rule("expand", "expand_as", "broadcast_to")
def _expand(c: Canonicalizer, node: Node, x: Node, *args: Any) -> sympy.Expr:
    return c.term(node, "expand", (tuple(expression(s) for s in node.meta["val"].shape),), c.value(x))


SIZED = {"slice": 2, "reshape": 0, "expand": 0}
"""Terms whose attributes are sizes, with the number of leading attributes that are not."""
