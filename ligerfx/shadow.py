"""Shadows: what the tracer runs in place of a model's modules.

A shadow is a shallow copy whose parameters are fakes, whose hooks are gone, and which reports what the model's
Python code reads of it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import nn

from .capture import (
    HIDDEN,
    MISSING,
    Alias,
    Children,
    Inherited,
    Missing,
    Read,
    exactly,
    has_hooks,
    has_own_hooks,
    join,
    parameters_of,
    present_parameters,
    runs_its_forward,
    stands_for,
)
from .clone import COMPILED, clone_tree, detach_state
from .errors import CaptureError
from .frame import Frame
from .leaves import CACHE_INDEX, HOOKS_MARK
from .recorder import Recorder
from .sharded import whole_parameters, wrapped_module
from .traced_numbers import TracedInt

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


def logged_class(
    cls: type, log: Callable, log_other: Callable, log_write: Callable, log_method: Callable, cache: dict[type, type]
) -> type:
    """A subclass of `cls` that reports which attributes are read and set. It passes for `cls` by name.

    `log(shadow, name, value)` gives what the model's code sees of an attribute that is read; `log_other` is told of the
    parameters, buffers and modules that it reads, and of what it looks for in vain; `log_method` of the methods and
    properties of the class that it uses, and what it gets.
    """
    if cls not in cache:

        def __getattribute__(self: nn.Module, name: str) -> Any:
            value = super(logged, self).__getattribute__(name)
            if not name.startswith("__") and name not in _INTERNAL and not name.endswith("_hooks"):
                state = object.__getattribute__(self, "__dict__")
                if name in state or (isinstance(value, _CONSTANT) and _is_class_constant(cls, name)):
                    return log(self, name, value)
                if isinstance(getattr(cls, name, None), (FunctionType, property)):
                    log_method(self, cls, name, value)
            return value

        def __getattr__(self: nn.Module, name: str) -> Any:  # a parameter, buffer or module; or what there is not
            try:
                value = super(logged, self).__getattr__(name)
            except AttributeError:
                log_other(self, name, MISSING)
                raise
            log_other(self, name, value)
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
            "__getattr__": __getattr__,
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
    """True for activation functions, losses and the like, which have no parameters, buffers or children."""
    buffers = any(buffer is not None for buffer in module._buffers.values())  # a loss may have class weights
    owns = parameters_of(module) or buffers or module._modules
    return not owns and runs_its_forward(module)


def exposes_parameters(module: nn.Module) -> bool:
    """True where a fused op may read the weights of this leaf itself: a plain linear layer that nobody hooks."""
    if getattr(nn.Linear.forward, "__globals__", None) is not vars(torch.nn.modules.linear):  # another in its place
        return False
    return stands_for(module, exactly(nn.Linear), present_parameters(module))


class ShadowTree:
    """The shadows of the modules of a model.

    Args:
        recorder: has the model as its root, and frames that are to know what its code reads and sets.
        original_class: maps a module to the class whose forward defines it.
        call: `call(shadow, forward, *args, **kwargs)` takes the place of each shadow's forward.
    """

    def __init__(self, recorder: Recorder, original_class: Callable[[nn.Module], type], call: Callable) -> None:
        self.recorder = recorder
        self.origins = recorder.origins
        self.original_class = original_class
        self.device: torch.device | None = None  # of the first tensor of the call
        self._call = call
        self._fake_of: dict[int, torch.Tensor] = {}  # id(parameter) -> its fake
        model = self.origins.root
        shadows: dict[int, nn.Module] = {}
        logged: dict[type, type] = {}
        self._whole = whole_parameters(model)
        self.aliases = _aliases(model)
        self.root = clone_tree(
            model,
            lambda m: logged_class(
                self.original_class(m), self._log_read, self._log_other, self._log_write, self._log_method, logged
            ),
            shadows,
        )
        for real_id, real in {id(m): m for m in model.modules()}.items():
            self._prepare(shadows[real_id], real)
        for path, shadow in self.root.named_modules():
            self.origins.paths[id(shadow)] = path

    def _prepare(self, shadow: nn.Module, real: nn.Module) -> None:
        state = shadow.__dict__
        if self.original_class(real) is type(real):  # an optimised one learns by itself when it is compiled
            state.pop(COMPILED, None)
        self.origins.modules[id(shadow)] = real
        forward = self.original_class(real).forward
        if inner := wrapped_module(real):
            forward = functools.partial(_call_child, inner)
        state["forward"] = functools.partial(self._call, shadow, forward)
        for name, value in parameters_of(real).items():
            if state.pop(name, None) is not None:
                state["_parameters"][name] = value
        for table in ("_parameters", "_buffers"):
            state[table] = LazyFakes(state[table], self.fake_parameter)
        for name, value in state.items():
            if name.endswith("_hooks") and value:
                state[name] = type(value)()
        detach_state(shadow, self.fake_parameter)
        # transformers collects hidden states and attentions in hooks, and marks the model that has them: the shadow
        # has none.
        state.pop(HOOKS_MARK, None)
        if state.get("gradient_checkpointing"):
            state["gradient_checkpointing"] = False

    def fake_parameter(self, value: torch.Tensor) -> torch.Tensor:
        """The fake of a parameter or buffer; there is one of each."""
        if id(value) in self.origins.parameters:  # a buffer that forward replaced during capture
            return value
        if id(value) not in self._fake_of:
            with self.recorder.pause():
                whole = self._whole.get(id(value), value)
                fake = value if _is_fake(value) else self.recorder.fakes.parameter(whole, self.device)
            self._fake_of[id(value)] = fake
            self.origins.parameters[id(fake)] = value
        return self._fake_of[id(value)]

    def _log_write(self, shadow: nn.Module, name: str) -> None:
        """A graph has no side effects: a module whose forward sets an attribute runs as it is. (What hooks collect,
        its graph returns.)"""
        path, frames = self.origins.paths.get(id(shadow)), self.recorder.frames
        if name != HOOKS_MARK and not self.recorder.paused and frames and path is not None:
            frames[-1].fail(f"forward sets the attribute {name!r} of {path or 'the model'!r}")

    def _log_read(self, shadow: nn.Module, name: str, value: Any) -> Any:
        path = self.origins.paths.get(id(shadow))
        if self.recorder.paused or path is None:
            return value
        if id(value) in self.origins.paths:
            self._log_reference(join(path, name), value)
            return value
        if (frame := self._frame_around(path)) is None:
            return value
        relative = frame.relative(path)
        if (relative, name) not in frame.reads:
            # A layer that tells a cache its number, and no more, has the graph of the other layers.
            traced = self.origins.parameters.get(id(value), value)
            if name == CACHE_INDEX and type(value) is int:
                traced = TracedInt(value)
            frame.reads[relative, name] = Read(relative, name, traced)
        return frame.reads[relative, name].value if name == CACHE_INDEX else value

    def _frame_around(self, path: str) -> Frame | None:
        """The innermost graph under construction whose module is the one of this path, or holds it."""
        for frame in reversed(self.recorder.frames):
            if path == frame.path or frame.path == "" or path.startswith(frame.path + "."):
                return frame
        return None

    def _log_other(self, shadow: nn.Module, name: str, value: Any) -> None:
        """What is None or missing may be there later, and an empty list of modules have some."""
        if self.recorder.paused or name in _INTERNAL or name in HIDDEN or name.startswith("__"):
            return
        if value is None or value is MISSING:
            self._log_check(shadow, Missing, name, value)
        elif isinstance(value, (nn.ModuleList, nn.ModuleDict)) and not value._modules:
            self._log_check(value, Children, "_modules", ())

    def _log_method(self, shadow: nn.Module, cls: type, name: str, value: Any) -> None:
        if self.recorder.paused or getattr(cls, name) is getattr(nn.Module, name, None):
            return
        self.recorder.log_method(cls, name)
        if isinstance(value, FunctionType):  # a property gives it, for the model to call: its loss
            self.recorder.log_code(value)
        if not isinstance(getattr(cls, name), property):
            self._log_check(shadow, Inherited, name, None)

    def _log_check(self, shadow: nn.Module, kind: type[Read], name: str, value: Any) -> None:
        path = self.origins.paths.get(id(shadow))
        if path is not None and (frame := self._frame_around(path)) is not None:
            relative = frame.relative(path)
            frame.reads.setdefault((relative, name), kind(relative, name, value))

    def _log_reference(self, path: str, target: nn.Module) -> None:
        """An attribute that is a module of the model, and no submodule where it is read: for the graph it is the
        submodule that it is elsewhere."""
        for frame in reversed(self.recorder.frames):
            with contextlib.suppress(CaptureError):
                names = frame.relative(self.origins.paths[id(target)]), frame.relative(path)
                frame.reads["", names] = Alias("", *names)
                return
            frame.fail(f"the attribute {path!r} is a module outside of {frame.path!r}")


def _aliases(root: nn.Module) -> list[tuple[str, str]]:
    """The first name of each module that has several, with each other name."""
    first: dict[int, str] = {}
    named = root.named_modules(remove_duplicate=False)
    return [(first[id(m)], name) for name, m in named if first.setdefault(id(m), name) != name]


def _call_child(name: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return module._modules[name](*args, **kwargs)


def _is_fake(value: torch.Tensor) -> bool:
    return isinstance(value, torch._subclasses.FakeTensor)
