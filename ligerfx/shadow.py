"""Shadows: what the tracer runs in place of a model's modules.

A shadow is a shallow copy whose parameters are fakes, whose hooks are gone, and which reports what the model's
Python code reads of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .capture import has_hooks, has_own_hooks, parameters_of, present_parameters, runs_its_forward, stands_for

_INTERNAL = frozenset(vars(nn.Module())) - {"training"} | {
    "forward",
    "gradient_checkpointing",
}


_CONSTANT = (bool, int, float, str)


class LazyFakes(dict):
    """A parameter table that makes each fake when it is first looked up."""

    def __init__(self, real: dict[str, torch.Tensor | None], fake: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__(real)
        self._fake = fake

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        return value if value is None else self._fake(value)


def logged_class(cls: type, log: Callable, log_write: Callable, cache: dict[type, type]) -> type:
    """A subclass of `cls` that reports which attributes are read and set. It passes for `cls` by name.

    `log(shadow, name, value)` gives what the model's code sees of an attribute that is read.
    """
    if cls not in cache:

        def __getattribute__(self: nn.Module, name: str) -> Any:
            value = super(logged, self).__getattribute__(name)
            if not name.startswith("__") and name not in _INTERNAL and not name.endswith("_hooks"):
                state = object.__getattribute__(self, "__dict__")
                if name in state or (isinstance(value, _CONSTANT) and _is_class_constant(cls, name)):
                    return log(self, name, value)
            return value

        def __setattr__(self: nn.Module, name: str, value: Any) -> None:
            log_write(self, name)
            super(logged, self).__setattr__(name, value)

        def _call_impl(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if has_own_hooks(self):  # made by the forward that is being captured, to collect outputs
                return super(logged, self)._call_impl(*args, **kwargs)
            return self.forward(*args, **kwargs)  # without global hooks: nobody is to see the shadow

        body = {
            "_call_impl": _call_impl,
            "__getattribute__": __getattribute__,
            "__setattr__": __setattr__,
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
        }
        logged = type(cls)(cls.__name__, (cls,), body)
        cache[cls] = logged
    return cache[cls]


def _is_class_constant(cls: type, name: str) -> bool:
    """True for a number or string in a class body; a property that gives one is code, not state."""
    return isinstance(next((vars(c)[name] for c in cls.__mro__ if name in vars(c)), None), _CONSTANT)


def is_leaf_module(module: nn.Module, cls: type) -> bool:
    """True for modules that stay one node: torch's own (RMSNorm apart, an idiom), linear layers of every kind,
    and modules whose forward was replaced on the instance."""
    if "forward" in vars(module) or isinstance(module, nn.Linear):
        return True
    if not module._parameters and not module._modules and has_hooks(module):
        return True
    return cls.__module__.split(".")[0] == "torch" and cls not in (nn.RMSNorm, nn.Sequential)


def owns_nothing(module: nn.Module) -> bool:
    """True for activation functions and the like, which have no parameters, buffers or children."""
    owns = parameters_of(module) or module._buffers or module._modules
    return not owns and runs_its_forward(module)


def exposes_parameters(module: nn.Module) -> bool:
    """True where a fused op may read the weights of this leaf itself: a plain linear layer that nobody hooks."""
    return stands_for(module, nn.Linear, present_parameters(module))
