"""Calls of torch as a tracer sees them: what they are in a graph, and which kinds of them count."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from .operations import CASTS

_BINARY_OPERATORS: dict[str, Callable] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv,
    "__truediv__": operator.truediv, "matmul": operator.matmul, "__getitem__": operator.getitem,
    "gt": operator.gt, "lt": operator.lt, "ge": operator.ge, "le": operator.le, "eq": operator.eq,
    "ne": operator.ne, "__floordiv__": operator.floordiv, "__setitem__": operator.setitem,
    "__pow__": operator.pow, "__and__": operator.and_, "__or__": operator.or_,
}  # fmt: skip
_REFLECTED_OPERATORS: dict[str, Callable] = {
    "__rsub__": operator.sub, "__rdiv__": operator.truediv, "__rtruediv__": operator.truediv,
    "__rpow__": operator.pow, "__rfloordiv__": operator.floordiv,
}  # fmt: skip
COUNTING = {"split", "chunk", "unbind", "tensor_split", "split_with_sizes", "__iter__", "squeeze"}
"""Operations for which a size decides how many tensors they give, or of what rank: their guards count."""
MEASURING = {"size", "numel", "nelement", "__len__", "stride"}
CONVERSIONS = {*CASTS, "cpu", "cuda"}
"""Operations that give back what they are given where that is as it should be: such a call leaves no node."""


def spelled(func: Any, name: str, args: tuple, kwargs: dict) -> tuple[str, Any, tuple, dict]:
    """The fx spelling of a torch call: an operator, a method or a function."""
    qualname = getattr(func, "__qualname__", "")
    is_method = qualname.startswith(("TensorBase.", "Tensor."))
    if name == "__get__":
        return "call_function", getattr, (args[0], func.__self__.__name__), {}
    if is_method and not kwargs and len(args) == 2 and name in _REFLECTED_OPERATORS:
        return "call_function", _REFLECTED_OPERATORS[name], (args[1], args[0]), {}
    if is_method and not kwargs and name in _BINARY_OPERATORS:
        return "call_function", _BINARY_OPERATORS[name], args, {}
    if is_method and name == "neg":
        return "call_function", operator.neg, args, {}
    if is_method and isinstance(args[0], torch.Tensor):
        return "call_method", name, args, kwargs
    return "call_function", func, args, kwargs


def is_replaced(func: Any) -> bool:
    """Whether a function that torch says is called has been put in the place of one of torch's, which it then called:
    in a graph it would do what it does besides twice."""
    file = getattr(func, "__globals__", {}).get("__name__", "torch")
    return file.split(".")[0] != "torch" and any(value is func for value in vars(F).values())


def holds_tensor(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(holds_tensor(v) for v in value)
    return isinstance(value, torch.Tensor)


def modes() -> tuple:
    """The grad and autocast modes."""
    return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
