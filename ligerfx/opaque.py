"""The edges of a module that stays as it is.

Inside, its Python code made numbers of sizes and of data, which hold for the example inputs alone. Neither the modules
that it calls nor the one that called it may take them for constants.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_map

from .guesses import Guesses
from .symbols import FakeInputs
from .traced_numbers import TracedFloat, TracedInt


def symbolic_inputs(call: Any, guesses: Guesses) -> Any:
    """The arguments of a module inside: the sizes of a tensor that has none but numbers are symbols, as those of the
    example inputs are."""
    return tree_map(lambda leaf: guesses.symbolic(leaf) if _has_numbers_alone(leaf) else leaf, call)


def _has_numbers_alone(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.ndim > 0 and all(type(size) is int for size in leaf.shape)


def own_results(out: Any, fakes: FakeInputs) -> Any:
    """What the module returns, as its caller sees it: sizes that are numbers are symbols of their own (widths apart),
    to be measured when it has run, and numbers know whether they are computed with."""

    def own(leaf: Any) -> Any:
        if type(leaf) in (int, float):
            return TracedInt(leaf) if type(leaf) is int else TracedFloat(leaf)
        if not isinstance(leaf, torch.Tensor):
            return leaf
        sizes = [
            fakes.own_size(size) if _is_own(size, d, leaf.ndim, fakes) else size for d, size in enumerate(leaf.shape)
        ]
        if all(a is b for a, b in zip(sizes, leaf.shape, strict=True)):
            return leaf
        with fakes.mode:
            return torch.empty(sizes, dtype=leaf.dtype, device=leaf.device)

    return tree_map(own, out)


def _is_own(size: Any, dim: int, rank: int, fakes: FakeInputs) -> bool:
    if type(size) is int:
        return dim == 0 or dim < rank - 1
    return not fakes.knows_size(size)
