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

import sympy
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .capture import works_in_place
from .shape_rules import GROUPED, OF_ANY_LAYOUT, RULES, expressions
from .symbols import FakeInputs, expression
from .traced_numbers import TracedFloat, TracedInt, plain


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
        if name == "__get__":  # two of three calls read a property
            return function(*args, **kwargs)
        if name == "__setitem__" and type(args[0]) is FakeTensor:
            return None  # a fake has no contents
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
        if not args or works_in_place(name, kwargs) or torch.is_inference_mode_enabled():
            raise _Unknown
        first = _first(args)
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
        rule = RULES.get(name)
        if rule is None or not args or type(first := _first(args)) is not FakeTensor:
            return None
        device = first.device
        if name in GROUPED:  # torch knows it of bf16 fakes alone
            sizes, dtype = rule(*args, **kwargs)
            return self.fakes.of_layout(sizes, None, dtype, device)
        given = args[0] if isinstance(args[0], (tuple, list)) else args[:1]
        tensors = [a for a in (*given, *args[1:], *kwargs.values()) if isinstance(a, Tensor)]
        if _autocasts(device) or torch.is_inference_mode_enabled():
            return None
        if not all(isinstance(t, FakeTensor) and t.device == device for t in tensors):
            return None
        if name not in OF_ANY_LAYOUT and not all(map(self._is_contiguous, tensors)):
            return None
        try:
            found = rule(*args, **kwargs)
        except TypeError:  # arguments that the rule does not know
            return None
        if found is None:
            return None
        sizes, dtype = found
        known = self.fakes.shape_env.backed_var_to_val
        if any(isinstance(size, sympy.Basic) and not size.free_symbols <= known.keys() for size in sizes):
            return None
        sizes = [self.fakes.of_expression(size) if isinstance(size, sympy.Basic) else size for size in sizes]
        return self.fakes.of_layout(sizes, None, dtype, device)

    def _is_contiguous(self, tensor: Tensor) -> bool:
        sizes = expressions(tensor.shape)
        if sizes not in self._strides:
            self._strides[sizes] = expressions(
                self.fakes.of_layout(tensor.shape, None, tensor.dtype, tensor.device).stride()
            )
        return expressions(tensor.stride()) == self._strides[sizes]


_STATIC = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.memory_format, type(...))


def _described(value: Any) -> Any:
    """An argument, without the memory of its tensors, to compare with others. Raises _Unknown."""
    kind = type(value)
    if kind is FakeTensor:
        if value.constant is not None or value.requires_grad or value.layout is not torch.strided:
            raise _Unknown
        if value.is_conj() or value.is_neg():
            raise _Unknown
        return expressions(value.shape), expressions(value.stride()), value.dtype, value.device
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


def _first(args: tuple) -> Any:
    """The first tensor of a call: its first argument, or the first in that list."""
    return args[0][0] if isinstance(args[0], (tuple, list)) and args[0] else args[0]


def _autocasts(device: torch.device) -> bool:
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
