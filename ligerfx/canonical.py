"""Canonical values: what a node computes, however it is spelled.

Pointwise arithmetic becomes a sympy expression, so operand order, methods against operators, `rsqrt` against
`1 / sqrt`, `silu` against `x * sigmoid(x)` are all one. Everything else (reductions, slices, `cat`, linear
layers) becomes a term, a sympy symbol that stands for an operation on canonical values; equal terms are one
symbol. Dimensions count from the end, and views are described by what they do, not by how they were asked for.

Rounding is part of the value: where bf16 arithmetic is followed by fp32 arithmetic, or a value is cast down,
there is a `round` term. A cast that changes no value (fp32 to fp32, or an input widened) leaves none.
"""

from __future__ import annotations

import functools
import inspect
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

    symbol: sympy.Expr

    def __repr__(self) -> str:
        return str(self.symbol)


class ConstantFloat(Constant, float):
    def __neg__(self) -> ConstantFloat:
        return constant(-self.symbol, -float(self))


class ConstantInt(Constant, int):
    pass


class ConstantStr(Constant, str):
    pass


def constant(symbol: sympy.Expr, value: float | int | str) -> Any:
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

    def are_related(self, a: sympy.Expr, b: sympy.Expr) -> bool:
        """Whether all that one of two values is made of goes into the other, itself or inside a term."""
        return any(y.free_symbols and y.free_symbols <= self._inside(x) for x, y in ((a, b), (b, a)))

    def _inside(self, value: sympy.Expr) -> set[sympy.Symbol]:
        seen: set[sympy.Symbol] = set()
        pending = set(value.free_symbols)
        while pending:
            seen.add(symbol := pending.pop())
            for arg in self.terms[symbol].args if symbol in self.terms else ():
                pending |= arg.free_symbols - seen
        return seen


@functools.lru_cache(maxsize=4096)
def normal(expr: sympy.Expr) -> sympy.Expr:
    """One form for algebraically equal expressions: multiplied out, floats rounded to what fp32 resolves."""
    expanded = decimal(sympy.expand(expr, power_base=False, power_exp=False, log=False))
    return expanded.xreplace({f: number(float(f"{float(f):.8g}")) for f in expanded.atoms(sympy.Float)})


def power(base: sympy.Expr, exponent: sympy.Expr) -> sympy.Expr:
    """`base**exponent`; of a sum, its largest coefficient is taken out: `(8*m + 8*e)**-0.5` is
    `8**-0.5 * (m + e)**-0.5`, whoever multiplied."""
    whole = exponent.is_Integer and exponent.is_positive
    base = decimal(sympy.expand(base, power_base=False, power_exp=False, log=False)) if base.is_Mul else base
    if whole or not exponent.is_number or not (base.is_Add or base.is_Mul):
        return base**exponent
    factor, rest = content(base)
    return number(float(factor) ** float(exponent)) * rest**exponent


