"""Captures: the graph of one module's forward for one call signature, and what it rests on."""

from __future__ import annotations

import dataclasses
import functools
import operator
import types
from collections.abc import Callable, Iterator
from typing import Any

import sympy
import torch
from torch import nn
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

from .constants import PLAIN, copied, literal
from .names import Name
from .sharded import (
    gathers_nothing,
    has_no_hooks_but,
    is_fully_sharded,
    is_gathered_by_zero,
    is_hook_of_fsdp,
    is_view_of_flat,
)
from .traced_numbers import TracedInt, plain

OWN_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
GLOBAL_HOOKS = (
    _global_forward_hooks,
    _global_forward_pre_hooks,
    _global_backward_hooks,
    _global_backward_pre_hooks,
)

MISSING = object()

COMPARES_ATTRIBUTES = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
"""Whether what torch.compile traces may compare all attributes of an object at once. 2.11 can where some are no
constants; 2.12 was not tried. Otherwise they are compared one by one, and compiled code does not notice new ones."""

HIDDEN = frozenset(dir(torch.fx.GraphModule)) | {"itself"}
"""Attributes that an optimised module has, whatever is stored under their names."""


@dataclasses.dataclass(eq=False)
class Read:
    """An attribute of a module that the captured Python code looked at: the capture holds while it is so."""

    path: str  # of the module, relative to the captured one
    name: str
    value: Any

    def __post_init__(self) -> None:
        self.state = snapshot(self.value)
        self.can_change = self.state is not None or isinstance(self.value, TracedInt)
        self._by_value = isinstance(self.value, (*PLAIN, tuple)) and not isinstance(self.value, TracedInt)

    def settled(self) -> Read:
        """This, or where the capture used nothing of a number, that there is one: once the capture is finished."""
        if not isinstance(self.value, TracedInt):
            return self
        return Read(self.path, self.name, plain(self.value)) if self.value.used else AnyInt(self.path, self.name, None)

    def has_changed(self) -> bool:
        """Whether the value has been changed in place since it was read."""
        return self.state is not None and not _equal(snapshot(self.value), self.state)

    def holds(self, module: nn.Module) -> bool:
        return self.same(submodule(module, self.path))

    def code(self, module: str, constant: Callable[[Any], str]) -> str:
        """`same` as Python code, of which `constant` gives that of an object. In each call compiled code checks all
        that it reads, but no literals."""
        value = f"getattr({module}, {self.name!r})"
        if type(self) is Read and self.name not in HIDDEN and not isinstance(self.value, types.MethodType):
            if self._by_value:
                return f"{constant(is_value)}({value}, {literal(self.value, constant)})"
            if type(self.state) is dict:
                return self._code_of_content(module, value, constant)
        return f"{constant(self.same)}({module})"

    def _code_of_content(self, module: str, value: str, constant: Callable[[Any], str]) -> str:
        of_object = has_attributes(self.value)
        known = {k: v for k, v in self.state.items() if not (of_object and has_attributes(v))}
        literals = ", ".join(f"{literal(k, constant)}: {literal(v, constant)}" for k, v in known.items())
        content = f"{value}, {constant(type(self.value))}, {{{literals}}}"
        if len(known) == len(self.state) and (COMPARES_ATTRIBUTES or not of_object):
            return f"{constant(has_content)}({content})"
        # The compiler would take an object inside for the constant that it is compared with, and not look at this
        # attribute any more. One that the code speaks of is an `Inside`.
        compiling = f"{constant(torch.compiler.is_compiling)}()"
        return f"({constant(has_items)}({content}) if {compiling} else {constant(self.same)}({module}))"

    def same(self, module: nn.Module) -> bool:
        """Whether `module` still has the attribute as it was read."""
        if self.name in module.__dict__:
            value = module.__dict__[self.name]
        else:
            value = getattr(type(module), self.name, MISSING)
        if self.state is not None:
            return has_content(value, type(self.value), self.state)
        if self._by_value:
            return is_value(value, self.value)
        if value is self.value:
            return True
        if isinstance(self.value, TracedInt):
            return type(value) is int and (not self.value.used or value == plain(self.value))
        if isinstance(value, types.MethodType) and isinstance(self.value, types.MethodType):
            return value.__func__ is self.value.__func__
        if isinstance(value, functools.partial) and isinstance(self.value, functools.partial):
            mine, other = ((p.func, p.args, p.keywords) for p in (value, self.value))
            return _equal(mine, other)
        return False


