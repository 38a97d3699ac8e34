"""Entries: the short way from a call to the program that served the call before it.

Which program serves a call is looked up by its signature and guards (`module.find_program`). For a small model that
costs more than a graph saves. So a call that was served leaves an entry with the module: one function, written for
just this kind of call, that checks the same in one go and runs the graph, or else gives `MISS`. What it checks is
never less; where a check is not short, it makes the general one.

The graph that it runs gets the modules that it calls and the parameters that it reads as inputs, since they have been
looked up already.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.fx import Graph, Node, map_arg

from .capture import GLOBAL_HOOKS, OWN_HOOKS, AnyInt, Inherited, Read, StandsFor, has_attributes, has_own_hooks
from .deferred import settled_if_sharded
from .names import hold
from .signature import autocast_key

if TYPE_CHECKING:
    from .module import Program

MISS = object()
_ABSENT = object()


class _NoEntry(Exception):
    """There is no short way for such a call."""


class _Source:
    """The code of an entry under construction, and the objects that it names."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.names: dict[str, Any] = {}
        self.modules: dict[str, str] = {"": "m"}  # what holds the module of a path
        self.states: dict[str, str] = {}  # and what its attributes

    def constant(self, value: Any) -> str:
        name = f"c{len(self.names)}"
        self.names[name] = value
        return name

    def check(self, condition: str) -> None:
        self.lines.append(f"if not ({condition}): return MISS")

    def module(self, path: str) -> str:
        if path not in self.modules:
            outer, _, name = path.rpartition(".")
            self.modules[path] = found = f"m{len(self.modules)}"
            self.lines.append(f"{found} = {self.state(outer)}['_modules'][{name!r}]")
        return self.modules[path]

    def state(self, path: str) -> str:
        if path not in self.states:
            module = self.module(path)
            self.states[path] = found = f"d{module[1:]}"
            self.lines.append(f"{found} = {module}.__dict__")
        return self.states[path]


def entry_for(
    program: Program, module: nn.Module, forward: Callable, args: tuple, kwargs: dict[str, Any]
) -> Callable | None:
    """A function of (module, args, kwargs) that does what `program` does for calls such as this one, of this module and
    of modules like it, and gives MISS for others; None where one cannot be written.

    `forward` is the original one, for a program without a graph.
    """
    source = _Source()
    mode = autocast_key()
    source.check(f"autocast_key() == {mode!r}" if mode else "not autocast()")
    try:
        leaves = list(_arguments(source, args, kwargs))
    except _NoEntry:
        return None
    conditions = " and ".join(program.conditions)
    for index in sorted({int(i) for i in re.findall(r"x\[(\d+)\]\.shape", conditions)}):
        source.lines.append(f"s{index} = {leaves[index]}.shape")
    if conditions:
        conditions = re.sub(r"x\[(\d+)\]\.shape", r"s\1", conditions)
        source.check(re.sub(r"x\[(\d+)\]", lambda leaf: leaves[int(leaf[1])], conditions))
    if program.capture.error is None:
        _check_modules(source, program.checks, module)
        _check_names(source, program)
    if program.function is None:
        result = "forward(m, *args, **kwargs)"
    else:
        graph, paths = _with_modules_as_inputs(program.capture.graph, module, program.capture.absorbed)
        given = [leaves[i] for i in program.capture.leaves] + [
            f"{source.state(path)}['_parameters'][{name!r}]" if name else source.module(path) for path, name in paths
        ]
        result = f"run({', '.join(['m', *given])})"
        source.names["run"] = _function(graph)
    if program.defers_logits:
        result = f"settled_if_sharded(m, {result})"
    grad = program.capture.grad_enabled
    text = "\n        ".join(["def entry(m, args, kwargs):\n    try:", *source.lines])
    text += "\n    except (AttributeError, KeyError): return MISS\n"
    text += f"    return {result}" if grad is None else f"    with set_grad_enabled({grad}): return {result}"
    names = {
        **source.names, "MISS": MISS, "Tensor": torch.Tensor, "autocast": torch._C._is_any_autocast_enabled,
        "autocast_key": autocast_key, "torch": torch, "attribute_of": object.__getattribute__, "forward": forward,
        "absent": _ABSENT, "hold": hold, "settled_if_sharded": settled_if_sharded,
        "set_grad_enabled": torch.set_grad_enabled,
    }  # fmt: skip
    exec(compile(text, "<ligerfx entry>", "exec"), names)
    return names["entry"]


