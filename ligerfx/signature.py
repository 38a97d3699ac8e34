"""Call signatures: what of a call must be the same for a captured graph to serve it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch


def call_key(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, list[Any]]:
    """Splits a call into a hashable key and its variable leaves.

    The key holds the structure of the arguments, every constant (strings, bools, None, dtypes, devices), and
    the dtype, rank and device of every tensor, and that of autocast. The leaves are the tensors, numbers and foreign
    objects, in order.
    """
    key: list[Any] = []
    leaves: list[Any] = []
    for value in args:
        _flatten(value, key, leaves)
    for name, value in kwargs.items():
        key.append(name)
        _flatten(value, key, leaves)
    return (*key, *autocast_key()), leaves


def autocast_key() -> tuple:
    """What autocast adds to the key: its dtype on each device, if it is on."""
    if torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu"):
        return tuple(torch.get_autocast_dtype(d) if torch.is_autocast_enabled(d) else None for d in ("cuda", "cpu"))
    return ()


def _flatten(value: Any, key: list, leaves: list) -> None:
    if isinstance(value, torch.Tensor):
        key.append((value.dtype, value.ndim, value.device))
        leaves.append(value)
    elif value is None or isinstance(value, (bool, str, torch.dtype, torch.device)):
        key.append(value)
    elif isinstance(value, int):
        key.append(int)
        leaves.append(value)
    elif isinstance(value, float):
        key.append(float)
        leaves.append(value)
    elif type(value) in (tuple, list, torch.Size):
        key.append((type(value), len(value)))
        for item in value:
            _flatten(item, key, leaves)
    elif type(value) is dict:
        key.append((dict, *value))
        for item in value.values():
            _flatten(item, key, leaves)
    elif isinstance(value, torch.SymInt):
        key.append(int)
        leaves.append(value)
    else:
        key.append(getattr(value, "_ligerfx_stands_for", type(value)))
        leaves.append(value)


def parameter_names(forward: Callable, args: tuple, kwargs: dict[str, Any]) -> list[str]:
    """A readable name for each leaf of a call of an unbound `forward`, in the order of `call_key`."""
    positional = [
        p.name for p in inspect.signature(forward).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ][1:]  # fmt: skip
    names: list[str] = []
    for index, value in enumerate(args):
        _names(value, positional[index] if index < len(positional) else f"arg{index}", names)
    for name, value in kwargs.items():
        _names(value, name, names)
    return names


def _names(value: Any, name: str, names: list[str]) -> None:
    if type(value) in (tuple, list, torch.Size):
        for index, item in enumerate(value):
            _names(item, f"{name}_{index}", names)
    elif type(value) is dict:
        for key, item in value.items():
            _names(item, f"{name}_{key}", names)
    elif not (value is None or isinstance(value, (bool, str, torch.dtype, torch.device))):
        names.append(name)


def stand_in(value: Any, methods: dict[str, Callable], items: Any = None) -> Any:
    """What stands for a foreign object (a KV cache) during capture: it passes for an instance of its class.

    `methods` are what may be called on it, each with the stand-in as its first argument. Every other use raises
    AttributeError, which ends the capture of the module that tries. `items` is kept as the attribute `_ligerfx_items`.
    """
    cls = type(value)
    known = {name: functools.partialmethod(_call, method) for name, method in methods.items()}
    known |= {"_ligerfx_stands_for": cls, "_ligerfx_items": items}

    def __getattribute__(self: Any, name: str) -> Any:
        if name in known or name == "__class__":
            return object.__getattribute__(self, name)
        raise AttributeError(f"{cls.__name__}.{name} is used inside forward")

    body = {**known, "__getattribute__": __getattribute__}
    if hasattr(cls, "__getattr__"):  # called after an AttributeError, that of nn.Module would ask again, without end
        body["__getattr__"] = __getattribute__
    try:
        return object.__new__(type(cls.__name__, (cls,), body))
    except Exception:
        # There is no subclass, or it is written in C (the dict that a ModelOutput is, an array), and would answer for
        # itself, as if it were empty. So this one only says that it is of the class.
        body |= {"__class__": property(lambda self: cls)}
        body |= {name: functools.partialmethod(_refuse, cls, name) for name in ("__bool__", "__eq__", "__hash__")}
        return object.__new__(type(cls.__name__, (), body))


def _refuse(self: Any, cls: type, name: str, *args: Any) -> Any:
    raise AttributeError(f"{cls.__name__}.{name} is used inside forward")


def _call(self: Any, function: Callable, *args: Any, **kwargs: Any) -> Any:
    return function(self, *args, **kwargs)


def same_containers(a: Any, b: Any, same_leaf: Callable[[Any, Any], bool]) -> bool:
    """Whether two arguments hold the same, down through tuples, lists and dicts."""
    if type(a) is not type(b) and (type(a) in _CONTAINERS or type(b) in _CONTAINERS):
        return False
    if type(a) is dict:
        return list(a) == list(b) and all(same_containers(a[key], b[key], same_leaf) for key in a)
    if type(a) in _CONTAINERS:
        return len(a) == len(b) and all(same_containers(x, y, same_leaf) for x, y in zip(a, b, strict=True))
    return same_leaf(a, b)


_CONTAINERS = (tuple, list, torch.Size, dict)
