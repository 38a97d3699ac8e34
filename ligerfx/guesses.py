"""Answers for Python code that looks at data, in a forward that no graph can hold.

Such a module stays as it is: what is wanted of a run of its forward on fakes is how it calls the modules inside, and
the kind of its output. Its code may look at the grid of an image, or for the places of its tokens. These follow from
the example inputs alone, whose values are there: operations on nothing else run on them, too. What cannot be known is
guessed to be 0, False or empty, and a slice to be of any size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.distributions import Distribution
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from .symbols import FakeInputs

_GUESSES = {"__bool__": False, "__int__": 0, "__index__": 0, "__float__": 0.0, "item": 0}
_QUESTIONS = {*_GUESSES, "tolist", "equal", "allclose", "is_nonzero"}

_LIKE = {"expand_as": torch.Tensor.expand, "reshape_as": torch.Tensor.reshape, "view_as": torch.Tensor.view}
"""Operations that take of another tensor its sizes alone, as those that take the sizes."""

_TAKING_SIZES = {"view", "reshape", "expand", "repeat", "split", "split_with_sizes", "narrow", "interpolate"}


@contextlib.contextmanager
def _distributions_unchecked() -> Iterator[None]:
    """A distribution refuses parameters that are not valid, as a guess about them is not."""
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


def _is_open(item: Any) -> bool:
    """Whether a slice is bounded by tensors, whose values are not known."""
    return isinstance(item, slice) and any(isinstance(b, torch.Tensor) for b in (item.start, item.stop, item.step))


def _is_mask(item: Any) -> bool:
    return isinstance(item, torch.Tensor) and item.dtype == torch.bool


class Guesses:
    """What is known of the data of fakes, and guesses about the rest."""

    def __init__(self, fakes: FakeInputs) -> None:
        self.fakes = fakes
        self._given: dict[int, torch.Tensor] = {}  # id(fake) -> an example input, which must not change
        self._values: dict[int, torch.Tensor] = {}
        self._symbolic: dict[int, torch.Tensor] = {}  # id(fake with numbers for sizes) -> one with symbols
        self._alive: list[torch.Tensor] = []  # keeps ids valid

    def learn(self, fake: torch.Tensor, given: torch.Tensor) -> None:
        """The value of an input."""
        if given.device.type != "meta":
            self._given[id(fake)] = given
            self._alive.append(fake)

    def forget(self) -> None:
        """Lets go of the example inputs and of what was computed from them, whoever keeps this."""
        for known in (self._given, self._values, self._symbolic, self._alive):
            known.clear()

    def symbolic(self, fake: torch.Tensor) -> torch.Tensor:
        """A fake like one whose sizes are numbers, with symbols instead."""
        if id(fake) not in self._symbolic:
            made = self._symbolic[id(fake)] = self.fakes.tensor(fake, static_rows=True)
            if self.knows(fake):
                with _disable_current_modes():
                    self._values[id(made)] = self._value(fake)
            self._alive += [fake, made]
        return self._symbolic[id(fake)]

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Operations on values leave torch's random numbers as they were, and distributions do not look at guesses."""
        devices = {t.device for t in self._given.values() if t.is_cuda}
        with torch.random.fork_rng(devices=devices), _distributions_unchecked():
            yield

    def answer(self, name: str, args: tuple, kwargs: dict) -> Any:
        """What to say where code asks for data that is not known. None where it does not ask."""
        if name == "nonzero" or (name == "where" and len(args) == 1):
            rank = args[0].ndim
            if name == "where" or kwargs.get("as_tuple"):
                return tuple(args[0].new_empty((0,), dtype=torch.int64) for _ in range(rank))
            return args[0].new_empty((0, rank), dtype=torch.int64)
        return _GUESSES.get(name)

    def run(self, on_fakes: Callable, func: Callable, name: str, args: tuple, kwargs: dict) -> Any:
        """The result of an operation, whose values are known where those of all operands are."""
        if name in _LIKE and len(args) == 2:
            func, name, args = _LIKE[name], _LIKE[name].__name__, (args[0], *args[1].shape)
        if name in _TAKING_SIZES and args:
            args, kwargs = (args[0], *tree_map(self._number, args[1:])), tree_map(self._number, kwargs)
        elif name == "__getitem__":
            args = tree_map(self._bounds, args, is_leaf=lambda leaf: isinstance(leaf, slice))
            items = args[1] if isinstance(args[1], tuple) else args[1:]
            if any(map(_is_open, items)) and not any(isinstance(item, (torch.Tensor, list)) for item in items):
                return self._sliced(on_fakes, func, args[0], items)
            if _is_mask(args[1]) and self.knows(args[1]) and not self.knows(args[0]):
                with _disable_current_modes():
                    count = int(self._value(args[1]).sum())
                return args[0].new_empty((count, *args[0].shape[args[1].ndim :]))
        known, real = self._on_values(func, args, kwargs)
        if known and name in _QUESTIONS:
            return real
        if not known and (guess := self.answer(name, args, kwargs)) is not None:
            return guess
        try:
            out = on_fakes(func, name, args, kwargs)
        except Exception:
            if not known:
                raise
            out = None
        return self._paired(out, real) if known else out

    def _on_values(self, func: Callable, args: tuple, kwargs: dict) -> tuple[bool, Any]:
        leaves, _ = tree_flatten((args, kwargs))
        if not all(self.knows(leaf) for leaf in leaves):
            return False, None
        try:
            with _disable_current_modes(), torch.no_grad():
                return True, func(*tree_map(self._value, args), **tree_map(self._value, kwargs))
        except Exception:
            return False, None

    def knows(self, leaf: Any) -> bool:
        if isinstance(leaf, slice):
            return all(map(self.knows, (leaf.start, leaf.stop, leaf.step)))
        return not isinstance(leaf, torch.Tensor) or id(leaf) in self._values or id(leaf) in self._given

    def _bounds(self, leaf: Any) -> Any:
        """A slice with numbers for bounds, where they are known."""
        return slice(*map(self._number, (leaf.start, leaf.stop, leaf.step))) if isinstance(leaf, slice) else leaf

    def _sliced(self, on_fakes: Callable, func: Callable, x: torch.Tensor, items: tuple) -> torch.Tensor:
        """A part of a tensor, of a size that the data tell: any."""
        out = on_fakes(func, "__getitem__", (x, tuple(slice(None) if _is_open(i) else i for i in items)), {})
        sizes = list(out.shape)
        dims = [item for item in items if not isinstance(item, int)]  # a number takes a dimension away
        for place, item in enumerate(dims):
            if _is_open(item):
                behind = any(before is ... for before in dims[:place])
                dim = place - len(dims) if behind else place
                sizes[dim] = self.fakes.own_size(sizes[dim])
        return out.new_empty(sizes)

    def _number(self, leaf: Any) -> Any:
        """A number in place of a tensor that holds one, where it is known."""
        if not isinstance(leaf, torch.Tensor) or leaf.ndim or not self.knows(leaf):
            return leaf
        with _disable_current_modes():
            return self._value(leaf).item()

    def _value(self, leaf: Any) -> Any:
        if isinstance(leaf, slice):
            return slice(*map(self._value, (leaf.start, leaf.stop, leaf.step)))
        if isinstance(leaf, torch.Tensor):
            if id(leaf) not in self._values:
                self._values[id(leaf)] = self._given[id(leaf)].detach().clone()
            return self._values[id(leaf)]
        if isinstance(leaf, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return leaf.node.hint
        return leaf

    def _paired(self, out: Any, real: Any) -> Any:
        """The fake result, with the values of its tensors remembered; made from these where fakes alone do not tell
        its sizes."""
        leaves, spec = tree_flatten(real)
        if out is not None and not any(isinstance(leaf, torch.Tensor) for leaf in leaves):
            return out
        fakes = tree_flatten(out)[0] if out is not None else [None] * len(leaves)
        made = [self._pair(fake, value) for fake, value in zip(fakes, leaves, strict=True)]
        return tree_unflatten(made, spec)

    def _pair(self, fake: Any, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value if fake is None else fake
        if not isinstance(fake, torch.Tensor) or not self.fakes.knows_sizes(fake):
            with self.fakes.mode:
                fake = torch.empty(value.shape, dtype=value.dtype, device=value.device)
        self._values[id(fake)] = value
        self._alive.append(fake)
        return fake