@dataclasses.dataclass(eq=False)
class AnyInt(Read):
    """An integer that was read, and did not matter."""

    def same(self, module: nn.Module) -> bool:
        return type(module.__dict__.get(self.name)) is int


@dataclasses.dataclass(eq=False)
class Missing(Read):
    """An attribute that was looked for in vain (`value`: MISSING), or a parameter, buffer or module that was None."""

    def same(self, module: nn.Module) -> bool:
        for table in (module.__dict__, module._parameters, module._buffers, module._modules):
            if self.name in table:
                return self.value is None and table[self.name] is None
        kind = type(module)
        return self.value is MISSING and not hasattr(getattr(kind, "_original_class", kind), self.name)

    def code(self, module: str, constant: Callable[[Any], str]) -> str:
        """Of names that are looked up in a dict in vain compiled code does not notice when they come."""
        if self.value is None:
            return f"getattr({module}, {self.name!r}) is None"
        return f"not hasattr({module}, {self.name!r})"


@dataclasses.dataclass(eq=False)
class Inside(Read):
    """An object with attributes inside an attribute of the module, by a `name` with dots."""

    def same(self, module: nn.Module) -> bool:
        try:
            value = operator.attrgetter(self.name)(module)
        except AttributeError:
            return False
        return has_content(value, type(self.value), self.state)

    def code(self, module: str, constant: Callable[[Any], str]) -> str:
        return self._code_of_content(module, f"{module}.{self.name}", constant)


@dataclasses.dataclass(eq=False)
class Inherited(Read):
    """A method of the module's class: the module has no attribute of that name of its own."""

    def same(self, module: nn.Module) -> bool:
        return self.name not in module.__dict__

    def code(self, module: str, constant: Callable[[Any], str]) -> str:
        """Compiled code, of this module or any, does not notice one."""
        return f"({constant(torch.compiler.is_compiling)}() or {self.name!r} not in {module}.__dict__)"


@dataclasses.dataclass(eq=False)
class Children(Read):
    """The names in a list or dict of modules (the attribute "_modules"), of which the graph calls some by name."""

    def same(self, module: nn.Module) -> bool:
        return tuple(module._modules) == self.value


@dataclasses.dataclass(eq=False)
class Alias(Read):
    """One module under two names below `path`, `name` and `value`, of which the graph uses the first."""

    def same(self, module: nn.Module) -> bool:
        return submodule(module, self.name) is submodule(module, self.value)


@dataclasses.dataclass(eq=False)
class Tie(Alias):
    """One parameter or buffer under two names below `path`, of which the graph uses the first."""

    def same(self, module: nn.Module) -> bool:
        return tensor_of(module, self.name) is tensor_of(module, self.value)


@dataclasses.dataclass(eq=False)
class Lends(Read):
    """A linear layer with these parameters (`value`), which a fused operation reads inside a call of that layer."""

    def same(self, module: nn.Module) -> bool:
        return lends_parameters(module) and present_parameters(module) == self.value


@dataclasses.dataclass(eq=False)
class StandsFor:
    """A module without a call of its own in the graph, which has the code of `cls` in its place."""

    path: str  # relative to the captured one
    cls: type
    parameters: tuple[str, ...]
    methods: tuple[str, ...] = ()

    def same(self, module: nn.Module) -> bool:
        """Whether calling `module` still runs that code."""
        return stands_for(module, exactly(self.cls), self.parameters, self.methods)

    def code(self, module: str, constant: Callable[[Any], str]) -> str:
        """The same as Python code, of which `constant` gives that of an object."""
        known = f"{constant(exactly(self.cls))}, {self.parameters!r}, {self.methods!r}"
        return f"{constant(stands_for)}({module}, {known})"


