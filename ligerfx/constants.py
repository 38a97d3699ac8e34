"""Python constants."""

import math
from collections.abc import Callable
from typing import Any

import torch

PLAIN = (
    str, bool, int, float, complex, type(None), type(...),
    torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip
"""Types of Python constants: they may stand in a graph as they are, and compare by value."""


def literal(value: Any, constant: Callable[[Any], str]) -> str:
    """The Python code of a value; where it is no literal, what `constant` gives for it."""
    is_literal = type(value) in (str, bool, int, type(None)) or (type(value) is float and math.isfinite(value))
    return repr(value) if is_literal else constant(value)


_LARGE = 1000


def copied(value: Any) -> Any:
    """A list, dict or set, copied with those inside it, but for large ones, to be compared with it later. What else is
    inside is the same."""
    kind = type(value)
    if kind not in (list, dict, set) or len(value) > _LARGE:
        return value
    return {k: copied(v) for k, v in value.items()} if kind is dict else kind(map(copied, value))
