"""The results of common operations on fakes, told from their operands' shapes.

torch asks dozens of questions about symbolic sizes to run one operation on fakes: 1 ms for a product, 6 ms for a
linear layer. Most of a model is a handful of operations on contiguous tensors, whose result is a contiguous tensor
of a size that is plain to see. Whatever is not exactly that is left to torch, errors included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .symbols import FakeInputs, expression

Sizes = Sequence[int | torch.SymInt]


class Shapes:
    """Knows the results of common operations on the fakes of one `FakeInputs`."""

    def __init__(self, fakes: FakeInputs) -> None:
        self.fakes = fakes
        self._strides: dict[tuple, tuple] = {}  # those of a contiguous tensor, by its sizes; both as expressions

    def result(self, name: str, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
        """What the operation called `name` returns, a new fake; None where torch has to tell."""
        rule = _RULES.get(name)
        if rule is None or not args or not isinstance(args[0], FakeTensor):
            return None
        device = args[0].device
        if name in _GROUPED:  # torch knows it of bf16 fakes alone
            sizes, dtype = rule(*args, **kwargs)
            with self.fakes.mode:
                return torch.empty(sizes, dtype=dtype, device=device)
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        autocast = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
        if autocast or torch.is_inference_mode_enabled():
            return None
        if not all(isinstance(t, FakeTensor) and t.device == device and self._is_contiguous(t) for t in tensors):
            return None
        try:
            found = rule(*args, **kwargs)
        except TypeError:  # arguments that the rule does not know
            return None
        if found is None:
            return None
        sizes, dtype = found
        with self.fakes.mode:
            return torch.empty(sizes, dtype=dtype, device=device)

    def _is_contiguous(self, tensor: Tensor) -> bool:
        sizes = _expressions(tensor.shape)
        if sizes not in self._strides:
            with self.fakes.mode:
                self._strides[sizes] = _expressions(torch.empty(tensor.shape, device=tensor.device).stride())
        return _expressions(tensor.stride()) == self._strides[sizes]


Rule = Callable[..., tuple[Sizes, torch.dtype] | None]
_RULES: dict[str, Rule] = {}


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, rule))
        return rule

    return register


@_rule("add", "sub", "mul", "div", "truediv", "__truediv__")
def _arithmetic(a: Tensor, b: Tensor | float) -> tuple[Sizes, torch.dtype] | None:
    if not a.is_floating_point() or not a.ndim:
        return None
    if type(b) in (int, float):
        return a.shape, a.dtype
    if not isinstance(b, Tensor) or not b.is_floating_point() or not b.ndim:
        return None
    for large, small in ((a, b), (b, a)):
        sizes = zip(reversed(_expressions(small.shape)), reversed(_expressions(large.shape)), strict=False)
        if small.ndim <= large.ndim and all(size in (whole, 1) for size, whole in sizes):
            return large.shape, torch.promote_types(a.dtype, b.dtype)
    return None


@_rule("neg", "rsqrt", "silu", "gelu", "tanh", "sigmoid")
def _function(x: Tensor, inplace: bool = False, approximate: str = "none") -> tuple[Sizes, torch.dtype] | None:
    return (x.shape, x.dtype) if x.is_floating_point() and not inplace else None


@_rule("pow")
def _pow(x: Tensor, exponent: float) -> tuple[Sizes, torch.dtype] | None:
    return (x.shape, x.dtype) if x.is_floating_point() and type(exponent) in (int, float) else None


@_rule("mean")
def _mean(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Sizes, torch.dtype] | None:
    if not x.is_floating_point() or dim not in (-1, (-1,), [-1]) or not keepdim or not x.ndim:
        return None
    return (*x.shape[:-1], 1), x.dtype


@_rule("linear")
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Sizes, torch.dtype] | None:
    if x.ndim < 2 or weight.ndim != 2 or any(t is not None and t.dtype != x.dtype for t in (weight, bias)):
        return None
    outer, inner = _expressions(weight.shape)
    if _expressions(x.shape[-1:]) != (inner,) or (bias is not None and _expressions(bias.shape) != (outer,)):
        return None
    return (*x.shape[:-1], weight.shape[0]), x.dtype


@_rule("cross_entropy")
def _cross_entropy(
    logits: Tensor, target: Tensor, weight: None = None, size_average: None = None, ignore_index: int = -100,
    reduce: None = None, reduction: str = "mean", label_smoothing: float = 0.0,
) -> tuple[Sizes, torch.dtype] | None:  # fmt: skip
    if not (weight is size_average is reduce is None) or reduction not in ("mean", "sum"):
        return None
    if logits.ndim != 2 or not logits.is_floating_point() or target.dtype != torch.int64:
        return None
    if _expressions(target.shape) != _expressions(logits.shape[:1]):
        return None
    return (), logits.dtype


_GROUPED = ("grouped_mm", "_grouped_mm")


@_rule(*_GROUPED)
def _grouped_mm(x: Tensor, weight: Tensor, **_: Any) -> tuple[Sizes, torch.dtype]:
    """Rows of x [S, K], in groups, times a matrix [K, N] for each group."""
    return (x.shape[0], weight.shape[-1]), x.dtype


def _expressions(sizes: Sizes) -> tuple:
    return tuple(map(expression, sizes))
