"""Parameters of which a process keeps a shard, and which are whole while their module runs.

FSDP and DeepSpeed ZeRO-3 gather them in hooks, which do not run during capture: it takes their whole sizes from here.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Whole:
    """What forward sees of a sharded parameter."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


def whole_parameters(root: nn.Module) -> dict[int, Whole]:
    """What forward sees of each sharded parameter below `root`, by the id of the tensor that is there now."""
    return dict(_found(root, None))


def _found(module: nn.Module, dtype: torch.dtype | None) -> Iterator[tuple[int, Whole]]:
    """`dtype` is that of the mixed precision of the nearest FSDP2 module."""
    if is_fully_sharded(module):
        dtype = module._get_fsdp_state()._mp_policy.param_dtype
    handle = module.__dict__.get("_handle")
    if getattr(getattr(handle, "flat_param", None), "_is_flat_param", False):
        yield from _views(handle)
    for value in module._parameters.values():
        if _is_shard(value):
            yield id(value), Whole(value.shape, dtype or value.dtype, value.device)
        elif hasattr(value, "ds_shape") and value.shape != value.ds_shape:  # ZeRO-3
            yield id(value), Whole(torch.Size(value.ds_shape), value.dtype, value.device)
    for child in module.children():
        yield from _found(child, dtype)


def _is_shard(value: Any) -> bool:
    """Whether a parameter is one of FSDP2: a DTensor that is split over one dimension of its mesh. (One that is
    split over more is of tensor parallelism, too, and forward sees a part of it.)"""
    if not hasattr(value, "full_tensor"):
        return False
    return value.is_floating_point() and sum(placement.is_shard() for placement in value.placements) == 1


def _views(handle: Any) -> Iterator[tuple[int, Whole]]:
    """The views that FSDP1 makes of one flat parameter."""
    flat = handle.flat_param
    wholes = {}
    for info, shape in zip(flat._param_infos, flat._shapes, strict=True):
        wholes[id(info.module), info.param_name] = whole = Whole(shape, handle._fwd_bwd_param_dtype, flat.device)
        yield id(getattr(info.module, info.param_name)), whole
    for info in flat._shared_param_infos:
        whole = wholes[id(info.prim_module), info.prim_param_name]
        yield id(getattr(info.module, info.param_name)), whole


def data_parallel_wrapper(root: nn.Module) -> str | None:
    """The name of what has wrapped `root` or a module in it for data parallel training, if anything has."""
    for module in root.modules():
        cls = type(module)
        if is_fully_sharded(module):
            return "fully_shard"
        if cls.__module__.startswith(("torch.nn.parallel.", "torch.distributed.fsdp.")):
            return cls.__name__
    return None


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether FSDP2's `fully_shard` was applied to the module itself."""
    return hasattr(type(module), "_get_fsdp_state")


_lock = threading.RLock()


@contextlib.contextmanager
def torchs_own_linear() -> Iterator[None]:
    """While active, `F.linear` is torch's own, of which patterns speak. ZeRO-3 puts another function in its place,
    which computes the same from other operations."""
    with _lock:
        current = F.linear
        F.linear = torch._C._nn.linear
        try:
            yield
        finally:
            F.linear = current


_ZERO = {"deepspeed.runtime.zero.parameter_offload", "deepspeed.utils.nvtx"}
"""The files of ZeRO-3's hooks, and of what wraps one of them."""


def gathers_nothing(module: nn.Module) -> bool:
    """Whether all hooks of a module are ZeRO-3's, which gather the parameters that a module has, and it has none."""
    return _has_hooks_of_zero_alone(module) and next(module.parameters(), None) is None


def is_gathered_by_zero(module: nn.Module) -> bool:
    """Whether a module's parameters are ZeRO-3's, and its hooks, too: they gather them for each call and free them."""
    parameters = [p for p in module._parameters.values() if p is not None]
    split = bool(parameters) and all(hasattr(p, "ds_shape") for p in parameters)
    return split and bool(module._forward_pre_hooks) and _has_hooks_of_zero_alone(module)


def is_called_by_zero() -> bool:
    """Whether what calls this function is called by a hook of ZeRO-3."""
    return sys._getframe(2).f_globals.get("__name__") in _ZERO


def _has_hooks_of_zero_alone(module: nn.Module) -> bool:
    of_zero = has_no_hooks_but(module, lambda hook: getattr(hook, "__module__", "") in _ZERO)
    return of_zero and not vars(module).get("_external_params")


def has_no_hooks_but(module: nn.Module, known: Callable[[Any], bool]) -> bool:
    """Whether all of a module's own hooks are of its forward, and `known`."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return all(map(known, hooks)) and not (module._backward_hooks or module._backward_pre_hooks)


def call_with(module: nn.Module, forward: Callable, *args: Any) -> Any:
    """What calling `module` gives with another forward: its hooks do what they do around any call."""
    module.forward = forward
    try:
        return module(*args)
    finally:
        del module.forward


def is_hook_of_fsdp(hook: Any) -> bool:
    function = getattr(hook, "func", hook)  # FSDP1 registers a partial
    return getattr(function, "__module__", "").startswith("torch.distributed.fsdp.")


def is_view_of_flat(value: Any) -> bool:
    """Whether a tensor is what FSDP1 puts in the place of a parameter while its module runs."""
    if not isinstance(value, torch.Tensor):
        return False
    with torch._C.DisableTorchFunction():  # no operation of the model
        return getattr(value._base, "_is_flat_param", False)


def wrapped_module(module: nn.Module) -> str | None:
    """The name of the one child that an FSDP1 wrapper calls, once it has gathered its parameters."""
    return "_fsdp_wrapped_module" if "_fsdp_wrapped_module" in module._modules else None
