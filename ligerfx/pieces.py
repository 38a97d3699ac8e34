"""Loops over the pieces of tensors, of sizes that only the data tell: attention within each image of a batch.

    sizes = lengths.tolist()
    pieces = zip(*(torch.split(x, sizes, dim=2) for x in (query, key, value)))
    out = torch.cat([attention(self, *piece)[0] for piece in pieces], dim=1)

While it is captured, such a loop runs over three pieces, whose sizes are symbols of their own. Where one leaf function
gets each of them, and the results are joined in order, the graph has one call that splits, loops and joins. Whatever
else code does with lengths or pieces has no place in a graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._pytree import tree_leaves

from .constants import PLAIN
from .errors import CaptureError
from .symbols import FakeInputs, expression

_COUNT = 3
"""Pieces that stand for all: that the same happens to each tells that it depends neither on the one before nor on its
number."""


class Unknown:
    """A list of which only the data tell what is in it."""

    def refuse(self, *_: Any) -> NoReturn:
        raise DataDependentOutputException(torch.Tensor.tolist)

    __iter__ = __len__ = __getitem__ = __bool__ = __contains__ = __eq__ = __add__ = __radd__ = refuse
    __hash__ = object.__hash__


def refuse_unknown(values: Any) -> None:
    """Raises if there is such a list among values that enter or leave a module: its place is one graph."""
    if any(isinstance(value, Unknown) for value in tree_leaves(values)):
        raise CaptureError("a list of the numbers in a tensor is handed to another module")


class Lengths(Unknown):
    """The numbers in a tensor."""

    def __init__(self, tensor: torch.Tensor, fakes: FakeInputs) -> None:
        self.tensor = tensor
        self.sizes = [fakes.own_size(number + 2) for number in range(_COUNT)]


class Pieces(Unknown, tuple):
    """The pieces of a tensor. Some that stand for all can be looped over."""

    whole: torch.Tensor
    lengths: Lengths
    dim: int

    @staticmethod
    def of(whole: torch.Tensor, lengths: Lengths, dim: int) -> Pieces:
        before, after = whole.shape[:dim], whole.shape[dim:][1:]
        pieces = Pieces(whole.new_empty((*before, size, *after)) for size in lengths.sizes)
        pieces.whole, pieces.lengths, pieces.dim = whole, lengths, dim
        return pieces

    def __iter__(self) -> Iterator[torch.Tensor]:
        return tuple.__iter__(self)


@dataclass(eq=False)
class _Call:
    """A call of a leaf function with pieces, in whose place are what they are pieces of."""

    function: Callable
    args: dict[int | str, Any]  # by position or name
    number: int  # of the pieces
    before: int  # how many nodes the graph had

    @property
    def pieces(self) -> dict[int | str, Pieces]:
        return {key: value for key, value in self.args.items() if isinstance(value, Pieces)}

    def is_like(self, other: _Call) -> bool:
        same = self.function is other.function and self.args.keys() == other.args.keys()
        return same and all(_alike(value, other.args[key]) for key, value in self.args.items())


def _alike(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, PLAIN) and a == b)


class Loops:
    """The loops of one forward, whose graph is under construction."""

    def __init__(self, graph: torch.fx.Graph) -> None:
        self._graph = graph
        self._lengths: dict[int, Lengths] = {}  # by id of the tensor
        self._pieces: dict[int, tuple[Pieces, int]] = {}  # by id of the piece, with its number
        self._results: dict[int, tuple[_Call, int | None]] = {}  # by id of the tensor, with its place in the result
        self._alive: list[Any] = []  # keeps ids valid

    def __bool__(self) -> bool:
        """Whether lengths were asked for: else there are no pieces."""
        return bool(self._lengths)

    def lengths(self, tensor: torch.Tensor, fakes: FakeInputs) -> Lengths:
        self._alive.append(tensor)
        return self._lengths.setdefault(id(tensor), Lengths(tensor, fakes))

    def knows(self, value: Any) -> bool:
        """Whether a value has no place in the graph, as a piece or the result of a loop for one."""
        return id(value) in self._pieces or id(value) in self._results

    def split(self, whole: torch.Tensor, lengths: Lengths, dim: int) -> Pieces:
        pieces = Pieces.of(whole, lengths, dim % whole.ndim)
        self._alive.append(pieces)
        self._pieces |= {id(sample): (pieces, number) for number, sample in enumerate(pieces)}
        return pieces

    def called(self, function: Callable, args: tuple, kwargs: dict[str, Any], out: Any) -> bool:
        """Whether a leaf function got pieces; what it gave is then known."""
        given = dict(enumerate(args)) | kwargs
        found = {key: self._pieces[id(value)] for key, value in given.items() if id(value) in self._pieces}
        if len({(id(pieces.lengths), number) for pieces, number in found.values()}) != 1:
            return False
        number = next(number for _, number in found.values())
        call = _Call(function, given | {key: pieces for key, (pieces, _) in found.items()}, number, self._nodes())
        places = enumerate(out) if isinstance(out, tuple) else [(None, out)]
        self._results |= {id(value): (call, place) for place, value in places if isinstance(value, torch.Tensor)}
        self._alive.append(out)
        return True

    def joined(self, tensors: Sequence[torch.Tensor], dim: int) -> tuple[Callable, tuple, torch.Tensor] | None:
        """The call that gives what the results of a loop are joined to: function, arguments and a fake of the result;
        None for other tensors."""
        found = [self._results.get(id(tensor)) for tensor in tensors]
        if None in found or [call.number for call, _ in found] != list(range(_COUNT)):
            return None
        (call, place), *others = found
        if call.before != self._nodes():  # what happened since then may have changed what it was given
            return None
        first = next(iter(call.pieces.values()))
        size = tensors[0].shape[dim]
        if not all(other.is_like(call) and where == place for other, where in others):
            return None
        if expression(size) != expression(first.lengths.sizes[0]):
            return None
        sizes = list(tensors[0].shape)
        sizes[dim] = first.whole.shape[first.dim]
        whole = {key: value.whole if isinstance(value, Pieces) else value for key, value in call.args.items()}
        args = tuple(value for key, value in whole.items() if isinstance(key, int))
        kwargs = {key: value for key, value in whole.items() if isinstance(key, str)}
        dims = tuple((key, pieces.dim) for key, pieces in call.pieces.items())
        return (
            over_pieces(call.function),
            (first.lengths.tensor, dims, args, kwargs, place, dim),
            (tensors[0].new_empty(sizes)),
        )

    def _nodes(self) -> int:
        return len(self._graph.nodes)


@functools.cache
def over_pieces(function: Callable) -> Callable:
    """The loop over pieces of which each goes through `function`."""

    def loop(
        lengths: torch.Tensor, dims: tuple, args: tuple, kwargs: dict[str, Any], place: int | None, dim: int
    ) -> torch.Tensor:
        """Splits those of the arguments that `dims` names, each along its dimension, and joins the results (of
        tuples, what is at `place`) along `dim`."""
        sizes, given = lengths.tolist(), dict(enumerate(args)) | kwargs
        keys, splits = zip(*((key, torch.split(given[key], sizes, dim=along)) for key, along in dims), strict=True)
        results = []
        for pieces in zip(*splits, strict=True):
            given.update(zip(keys, pieces, strict=True))
            out = function(*(given[i] for i in range(len(args))), **{name: given[name] for name in kwargs})
            results.append(out if place is None else out[place])
        return torch.cat(results, dim=dim)

    loop.__name__ = loop.__qualname__ = f"{function.__name__}_over_pieces"
    return loop