def _arguments(source: _Source, args: tuple, kwargs: dict[str, Any]) -> Iterator[str]:
    """Checks what `signature.call_key` makes a key of; gives the leaves."""
    source.check(f"len(args) == {len(args)} and len(kwargs) == {len(kwargs)}")
    for index, value in enumerate(args):
        yield from _argument(source, f"args[{index}]", value)
    for name, value in kwargs.items():
        yield from _argument(source, f"kwargs[{name!r}]", value)


def _argument(source: _Source, where: str, value: Any) -> Iterator[str]:
    if value is None or isinstance(value, bool):
        source.check(f"{where} is {value}")
        return
    name = f"a{len(source.lines)}"
    source.lines.append(f"{name} = {where}")
    kind = type(value)
    if isinstance(value, torch.Tensor):
        # Half the time of comparing devices.
        place = f"{name}.is_cpu" if value.is_cpu else f"{name}.device == {source.constant(value.device)}"
        same = f"{name}.dtype is {source.constant(value.dtype)} and {name}.ndim == {value.ndim} and {place}"
        source.check(f"isinstance({name}, Tensor) and {same}")
        yield name
    elif isinstance(value, (str, torch.dtype, torch.device)):
        source.check(f"type({name}) is {source.constant(kind)} and {name} == {source.constant(value)}")
    elif kind in (tuple, list, torch.Size):
        source.check(f"type({name}) is {source.constant(kind)} and len({name}) == {len(value)}")
        for index, item in enumerate(value):
            yield from _argument(source, f"{name}[{index}]", item)
    elif kind is dict:
        source.check(f"type({name}) is dict and tuple({name}) == {source.constant(tuple(value))}")
        for key, item in value.items():
            yield from _argument(source, f"{name}[{source.constant(key)}]", item)
    elif isinstance(value, torch.SymInt) or hasattr(value, "_ligerfx_stands_for"):
        raise _NoEntry
    else:  # a number, or a foreign object
        source.check(f"type({name}) is {source.constant(kind)}")
        yield name


def _check_modules(source: _Source, checks: Sequence[StandsFor | Read], module: nn.Module) -> None:
    """Makes each check of a program on its modules, in a short way where there is one."""
    if any(isinstance(check, StandsFor) for check in checks):
        tables = [source.constant(table) for table in GLOBAL_HOOKS]
        source.check(f"not ({' or '.join(tables)})")
    for check in checks:
        if isinstance(check, StandsFor):
            _check_stands_for(source, check, module.get_submodule(check.path))
        else:
            _check_read(source, check)


def _check_read(source: _Source, read: Read) -> None:
    if type(read) is Inherited:
        source.check(f"{read.name!r} not in {source.state(read.path)}")
        return
    owner = source.module(read.path)
    general = f"{source.constant(read)}.same({owner})"
    value = source.constant(read.value)
    if type(read) is not Read and type(read) is not AnyInt:
        source.check(general)
        return
    state = source.state(read.path)
    if type(read) is AnyInt:
        source.check(f"type({state}[{read.name!r}]) is int")
    elif not read.can_change:
        source.check(f"{state}.get({read.name!r}, absent) is {value} or {general}")
    elif has_attributes(read.value):  # a configuration
        # The object is not asked itself: its `__getattribute__` is Python code, and takes longer than all the rest.
        kind, known = source.constant(type(read.value)), source.constant(read.state)
        source.lines.append(f"v = {state}[{read.name!r}]")
        source.check(f"type(v) is {kind} and attribute_of(v, '__dict__') == {known}")
    else:
        source.check(general)


