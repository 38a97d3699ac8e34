"""Frames: the graph of one module while its forward runs.

A frame knows for each value that the forward has seen the node that stands for it, or how to make one: of an input, a
result, a parameter, a size. Recording a call looks its arguments up there.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import sympy
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from . import draws
from .capture import PLAIN, Capture, Children, Inside, Read, Tie, has_attributes, join, parameters_of, submodule
from .errors import CaptureError
from .names import Name, Names
from .pieces import Loops
from .source import call_site
from .symbols import bind_sizes, size_node, symbols_of
from .torch_calls import modes
from .traced_numbers import TracedFloat, TracedInt, plain


@dataclasses.dataclass
class Origins:
    """What stands behind the fakes and shadows of a capture, by their ids."""

    root: nn.Module | None = None
    modules: dict[int, nn.Module] = dataclasses.field(default_factory=dict)  # id(shadow) -> module
    paths: dict[int, str] = dataclasses.field(default_factory=dict)  # id(shadow) -> path from the root
    parameters: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)  # id(fake) -> the parameter


class Frame:
    """One graph under construction. `path` is that of its module, `origins` what stands behind its values."""

    def __init__(self, path: str, capture: Capture, origins: Origins) -> None:
        self.path = path
        self.origins = origins
        self.capture = capture
        self.graph = capture.graph
        self.known: dict[int, Any] = {}  # id(value) -> node, or a function that makes it
        self.alive: list[Any] = []  # keeps ids valid
        self.measured: list[torch.Tensor] = []  # tensors whose sizes Python code looked at
        self.stand_ins: dict[int, Any] = {}  # id(foreign object) -> what the module sees in its place
        self.sizes: dict[sympy.Expr, Any] = {}
        self.entry_mode = modes()
        self.recorded_modes: set[tuple] = set()
        self.reads: dict[tuple[str, Any], Read] = {}
        self.code: dict[int, Any] = {}  # by id, functions and properties that ran
        self.watched: list[tuple[Name, Any]] = []
        self.loops = Loops(self.graph)
        self.numbers: list[TracedInt | TracedFloat] = []  # that modules returned which stay as they are
        self.symbols: set[sympy.Symbol] = set()  # of the sizes of what it works on
        self.random = draws.state()  # when code of its own began to run
        self.guessing = False  # forward runs again, only so that modules inside are captured and there is an output

    def fail(self, reason: str) -> None:
        self.capture.error = self.capture.error or reason

    def bind(self, value: Any, node: Any) -> None:
        """`node` stands for a value from here on, or what a function gives that makes it."""
        self.known[id(value)] = node
        self.alive.append(value)

    def node_of(self, value: Any) -> torch.fx.Node | None:
        entry = self.known.get(id(value))
        if entry is not None and not isinstance(entry, torch.fx.Node):
            entry = self.known[id(value)] = entry()
        return entry

    def record(self, op: str, target: Any, args: Sequence, kwargs: dict, out: Any) -> torch.fx.Node | None:
        """A node for a call that gave `out`; None, and no graph any more, where an argument has no place in one."""
        if self.capture.error:
            return None
        try:
            node_args, node_kwargs = self.arg((tuple(args), kwargs), keep_sizes=op == "call_module")
        except CaptureError as error:
            self.fail(f"{error}, in {call_site()[0]}")
            return None
        node = self.graph.create_node(op, target, node_args, node_kwargs)
        site, line = call_site()
        node.meta.update(val=out, source=site, line=line)
        self.bind_output(out, node)
        return node

    def bind_output(self, out: Any, node: torch.fx.Node, get: Callable | None = None) -> None:
        """Makes every tensor and every foreign object inside `out` known, by a path of nodes from `node`."""
        make = get or (lambda: node)
        if isinstance(out, torch.Tensor):
            self.bind(out, make if get else node)
        elif dataclasses.is_dataclass(out) and not isinstance(out, type):
            for field in dataclasses.fields(out):
                value = getattr(out, field.name)
                self.bind_output(value, node, _getter(self, make, getattr, field.name, value))
        elif isinstance(out, (tuple, list)):
            for index, value in enumerate(out):
                self.bind_output(value, node, _getter(self, make, operator.getitem, index, value))
        elif isinstance(out, dict):
            for name, value in out.items():
                self.bind_output(value, node, _getter(self, make, operator.getitem, name, value))
        elif not isinstance(out, (*PLAIN, torch.SymInt)) or isinstance(out, (TracedInt, TracedFloat)):
            self.bind(out, make if get else node)

    def arg(self, value: Any, keep_sizes: bool = False) -> Any:
        """What stands for `value` in this graph. A torch.Size becomes a tuple, which is the same for torch; not so for
        a module, `keep_sizes`. Raises CaptureError where nothing can."""
        node = self.node_of(value)
        if node is not None:
            return node
        if self.loops.knows(value):
            raise CaptureError("a piece of a tensor, of a size that only the data tell, is used by itself")
        if isinstance(value, torch.Tensor):
            return self._parameter_node(value)
        if isinstance(value, (TracedInt, TracedFloat)):
            value.used = True  # not an input of this graph: its value becomes part of it
            return plain(value)
        if isinstance(value, torch.SymInt):
            size = size_node(value.node.expr, self.graph, self.sizes)
            if isinstance(size, torch.fx.Node):
                size.meta.setdefault("val", value)
            return size
        if isinstance(value, torch.Size):
            sizes = tuple(self.arg(v) for v in value)
            return self.graph.call_function(torch.Size, (sizes,)) if keep_sizes else sizes
        if type(value).__module__ == "numpy" and value.ndim == 0:  # `np.sqrt(head_dim)`: a float by another name
            return value.item()
        if isinstance(value, PLAIN):
            return value
        if isinstance(value, (tuple, list)):
            items = [self.arg(v, keep_sizes) for v in value]
            if hasattr(value, "_fields"):
                return type(value)(*items)
            return tuple(items) if isinstance(value, tuple) else items
        if type(value) is dict:
            return {k: self.arg(v, keep_sizes) for k, v in value.items()}
        if isinstance(value, slice):
            return slice(*(self.arg(v) for v in (value.start, value.stop, value.step)))
        if isinstance(value, nn.Module) and id(value) in self.origins.paths:
            return self.attribute(self.relative(self.origins.paths[id(value)]) or "itself", value)
        for owner, name in self._attributes_holding(value):
            return self.attribute(join(owner, name), value)
        raise CaptureError(f"an argument of type {type(value).__name__} has no place in a graph")

    def _attributes_holding(self, value: Any) -> Iterator[tuple[str, str]]:
        for (path, name), read in self.reads.items():
            if read.value is value:
                yield path, name
            elif not isinstance(read.value, (*PLAIN, nn.Module)):  # one configuration inside another
                yield from ((join(path, name), n) for n, v in getattr(read.value, "__dict__", {}).items() if v is value)

    def attribute(self, target: str, value: Any) -> torch.fx.Node:
        node = self.graph.create_node("get_attr", target)
        node.meta["val"] = value
        self.bind(value, node)
        return node

    def _parameter_node(self, value: torch.Tensor) -> torch.fx.Node:
        real = self.origins.parameters.get(id(value))
        if real is not None:
            names = [
                join(path, name)
                for path, owner in submodule(self.origins.root, self.path).named_modules()
                for name, tensor in (*parameters_of(owner).items(), *owner._buffers.items())
                if tensor is real
            ]
            for other in names[1:]:
                self.reads["", (names[0], other)] = Tie("", names[0], other)
            if names:
                return self.attribute(names[0], value)
            for owner, name in self._attributes_holding(real):
                return self.attribute(join(owner, name), value)
        raise CaptureError("a tensor that is neither an input nor a parameter of this module is used")

    def relative(self, path: str) -> str:
        """The path of a module from the root, seen from this one. Raises CaptureError for one that is not inside."""
        if path == self.path:
            return ""
        prefix = self.path + "." if self.path else ""
        if not path.startswith(prefix):
            raise CaptureError(f"module {path!r} is used from inside {self.path!r}")
        return path[len(prefix) :]

    def handed_on(self, value: Any) -> Any:
        """A number that the module read of itself, as that attribute."""
        if isinstance(value, TracedInt) and self.node_of(value) is None:
            for owner, name in self._attributes_holding(value):
                self.attribute(join(owner, name), value)
        return value

    def log_containers(self, target: str) -> None:
        """A forward that runs through a list of modules runs through those that are in it."""
        path = ""
        for name in target.split(".")[:-1]:
            path = join(path, name)
            container = submodule(self.origins.root, join(self.path, path))
            if isinstance(container, (nn.ModuleList, nn.ModuleDict)):
                self.reads.setdefault((path, "_modules"), Children(path, "_modules", tuple(container._modules)))

    def watch(self, forward: Callable) -> None:
        """What is in the lists, dicts and sets that the code of a forward, which is about to run, reads by global
        names."""
        found = Names([forward]).found.values()
        self.watched = [(name, copy.copy(name.value)) for name in found if type(name.value) in (list, dict, set)]

    def put_back(self) -> None:
        """Undoes what forward has changed there: it may hold fakes now."""
        for name, before in self.watched:
            if not name.holds():
                self.fail(f"forward changes what {name.name!r} holds, outside of the model")
                name.value.clear()
                name.value.extend(before) if isinstance(before, list) else name.value.update(before)

    def log_names(self, forward: Callable) -> None:
        """What the code that ran reads by global names, the graph rests on."""
        functions = [read.value for read in self.reads.values() if callable(read.value)]
        names = Names([forward, *self.code.values(), *functions])
        self.capture.names |= names.found
        if names.sets_global:
            self.fail(f"{names.sets_global} sets a global variable")
        for read in list(self.reads.values()):
            self._log_inside(read, names.words)

    def _log_inside(self, read: Read, words: set[str]) -> None:
        """Objects inside a configuration or the like, by attributes that the code that ran speaks of."""
        if type(read) in (Read, Inside) and has_attributes(read.value):
            for name in words & vars(read.value).keys():
                inside = Inside(read.path, f"{read.name}.{name}", vars(read.value)[name])
                if has_attributes(inside.value) and self.reads.setdefault((inside.path, inside.name), inside) is inside:
                    self._log_inside(inside, words)

    def bind_results(self, out: Any) -> None:
        """Lets sizes that come from a module that stays as it is be measured when it, or its caller, has run.
        Looks at sizes, which is not the model's doing: to be called while nothing is recorded."""
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor):
                symbols = symbols_of(value)
                if not symbols <= self.symbols:
                    bind_sizes(value, functools.partial(self.node_of, value), self.sizes)
                    self.symbols |= symbols
            elif isinstance(value, (TracedInt, TracedFloat)):
                self.numbers.append(value)

    def check_modes(self) -> None:
        recorded = self.recorded_modes
        if len(recorded) > 1:
            self.fail("the grad or autocast mode changes inside forward")
        elif recorded and recorded != {self.entry_mode}:
            (mode,) = recorded
            if mode[1:] != self.entry_mode[1:]:
                self.fail("the autocast mode changes inside forward")
            self.capture.grad_enabled = mode[0]

    def check_draws(self) -> None:
        """Of the code of its own that has just run; to be called before and after that of a module inside."""
        if draws.state() != self.random:
            self.fail("forward draws random numbers from Python or numpy")

    def check_reads(self) -> None:
        for read in self.reads.values():
            if read.has_changed():
                where = join(self.path, read.path) or "the model"
                self.fail(f"forward changes the attribute {read.name!r} of {where!r} in place")

    def finish(self, out: Any, placeholders: list[torch.fx.Node]) -> None:
        """Lets the graph return `out`, and leaves it no more inputs than it uses."""
        capture = self.capture
        if not capture.error:
            try:
                self.graph.output(self.output_arg(out))
            except CaptureError as error:
                self.fail(str(error))
        measured = self._measured_nodes()
        for index, node in enumerate(placeholders):
            only_passed = all(user.op == "call_module" or "leaf" in user.meta for user in node.users)
            if only_passed and node not in measured:
                capture.passed_on.add(index)
            if node.users:
                capture.leaves.append(index)
            else:
                self.graph.erase_node(node)
        for node in reversed(self.graph.nodes):  # size nodes that served an expression made another way
            if node.target == "size" and not node.users:
                self.graph.erase_node(node)

    def _measured_nodes(self) -> set[torch.fx.Node]:
        """The nodes on which the sizes that Python code looked at may depend."""
        found: set[torch.fx.Node] = set()
        pending = [self.known.get(id(tensor)) for tensor in self.measured]
        while pending:
            node = pending.pop()
            if isinstance(node, torch.fx.Node) and node not in found:
                found.add(node)
                pending += node.all_input_nodes
        return found

    def output_arg(self, value: Any) -> Any:
        if self.node_of(value) is None and dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
            kwargs = {k: self.output_arg(v) for k, v in fields.items() if v is not None}
            return self.graph.call_function(type(value), kwargs=kwargs)
        if type(value) in (tuple, list):
            return type(value)(self.output_arg(v) for v in value)
        return self.arg(value, keep_sizes=True)


def _getter(frame: Frame, make: Callable, function: Callable, key: Any, value: Any) -> Callable:
    def node() -> torch.fx.Node:
        got = frame.graph.call_function(function, (make(), key))
        got.meta["val"] = value
        return got

    return node
