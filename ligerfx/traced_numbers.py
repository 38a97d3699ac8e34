"""Python numbers that remember whether the model computed with them.

A number that a module only hands on (`num_items_in_batch`, say) is an input of its graph and may change from
call to call. A number that it compares or computes with decides what the graph is, so it becomes a guard.
"""

from __future__ import annotations

from typing import Any

_DUNDERS = [
    f"__{prefix}{name}__"
    for name in (
        "add", "sub", "mul", "truediv", "floordiv", "mod", "divmod", "pow", "lshift", "rshift", "and", "or", "xor",
    )
    for prefix in ("", "r")
] + [
    f"__{name}__"
    for name in (
        "eq", "ne", "lt", "le", "gt", "ge", "hash", "bool", "neg", "pos", "abs", "int", "float", "index",
        "round", "trunc", "floor", "ceil", "invert", "str", "repr", "format",
    )
]  # fmt: skip


def _watched(base: type, name: str) -> Any:
    original = getattr(base, name)

    def method(self: Any, *args: Any) -> Any:
        self.used = True
        return original(self, *args)

    method.__name__ = name
    return method


class TracedInt(int):
    """An int that sets `used` when Python computes with it."""

    used = False


class TracedFloat(float):
    """A float that sets `used` when Python computes with it."""

    used = False


for _cls, _base in ((TracedInt, int), (TracedFloat, float)):
    for _name in _DUNDERS:
        if hasattr(_base, _name):
            setattr(_cls, _name, _watched(_base, _name))


def plain(value: Any) -> Any:
    """The ordinary number inside a traced one; anything else as it is. Does not mark the number as used."""
    if isinstance(value, TracedInt):
        return int.__int__(value)
    if isinstance(value, TracedFloat):
        return float.__float__(value)
    return value
