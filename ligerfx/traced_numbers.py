"""Python numbers that remember whether the model computed with them.

A number that a module only hands on (`num_items_in_batch`, say) is an input of its graph and may change from
call to call. A number that it compares or computes with decides what the graph is, so it becomes a guard.
"""

from __future__ import annotations

from typing import Any

_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "divmod", "pow", "lshift", "rshift", "and", "or", "xor")
_MIRRORED = {f"__{name}__": f"__r{name}__" for name in _BINARY} | {
    f"__{name}__": f"__{other}__"
    for name, other in (("eq", "eq"), ("ne", "ne"), ("lt", "gt"), ("gt", "lt"), ("le", "ge"), ("ge", "le"))
}
_DUNDERS = [*_MIRRORED, *(f"__r{name}__" for name in _BINARY)] + [
    f"__{name}__"
    for name in (
        "hash", "bool", "neg", "pos", "abs", "int", "float", "index",
        "round", "trunc", "floor", "ceil", "invert", "str", "repr", "format",
    )
]  # fmt: skip


def _watched(base: type, name: str) -> Any:
    original = getattr(base, name)

    def method(self: Any, *args: Any) -> Any:
        self.used = True
        result = original(self, *args)
        if result is NotImplemented and name in _MIRRORED:  # a symbolic size, which takes ordinary numbers alone
            mirrored = getattr(type(args[0]), _MIRRORED[name], None)
            return NotImplemented if mirrored is None else mirrored(args[0], plain(self))
        if result is NotImplemented and name in _MIRRORED.values():
            direct = getattr(type(args[0]), f"__{name[3:]}", None)
            return NotImplemented if direct is None else direct(args[0], plain(self))
        return result

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
