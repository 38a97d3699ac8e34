"""What a function gives, told from two runs on tensors without data.

The scan of a recurrent layer is hundreds of small operations, and fakes with symbolic sizes take a millisecond or more
for each. Tensors on the meta device take none. So the function runs on them at two choices of sizes: what differs
between the results is a symbol, what does not is a number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import sympy
import torch
from torch.overrides import _pop_mode_temporarily
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from .symbols import FakeInputs, expression

LONG = 150
"""A size in the second run, above the lengths at which such functions work in chunks (64, 128)."""


def probed(function: Callable, args: tuple, kwargs: dict[str, Any], fakes: FakeInputs) -> tuple[bool, Any]:
    """(True, the result of the function on these fakes, a fake), or (False, None) where two runs do not tell."""
    leaves, _ = tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    known = {expr for leaf in leaves for expr in _sizes(leaf)}
    symbols = sorted({s for expr in known for s in expr.free_symbols}, key=str)
    if not tensors or not symbols:
        return False, None
    hints = [dict(zip(symbols, numbers, strict=True)) for numbers in _choices(symbols, fakes)]
    try:
        runs = [_run(function, args, kwargs, numbers) for numbers in hints]
        merged = [_merged(a, b, known, hints) for a, b in zip(*(tree_flatten(run)[0] for run in runs), strict=True)]
    except Exception:  # it looks at the data, or at more than sizes: then fakes have to tell
        return False, None
    with fakes.mode:
        made = [_fake(leaf, fakes, tensors[0].device) for leaf in merged]
    return True, tree_unflatten(made, tree_flatten(runs[0])[1])


def _sizes(leaf: Any) -> Iterator[sympy.Expr]:
    sizes = leaf.shape if isinstance(leaf, torch.Tensor) else [leaf] if isinstance(leaf, torch.SymInt) else []
    return (expression(size) for size in sizes if not expression(size).is_Integer)


def _choices(symbols: list[sympy.Symbol], fakes: FakeInputs) -> Iterator[list[int]]:
    hints = [int(fakes.shape_env.backed_var_to_val[symbol]) for symbol in symbols]
    yield hints
    yield [hint + 1 if hint == min(hints) and len(hints) > 1 else LONG + 2 * i for i, hint in enumerate(hints)]


def _run(function: Callable, args: tuple, kwargs: dict[str, Any], numbers: dict[sympy.Symbol, int]) -> Any:
    def concrete(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            shape = [int(expression(size).subs(numbers)) for size in leaf.shape]
            return torch.empty(shape, dtype=leaf.dtype, device="meta")
        if isinstance(leaf, torch.SymInt):
            return int(expression(leaf).subs(numbers))
        return leaf

    with _disable_current_modes(), _pop_mode_temporarily(), torch.no_grad():
        args, kwargs = tree_map(concrete, (args, kwargs))
        return function(*args, **kwargs)


def _merged(a: Any, b: Any, known: set[sympy.Expr], numbers: list[dict]) -> Any:
    """A leaf of the result: (sizes, dtype) for a tensor. Raises ValueError where the runs do not agree on one."""
    if not isinstance(a, torch.Tensor):
        if type(a) is not type(b) or a != b:
            raise ValueError("not the same in both runs")
        return a
    if a.ndim != b.ndim or a.dtype != b.dtype:
        raise ValueError("tensors of two kinds")
    sizes = []
    for pair in zip(a.shape, b.shape, strict=True):
        fitting = [e for e in known if tuple(e.subs(n) for n in numbers) == pair] if pair[0] != pair[1] else pair[:1]
        if len(fitting) != 1:
            raise ValueError("a size that is no size of the arguments")
        sizes.append(fitting[0])
    return sizes, a.dtype


def _fake(leaf: Any, fakes: FakeInputs, device: torch.device) -> Any:
    if not isinstance(leaf, tuple):
        return leaf
    sizes, dtype = leaf
    return torch.empty([fakes.of_expression(size) for size in sizes], dtype=dtype, device=device)
