"""Stage 1: capture. Runs a model's own Python on fake tensors and records what it computes.

Every module that is called gets its own graph; its parent holds one `call_module` node. Values are real Python
values throughout (fake tensors with symbolic sizes), so branches, `x.shape` unpacking and isinstance checks in
model code just work. The model itself is not touched: the tracer runs a shadow of the module tree whose
parameters are fake and whose modules have no hooks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import sympy
import torch
from torch import nn
from torch.overrides import TorchFunctionMode, _pop_mode_temporarily
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from .capture import (
    PLAIN,
    Alias,
    Capture,
    Children,
    Read,
    has_own_hooks,
    join,
    own_methods,
    parameters_of,
    present_parameters,
    structure,
    submodule,
    works_in_place,
)
from .clone import clone_tree
from .dissolve import may_dissolve
from .errors import CaptureError
from .guesses import Guesses
from .leaves import CACHE_INDEX, HOOKS_MARK, is_check, is_kernel, leaf_functions
from .opaque import own_results, symbolic_inputs
from .probes import probed
from .shadow import LazyFakes, exposes_parameters, is_leaf_module, logged_class, owns_nothing
from .shapes import Shapes
from .sharded import torchs_own_linear, whole_parameters, wrapped_module
from .signature import call_key, parameter_names, stand_in
from .source import call_site, describe_error
from .symbols import FakeInputs, bind_sizes, expression, size_node, symbols_of
from .traced_numbers import TracedFloat, TracedInt, plain

_BINARY_OPERATORS: dict[str, Callable] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv,
    "__truediv__": operator.truediv, "matmul": operator.matmul, "__getitem__": operator.getitem,
    "gt": operator.gt, "lt": operator.lt, "ge": operator.ge, "le": operator.le, "eq": operator.eq,
    "ne": operator.ne, "__floordiv__": operator.floordiv, "__setitem__": operator.setitem,
    "__pow__": operator.pow, "__and__": operator.and_, "__or__": operator.or_,
}  # fmt: skip
_REFLECTED_OPERATORS: dict[str, Callable] = {
    "__rsub__": operator.sub, "__rdiv__": operator.truediv, "__rtruediv__": operator.truediv,
    "__rpow__": operator.pow, "__rfloordiv__": operator.floordiv,
}  # fmt: skip
_COUNTING = {"split", "chunk", "unbind", "tensor_split", "split_with_sizes", "__iter__", "squeeze"}
"""Operations for which a size decides how many tensors they give, or of what rank: their guards count."""
_MEASURING = {"size", "numel", "nelement", "__len__", "stride"}
CASTS = {"to", "float", "half", "bfloat16", "double", "type", "type_as", "cpu", "cuda"}


class _Frame:
    """One graph under construction."""

    def __init__(self, path: str, capture: Capture) -> None:
        self.path = path
        self.capture = capture
        self.graph = capture.graph
        self.known: dict[int, Any] = {}  # id(value) -> node, or a function that makes it
        self.alive: list[Any] = []  # keeps ids valid
        self.measured: list[torch.Tensor] = []  # tensors whose sizes Python code looked at
        self.stand_ins: dict[int, Any] = {}  # id(foreign object) -> what the module sees in its place
        self.sizes: dict[sympy.Expr, Any] = {}
        self.entry_mode = _mode()
        self.recorded_modes: set[tuple] = set()
        self.reads: dict[tuple[str, Any], Read] = {}
        self.numbers: list[TracedInt | TracedFloat] = []  # that modules returned which stay as they are
        self.symbols: set[sympy.Symbol] = set()  # of the sizes of what it works on
        self.guessing = False  # forward runs again, only so that modules inside are captured and there is an output

    def fail(self, reason: str) -> None:
        self.capture.error = self.capture.error or reason

    def bind(self, value: Any, node: Any) -> None:
        self.known[id(value)] = node
        self.alive.append(value)

    def node_of(self, value: Any) -> torch.fx.Node | None:
        entry = self.known.get(id(value))
        if entry is not None and not isinstance(entry, torch.fx.Node):
            entry = self.known[id(value)] = entry()
        return entry


def _mode() -> tuple:
    return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")


class Tracer(TorchFunctionMode):
    """Captures a module tree. One tracer serves one call of the root module.

    Args:
        root: the module to capture.
        fakes: the fake tensor mode and its symbolic sizes.
        original_class: maps a module to the class whose forward defines it.
    """

    def __init__(
        self,
        root: nn.Module | None = None,
        fakes: FakeInputs | None = None,
        original_class: Callable[[nn.Module], type] = type,
    ) -> None:
        super().__init__()
        self.root = root
        self.fakes = fakes or FakeInputs()
        self.original_class = original_class
        self.guesses = Guesses(self.fakes)
        self._shapes = Shapes(self.fakes)
        self.frames: list[_Frame] = []
        self.paused = self.guessing = False
        self._device: torch.device | None = None  # of the first tensor of the call
        self._fake_of: dict[int, torch.Tensor] = {}  # id(parameter) -> its fake
        self._real_of: dict[int, torch.Tensor] = {}  # id(fake) -> the parameter
        self._paths: dict[int, str] = {}  # id(shadow) -> path from the root
        self._real: dict[int, nn.Module] = {}  # id(shadow) -> module
        self._finished: dict[tuple, list[Capture]] = {}  # by structure and call
        self._structures: dict[int, tuple] = {}
        self._hopeless: dict[int, str] = {}  # id(shadow) -> why its forward gives no output on fakes

    def trace(self, args: tuple, kwargs: dict[str, Any]) -> Capture:
        """Runs the root on fake versions of the given inputs and returns its capture."""
        shadows: dict[int, nn.Module] = {}
        logged: dict[type, type] = {}
        self._whole = whole_parameters(self.root)
        self._aliases = _aliases(self.root)
        shadow_root = clone_tree(
            self.root,
            lambda m: logged_class(self.original_class(m), self._log_read, self._log_write, logged),
            shadows,
        )
        for real_id, real in {id(m): m for m in self.root.modules()}.items():
            self._prepare(shadows[real_id], real)
        for path, shadow in shadow_root.named_modules():
            self._paths[id(shadow)] = path
        args, kwargs = self._fake_call(args, kwargs)
        self._device = next((x.device for x in call_key(args, kwargs)[1] if isinstance(x, torch.Tensor)), None)
        self._shadow_root = shadow_root
        self._root_capture = Capture("", *call_key(args, kwargs)[:1], torch.fx.Graph())
        leaves = leaf_functions(self.root.modules(), self.record_leaf_function)
        # What a model compiles (flex attention) runs uncompiled meanwhile: the compiler ends the process on such fakes.
        # The stance is the process's, and is set while `leaves` keeps other threads from tracing.
        with leaves, torch.compiler.set_stance("force_eager"), _errors_not_logged(), self.fakes.active(), self:
            try:
                shadow_root(*args, **kwargs)
            except Exception as error:  # the graph of every finished module is still good
                self._root_capture.error = self._root_capture.error or describe_error(error)
            finally:
                self.guesses.forget()
        return self._root_capture

    def _fake_call(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        memo: dict[int, Any] = {}

        def fake(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                if id(value) not in memo:
                    memo[id(value)] = self.fakes.tensor(value)
                    self.guesses.learn(memo[id(value)], value)
                return memo[id(value)]
            if type(value) is int:
                return TracedInt(value)
            if type(value) is float:
                return TracedFloat(value)
            if isinstance(value, tuple) and type(value) is tuple:
                return tuple(fake(v) for v in value)
            if type(value) is list:
                return [fake(v) for v in value]
            if type(value) is dict:
                return {k: fake(v) for k, v in value.items()}
            if isinstance(value, (str, bool, type(None), torch.dtype, torch.device)):
                return value
            return self._stand_in(value)

        return tuple(fake(a) for a in args), {k: fake(v) for k, v in kwargs.items()}

    def _stand_in(self, value: Any) -> Any:
        return stand_in(value, self._record_update)

    def _prepare(self, shadow: nn.Module, real: nn.Module) -> None:
        state = shadow.__dict__
        self._real[id(shadow)] = real
        forward = self.original_class(real).forward
        if inner := wrapped_module(real):
            forward = functools.partial(_call_child, inner)
        state["forward"] = functools.partial(self._call_module, shadow, forward)
        for name, value in parameters_of(real).items():
            if state.pop(name, None) is not None:
                state["_parameters"][name] = value
        for table in ("_parameters", "_buffers"):
            state[table] = LazyFakes(state[table], self._fake_parameter)
        for name, value in state.items():
            if name.endswith("_hooks") and value:
                state[name] = type(value)()
            elif type(value) in (list, dict, set):  # what forward puts into it (a cache, say) is not for the model
                state[name] = value.copy()
            elif isinstance(value, torch.Tensor):  # which forward may change in place
                state[name] = self._fake_parameter(value)
        # transformers collects hidden states and attentions in hooks, and marks the model that has them: the shadow
        # has none.
        state.pop(HOOKS_MARK, None)
        if state.get("gradient_checkpointing"):
            state["gradient_checkpointing"] = False

    def _fake_parameter(self, value: torch.Tensor) -> torch.Tensor:
        if id(value) in self._real_of:  # a buffer that forward replaced during capture
            return value
        if id(value) not in self._fake_of:
            with self._pause():
                whole = self._whole.get(id(value), value)
                fake = value if _is_fake(value) else self.fakes.parameter(whole, self._device)
            self._fake_of[id(value)] = fake
            self._real_of[id(fake)] = value
        return self._fake_of[id(value)]

    def __torch_function__(self, func: Any, tensor_types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self.paused or not self.frames:
            if self.guessing:
                return self.guesses.run(self._shapes.run, func, name, args, kwargs)
            return self._shapes.run(func, name, args, kwargs)
        if self.frames[-1].guessing:
            with self.fakes.shape_env.suppress_guards():
                return self.guesses.run(self._shapes.run, func, name, args, kwargs)
        if name in _MEASURING or getattr(getattr(func, "__self__", None), "__name__", "") == "shape":
            self.frames[-1].measured.append(args[0])
        # Guards raised inside an op concern strides and broadcasting of fakes; the op itself runs again, on
        # real tensors, at run time. Guards raised by the model's own Python are kept.
        if name in _COUNTING:
            self.fakes.shape_env.counting = True
            try:
                out = func(*args, **kwargs)
            finally:
                self.fakes.shape_env.counting = False
        else:
            with self.fakes.shape_env.suppress_guards():
                out = self._shapes.run(func, name, args, kwargs)
        if not works_in_place(name, kwargs) and (not _holds_tensor(out) or (name in CASTS and out is args[0])):
            return out
        frame = self.frames[-1]
        frame.recorded_modes.add(_mode())
        self._record(frame, *_target(func, name, args, kwargs), out)
        return out

    def _record(
        self, frame: _Frame, op: str, target: Any, args: Sequence, kwargs: dict, out: Any
    ) -> torch.fx.Node | None:
        if frame.capture.error:
            return None
        try:
            node_args = tuple(self._arg(frame, a) for a in args)
            node_kwargs = {k: self._arg(frame, v) for k, v in kwargs.items()}
        except CaptureError as error:
            frame.fail(f"{error}, in {call_site()[0]}")
            return None
        node = frame.graph.create_node(op, target, node_args, node_kwargs)
        site, line = call_site()
        node.meta.update(val=out, source=site, line=line)
        self._bind_output(frame, out, node)
        return node

    def _bind_output(self, frame: _Frame, out: Any, node: torch.fx.Node, get: Callable | None = None) -> None:
        """Makes every tensor and every foreign object inside `out` known, by a path of nodes from `node`."""
        make = get or (lambda: node)
        if isinstance(out, torch.Tensor):
            frame.bind(out, make if get else node)
        elif dataclasses.is_dataclass(out) and not isinstance(out, type):
            for field in dataclasses.fields(out):
                value = getattr(out, field.name)
                self._bind_output(frame, value, node, _getter(frame, make, getattr, field.name, value))
        elif isinstance(out, (tuple, list)):
            for index, value in enumerate(out):
                self._bind_output(frame, value, node, _getter(frame, make, operator.getitem, index, value))
        elif isinstance(out, dict):
            for name, value in out.items():
                self._bind_output(frame, value, node, _getter(frame, make, operator.getitem, name, value))
        elif not isinstance(out, (*PLAIN, torch.SymInt)) or isinstance(out, (TracedInt, TracedFloat)):
            frame.bind(out, make if get else node)

    def _arg(self, frame: _Frame, value: Any) -> Any:
        """What stands for `value` in the graph of `frame`. Raises CaptureError where nothing can."""
        node = frame.node_of(value)
        if node is not None:
            return node
        if isinstance(value, torch.Tensor):
            return self._parameter_node(frame, value)
        if isinstance(value, (TracedInt, TracedFloat)):
            value.used = True  # not an input of this frame's graph: its value becomes part of it
            return plain(value)
        if isinstance(value, torch.SymInt):
            size = size_node(value.node.expr, frame.graph, frame.sizes)
            if isinstance(size, torch.fx.Node):
                size.meta.setdefault("val", value)
            return size
        if isinstance(value, torch.Size):
            return tuple(self._arg(frame, v) for v in value)
        if type(value).__module__ == "numpy" and value.ndim == 0:  # `np.sqrt(head_dim)`: a float by another name
            return value.item()
        if isinstance(value, PLAIN):
            return value
        if isinstance(value, (tuple, list)):
            items = [self._arg(frame, v) for v in value]
            if hasattr(value, "_fields"):
                return type(value)(*items)
            return tuple(items) if isinstance(value, tuple) else items
        if type(value) is dict:
            return {k: self._arg(frame, v) for k, v in value.items()}
        if isinstance(value, slice):
            return slice(*(self._arg(frame, v) for v in (value.start, value.stop, value.step)))
        if isinstance(value, nn.Module) and id(value) in self._paths:
            return self._attribute(frame, self._relative(frame, self._paths[id(value)]) or "itself", value)
        for owner, name in self._attributes_holding(frame, value):
            return self._attribute(frame, join(owner, name), value)
        raise CaptureError(f"an argument of type {type(value).__name__} has no place in a graph")

    def _attributes_holding(self, frame: _Frame, value: Any) -> Iterator[tuple[str, str]]:
        for (path, name), read in frame.reads.items():
            if read.value is value:
                yield path, name
            elif not isinstance(read.value, (*PLAIN, nn.Module)):  # one configuration inside another
                yield from ((join(path, name), n) for n, v in getattr(read.value, "__dict__", {}).items() if v is value)

    def _attribute(self, frame: _Frame, target: str, value: Any) -> torch.fx.Node:
        node = frame.graph.create_node("get_attr", target)
        node.meta["val"] = value
        frame.bind(value, node)
        return node

    def _parameter_node(self, frame: _Frame, value: torch.Tensor) -> torch.fx.Node:
        real = self._real_of.get(id(value))
        if real is not None:
            for path, owner in submodule(self.root, frame.path).named_modules():
                for name, tensor in (*parameters_of(owner).items(), *owner._buffers.items()):
                    if tensor is real:
                        return self._attribute(frame, join(path, name), value)
            for owner, name in self._attributes_holding(frame, real):
                return self._attribute(frame, join(owner, name), value)
        raise CaptureError("a tensor that is neither an input nor a parameter of this module is used")

    def _relative(self, frame: _Frame, path: str) -> str:
        if path == frame.path:
            return ""
        prefix = frame.path + "." if frame.path else ""
        if not path.startswith(prefix):
            raise CaptureError(f"module {path!r} is used from inside {frame.path!r}")
        return path[len(prefix) :]

    def record_leaf_function(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        """Runs a leaf function unrecorded and records one call of it."""
        if self.paused or not self.frames:
            return function(*args, **kwargs)
        frame = self.frames[-1]
        try:
            with self._pause():
                told, out = probed(function, args, kwargs, self.fakes) if is_kernel(function) else (False, None)
                out = out if told else function(*args, **kwargs)
        except Exception as error:  # it looks at the data, as the mask for flash attention does: the layers do not
            frame.fail(describe_error(error))
            with self._pause(guess=True):
                out = function(*args, **kwargs)
        frame.recorded_modes.add(_mode())
        if is_check(function):
            if isinstance(args[0], torch.Tensor):  # others the model's Python code has answered
                self._record(frame, "call_function", function, args[:2], {}, None)
            return None
        if out is None:
            if any(isinstance(a, torch.Tensor) and not a.is_floating_point() for a in (*args, *kwargs.values())):
                frame.fail(f"{function.__name__} returned None, which may depend on the data")
            return None  # of hidden states, only the kind is looked at
        node = self._record(frame, "call_function", function, args, kwargs, out)
        if node is not None:
            node.meta["leaf"] = True
        return out

    def _record_update(self, cache: Any, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        frame = self.frames[-1]
        with self._pause():
            length = self.fakes.own_size(_cached_length(frame, key))
            out = tuple(t.new_empty((*t.shape[:-2], length, t.shape[-1])) for t in (key, value))
        args = [self._handed_on(frame, a) for a in args]
        if self._record(frame, "call_method", "update", (cache, key, value, *args), kwargs, out) is not None:
            self._bind_results(frame, out)
        return out

    def _handed_on(self, frame: _Frame, value: Any) -> Any:
        """A number that the module read of itself, as that attribute."""
        if isinstance(value, TracedInt) and frame.node_of(value) is None:
            for owner, name in self._attributes_holding(frame, value):
                self._attribute(frame, join(owner, name), value)
        return value

    @contextlib.contextmanager
    def _pause(self, guess: bool = False) -> Iterator[None]:
        """While active, nothing is recorded. With `guess`, questions about the data of fakes are answered with
        0: for a module that stays as it is, only the kind of its output is wanted."""
        before = self.paused, self.guessing
        self.paused, self.guessing = True, guess or self.guessing
        try:
            with self.fakes.shape_env.suppress_guards():
                yield
        finally:
            self.paused, self.guessing = before

    @contextlib.contextmanager
    def _guess_sizes(self, guess: bool) -> Iterator[None]:
        sizes = self.fakes.shape_env
        before, sizes.guessing = sizes.guessing, guess
        try:
            yield
        finally:
            sizes.guessing = before

    def _log_write(self, shadow: nn.Module, name: str) -> None:
        """A graph has no side effects: a module whose forward sets an attribute runs as it is. (What hooks collect,
        its graph returns.)"""
        if name != HOOKS_MARK and not self.paused and self.frames and id(shadow) in self._paths:
            self.frames[-1].fail(f"forward sets the attribute {name!r} of {self._paths[id(shadow)] or 'the model'!r}")

    def _log_read(self, shadow: nn.Module, name: str, value: Any) -> Any:
        path = self._paths.get(id(shadow))
        if self.paused or path is None or isinstance(value, nn.Module):
            return value
        for frame in reversed(self.frames):
            if path == frame.path or frame.path == "" or path.startswith(frame.path + "."):
                relative = self._relative(frame, path)
                if (relative, name) not in frame.reads:
                    # A layer that tells a cache its number, and no more, has the graph of the other layers.
                    traced = self._real_of.get(id(value), value)
                    if name == CACHE_INDEX and type(value) is int:
                        traced = TracedInt(value)
                    frame.reads[relative, name] = Read(relative, name, traced)
                return frame.reads[relative, name].value if name == CACHE_INDEX else value
        return value

    def _log_containers(self, frame: _Frame, target: str) -> None:
        """A forward that runs through a list of modules runs through those that are in it."""
        path = ""
        for name in target.split(".")[:-1]:
            path = join(path, name)
            container = submodule(self.root, join(frame.path, path))
            if isinstance(container, (nn.ModuleList, nn.ModuleDict)):
                frame.reads.setdefault((path, "_modules"), Children(path, "_modules", tuple(container._modules)))

    def _call_module(self, shadow: nn.Module, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        if self.paused:
            return forward(shadow, *args, **kwargs)
        path = self._paths[id(shadow)]
        real = self._real[id(shadow)]
        cls = self.original_class(real)
        if self.frames and owns_nothing(real):
            self.frames[-1].capture.absorbed[self._relative(self.frames[-1], path)] = (cls, ())
            return forward(shadow, *args, **kwargs)
        if self.frames and is_leaf_module(real, cls):
            with self._pause():
                try:
                    out = forward(shadow, *args, **kwargs)
                except Exception:
                    if not isinstance(real, nn.Linear) or len(args) != 1 or kwargs:
                        raise
                    out = _probed(real, forward, *args)
            self._record_call(self.frames[-1], path, args, kwargs, out, real)
            return out
        if self.frames and self.frames[-1].guessing:
            with self._pause():
                args, kwargs = symbolic_inputs((args, kwargs), self.guesses)
        capture = out = None
        if not any(has_own_hooks(inner) for inner in shadow.modules() if inner is not shadow):
            capture, out = self._reuse(real, path, args, kwargs)
        if capture is None:  # forward may also have made hooks inside, which must see what is computed there
            capture, out = self._capture_module(shadow, forward, path, args, kwargs)
        if self.frames:
            parent = self.frames[-1]
            parent.capture.children.append((self._relative(parent, path), capture))
            if capture.error and not parent.guessing:
                with self._pause():
                    out = own_results(out, self.fakes)
            node = self._record_call(parent, path, args, kwargs, out, real)
            if node is not None:
                self._bind_results(parent, out)
            if node is not None and may_dissolve(node.target, real):
                known = cls, present_parameters(real), own_methods(real, cls)
                node.meta.update(capture=capture, stands_for=known)
        return out

    def _bind_results(self, frame: _Frame, out: Any) -> None:
        """Lets sizes that come from a module that stays as it is be measured when it, or its caller, has run."""
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor):
                with self._pause():  # looking at sizes here is not the model's doing
                    symbols = symbols_of(value)
                    if not symbols <= frame.symbols:
                        bind_sizes(value, functools.partial(frame.node_of, value), frame.sizes)
                        frame.symbols |= symbols
            elif isinstance(value, (TracedInt, TracedFloat)):
                frame.numbers.append(value)

    def _record_call(
        self, frame: _Frame, path: str, args: tuple, kwargs: dict, out: Any, real: nn.Module
    ) -> torch.fx.Node | None:
        frame.recorded_modes.add(_mode())
        target = self._relative(frame, path)
        self._log_containers(frame, target)
        node = self._record(frame, "call_module", target, args, kwargs, out)
        if node is not None and exposes_parameters(real):
            node.meta["parameters"] = {}
            with frame.graph.inserting_before(node):
                for name, value in parameters_of(real).items():
                    attribute = frame.graph.create_node("get_attr", join(node.target, name))
                    attribute.meta["val"] = self._fake_parameter(value)
                    node.meta["parameters"][name] = attribute
        return node

    def _capture_module(
        self, shadow: nn.Module, forward: Callable, path: str, args: tuple, kwargs: dict
    ) -> tuple[Capture, Any]:
        args, kwargs = _with_traced_numbers(args), _with_traced_numbers(kwargs)
        key, leaves = call_key(args, kwargs)
        capture = Capture(path, key, torch.fx.Graph(), leaf_values=leaves)
        if not self.frames:
            self._root_capture = capture
        frame = _Frame(path, capture)
        for names in self._aliases:
            if all(name.startswith(path + ".") or not path for name in names):
                frame.reads["", names] = Alias("", *(self._relative(frame, name) for name in names))
        with self._pause():  # looking at sizes here is not the caller's doing
            placeholders = self._placeholders(frame, forward, args, kwargs, leaves)
        if id(shadow) in self._hopeless:
            raise CaptureError(self._hopeless[id(shadow)])
        guards_before = len(self.fakes.shape_env.guards)
        self.frames.append(frame)
        try:
            with self._guess_sizes(False):
                out = forward(shadow, *_with_stand_ins(args, frame), **_with_stand_ins(kwargs, frame))
        except Exception as error:
            frame.fail(describe_error(error))
            frame.guessing = True  # the caller's graph, and those of the modules inside, may be good all the same
            try:
                with self._guess_sizes(True), self.guesses.active():
                    out = forward(shadow, *args, **kwargs)
                if _is_empty(out):  # what was guessed to be empty was an output
                    raise CaptureError(frame.capture.error)
            except Exception:
                try:  # a module inside may need what it gets as it is: a mask object, say
                    if len(self.frames) == 1:
                        raise
                    with self._pause(guess=True), self.guesses.active():
                        out = forward(shadow, *args, **kwargs)
                    if _is_empty(out):
                        raise CaptureError(frame.capture.error) from None
                except Exception:
                    # With other sizes than some that depend on the data, it may run.
                    if all(self.fakes.knows_sizes(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)):
                        self._hopeless[id(shadow)] = frame.capture.error
                    raise
        finally:
            self.frames.pop()
            # Modules inside answer for sizes that only they know.
            guards = [g.expr for g in self.fakes.shape_env.guards[guards_before:]]
            capture.guards = [guard for guard in guards if guard.free_symbols <= frame.symbols]
            capture.reads = list(frame.reads.values())
            if not capture.error:
                self._check_modes(frame)
                self._check_reads(frame)
                if any(number.used for number in frame.numbers):
                    frame.fail("forward computes with a number that a module which stays as it is returned")
        self._finish(frame, out, placeholders)
        capture.output = out
        self._finished.setdefault((structure(self._real[id(shadow)], self._structures), key), []).append(capture)
        return capture, out

    def _placeholders(
        self, frame: _Frame, forward: Callable, args: tuple, kwargs: dict, leaves: list
    ) -> list[torch.fx.Node]:
        nodes = []
        for name, value in zip(parameter_names(forward, args, kwargs), leaves, strict=True):
            node = frame.graph.placeholder(name)
            node.meta["val"] = value
            nodes.append(node)
            frame.symbols |= symbols_of(value)
            if id(value) in frame.known:
                continue  # one tensor passed twice: the first name serves
            if _is_foreign(value):
                frame.stand_ins[id(value)] = value = self._stand_in(value)
            frame.bind(value, node)
            if isinstance(value, torch.Tensor):
                bind_sizes(value, node, frame.sizes)
            elif isinstance(value, torch.SymInt):
                frame.sizes.setdefault(value.node.expr, node)
        return nodes

    def _check_modes(self, frame: _Frame) -> None:
        modes = frame.recorded_modes
        if len(modes) > 1:
            frame.fail("the grad or autocast mode changes inside forward")
        elif modes and modes != {frame.entry_mode}:
            (mode,) = modes
            if mode[1:] != frame.entry_mode[1:]:
                frame.fail("the autocast mode changes inside forward")
            frame.capture.grad_enabled = mode[0]

    def _check_reads(self, frame: _Frame) -> None:
        for read in frame.reads.values():
            if read.has_changed():
                where = join(frame.path, read.path) or "the model"
                frame.fail(f"forward changes the attribute {read.name!r} of {where!r} in place")

    def _finish(self, frame: _Frame, out: Any, placeholders: list[torch.fx.Node]) -> None:
        capture = frame.capture
        if not capture.error:
            try:
                frame.graph.output(self._output_arg(frame, out))
            except CaptureError as error:
                frame.fail(str(error))
        measured = self._measured_nodes(frame)
        for index, node in enumerate(placeholders):
            only_passed = all(user.op == "call_module" or "leaf" in user.meta for user in node.users)
            if only_passed and node not in measured:
                capture.passed_on.add(index)
            if node.users:
                capture.leaves.append(index)
            else:
                frame.graph.erase_node(node)
        for node in reversed(frame.graph.nodes):  # size nodes that served an expression made another way
            if node.target == "size" and not node.users:
                frame.graph.erase_node(node)

    def _measured_nodes(self, frame: _Frame) -> set[torch.fx.Node]:
        """The nodes on which the sizes that Python code looked at may depend."""
        found: set[torch.fx.Node] = set()
        pending = [frame.known.get(id(tensor)) for tensor in frame.measured]
        while pending:
            node = pending.pop()
            if isinstance(node, torch.fx.Node) and node not in found:
                found.add(node)
                pending += node.all_input_nodes
        return found

    def _output_arg(self, frame: _Frame, value: Any) -> Any:
        if frame.node_of(value) is None and dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
            kwargs = {k: self._output_arg(frame, v) for k, v in fields.items() if v is not None}
            return frame.graph.call_function(type(value), kwargs=kwargs)
        if type(value) in (tuple, list):
            return type(value)(self._output_arg(frame, v) for v in value)
        return self._arg(frame, value)

    def trace_function(self, function: Callable, arguments: dict[str, Any], meta: bool = False) -> torch.fx.Graph:
        """Records a plain function. Tensors among the arguments (fakes, or `meta` tensors) become placeholders by
        their names."""
        frame = _Frame("", Capture("", (), torch.fx.Graph()))
        for name, value in arguments.items():
            if isinstance(value, torch.Tensor):
                node = frame.graph.placeholder(name)
                node.meta["val"] = value
                frame.bind(value, node)
                bind_sizes(value, node, frame.sizes)
        self.frames.append(frame)
        try:
            with torchs_own_linear(), contextlib.nullcontext() if meta else self.fakes.active(), self:
                out = function(**arguments)
            frame.graph.output(self._output_arg(frame, out))
        finally:
            self.frames.pop()
        if frame.capture.error:
            raise CaptureError(frame.capture.error)
        return frame.graph

    def _reuse(self, real: nn.Module, path: str, args: tuple, kwargs: dict) -> tuple[Capture | None, Any]:
        """The capture of an identical module called the same way, and a fresh copy of its output."""
        key, leaves = call_key(args, kwargs)
        for capture in self._finished.get((structure(real, self._structures), key), ()):
            with self._pause():  # looking at sizes here is not the model's doing
                same = (
                    all(_same_input(a, b) for a, b in zip(capture.leaf_values, leaves, strict=True))
                    and _same_aliasing(capture.leaf_values, leaves)
                    and all(
                        read.holds(submodule(real, inner)) for inner, sub in capture.subtree() for read in sub.reads
                    )
                )
            if same:
                inputs = {id(old): new for old, new in zip(capture.leaf_values, leaves, strict=True)}
                with self._pause():
                    return capture, _fresh(capture.output, inputs, self.fakes)
        return None, None


def _cached_length(frame: _Frame, key: torch.Tensor) -> int:
    """A length for the keys that a cache gives back, which has more than it is given: the mask's, if there is one."""
    sizes = [v.shape for v in frame.capture.leaf_values if isinstance(v, torch.Tensor) and v.ndim == 4]
    masks = [s for s in sizes if expression(s[-2]) == expression(key.shape[-2])]
    length = masks[0][-1] if masks else key.shape[-2]
    return length.node.hint if isinstance(length, torch.SymInt) else length


