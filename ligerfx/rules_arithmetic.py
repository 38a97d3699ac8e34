"""Rules for arithmetic: pointwise operations, activations, casts, reductions, norms and layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch.fx import Node

from .algebra import decimal, normal, number, power, product
from .operations import CASTS, is_cast, op_name
from .rules import pointwise, rule
from .symbols import expression

if TYPE_CHECKING:
    from .canonical import Canonicalizer

pointwise("add")(lambda a, b, alpha=1: a + alpha * b)
pointwise("sub", "subtract")(lambda a, b, alpha=1: a - alpha * b)
pointwise("rsub")(lambda a, b, alpha=1: b - alpha * a)
pointwise("mul", "multiply")(product)
pointwise("truediv", "div", "divide", "true_divide")(lambda a, b: a * power(b, sympy.Integer(-1)))
pointwise("neg", "negative")(lambda a: -a)
pointwise("pos", "positive")(lambda a: a)
pointwise("pow")(power)
pointwise("square")(lambda a: a**2)
pointwise("sqrt")(lambda a: power(a, sympy.Float(0.5)))
pointwise("rsqrt")(lambda a: power(a, sympy.Float(-0.5)))
pointwise("reciprocal")(lambda a: power(a, sympy.Integer(-1)))
pointwise("exp")(lambda a: sympy.exp(normal(a)))
pointwise("tanh")(lambda a: sympy.tanh(normal(a)))
pointwise("erf", "special_erf")(lambda a: sympy.erf(normal(a)))
pointwise("special_ndtr")(lambda a: (1 + sympy.erf(normal(a * number(math.sqrt(0.5))))) * number(0.5))
pointwise("cos")(sympy.cos)
pointwise("sin")(sympy.sin)
pointwise("sigmoid", "special_expit")(lambda a: 1 / (1 + sympy.exp(-a)))
pointwise("silu")(lambda a: a / (1 + sympy.exp(-a)))
pointwise("relu")(lambda a: sympy.Max(a, 0))


@rule("gelu")
def _gelu(c: Canonicalizer, node: Node, x: Node, approximate: str = "none") -> sympy.Expr | None:
    a = c.operand(node, x)
    if approximate == "none":
        return a * (1 + sympy.erf(a * number(math.sqrt(0.5)))) * number(0.5)
    inner = normal(number(math.sqrt(2 / math.pi)) * (a + number(0.044715) * a**3))
    return a * (1 + sympy.tanh(inner)) * number(0.5)


@rule(*CASTS)
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


@rule("contiguous")
def _same_value(c: Canonicalizer, node: Node, x: Node, **_: Any) -> sympy.Expr:
    return c.value(x)


@rule("mean", "sum")
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


@rule("norm", "vector_norm", "linalg_norm", "linalg_vector_norm")
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


@rule("normalize")
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


@rule("rms_norm")
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


@rule("clamp", "clip")
def _clamp(c: Canonicalizer, node: Node, x: Node, min: Any = None, max: Any = None) -> sympy.Expr | None:
    bounds = {name: value for name, value in (("min", min), ("max", max)) if value is not None}
    if x.meta["val"].dtype != node.meta["val"].dtype or not x.meta["val"].is_floating_point():
        return None
    operands = [c.operand(node, value) for value in bounds.values()]
    return None if None in operands else c.term(node, "clamp", tuple(bounds), c.value(x), *operands)


@rule("linear")
def _linear(c: Canonicalizer, node: Node, x: Node, weight: Node, bias: Node | None = None) -> sympy.Expr:
    return c.term(node, "linear", (), *(c.value(a) for a in (x, weight, bias) if a is not None))


@rule("linear_module")
def _linear_module(c: Canonicalizer, node: Node, x: Node) -> sympy.Expr:
    parameters = node.meta["parameters"]
    return _linear(c, node, x, parameters["weight"], parameters.get("bias"))


@rule("cross_entropy")
def _cross_entropy(
    c: Canonicalizer, node: Node, logits: Node, target: Node, weight: Node | None = None, size_average: Any = None,
    ignore_index: int = -100, reduce: Any = None, reduction: str = "mean", label_smoothing: float = 0.0,
) -> sympy.Expr | None:  # fmt: skip
    if size_average is not None or reduce is not None:
        return None
    args = [c.value(a) for a in (logits, target, weight) if a is not None]
    attrs = (("ignore_index", ignore_index), ("reduction", reduction), ("label_smoothing", label_smoothing))
    return c.term(node, "cross_entropy", attrs, *args)
