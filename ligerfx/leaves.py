"""Functions that stay one node in a graph: mask creation, attention, experts, checks.

They run as they are at run time, so flash-attention, flex and user-registered attention keep their own fast
paths. During capture, and for the capturing thread only, the names by which the model's own source files know
these functions lead to wrappers that record a call.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

_lock = threading.RLock()

TOLIST = FakeTensor.tolist
"""The one method of a tensor that torch does not tell a tracer of."""

PRINT = print
"""The function itself: during a capture, its name leads to one that records a call."""

MASKS = "transformers.masking_utils"
EAGER_ATTENTION = "eager_attention_forward"
CACHE_INDEX = "layer_idx"
"""The attribute by which a layer of transformers knows its own entries in a cache."""

HOOKS_MARK = "_output_capturing_hooks_installed"
"""The attribute by which a model of transformers knows that hooks collect its hidden states and attentions."""

EXPERTS = "transformers.integrations.moe"
GROUPED_EXPERTS = ("grouped_mm_experts_forward", "batched_mm_experts_forward")
"""Experts functions that are ordinary tensor operations from beginning to end: recorded as such, so that the gated unit
between their matrix products is seen."""


def is_mask_function(value: Any) -> bool:
    return isinstance(value, FunctionType) and value.__module__ == MASKS and value.__name__.startswith("create_")


def is_check(value: Any) -> bool:
    """Whether a function raises unless what it is given is true: the one by which models of transformers look whether
    there are as many places for features in the text as features."""
    return isinstance(value, FunctionType) and value.__name__ == "torch_compilable_check"


def put(items: Any, key: Any, value: Any) -> None:
    """What `items[key] = value` is in a graph, where `items` is no tensor: no tensor changes."""
    items[key] = value


def is_kernel(value: Any) -> bool:
    """Whether transformers runs a kernel of another package in place of this function where there is one: the scan of a
    recurrent layer, a causal convolution."""
    return isinstance(value, FunctionType) and "is_new_implementation" in value.__code__.co_freevars


def is_recorded(function: Any) -> bool:
    """Whether an entry of a registry is recorded operation by operation, rather than as one call."""
    return getattr(function, "__module__", "") == EXPERTS and function.__name__ in GROUPED_EXPERTS


def _source_files(modules: Iterable[nn.Module]) -> set[ModuleType]:
    """The Python modules that define the classes of these torch modules, torch itself left out."""
    names = {cls.__module__ for module in modules for cls in type(module).__mro__}
    return {sys.modules[n] for n in names if n in sys.modules and n.split(".")[0] not in ("torch", "builtins")}


def _registry_class() -> type | None:
    """The base class of transformers' function registries (attention, experts), where transformers is loaded."""
    generic = sys.modules.get("transformers.utils.generic")
    return getattr(generic, "GeneralInterface", None)


class _Registry:
    """Stands for a function registry: every function that it gives out is a leaf.

    `looked_up(registry, key)` is called when a function is asked for.
    """

    def __init__(self, registry: Any, leaf: Callable[[Callable], Callable], looked_up: Callable) -> None:
        self._ligerfx_original = registry
        self._leaf = leaf
        self._looked_up = looked_up

    def __getitem__(self, key: Any) -> Callable:
        self._looked_up(self._ligerfx_original, key)
        return self._leaf(self._ligerfx_original[key])

    def get_interface(self, key: Any, *args: Any, **kwargs: Any) -> Callable:
        self._looked_up(self._ligerfx_original, key)
        return self._leaf(self._ligerfx_original.get_interface(key, *args, **kwargs))

    def get(self, key: Any, *args: Any, **kwargs: Any) -> Any:
        self._looked_up(self._ligerfx_original, key)
        value = self._ligerfx_original.get(key, *args, **kwargs)
        return self._leaf(value) if callable(value) else value

    def __contains__(self, key: Any) -> bool:
        return key in self._ligerfx_original

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ligerfx_original, name)


@contextlib.contextmanager
def leaf_functions(
    modules: Iterable[nn.Module], record: Callable[..., Any], look_up: Callable[[Any, Any], None]
) -> Iterator[None]:
    """While active, leaf functions reached from the source files of `modules` go through `record`.

    `record(function, args, kwargs)` is called in place of `function(*args, **kwargs)`, and `look_up(registry, key)`
    when a registry is asked for one. Other threads keep seeing the original functions.
    """
    owner = threading.get_ident()

    def looked_up(registry: Any, key: Any) -> None:
        if threading.get_ident() == owner:
            look_up(registry, key)

    def leaf(function: Callable) -> Callable:
        function = getattr(function, "_ligerfx_original", function)
        if is_recorded(function):
            return function

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != owner:
                return function(*args, **kwargs)
            return record(function, args, kwargs)

        wrapper._ligerfx_original = function
        return wrapper

    registry_class = _registry_class()

    @functools.wraps(F.scaled_dot_product_attention)
    def attention(*args: Any, **kwargs: Any) -> Any:
        # A comparison of sizes ("more than one token, and no mask") is not a bool yet, which torch insists on.
        if isinstance(kwargs.get("is_causal"), torch.SymBool):
            kwargs["is_causal"] = bool(kwargs["is_causal"])
        return plain_attention(*args, **kwargs)

    def tolist(tensor: FakeTensor) -> Any:
        return record(TOLIST, (tensor,), {}) if threading.get_ident() == owner else TOLIST(tensor)

    replaced: list[tuple[dict, str, Any]] = []
    with _lock:
        plain_attention = F.scaled_dot_product_attention
        attention._ligerfx_original = getattr(plain_attention, "_ligerfx_original", plain_attention)
        replaced.append((vars(F), "scaled_dot_product_attention", plain_attention))
        F.scaled_dot_product_attention = attention
        plain_tolist, FakeTensor.tolist = FakeTensor.tolist, tolist
        replaced.append((vars(builtins), "print", builtins.print))
        builtins.print = leaf(PRINT)
        for file in _source_files(modules):
            for name, value in list(vars(file).items()):
                eager = name == EAGER_ATTENTION and isinstance(value, FunctionType)
                if eager or is_mask_function(value) or is_kernel(value):
                    new: Any = leaf(value)
                elif registry_class is not None and isinstance(value, registry_class):
                    new = _Registry(value, leaf, looked_up)
                else:
                    continue
                replaced.append((vars(file), name, value))
                vars(file)[name] = new
        try:
            yield
        finally:
            FakeTensor.tolist = plain_tolist
            for namespace, name, value in reversed(replaced):
                namespace[name] = value