def product(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr:
    """`a * b`; of sums, the largest coefficient is taken out."""
    (first, a), (second, b) = content(a), content(b)
    return sympy.Mul(first * second, a, b)


def content(expr: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
    """The largest coefficient of a sum, and the sum without it."""
    terms = [term for term in sympy.Add.make_args(expr) if not term.is_number] if expr.is_Add else []
    factor = max((abs(term.as_coeff_Mul()[0]) for term in terms), default=sympy.Integer(1))
    if factor in (0, 1) or not factor.is_real:
        return sympy.Integer(1), expr
    return factor, decimal(sympy.expand(expr / factor, power_base=False, power_exp=False, log=False))


@functools.lru_cache(maxsize=4096)
def decimal(expr: sympy.Expr) -> sympy.Expr:
    """`expr` with every fraction as a float and every whole float as an integer: one spelling of constants. The square
    of a root of 8 is 8."""
    constants = {a for a in expr.atoms(sympy.Rational, sympy.Float) if not a.is_Integer}
    return expr.xreplace({c: number(float(f"{float(c):.15g}")) for c in constants}) if constants else expr


LARGEST = 32
"""Summands, multiplied out, of a value that an idiom may be found in. A matrix that is divided by the sums of its rows
and columns in turn (Sinkhorn) would have 2 to the power of their number."""


def _expanded_size(expr: sympy.Expr) -> int:
    """How many summands there would be, numerator and denominator multiplied out."""
    if expr.is_Add:
        return sum(map(_expanded_size, expr.args))
    if expr.is_Mul:
        return math.prod(map(_expanded_size, expr.args))
    if expr.is_Pow and expr.exp.is_Integer:
        return min(_expanded_size(expr.base) ** abs(int(expr.exp)), 2 * LARGEST)
    return 1


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
            value = self._compute(node)
            self._values[node] = self.leaf(node) if _expanded_size(value) > LARGEST else value
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
            expr = self.value(value)
            if val.is_complex():
                return self.parts(expr)
            return self.widened(expr, val.dtype, node.meta["val"].dtype)
        return number(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None

    def parts(self, expr: sympy.Expr) -> sympy.Expr:
        """A complex value as arithmetic on real ones."""
        if not expr.is_Symbol:
            return expr
        real, imaginary = (self.terms.symbol(part, (), (expr,), None) for part in ("real", "imag"))
        return real + sympy.I * imaginary

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
    """Registers arithmetic on operand values. A call with keyword arguments that the function does not have, or with
    other operands, is left opaque."""

    def register(function: Callable) -> Callable:
        takes = inspect.signature(function).parameters if inspect.isfunction(function) else ()

        def rule(c: Canonicalizer, node: Node, *args: Any, **kwargs: Any) -> sympy.Expr | None:
            kwargs = {name: value for name, value in kwargs.items() if value not in (None, False)}
            if not set(kwargs) <= set(takes):
                return None
            operands = [c.operand(node, a) for a in args]
            options = {name: c.operand(node, value) for name, value in kwargs.items()}
            val = node.meta["val"]
            if None in operands or None in options.values() or not (val.is_floating_point() or val.is_complex()):
                return None
            return decimal(function(*operands, **options))

        for name in names:
            _RULES[name] = rule
        return function

    return register


_pointwise("add")(lambda a, b, alpha=1: a + alpha * b)
_pointwise("sub", "subtract")(lambda a, b, alpha=1: a - alpha * b)
_pointwise("rsub")(lambda a, b, alpha=1: b - alpha * a)
_pointwise("mul", "multiply")(product)
_pointwise("truediv", "div", "divide", "true_divide")(lambda a, b: a * power(b, sympy.Integer(-1)))
_pointwise("neg", "negative")(lambda a: -a)
_pointwise("pos", "positive")(lambda a: a)
_pointwise("pow")(power)
_pointwise("square")(lambda a: a**2)
_pointwise("sqrt")(lambda a: power(a, sympy.Float(0.5)))
_pointwise("rsqrt")(lambda a: power(a, sympy.Float(-0.5)))
_pointwise("reciprocal")(lambda a: power(a, sympy.Integer(-1)))
_pointwise("exp")(lambda a: sympy.exp(normal(a)))
_pointwise("tanh")(lambda a: sympy.tanh(normal(a)))
_pointwise("erf", "special_erf")(lambda a: sympy.erf(normal(a)))
_pointwise("special_ndtr")(lambda a: (1 + sympy.erf(normal(a * number(math.sqrt(0.5))))) * number(0.5))
_pointwise("cos")(sympy.cos)
_pointwise("sin")(sympy.sin)
_pointwise("sigmoid", "special_expit")(lambda a: 1 / (1 + sympy.exp(-a)))
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
    if _is_widened_activation(x, result.dtype):
        return c.value(x)
    return c.cast(c.value(x), source.dtype, result.dtype, node)


def _is_widened_activation(node: Node, dtype: torch.dtype) -> bool:
    """Whether a node is an activation of what was widened from the dtype: cast back, it is what the activation gives in
    that dtype, which torch itself computes in fp32 and rounds."""
    name = op_name(node)
    if name not in ("gelu", "silu", "relu", "sigmoid", "tanh") or dtype not in (torch.float16, torch.bfloat16):
        return False
    (x,) = node.all_input_nodes
    return is_cast(x) and x.args[0].meta["val"].dtype == dtype


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
    dims = _dims(dim, source.ndim)
    value = c.widened(c.value(x), source.dtype, result.dtype)
    added, rest = normal(value).as_coeff_Add()
    factor, rest = rest.as_coeff_Mul()
    if rest.is_number:  # of a constant
        return value
    out = c.term(node, "mean", (dims,), rest)
    if not keepdim:
        out = c.term(node, "squeeze", (dims,), out)
    out = added + factor * out
    if op_name(node) == "sum":
        out = out * sympy.Mul(*(expression(source.shape[d]) for d in dims))
    return decimal(out)


@_rule("norm", "vector_norm", "linalg_norm", "linalg_vector_norm")
def _norm(
    c: Canonicalizer, node: Node, x: Node, p: Any = 2, dim: Any = None, keepdim: bool = False, *,
    ord: Any = 2, out: Any = None, dtype: Any = None,
) -> sympy.Expr | None:  # fmt: skip
    """The root of a sum of squares."""
    if op_name(node) != "norm" and p != 2:
        ord = p  # torch.linalg calls it so
    if {p, ord} - {2, "fro"} or out is not None or (op_name(node) == "linalg_norm" and dim is None):
        return None
    source, result = x.meta["val"], node.meta["val"]
    if not source.is_floating_point():
        return None
    dims, value = _dims(dim, source.ndim), c.widened(c.value(x), source.dtype, result.dtype)
    mean = c.term(node, "mean", (dims,), value**2)
    size = sympy.Mul(*(expression(source.shape[d]) for d in dims))
    root = power(decimal(mean * size), sympy.Float(0.5))
    return root if keepdim else c.term(node, "squeeze", (dims,), root)


@_rule("normalize")
def _normalize(
    c: Canonicalizer, node: Node, x: Node, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Any = None
) -> sympy.Expr | None:
    """torch's own division by a length that is at least eps."""
    length = _norm(c, x, x, p, dim, True, out=out)
    return None if length is None else c.value(x) / c.term(node, "at_least", (eps,), length)


def _dims(dim: Any, rank: int) -> tuple[int, ...]:
    """Dimensions counted from the end, in order; None is all."""
    dims = range(rank) if dim is None else (dim if isinstance(dim, (tuple, list)) else (dim,))
    return tuple(sorted(d % rank - rank for d in dims))


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


@_rule("clamp", "clip")
def _clamp(c: Canonicalizer, node: Node, x: Node, min: Any = None, max: Any = None) -> sympy.Expr | None:
    bounds = {name: value for name, value in (("min", min), ("max", max)) if value is not None}
    if x.meta["val"].dtype != node.meta["val"].dtype or not x.meta["val"].is_floating_point():
        return None
    operands = [c.operand(node, value) for value in bounds.values()]
    return None if None in operands else c.term(node, "clamp", tuple(bounds), c.value(x), *operands)


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


@_rule("select")
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
    if _RULES.get(op_name(x) or "") is not _reshape or not isinstance(x.args[0], Node):
        return None
    shape, source = x.meta["val"].shape, x.args[0].meta["val"].shape
    split = len(shape) == len(source) + 1 and all(isinstance(s, int) for s in (*shape[-2:], source[-1]))
    same = split and list(map(expression, shape[:-2])) == list(map(expression, source[:-1]))
    return x.args[0] if same else None


@_rule("view_as_complex")
def _view_as_complex(c: Canonicalizer, node: Node, x: Node) -> sympy.Expr:
    term = c.terms.terms.get(c.value(x))
    if term is not None and term.op == "stack" and term.attrs == (-1,):
        real, imaginary = term.args
    else:
        real, imaginary = (_select(c, x, x, -1, index) for index in (0, 1))
    return real + sympy.I * imaginary


@_rule("view_as_real")
def _view_as_real(c: Canonicalizer, node: Node, x: Node) -> sympy.Expr:
    terms = sympy.Add.make_args(sympy.expand(c.parts(c.value(x))))
    real = sympy.Add(*(t for t in terms if not t.has(sympy.I)))
    imaginary = sympy.Add(*(t / sympy.I for t in terms if t.has(sympy.I)))
    return c.term(node, "stack", (-1,), real, imaginary)


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
    before = tuple(expression(s) for s in x.meta["val"].shape)
    if term is not None and term.op == "stack" and shape == (*before[:-2], before[-2] * before[-1]):
        if term.attrs == (-1,):  # pairs, one after the other
            return c.term(node, "interleave", (), *term.args)
        if term.attrs == (-2,):
            return c.term(node, "cat", (-1,), *term.args)
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