@dataclasses.dataclass(eq=False)
class Capture:
    """The graph of one module's forward, for one call signature.

    `graph` takes the tensors and numbers of the call that it uses (`leaves`: their positions in the flattened
    call) and returns what forward returns. `error` says why there is no usable graph.
    """

    path: str
    key: tuple
    graph: torch.fx.Graph
    leaves: list[int] = dataclasses.field(default_factory=list)
    leaf_values: list[Any] = dataclasses.field(default_factory=list)
    passed_on: set[int] = dataclasses.field(default_factory=set)  # leaves that only modules and leaf functions get
    reads: list[Read] = dataclasses.field(default_factory=list)
    names: dict[tuple, Name] = dataclasses.field(default_factory=dict)  # global ones, by `Name.key`
    guards: list[sympy.Basic] = dataclasses.field(default_factory=list)
    children: list[tuple[str, Capture]] = dataclasses.field(default_factory=list)
    # Modules without a call of their own in the graph: path -> what `stands_for` is to ask of them.
    absorbed: dict[str, tuple] = dataclasses.field(default_factory=dict)
    grad_enabled: bool | None = None  # where forward itself switches the grad mode
    error: str | None = None
    output: Any = None

    def module_checks(self) -> list[StandsFor | Read]:
        """What the capture, once it is finished, rests on in the modules below its own: that each is the `same`."""
        absorbed = [StandsFor(path, *known) for path, known in self.absorbed.items()]
        return [*absorbed, *(read.settled() for read in self.reads)]

    def subtree(self) -> Iterator[tuple[str, Capture]]:
        """This capture and those of all modules called inside, with paths relative to this module."""
        yield "", self
        for path, child in self.children:
            for inner, capture in child.subtree():
                yield join(path, inner), capture


def join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def submodule(module: nn.Module, path: str) -> nn.Module:
    return module.get_submodule(path) if path else module


def tensor_of(module: nn.Module, path: str) -> Any:
    """The parameter, buffer or other attribute by this path."""
    owner, _, name = path.rpartition(".")
    return getattr(submodule(module, owner), name)


def is_value(value: Any, known: Any) -> bool:
    """Whether a value is the known constant."""
    return value is known or (type(value) is type(known) and _equal(value, known))


def has_content(value: Any, cls: type, known: Any) -> bool:
    """Whether an object of this class holds what was known of it, by its `snapshot`."""
    return type(value) is cls and _equal(_content(value), known)


def has_items(value: Any, cls: type, known: dict[str, Any]) -> bool:
    """Whether an object of this class has these attributes, perhaps among others."""
    return type(value) is cls and _equal({n: vars(value)[n] for n in known if n in vars(value)}, known)


def has_attributes(value: Any) -> bool:
    """Whether a value is an object that is compared by its attributes: a configuration."""
    return _can_change(value) and not isinstance(value, (list, dict, set, types.MethodType))


def snapshot(value: Any) -> Any:
    """A copy of what of a value can change in place: of a list, dict or set, and of the attributes of a
    configuration-like object, with the lists, dicts and sets inside. None for a value that cannot, or whose change is
    seen elsewhere."""
    if not _can_change(value):
        return None
    content = _content(value).copy()
    if isinstance(content, dict):
        content.update((key, copied(inside)) for key, inside in list(content.items()))
    elif isinstance(content, list):
        content[:] = map(copied, content)
    return content


def _can_change(value: Any) -> bool:
    """Whether a value can change in place, and no other guard sees it."""
    if isinstance(value, (*PLAIN, torch.Tensor, nn.Module, tuple)) or (callable(value) and not _has_state(value)):
        return False
    return isinstance(value, (list, dict, set)) or hasattr(value, "__dict__")


def _content(value: Any) -> Any:
    """A list, dict or set itself, and of another object, or that of a method, the attributes."""
    if isinstance(value, types.MethodType):
        return {**vars(value.__self__), "__func__": value.__func__}
    return value if issubclass(type(value), (list, dict, set)) else vars(value)


def _has_state(function: Any) -> bool:
    """Whether what is called is, or belongs to, an object with attributes of its own. (Not a module, whose attributes
    are read one by one.)"""
    if isinstance(function, types.MethodType):
        owner = function.__self__
        return not isinstance(owner, (type, nn.Module)) and hasattr(owner, "__dict__")
    written = any(isinstance(vars(cls).get("__call__"), types.FunctionType) for cls in type(function).__mro__)
    return written and hasattr(function, "__dict__")


def _equal(a: Any, b: Any) -> bool:
    try:
        return bool(a == b)
    except (RuntimeError, ValueError):  # tensors inside, which have no single answer
        return False


def works_in_place(name: str, kwargs: dict[str, Any]) -> bool:
    """Whether a torch call of this name and these keyword arguments changes a tensor that it is given."""
    by_name = name in ("setitem", "__setitem__") or (name.endswith("_") and not name.endswith("__"))
    return by_name or kwargs.get("out") is not None or bool(kwargs.get("inplace"))


