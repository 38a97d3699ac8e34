"""Twins: modules so alike, and so alike called, that one graph serves them all.

Capture time must not grow with depth: of equal layers the first is captured, and the others are compared with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .capture import Capture, structure, submodule
from .signature import call_key
from .symbols import FakeInputs, expression
from .traced_numbers import TracedFloat, TracedInt, plain


class Twins:
    """The captures of one tracer, for modules like those that were captured."""

    def __init__(self, fakes: FakeInputs) -> None:
        self.fakes = fakes
        self._finished: dict[tuple, list[Capture]] = {}  # by structure and call
        self._structures: dict[int, tuple] = {}

    def add(self, real: nn.Module, capture: Capture) -> None:
        self._finished.setdefault((structure(real, self._structures), capture.key), []).append(capture)

    def find(self, real: nn.Module, args: tuple, kwargs: dict) -> tuple[Capture | None, Any]:
        """The capture of an identical module called the same way, and a fresh copy of its output. Looks at sizes, which
        is not the model's doing: to be called while nothing is recorded."""
        key, leaves = call_key(args, kwargs)
        for capture in self._finished.get((structure(real, self._structures), key), ()):
            same = (
                all(_same_input(a, b) for a, b in zip(capture.leaf_values, leaves, strict=True))
                and _same_aliasing(capture.leaf_values, leaves)
                and all(read.holds(submodule(real, inner)) for inner, sub in capture.subtree() for read in sub.reads)
            )
            if same:
                inputs = {id(old): new for old, new in zip(capture.leaf_values, leaves, strict=True)}
                return capture, _fresh(capture.output, inputs, self.fakes)
        return None, None


def _same_input(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        sizes_a, sizes_b = ([expression(size) for size in (*t.shape, *t.stride())] for t in (a, b))
        return sizes_a == sizes_b
    if isinstance(a, (TracedInt, TracedFloat)):
        return not a.used or plain(a) == plain(b)
    return a is b


def _same_aliasing(a: Sequence, b: Sequence) -> bool:
    first_a = [[id(x) for x in a].index(id(x)) for x in a]
    return first_a == [[id(x) for x in b].index(id(x)) for x in b]


def _fresh(out: Any, inputs: dict[int, Any], fakes: FakeInputs) -> Any:
    if id(out) in inputs:
        return inputs[id(out)]
    if isinstance(out, torch.Tensor):
        return fakes.like(out)
    if dataclasses.is_dataclass(out) and not isinstance(out, type):
        return type(out)(**{f.name: _fresh(getattr(out, f.name), inputs, fakes) for f in dataclasses.fields(out)})
    if type(out) in (tuple, list):
        return type(out)(_fresh(v, inputs, fakes) for v in out)
    if isinstance(out, dict):
        return {k: _fresh(v, inputs, fakes) for k, v in out.items()}
    return out
