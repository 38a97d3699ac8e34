"""What operations on contiguous fakes give: sizes and dtype, where they are plain to see. `shapes` asks these rules.

A rule gets the arguments of a call and returns the sizes (those that are new as sympy expressions) and the dtype of a
contiguous result, or None where torch has to tell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.utils._sympy.functions import FloorDiv

from .symbols import expression

Sizes = Sequence[int | torch.SymInt | sympy.Expr]
Rule = Callable[..., tuple[Sizes, torch.dtype] | None]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


@rule("add", "sub", "mul", "div", "truediv", "__truediv__")
def _arithmetic(a: Tensor, b: Tensor | float) -> tuple[Sizes, torch.dtype] | None:
    if not a.is_floating_point() or not a.ndim:
        return None
    if type(b) in (int, float):
        return a.shape, a.dtype
    if not isinstance(b, Tensor) or not b.is_floating_point() or not b.ndim:
        return None
    for large, small in ((a, b), (b, a)):
        sizes = zip(reversed(expressions(small.shape)), reversed(expressions(large.shape)), strict=False)
        if small.ndim <= large.ndim and all(size in (whole, 1) for size, whole in sizes):
            return large.shape, torch.promote_types(a.dtype, b.dtype)
    return None


@rule("lt", "le", "gt", "ge", "eq", "ne", "__and__", "__or__")
def _comparison(a: Tensor, b: Tensor | float) -> tuple[Sizes, torch.dtype] | None:
    if not isinstance(b, Tensor):
        return (a.shape, torch.bool) if type(b) in (int, float) and a.dtype != torch.bool else None
    if a.ndim != b.ndim or a.dtype != b.dtype or a.dtype not in (torch.bool, torch.int64, torch.float32):
        return None
    sizes: list[Any] = []
    for x, y in zip(a.shape, b.shape, strict=True):
        if expression(x) not in (expression(y), 1) and expression(y) != 1:
            return None
        sizes.append(y if expression(x) == 1 else x)
    return sizes, torch.bool


@rule("neg", "rsqrt", "silu", "gelu", "tanh", "sigmoid", "relu", "exp", "sqrt", "cos", "sin")
def _function(x: Tensor, inplace: bool = False, approximate: str = "none") -> tuple[Sizes, torch.dtype] | None:
    return (x.shape, x.dtype) if x.is_floating_point() and not inplace else None


@rule("dropout")
def _dropout(
    x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> tuple[Sizes, torch.dtype] | None:
    return (x.shape, x.dtype) if x.is_floating_point() and not inplace else None


@rule("clamp", "clip")
def _clamp(x: Tensor, min: float | None = None, max: float | None = None) -> tuple[Sizes, torch.dtype] | None:
    bounds = {type(bound) for bound in (min, max)} - {type(None)}
    known = {int, torch.SymInt} if x.dtype == torch.int64 else {int, float} if x.is_floating_point() else set()
    return (x.shape, x.dtype) if bounds and bounds <= known else None


@rule("layer_norm")
def _layer_norm(
    x: Tensor, normalized_shape: Sizes, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Sizes, torch.dtype] | None:
    size = expressions(normalized_shape)
    fits = all(t is None or (expressions(t.shape) == size and t.dtype == x.dtype) for t in (weight, bias))
    known = x.is_floating_point() and len(size) == 1 and x.ndim > 1
    return (x.shape, x.dtype) if known and fits and expressions(x.shape[-1:]) == size else None


@rule("masked_fill")
def _masked_fill(x: Tensor, mask: Tensor, value: float) -> tuple[Sizes, torch.dtype] | None:
    if mask.dtype != torch.bool or mask.ndim != x.ndim or type(value) not in (int, float):
        return None
    sizes = zip(expressions(mask.shape), expressions(x.shape), strict=True)
    return (x.shape, x.dtype) if x.is_floating_point() and all(size in (whole, 1) for size, whole in sizes) else None


@rule("pow")
def _pow(x: Tensor, exponent: float) -> tuple[Sizes, torch.dtype] | None:
    return (x.shape, x.dtype) if x.is_floating_point() and type(exponent) in (int, float) else None


@rule("mean")
def _mean(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Sizes, torch.dtype] | None:
    if not x.is_floating_point() or dim not in (-1, (-1,), [-1]) or not keepdim or not x.ndim:
        return None
    return (*x.shape[:-1], 1), x.dtype


@rule("view", "reshape")
def _view(x: Tensor, *shape: Any) -> tuple[Sizes, torch.dtype] | None:
    sizes = list(shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list, torch.Size)) else shape)
    if not all(isinstance(size, (int, torch.SymInt)) for size in sizes):
        return None
    found = expressions(sizes)
    elements, others = sympy.Mul(*expressions(x.shape)), sympy.Mul(*(size for size in found if size != -1))
    if 0 in found or found.count(-1) > 1 or (-1 not in found and elements != others):
        return None
    # In lowest terms, so that torch need not bring it there, for which sympy takes 0.4 s the first time. If there is a
    # remainder, the model's own view fails.
    left = FloorDiv(*(elements / others).as_numer_denom())
    return [left if size == -1 else whole for size, whole in zip(found, sizes, strict=True)], x.dtype


@rule("sum")
def _sum(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Sizes, torch.dtype] | None:
    if not x.is_floating_point() or type(dim) is not int or not keepdim or not -x.ndim <= dim < x.ndim:
        return None
    return [1 if place == dim % x.ndim else size for place, size in enumerate(x.shape)], x.dtype


@rule("matmul")
def _matmul(a: Tensor, b: Tensor) -> tuple[Sizes, torch.dtype] | None:
    """Matrices in two or more dimensions of equal sizes, or of one matrix for all."""
    if a.ndim != b.ndim or a.ndim < 4 or a.dtype != b.dtype or not a.is_floating_point():
        return None
    (*outer_a, _, inner), (*outer_b, same, _) = expressions(a.shape), expressions(b.shape)
    if inner != same or any(x != y and y != 1 for x, y in zip(outer_a, outer_b, strict=True)):
        return None
    return (*a.shape[:-1], b.shape[-1]), a.dtype


@rule("cat", "concat")
def _cat(tensors: Sequence[Tensor], dim: int = 0) -> tuple[Sizes, torch.dtype] | None:
    first, *others = tensors
    if not all(t.dtype == first.dtype and t.ndim == first.ndim for t in others) or not -first.ndim <= dim < first.ndim:
        return None
    dim %= first.ndim
    rest = [expressions((*t.shape[:dim], *t.shape[dim + 1 :])) for t in tensors]
    if any(sizes != rest[0] for sizes in rest):
        return None
    return (*first.shape[:dim], sum(t.shape[dim] for t in tensors), *first.shape[dim + 1 :]), first.dtype


@rule("grid_sample")
def _grid_sample(
    x: Tensor, grid: Tensor, mode: str = "bilinear", padding_mode: str = "zeros", align_corners: bool | None = None
) -> tuple[Sizes, torch.dtype] | None:
    """Images [N, C, H, W] at points [N, ..., 2]."""
    if (
        x.ndim != 4
        or grid.ndim != 4
        or x.dtype != grid.dtype
        or expressions(x.shape[:1]) != expressions(grid.shape[:1])
    ):
        return None
    return (*x.shape[:2], *grid.shape[1:-1]), x.dtype


@rule("linear")
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Sizes, torch.dtype] | None:
    if x.ndim < 2 or weight.ndim != 2 or any(t is not None and t.dtype != x.dtype for t in (weight, bias)):
        return None
    outer, inner = expressions(weight.shape)
    if expressions(x.shape[-1:]) != (inner,) or (bias is not None and expressions(bias.shape) != (outer,)):
        return None
    return (*x.shape[:-1], weight.shape[0]), x.dtype


@rule("cross_entropy")
def _cross_entropy(
    logits: Tensor, target: Tensor, weight: None = None, size_average: None = None, ignore_index: int = -100,
    reduce: None = None, reduction: str = "mean", label_smoothing: float = 0.0,
) -> tuple[Sizes, torch.dtype] | None:  # fmt: skip
    if not (weight is size_average is reduce is None) or reduction not in ("mean", "sum"):
        return None
    if logits.ndim != 2 or not logits.is_floating_point() or target.dtype != torch.int64:
        return None
    if expressions(target.shape) != expressions(logits.shape[:1]):
        return None
    return (), logits.dtype


GROUPED = ("grouped_mm", "_grouped_mm")


@rule(*GROUPED)
def _grouped_mm(x: Tensor, weight: Tensor, **_: Any) -> tuple[Sizes, torch.dtype]:
    """Rows of x [S, K], in groups, times a matrix [K, N] for each group."""
    return (x.shape[0], weight.shape[-1]), x.dtype


OF_ANY_LAYOUT = ("matmul", "grid_sample")
"""Operations whose result is contiguous, whatever they are given."""


def expressions(sizes: Sizes) -> tuple:
    return tuple(map(expression, sizes))