class _Exactly(type):
    """Classes whose instances are the modules of one class, optimised or not, and of none of its subclasses.

    In each call compiled code checks of what type a module is, which is enough for `isinstance`. What `type` gives, it
    would check once more, and that it is the same for all modules of that class.
    """

    cls: type

    def __instancecheck__(self, module: Any) -> bool:
        kind = type(module)
        return kind is self.cls or getattr(kind, "_original_class", kind) is self.cls


@functools.cache
def exactly(cls: type) -> type:
    return _Exactly(cls.__name__, (), {"cls": cls})


def stands_for(module: nn.Module, cls: type, parameters: tuple[str, ...], methods: tuple[str, ...] = ()) -> bool:
    """Whether calling `module` is running the forward of a class on these parameters, and nothing else. `cls` is
    `exactly` that class.

    No attribute of the module's own may hide one of `methods`, which forward could call.
    """
    if not isinstance(module, cls) or not runs_its_forward(module):
        return False
    state = module.__dict__
    table = module._parameters
    present = 0
    for value in table.values():
        if value is not None:
            present += 1
    for name in parameters:
        if table.get(name) is None:
            if not is_view_of_flat(state.get(name)):
                return False
            present += 1
    return present == len(parameters) and all(name not in state for name in methods)


def own_methods(module: nn.Module, cls: type) -> tuple[str, ...]:
    """What `cls` and its bases up to nn.Module define, and the module has no attribute of its own for."""
    bases = cls.__mro__[: cls.__mro__.index(nn.Module)]
    names = dict.fromkeys(name for base in bases for name in vars(base) if not name.startswith("__"))
    return tuple(name for name in names if name not in vars(module))


def parameters_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters that a module has itself (a linear layer may have no bias), gathered or not."""
    found = {name: value for name, value in module._parameters.items() if value is not None}
    return found | {name: value for name, value in vars(module).items() if is_view_of_flat(value)}


def present_parameters(module: nn.Module) -> tuple[str, ...]:
    """The names of the parameters that a module has."""
    return tuple(parameters_of(module))


def runs_its_forward(module: nn.Module) -> bool:
    """Whether calling the module is running the forward of its class."""
    # What is read, compiled code checks again, and not what was looked for in vain.
    return "forward" not in module.__dict__ and module.forward is not None and not has_hooks(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more, or other, than the forward of its class."""
    return bool(
        (has_own_hooks(module) and not gathers_nothing(module))
        or (isinstance(module, torch.fx.GraphModule) and getattr(module, "_ligerfx_edited", False))
        or _global_forward_hooks
        or _global_forward_pre_hooks
        or _global_backward_hooks
        or _global_backward_pre_hooks
    )


def has_own_hooks(module: nn.Module) -> bool:
    # As attributes, not through `__dict__`: torch.compile knows them, and checks them where it is told to.
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def lends_parameters(module: nn.Module) -> bool:
    """Whether a module is a linear layer whose call gathers its weights, with no hooks but those that do so: under
    ZeRO-3, or in a unit of FSDP2 that keeps them until the backward (`reshard_after_forward=False`)."""
    if type(module).forward is not nn.Linear.forward or "forward" in vars(module) or any(GLOBAL_HOOKS):
        return False
    if not is_fully_sharded(module):
        return is_gathered_by_zero(module)
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]  # one group before torch 2.12
    return (
        all(group is not None and group.post_forward_mesh_info is None for group in groups)
        and state._mp_policy.output_dtype in (None, torch.float32)  # nothing is rounded on the way out
        and has_no_hooks_but(module, is_hook_of_fsdp)
    )


def structure(module: nn.Module, memo: dict[int, tuple] | None = None) -> tuple:
    """What module trees have in common that can share a graph: classes, attributes, kinds of parameters."""
    memo = {} if memo is None else memo
    if id(module) not in memo:
        buffers = {name: value for name, value in module._buffers.items() if value is not None}
        parameters = parameters_of(module)
        memo[id(module)] = (
            type(module),
            frozenset(vars(module)),
            *((name, _kind(value)) for name, value in (*parameters.items(), *buffers.items())),
            *((name, None if child is None else structure(child, memo)) for name, child in module._modules.items()),
        )
    return memo[id(module)]


def _kind(value: torch.Tensor) -> tuple:
    return torch.Size(getattr(value, "ds_shape", value.shape)), value.dtype, value.device
