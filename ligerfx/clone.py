"""Shallow copies of module trees: new modules, the same Parameter and buffer objects."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

COMPILED = "_compiled_call_impl"
"""What `module.compile()` leaves with a module: a compiled call of this very module."""

_REGISTRIES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


def clone_tree(
    module: nn.Module,
    class_of: Callable[[nn.Module], type],
    memo: dict[int, nn.Module] | None = None,
) -> nn.Module:
    """Copies a module tree without copying a tensor.

    Each module gets its own `__dict__`, registries and hook tables, so that hooks, adapters and mode changes
    on the copy do not reach the original. Shared modules stay shared and tied parameters stay tied.

    Args:
        module: the root of the tree.
        class_of: the class that the copy of a given module gets.
        memo: filled with id(original) -> copy.
    """
    memo = {} if memo is None else memo
    copy = _copy(module, class_of, memo)
    for clone in list(memo.values()):
        for name, value in list(vars(clone).items()):
            clone.__dict__[name] = _rebind(value, memo)
    return copy


def detach_state(copy: nn.Module, fake: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Lets a forward on a copy that `clone_tree` made write to lists, dicts, sets and plain tensors (a cache, say)
    without a trace in the original: the copy gets containers of its own, and fakes of the tensors.

    What ligerfx itself keeps with a module stays shared. The tables of parameters and buffers are left to the caller.
    """
    state = copy.__dict__
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            state[name] = fake(value)
        elif type(value) in (list, dict, set) and not name.startswith("_ligerfx"):
            state[name] = value.copy()


def _copy(module: nn.Module, class_of: Callable[[nn.Module], type], memo: dict[int, nn.Module]) -> nn.Module:
    if id(module) in memo:
        return memo[id(module)]
    copy = memo[id(module)] = object.__new__(class_of(module))
    copy.__dict__.update({name: _own(name, value) for name, value in vars(module).items()})
    for name, child in module._modules.items():
        if child is not None:
            copy._modules[name] = _copy(child, class_of, memo)
    return copy


def _own(name: str, value: Any) -> Any:
    if name == "_parameters":  # that of ZeRO-3 is a dict bound to its module, which gathers what is looked up
        return dict(value)
    is_table = name in _REGISTRIES or name.endswith("_hooks") or "_hooks_" in name
    return value.copy() if is_table and hasattr(value, "copy") else value


def _rebind(value: Any, memo: dict[int, nn.Module]) -> Any:
    """Points bound methods and unregistered references of the original tree to the copy."""
    if isinstance(value, types.MethodType) and id(value.__self__) in memo:
        return types.MethodType(value.__func__, memo[id(value.__self__)])
    if type(value) is functools.partial:  # what accelerate puts in the place of a forward
        args = [_rebind(a, memo) for a in value.args]
        keywords, attributes = ({k: _rebind(v, memo) for k, v in d.items()} for d in (value.keywords, vars(value)))
        before = (*value.args, *value.keywords.values(), *vars(value).values())
        if all(a is b for a, b in zip((*args, *keywords.values(), *attributes.values()), before, strict=True)):
            return value
        new = functools.partial(value.func, *args, **keywords)
        vars(new).update(attributes)
        return new
    if isinstance(value, nn.Module):
        return memo.get(id(value), value)
    return value