def _probed(layer: nn.Linear, forward: Callable, x: torch.Tensor) -> torch.Tensor:
    """The fake result of a linear layer that does not run on fakes (quantised weights are more than a tensor). Only
    its dtype is not known beforehand: the layer itself is asked, with two rows of zeros. They require a gradient:
    for inputs that do not, bitsandbytes on some CPUs repacks the weights of a model in evaluation, for good and without
    a backward."""
    with _disable_current_modes(), _pop_mode_temporarily(), torch.no_grad():
        width = x.shape[-1].node.hint if isinstance(x.shape[-1], torch.SymInt) else x.shape[-1]
        zeros = torch.zeros(2, width, dtype=x.dtype, device=x.device, requires_grad=True)
        dtype = forward(layer, zeros).dtype
    return x.new_empty((*x.shape[:-1], layer.out_features), dtype=dtype)


def _getter(frame: _Frame, make: Callable, function: Callable, key: Any, value: Any) -> Callable:
    def node() -> torch.fx.Node:
        got = frame.graph.call_function(function, (make(), key))
        got.meta["val"] = value
        return got

    return node


def _target(func: Any, name: str, args: tuple, kwargs: dict) -> tuple[str, Any, tuple, dict]:
    """The fx spelling of a torch call: an operator, a method or a function."""
    qualname = getattr(func, "__qualname__", "")
    is_method = qualname.startswith(("TensorBase.", "Tensor."))
    if name == "__get__":
        return "call_function", getattr, (args[0], func.__self__.__name__), {}
    if is_method and not kwargs and len(args) == 2 and name in _REFLECTED_OPERATORS:
        return "call_function", _REFLECTED_OPERATORS[name], (args[1], args[0]), {}
    if is_method and not kwargs and name in _BINARY_OPERATORS:
        return "call_function", _BINARY_OPERATORS[name], args, {}
    if is_method and name == "neg":
        return "call_function", operator.neg, args, {}
    if is_method and isinstance(args[0], torch.Tensor):
        return "call_method", name, args, kwargs
    return "call_function", func, args, kwargs


