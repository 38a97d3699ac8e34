"""Recording: each call of torch that returns a tensor, and each leaf function, becomes a node of the innermost frame.

While paused nothing is recorded, and calls run on fakes all the same. A plain function is recorded here; the modules of
a model are the tracer's.
"""

from __future__ import annotations

import contextlib
import operator
from collections import UserDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from .capture import Capture, works_in_place
from .errors import CaptureError
from .frame import Frame, Origins
from .guesses import Guesses
from .leaves import PRINT, TOLIST, is_check, is_kernel, put
from .names import entries, methods
from .pieces import Unknown
from .probes import probed
from .shapes import Shapes
from .sharded import torchs_own_linear
from .signature import stand_in
from .source import describe_error
from .symbols import FakeInputs, bind_sizes, expression, symbols_of
from .torch_calls import CONVERSIONS, COUNTING, MEASURING, holds_tensor, is_replaced, modes, spelled


class Recorder(TorchFunctionMode):
    """Records calls into frames, the last of which is the innermost.

    Args:
        root: the module whose parts are called, if any.
        fakes: the fake tensor mode and its symbolic sizes.
    """

    def __init__(self, root: nn.Module | None = None, fakes: FakeInputs | None = None) -> None:
        super().__init__()
        self.origins = Origins(root)
        self.fakes = fakes or FakeInputs()
        self.guesses = Guesses(self.fakes)
        self._shapes = Shapes(self.fakes)
        self.frames: list[Frame] = []
        self.paused = self.guessing = False

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
        if self.frames[-1].loops and (out := self._of_pieces(name, args, kwargs)) is not None:
            return out
        if name in MEASURING or getattr(getattr(func, "__self__", None), "__name__", "") == "shape":
            self.frames[-1].measured.append(args[0])
        # Guards raised inside an op concern strides and broadcasting of fakes; the op itself runs again, on
        # real tensors, at run time. Guards raised by the model's own Python are kept.
        if name in COUNTING:
            self.fakes.shape_env.counting = True
            try:
                out = func(*args, **kwargs)
            finally:
                self.fakes.shape_env.counting = False
        else:
            with self.fakes.shape_env.suppress_guards():
                out = self._shapes.run(func, name, args, kwargs)
        if not works_in_place(name, kwargs) and (not holds_tensor(out) or (name in CONVERSIONS and out is args[0])):
            return out
        frame = self.frames[-1]
        frame.recorded_modes.add(modes())
        if is_replaced(func):
            frame.fail(f"another function has taken the place of one of torch.nn.functional: {func.__qualname__}")
        frame.record(*spelled(func, name, args, kwargs), out)
        return out

    def _of_pieces(self, name: str, args: tuple, kwargs: dict) -> Any:
        """The result of a call that makes pieces of a tensor, or one tensor of what a loop over them gave; None for any
        other call."""
        frame = self.frames[-1]
        unknown = [value for value in (*args, *kwargs.values()) if isinstance(value, Unknown)]
        with self.pause():
            if name == "split" and unknown:
                return frame.loops.split(args[0], *unknown, kwargs.get("dim", args[2] if len(args) > 2 else 0))
            if unknown:
                unknown[0].refuse()
            tensors = args[0] if name == "cat" and args and isinstance(args[0], (tuple, list)) else ()
            joined = frame.loops.joined(tensors, kwargs.get("dim", args[1] if len(args) > 1 else 0))
        if joined is None:
            return None
        function, given, out = joined
        frame.record("call_function", function, given, {}, out)
        return out

    def log_code(self, function: Any) -> None:
        """Says that a function runs in the innermost forward."""
        if not self.paused and self.frames:
            self.frames[-1].code[id(function)] = function

    def log_method(self, cls: type, name: str) -> None:
        """Says that a method or a property of this class runs in the innermost forward."""
        if not self.paused and self.frames:
            self.log_code(getattr(cls, name))
            self.frames[-1].capture.names |= methods(cls, name)

    def log_lookup(self, registry: Any, key: Any) -> None:
        if not self.paused and self.frames:
            self.frames[-1].capture.names |= entries(registry, key)

    def trace_function(self, function: Callable, arguments: dict[str, Any], meta: bool = False) -> torch.fx.Graph:
        """Records a plain function. Tensors among the arguments (fakes, or `meta` tensors) become placeholders by
        their names."""
        frame = Frame("", Capture("", (), torch.fx.Graph()), self.origins)
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
            frame.graph.output(frame.output_arg(out))
        finally:
            self.frames.pop()
        if frame.capture.error:
            raise CaptureError(frame.capture.error)
        return frame.graph

    def record_leaf_function(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        """Runs a leaf function unrecorded and records one call of it."""
        if function is PRINT:  # not now, of fakes
            if self.frames and not self.paused:
                self.frames[-1].fail("forward prints")
            return None
        if self.paused or not self.frames:
            return function(*args, **kwargs)
        frame = self.frames[-1]
        if function is TOLIST:
            return self._list(args[0])
        try:
            with self.pause():
                told, out = probed(function, args, kwargs, self.fakes) if is_kernel(function) else (False, None)
                out = out if told else function(*args, **kwargs)
        except Exception as error:  # it looks at the data, as the mask for flash attention does: the layers do not
            frame.fail(describe_error(error))
            with self.pause(guess=True):
                out = function(*args, **kwargs)
        frame.recorded_modes.add(modes())
        if is_check(function):
            if isinstance(args[0], torch.Tensor):  # others the model's Python code has answered
                frame.record("call_function", function, args[:2], {}, None)
            return None
        if out is None:
            if any(isinstance(a, torch.Tensor) and not a.is_floating_point() for a in (*args, *kwargs.values())):
                frame.fail(f"{function.__name__} returned None, which may depend on the data")
            return None  # of hidden states, only the kind is looked at
        if frame.loops.called(function, args, kwargs, out):
            return out  # to be recorded where the pieces are joined
        node = frame.record("call_function", function, args, kwargs, out)
        if node is not None:
            node.meta["leaf"] = True
        return out

    def _list(self, tensor: FakeTensor) -> Any:
        """What `tensor.tolist()` gives. Of a row of integers that only the data tell, it may be lengths of pieces."""
        frame, integers = self.frames[-1], not tensor.is_floating_point() and tensor.dtype != torch.bool
        if frame.guessing and not self.guesses.knows(tensor):
            with self.pause():  # sizes of their own, and no guesses: pieces of these sizes go together again
                return TOLIST(tensor)
        if frame.guessing or tensor.ndim != 1 or not integers or tensor.constant is not None:
            return TOLIST(tensor)
        lengths = frame.loops.lengths(tensor, self.fakes)
        frame.symbols |= {symbol for size in lengths.sizes for symbol in symbols_of(size)}
        return lengths

    def _record_update(self, cache: Any, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        frame = self.frames[-1]
        with self.pause():
            length = self.fakes.own_size(_cached_length(frame, key))
            out = tuple(t.new_empty((*t.shape[:-2], length, t.shape[-1])) for t in (key, value))
        args = [frame.handed_on(a) for a in args]
        if frame.record("call_method", "update", (cache, key, value, *args), kwargs, out) is not None:
            with self.pause():
                frame.bind_results(out)
        return out

    def _read_item(self, items: Any, key: Any) -> Any:
        frame = self.frames[-1]
        value = items._ligerfx_items[key]
        if frame.record("call_function", operator.getitem, (items, key), {}, value) is not None:
            with self.pause():
                frame.bind_results(value)
        return value

    def _write_item(self, items: Any, key: Any, value: Any) -> None:
        items._ligerfx_items[key] = value
        self.frames[-1].record("call_function", put, (items, key, value), {}, None)

    def stand_in(self, value: Any, items: Any = None) -> Any:
        """What stands for a foreign object, whose known methods are recorded: of a cache the update of keys and values,
        of a UserDict, in which layers leave something for others, its items. `items` holds those; default: `value`."""
        if isinstance(value, UserDict):
            items = getattr(value, "_ligerfx_items", value) if items is None else items
            return stand_in(value, {"__getitem__": self._read_item, "__setitem__": self._write_item}, items)
        return stand_in(value, {"update": self._record_update})

    @contextlib.contextmanager
    def pause(self, guess: bool = False) -> Iterator[None]:
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
    def guess_sizes(self, guess: bool) -> Iterator[None]:
        """While active, whether questions about symbolic sizes are answered for those at hand, without a guard."""
        sizes = self.fakes.shape_env
        before, sizes.guessing = sizes.guessing, guess
        try:
            yield
        finally:
            sizes.guessing = before


def _cached_length(frame: Frame, key: torch.Tensor) -> int:
    """A length for the keys that a cache gives back, which has more than it is given: the mask's, if there is one."""
    sizes = [v.shape for v in frame.capture.leaf_values if isinstance(v, torch.Tensor) and v.ndim == 4]
    masks = [s for s in sizes if expression(s[-2]) == expression(key.shape[-2])]
    length = masks[0][-1] if masks else key.shape[-2]
    return length.node.hint if isinstance(length, torch.SymInt) else length