def _check_names(source: _Source, program: Program) -> None:
    """Checks what `names.hold` checks, by identity first."""
    names = tuple(program.capture.names.values())
    if not names:
        return
    owners: dict[int, str] = {}
    same = []
    for name in names:
        if id(name.owner) not in owners:
            owners[id(name.owner)] = source.constant(name.owner)
        same.append(name.short_check(owners[id(name.owner)], source.constant))
    source.check(f"({' and '.join(same)}) or hold({source.constant(names)})")


def _check_stands_for(source: _Source, check: StandsFor, module: nn.Module) -> None:
    """`check.same`, of a module like this one, for which that holds, and whose parameters are where nn.Module keeps
    them. Global hooks are checked elsewhere."""
    if has_own_hooks(module):  # which do nothing there
        source.check(f"{source.constant(check)}.same({source.module(check.path)})")
        return
    state = source.state(check.path)
    source.lines.append(f"t = {state}['_parameters']")
    wrong = [f"type({source.module(check.path)}) is not {source.constant(type(module))}"]
    wrong += [f"{state}[{name!r}]" for name in OWN_HOOKS]
    hiding = (name for name in check.parameters if name in module._parameters)
    wrong += [f"{name!r} in {state}" for name in dict.fromkeys(("forward", "_ligerfx_edited", *check.methods, *hiding))]
    wrong += [f"len(t) != {len(module._parameters)}"]
    wrong += [f"t[{name!r}] is {'not ' * (v is None)}None" for name, v in module._parameters.items()]
    source.lines.append(f"if {' or '.join(wrong)}: return MISS")


def _with_modules_as_inputs(
    graph: Graph, module: nn.Module, absorbed: dict[str, tuple]
) -> tuple[Graph, list[tuple[str, str]]]:
    """A copy of the graph of `module` that gets modules and parameters as further inputs: their paths, and of a
    parameter its name; `self` is its first input still."""
    new = Graph()
    values: dict[Node, Node] = {}
    inputs: dict[tuple[str, str], Node] = {}
    wanted: dict[Node, tuple[str, str]] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = new.node_copy(node)
        elif found := _input_for(node, module, absorbed):
            wanted[node] = found
    for path, name in dict.fromkeys(wanted.values()):
        inputs[path, name] = new.placeholder(f"{'parameter' if name else 'module'}_{path}_{name}".replace(".", "_"))
    for node in graph.nodes:
        if node.op == "placeholder":
            continue
        if node not in wanted:
            values[node] = new.node_copy(node, values.__getitem__)
            continue
        path, name = wanted[node]
        if node.op == "call_module":
            args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = new.call_method("__call__", (inputs[path, name], *args), kwargs)
        elif name or path == node.target:
            values[node] = inputs[path, name]
        else:
            values[node] = new.call_function(getattr, (inputs[path, name], node.target.rpartition(".")[2]))
    return new, list(inputs)


def _input_for(node: Node, module: nn.Module, absorbed: dict[str, tuple]) -> tuple[str, str] | None:
    """The module that a node calls, is, or takes an attribute of; the parameter of one that was checked to have it;
    None for other nodes."""
    if node.op not in ("call_module", "get_attr"):
        return None
    if node.op == "call_module" or _below(module, node.target) is not None:
        return None if node.target == "itself" else (node.target, "")
    path, _, name = node.target.rpartition(".")
    owner = _below(module, path)
    if owner is None:
        return None
    # FSDP1 keeps whole weights beside the table of parameters.
    in_table = path in absorbed and name in absorbed[path][1] and owner._parameters.get(name) is getattr(owner, name)
    return path, name if in_table else ""


def _below(module: nn.Module, path: str) -> nn.Module | None:
    """The module of a path that names submodules only, and not the module itself."""
    if not path:
        return None
    for name in path.split("."):
        module = module._modules.get(name) if isinstance(module, nn.Module) else None
    return module


def _function(graph: Graph) -> Callable:
    source = graph.python_code("self")
    names = dict(source.globals)
    exec(compile(source.src, "<ligerfx entry>", "exec"), names)
    return names["forward"]
