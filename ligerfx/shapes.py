"""The results of operations on fakes, without asking torch where they are known.

torch asks dozens of questions about symbolic sizes to run one operation on fakes: 1 ms for a product, 6 ms for a
linear layer. Most of a model is a handful of operations on contiguous tensors, whose result is a contiguous tensor
of a size that is plain to see. Whatever is not exactly that is left to torch, errors included, and remembered: models
and patterns do the same again and again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .capture import works_in_place
from .symbols import FakeInputs, expression
from .traced_numbers import TracedFloat, TracedInt, plain

Sizes = Sequence[int | torch.SymInt]


class _Unknown(Exception):
    """A call or a result that cannot be remembered."""


class Shapes:
    """Knows the results of operations on the fakes of one `FakeInputs`."""

    def __init__(self, fakes: FakeInputs) -> None:
        self.fakes = fakes
        self._strides: dict[tuple, tuple] = {}  # those of a contiguous tensor, by its sizes; both as expressions

    def run(self, function: Callable, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What `function`, called `name`, returns: from what is known, or else from torch.

        What torch would ask about sizes to get there leaves no guard.
        """
        try:
            call = self._call(function, name, args, kwargs)
        except _Unknown:
            call = None
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        if call is not None and call in self.fakes.results:
            return self._made(self.fakes.results[call], tensors)
        out = self.result(name, args, kwargs)
        if out is None:
            out = function(*args, **kwargs)
            if call is not None:
                with contextlib.suppress(_Unknown):
                    self.fakes.results[call] = self._recipe(out, tensors)
        return out

    def _call(self, function: Callable, name: str, args: tuple, kwargs: dict[str, Any]) -> tuple:
        """What the result of a call depends on, but for the memory of its tensors."""
        if not args or name == "__get__" or works_in_place(name, kwargs) or torch.is_inference_mode_enabled():
            raise _Unknown
        first = args[0][0] if isinstance(args[0], (tuple, list)) and args[0] else args[0]
        if type(first) is not FakeTensor or _autocasts(first.device):
            raise _Unknown
        return function, _described(args), _described(kwargs), torch.get_default_dtype()

    def _recipe(self, out: Any, tensors: Sequence[Tensor]) -> Any:
        """How to make a result again: the number of an argument, or a layout and a device."""
        for number, tensor in enumerate(tensors):
            if out is tensor:
                return number
        if type(out) in (tuple, list):
            return type(out), [self._recipe(piece, tensors) for piece in out]
        if type(out) is not FakeTensor:
            raise _Unknown
        sizes, strides, dtype, device = _described(out)
        known = self.fakes.shape_env.backed_var_to_val
        if not all(symbol in known for size in (*sizes, *strides) for symbol in size.free_symbols):
            raise _Unknown  # a size that is told by the data is another each time
        return tuple(out.shape), out.stride(), dtype, device

    def _made(self, recipe: Any, tensors: Sequence[Tensor]) -> Any:
        if isinstance(recipe, int):
            return tensors[recipe]
        if isinstance(recipe[0], type):
            return recipe[0](self._made(piece, tensors) for piece in recipe[1])
        return self.fakes.of_layout(*recipe)

    def result(self, name: str, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
        """What the operation called `name` returns, a new fake; None where torch has to tell."""
        rule = _RULES.get(name)
        if rule is None or not args or not isinstance(args[0], FakeTensor):
            return None
        device = args[0].device
        if name in _GROUPED:  # torch knows it of bf16 fakes alone
            sizes, dtype = rule(*args, **kwargs)
            return self.fakes.of_layout(sizes, None, dtype, device)
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        if _autocasts(device) or torch.is_inference_mode_enabled():
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
        return self.fakes.of_layout(sizes, None, dtype, device)

    def _is_contiguous(self, tensor: Tensor) -> bool:
        sizes = _expressions(tensor.shape)
        if sizes not in self._strides:
            self._strides[sizes] = _expressions(
                self.fakes.of_layout(tensor.shape, None, tensor.dtype, tensor.device).stride()
            )
        return _expressions(tensor.stride()) == self._strides[sizes]


_STATIC = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.memory_format, type(...))


def _described(value: Any) -> Any:
    """An argument, without the memory of its tensors, to compare with others. Raises _Unknown."""
    kind = type(value)
    if kind is FakeTensor:
        if value.constant is not None or value.requires_grad or value.layout is not torch.strided:
            raise _Unknown
        if value.is_conj() or value.is_neg():
            raise _Unknown
        return _expressions(value.shape), _expressions(value.stride()), value.dtype, value.device
    if kind in _STATIC:
        return kind, value
    if kind in (TracedInt, TracedFloat):
        return kind.__base__, plain(value)
    if kind is torch.SymInt:
        return expression(value)
    if kind in (tuple, list, torch.Size):
        return kind, tuple(map(_described, value))
    if kind is slice:
        return kind, _described((value.start, value.stop, value.step))
    if kind is dict:
        return kind, tuple(value), _described(tuple(value.values()))
    raise _Unknown


def _autocasts(device: torch.device) -> bool:
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


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
