"""Stage 1: capture. Runs a model's own Python on fake tensors and records what it computes.

Every module that is called gets its own graph; its parent holds one `call_module` node. Values are real Python
values throughout (fake tensors with symbolic sizes), so branches, `x.shape` unpacking and isinstance checks in
model code just work. The model itself is not touched: the tracer runs a shadow of the module tree whose
parameters are fake and whose modules have no hooks.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import UserDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import _pop_mode_temporarily
from torch.utils._python_dispatch import _disable_current_modes

from . import draws
from .capture import (
    PLAIN,
    Alias,
    Capture,
    Children,
    Read,
    has_own_hooks,
    join,
    lends_parameters,
    own_methods,
    parameters_of,
    present_parameters,
)
from .dissolve import may_dissolve
from .errors import CaptureError
from .frame import Frame
from .leaves import leaf_functions
from .opaque import own_results, symbolic_inputs
from .pieces import refuse_unknown
from .recorder import Recorder
from .shadow import ShadowTree, exposes_parameters, is_leaf_module, owns_nothing
from .signature import call_key, parameter_names, same_containers
from .source import describe_error
from .symbols import FakeInputs, bind_sizes, expression, symbols_of
from .torch_calls import modes
from .traced_numbers import TracedFloat, TracedInt
from .twins import Twins


class Tracer(Recorder):
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
        super().__init__(root, fakes)
        self.root = root
        self.original_class = original_class
        self._twins = Twins(self.fakes)
        self._hopeless: dict[int, str] = {}  # id(shadow) -> why its forward gives no output on fakes

    def trace(self, args: tuple, kwargs: dict[str, Any]) -> Capture:
        """Runs the root on fake versions of the given inputs and returns its capture."""
        self._shadows = ShadowTree(self, self.original_class, self._call_module)
        args, kwargs = self._fake_call(args, kwargs)
        self._shadows.device = next((x.device for x in call_key(args, kwargs)[1] if isinstance(x, torch.Tensor)), None)
        self._root_capture = Capture("", *call_key(args, kwargs)[:1], torch.fx.Graph())
        leaves = leaf_functions(self.root.modules(), self.record_leaf_function, self.log_lookup)
        # What a model compiles (flex attention) runs uncompiled meanwhile: the compiler ends the process on such fakes.
        # The stance is the process's, and is set while `leaves` keeps other threads from tracing.
        with (
            leaves, torch.compiler.set_stance("force_eager"), _errors_not_logged(), draws.put_back(),
            self.fakes.active(), self,
        ):  # fmt: skip
            try:
                self._shadows.root(*args, **kwargs)
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
            if type(value) in (tuple, torch.Size):
                return type(value)([fake(v) for v in value])
            if type(value) is list:
                return [fake(v) for v in value]
            if type(value) is dict:
                return {k: fake(v) for k, v in value.items()}
            if isinstance(value, (str, bool, type(None), torch.dtype, torch.device)):
                return value
            return self.stand_in(value, dict(value) if isinstance(value, UserDict) else None)

        return tuple(fake(a) for a in args), {k: fake(v) for k, v in kwargs.items()}

    def _call_module(self, shadow: nn.Module, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        if self.paused:
            return forward(shadow, *args, **kwargs)
        path = self.origins.paths[id(shadow)]
        real = self.origins.modules[id(shadow)]
        cls = self.original_class(real)
        if self.frames and owns_nothing(real):
            frame, own = self.frames[-1], self.frames[-1].relative(path)
            frame.capture.absorbed[own] = (cls, ())
            if real._buffers:  # a loss gets class weights later, perhaps
                frame.reads[own, "_buffers"] = Read(own, "_buffers", real._buffers)
            if isinstance(real, nn.Sequential):  # an empty one
                frame.reads[own, "_modules"] = Children(own, "_modules", ())
            self.log_method(cls, "forward")
            return forward(shadow, *args, **kwargs)
        if self.frames and is_leaf_module(real, cls):
            with self.pause():
                try:
                    out = forward(shadow, *args, **kwargs)
                except Exception:
                    if not isinstance(real, nn.Linear) or len(args) != 1 or kwargs:
                        raise
                    out = _probed(real, forward, *args)
            self._record_call(self.frames[-1], path, args, kwargs, out, real)
            return out
        refuse_unknown((args, kwargs))
        if self.frames and self.frames[-1].guessing:
            with self.pause():
                args, kwargs = symbolic_inputs((args, kwargs), self.guesses)
        capture = out = None
        if not any(has_own_hooks(inner) for inner in shadow.modules() if inner is not shadow):
            with self.pause():
                capture, out = self._twins.find(real, args, kwargs)
        if capture is None:  # forward may also have made hooks inside, which must see what is computed there
            capture, out = self._capture_module(shadow, forward, path, args, kwargs)
        if self.frames:
            parent = self.frames[-1]
            parent.capture.children.append((parent.relative(path), capture))
            if capture.error and not parent.guessing:
                with self.pause():
                    out = own_results(out, self.fakes)
            node = self._record_call(parent, path, args, kwargs, out, real)
            if node is not None:
                with self.pause():
                    parent.bind_results(out)
            if node is not None and may_dissolve(node.target, real):
                known = cls, present_parameters(real), own_methods(real, cls)
                node.meta.update(capture=capture, stands_for=known)
        return out

    def _record_call(
        self, frame: Frame, path: str, args: tuple, kwargs: dict, out: Any, real: nn.Module
    ) -> torch.fx.Node | None:
        frame.recorded_modes.add(modes())
        target = frame.relative(path)
        frame.log_containers(target)
        node = frame.record("call_module", target, args, kwargs, out)
        lends = node is not None and lends_parameters(real)
        if node is not None and (lends or exposes_parameters(real)):
            node.meta.update(parameters={}, lends=lends)
            with frame.graph.inserting_before(node):
                for name, value in parameters_of(real).items():
                    attribute = frame.graph.create_node("get_attr", join(node.target, name))
                    attribute.meta["val"] = self._shadows.fake_parameter(value)
                    node.meta["parameters"][name] = attribute
        return node

    def _capture_module(
        self, shadow: nn.Module, forward: Callable, path: str, args: tuple, kwargs: dict
    ) -> tuple[Capture, Any]:
        call = args, kwargs
        args, kwargs = _with_traced_numbers(call)
        key, leaves = call_key(args, kwargs)
        capture = Capture(path, key, torch.fx.Graph(), leaf_values=leaves)
        if not self.frames:
            self._root_capture = capture
        frame = Frame(path, capture, self.origins)
        for names in self._shadows.aliases:
            if all(name.startswith(path + ".") or not path for name in names):
                frame.reads["", names] = Alias("", *(frame.relative(name) for name in names))
        with self.pause():  # looking at sizes here is not the caller's doing
            placeholders = self._placeholders(frame, forward, args, kwargs, leaves)
        if id(shadow) in self._hopeless:
            raise CaptureError(self._hopeless[id(shadow)])
        guards_before = len(self.fakes.shape_env.guards)
        for caller in self.frames[-1:]:
            caller.check_draws()
        self.frames.append(frame)
        self.log_method(self.original_class(self.origins.modules[id(shadow)]), "forward")
        frame.watch(forward)
        try:
            with self.guess_sizes(False):
                given = _with_stand_ins((args, kwargs), frame)
                out = forward(shadow, *given[0], **given[1])
            refuse_unknown(out)
            self._pass_changes_on(call, given, (args, kwargs))
        except Exception as error:
            frame.fail(describe_error(error))
            frame.guessing = True  # the caller's graph, and those of the modules inside, may be good all the same
            try:
                with self.guess_sizes(True), self.guesses.active():
                    out = forward(shadow, *args, **kwargs)
                if _is_empty(out):  # what was guessed to be empty was an output
                    raise CaptureError(frame.capture.error)
            except Exception:
                try:  # a module inside may need what it gets as it is: a mask object, say
                    if len(self.frames) == 1:
                        raise
                    with self.pause(guess=True), self.guesses.active():
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
            frame.check_draws()
            frame.put_back()
            for caller in self.frames[-1:]:
                caller.random = draws.state()
            # Modules inside answer for sizes that only they know.
            guards = [g.expr for g in self.fakes.shape_env.guards[guards_before:]]
            capture.guards = [guard for guard in guards if guard.free_symbols <= frame.symbols]
            if not capture.error:
                frame.check_modes()
                frame.check_reads()
                frame.log_names(forward)
                if any(number.used for number in frame.numbers):
                    frame.fail("forward computes with a number that a module which stays as it is returned")
            capture.reads = list(frame.reads.values())
        frame.finish(out, placeholders)
        capture.output = out
        self._twins.add(self.origins.modules[id(shadow)], capture)
        return capture, out

    def _pass_changes_on(self, call: Any, given: Any, before: Any) -> None:
        """A graph has no side effects: a module whose forward changes a list or dict that it is given stays as it is,
        and so does its caller. The caller's list, of which forward got a copy, is changed in the same way, for what
        comes after."""
        frame, (args, kwargs), (own_args, own_kwargs) = self.frames[-1], call, given
        if same_containers(before, given, lambda a, b: b is frame.stand_ins.get(id(a), a)):
            return
        frame.fail("forward changes a list or dict that it is given")
        for caller in self.frames[-2:-1]:
            caller.fail(f"{frame.path} changes a list or dict that it is given")
        for value, own in (*zip(args, own_args, strict=True), *((v, own_kwargs[k]) for k, v in kwargs.items())):
            _change(value, own)

    def _placeholders(
        self, frame: Frame, forward: Callable, args: tuple, kwargs: dict, leaves: list
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
                frame.stand_ins[id(value)] = value = self.stand_in(value)
            frame.bind(value, node)
            if isinstance(value, torch.Tensor):
                bind_sizes(value, node, frame.sizes)
            elif isinstance(value, torch.SymInt):
                frame.sizes.setdefault(value.node.expr, node)
        return nodes


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


def _is_foreign(value: Any) -> bool:
    return not isinstance(value, (torch.Tensor, *PLAIN, torch.SymInt))


def _with_stand_ins(value: Any, frame: Frame) -> Any:
    if type(value) in (tuple, list):
        return type(value)(_with_stand_ins(v, frame) for v in value)
    if type(value) is dict:
        return {k: _with_stand_ins(v, frame) for k, v in value.items()}
    return frame.stand_ins.get(id(value), value)


def _with_traced_numbers(value: Any) -> Any:
    """A call in which each number is an object of its own, that knows whether forward computes with it. (Equal small
    ints are one object: what stands for one in a graph would stand for all.)"""
    if type(value) in (tuple, list, torch.Size):
        items = type(value)([_with_traced_numbers(v) for v in value])
        if type(value) is torch.Size:  # which computes with them unseen
            for number in items:
                number.used = True
        return items
    if type(value) is dict:
        return {k: _with_traced_numbers(v) for k, v in value.items()}
    return {int: TracedInt, float: TracedFloat}.get(type(value), lambda v: v)(value)


def _change(caller: Any, own: Any) -> None:
    """Makes of a list or dict what another is, down through what is inside."""
    if type(caller) is not type(own) or type(caller) not in (tuple, list, dict):
        return
    pairs = caller.items() if type(caller) is dict else enumerate(caller)
    for key, value in list(pairs):
        if key in own if type(caller) is dict else key < len(own):
            _change(value, own[key])
    if type(caller) is dict:
        caller.clear()
        caller.update(own)
    elif type(caller) is list:
        caller[:] = own


def _is_empty(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(_is_empty(v) for v in value)
    return isinstance(value, torch.Tensor) and any(expression(size) == 0 for size in value.shape)


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