def _is_foreign(value: Any) -> bool:
    return not isinstance(value, (torch.Tensor, *PLAIN, torch.SymInt))


def _with_stand_ins(value: Any, frame: _Frame) -> Any:
    if type(value) in (tuple, list):
        return type(value)(_with_stand_ins(v, frame) for v in value)
    if type(value) is dict:
        return {k: _with_stand_ins(v, frame) for k, v in value.items()}
    return frame.stand_ins.get(id(value), value)


def _with_traced_numbers(value: Any) -> Any:
    """A call in which each number is an object of its own, that knows whether forward computes with it. (Equal small
    ints are one object: what stands for one in a graph would stand for all.)"""
    if type(value) in (tuple, list, torch.Size):
        return (list if type(value) is list else tuple)(_with_traced_numbers(v) for v in value)
    if type(value) is dict:
        return {k: _with_traced_numbers(v) for k, v in value.items()}
    return {int: TracedInt, float: TracedFloat}.get(type(value), lambda v: v)(value)


def _is_empty(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(_is_empty(v) for v in value)
    return isinstance(value, torch.Tensor) and any(expression(size) == 0 for size in value.shape)


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(_holds_tensor(v) for v in value)
    return isinstance(value, torch.Tensor)


@contextlib.contextmanager
def _errors_not_logged() -> Iterator[None]:
    """torch logs operations that fail on fakes; here that ends the capture of a module, and is in the report."""
    logger, thread = logging.getLogger("torch._subclasses.fake_tensor"), threading.get_ident()

    def others(record: logging.LogRecord) -> bool:
        return record.thread != thread

    logger.addFilter(others)
    try:
        yield
    finally:
        logger.removeFilter(others)


def _aliases(root: nn.Module) -> list[tuple[str, str]]:
    """The first name of each module that has several, with each other name."""
    first: dict[int, str] = {}
    named = root.named_modules(remove_duplicate=False)
    return [(first[id(m)], name) for name, m in named if first.setdefault(id(m), name) != name]


def _call_child(name: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return module._modules[name](*args, **kwargs)


def _is_fake(value: torch.Tensor) -> bool:
    return isinstance(value, torch._subclasses.FakeTensor)


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
