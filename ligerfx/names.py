"""Global names that the Python code of a forward reads, and what they stood for.

A forward may use a number of its file (`self.norm(x) * SCALE`), a function of it, or one that a registry holds. The
graph has the value, so it serves while the names stand for what they stood for.

Which names those are is read off the compiled code, of the functions that ran as methods of the module, and of all that
they refer to by name. Names that the code holds but this call did not read are among them: they cost a comparison. Of
torch, numpy and the standard library nothing is compared, but for the functions of torch.nn.functional, which some
replace.
"""

from __future__ import annotations

import dis
import functools
import logging
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F

from .constants import PLAIN, copied, literal

_LIBRARIES = {"torch", "ligerfx", "numpy", "transformers", "accelerate", "peft"} | sys.stdlib_module_names
_MODELS = "transformers.models."
_RUN_BY_CALLS = ("__init__", "__new__", "__post_init__", "__call__", "forward")
_STORE_GLOBAL = dis.opmap["STORE_GLOBAL"]
_ABSENT = object()
_by_number: weakref.WeakValueDictionary[int, Name] = weakref.WeakValueDictionary()
"""All names that there are. torch.compile takes a number for a constant, and a name not in all versions."""


class Name:
    """What a name stands for in a namespace.

    Attributes:
        space: a Python file, a class, a dict (attributes of an object, a table of a registry), or a cell, which holds
            a variable of a closure.
        name: the name in it.
        value: what was there, as it is stored.
    """

    def __init__(self, space: ModuleType | type | dict | CellType, name: Any) -> None:
        self.space, self.name = space, name
        self.owner = vars(space) if isinstance(space, (ModuleType, type)) else space
        self.number = id(self)
        _by_number[self.number] = self
        self.value = original(self.stored())
        self.state = _state(self.value)
        self._is_plain = isinstance(self.value, PLAIN)
        self._compilers = isinstance(space, (ModuleType, type)) and (
            self._is_plain or isinstance(self.value, FunctionType)
        )

    @property
    def key(self) -> tuple:
        return id(self.space), self.name

    def stored(self) -> Any:
        """What is there now."""
        return self.owner.cell_contents if isinstance(self.owner, CellType) else self.owner.get(self.name, _ABSENT)

    def holds(self) -> bool:
        """Whether the name stands for what it stood for."""
        try:
            value = original(self.stored())
        except ValueError:  # an empty cell
            return False
        if self.state is not None:
            return value is self.value and self._holds_in_place()
        if value is self.value:
            return True
        return type(value) is type(self.value) and isinstance(value, (*PLAIN, tuple)) and bool(value == self.value)

    def _holds_in_place(self) -> bool:
        """Whether what can change in place is as in `state`; of a subclass what it holds, whatever that makes of it."""
        value = self.value
        if isinstance(value, torch.Tensor):
            return value._version == self.state
        if isinstance(value, dict) and isinstance(self.space, ModuleType) and _is_of_a_library(self.space):
            # Each model of transformers that is built adds to a table of its output classes.
            return all(_same(dict.get(value, key, _ABSENT), known) for key, known in self.state.items())
        kind = next(kind for kind in (list, set, dict) if isinstance(value, kind))
        return kind.__eq__(value, self.state)

    def holds_for_compiler(self) -> bool:
        """The same, as torch.compile can trace it: what it compiles asks again, at least for numbers and functions of
        files and classes."""
        if not self._compilers:
            return _holds_now(self.number)
        value = getattr(self.space, self.name, None)
        return value == self.value if self._is_plain else value is self.value

    def code(self, constant: Callable[[Any], str]) -> str:
        """`holds_for_compiler` as Python code, with literals, which compiled code need not check. `constant` gives the
        code of an object."""
        if not self._compilers:
            return f"{constant(_holds_now)}({self.number})"
        now = f"getattr({constant(self.space)}, {self.name!r}, None)"
        return f"{now} == {literal(self.value, constant)}" if self._is_plain else f"{now} is {constant(self.value)}"

    def short_check(self, owner: str, constant: Callable[[Any], str]) -> str:
        """Python code that says whether the name holds, where `owner` is its owner; it may say no, or fail, where
        `holds` says yes. `constant` gives the code of an object."""
        if self.state is not None:
            return f"{constant(self)}.holds()"
        if self.value is _ABSENT:
            return f"{self.name!r} not in {owner}"
        now = f"{owner}.cell_contents" if isinstance(self.owner, CellType) else f"{owner}[{self.name!r}]"
        return f"{now} is {constant(self.value)}"


def hold(names: tuple[Name, ...]) -> bool:
    """Whether all names stand for what they stood for."""
    return all(map(Name.holds_for_compiler if torch.compiler.is_compiling() else Name.holds, names))


def _holds_now(number: int) -> bool:
    name = _by_number.get(number)
    return name is not None and name.holds()


# What `torch.compiler.assume_constant_result` does; it would import the compiler, and Triton, with this package.
_holds_now._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _state(value: Any) -> Any:
    """What of a value can change in place; None for what cannot, or is compared part by part."""
    if isinstance(value, (list, set)):
        return type(value)(map(copied, value)) if type(value) in (list, set) else value.copy()
    if isinstance(value, dict):  # what is in it, whatever a subclass makes of it
        return {key: copied(inside) for key, inside in dict.items(value)}
    return value._version if isinstance(value, torch.Tensor) and not value.is_inference() else None


def _same(value: Any, known: Any) -> bool:
    return value is known or (type(value) in (list, dict, set) and value == known)


def original(value: Any) -> Any:
    """What a name stands for where a capture, perhaps that of another thread, has put something in its place."""
    attributes = getattr(value, "__dict__", None)
    return attributes.get("_ligerfx_original", value) if type(attributes) is dict else value


def entries(registry: Any, key: Any) -> dict[tuple, Name]:
    """What a registry of functions holds under a key, in each of its tables."""
    tables = [t for t in (*vars(registry).values(), *vars(type(registry)).values()) if isinstance(t, dict)]
    return _by_key(Name(table, key) for table in tables)


def methods(cls: type, name: str) -> dict[tuple, Name]:
    """What a class and its bases hold under the name of a method, up to the first that has it."""
    found = []
    for base in cls.__mro__:
        found.append(Name(base, name))
        if name in vars(base):
            break
    return _by_key(found)


def _by_key(names: Iterable[Name]) -> dict[tuple, Name]:
    return {name.key: name for name in names}


class Names:
    """The names that some functions read, and those that are reached through them."""

    def __init__(self, functions: Iterable[Any]) -> None:
        self.found: dict[tuple, Name] = {}
        self.sets_global: str | None = None  # a function that sets a global name
        self.words: set[str] = set()  # that stand for attributes anywhere in the code
        self._functions: set[int] = set()
        self._spaces: dict[int, ModuleType | type | dict] = {}  # by id of that of which they are the names
        of_torch: set[str] = set()
        for function in functions:
            for inner in _functions_in(function):
                if package(inner) == "torch":  # what nn.Module does is not the model's
                    of_torch |= _words(inner.__code__)[0]
                else:
                    self._read(inner)
        before = -1
        while before != len(self.found):  # a function that is found has words of its own
            before = len(self.found)
            for space in list(self._spaces.values()):
                for name in self.words & (space if isinstance(space, dict) else vars(space)).keys():
                    self._add(space, name)
        for name in (self.words | of_torch) & vars(F).keys():
            if isinstance(vars(F)[name], (FunctionType, BuiltinFunctionType)):
                self._add(F, name)

    def _add(self, space: ModuleType | type | dict | CellType, name: str) -> None:
        found = Name(space, name)
        if found.key in self.found:
            return
        if not _has_no_say(found.value):
            self.found[found.key] = found
        if found.stored() is found.value:
            self._reach(found.value)  # and not a leaf function, which runs as it is at run time

    def _reach(self, value: Any) -> None:
        """Looks at the code that `value` is, or at what is inside."""
        if isinstance(value, (property, staticmethod, classmethod, MethodType, functools.partial, FunctionType)):
            for function in _functions_in(value):
                if not _is_of_a_library(function):
                    self._read(function)
        elif isinstance(value, (ModuleType, type)):
            if not _is_of_a_library(value):
                self._spaces.setdefault(id(value), value)
            if isinstance(value, type):
                self._reach_class(value)
        elif isinstance(value, (list, dict, set)):
            for item in value.values() if isinstance(value, dict) else value:
                if isinstance(item, FunctionType):
                    self._reach(item)
        elif not isinstance(value, (*PLAIN, tuple, torch.Tensor, logging.Logger)) and value is not _ABSENT:
            if type(getattr(value, "__dict__", None)) is dict:
                self._spaces.setdefault(id(value), vars(value))
            self._reach_class(type(value))
            self._reach(getattr(value, "__wrapped__", None))

    def _reach_class(self, cls: type) -> None:
        for base in cls.__mro__:
            if id(base) not in self._functions and not _is_of_a_library(base):
                self._functions.add(id(base))
                self._spaces.setdefault(id(base), base)
                for name in _RUN_BY_CALLS:
                    if name in vars(base):
                        self._reach(vars(base)[name])

    def _read(self, function: FunctionType) -> None:
        if id(function) in self._functions:
            return
        self._functions.add(id(function))
        code = function.__code__
        words, sets = _words(code)
        self.words |= words
        if sets:
            self.sets_global = function.__qualname__
        namespace = function.__globals__
        file = sys.modules.get(namespace.get("__name__"))
        for name in words & namespace.keys():
            self._add(file if file is not None and vars(file) is namespace else namespace, name)
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            if name != "__class__" and not _is_empty(cell):
                self._add(cell, name)


def _functions_in(value: Any) -> Iterator[FunctionType]:
    if isinstance(value, property):
        value = value.fget
    while isinstance(value, (staticmethod, classmethod, MethodType, functools.partial)):
        value = value.func if isinstance(value, functools.partial) else value.__func__
    if isinstance(value, FunctionType):
        yield value


@functools.cache
def _words(code: CodeType) -> tuple[frozenset[str], bool]:
    """The names of globals and attributes in a function's code and in that of functions inside, with strings that may
    be names; and whether it sets a global."""
    words = {name for name in code.co_names if not name.startswith("__")}
    sets = _STORE_GLOBAL in code.co_code[::2]
    for constant in code.co_consts:
        if isinstance(constant, str) and constant.isidentifier() and not constant.startswith("__"):
            words.add(constant)
        elif isinstance(constant, CodeType):
            inner, inside = _words(constant)
            words |= inner
            sets |= inside
    return frozenset(words), sets


def _is_of_a_library(value: Any) -> bool:
    return package(value) in _LIBRARIES and not _file(value).startswith(_MODELS)


def package(value: Any) -> str:
    """The package that something is of, by its file: "builtins" where it names none."""
    return _file(value).split(".")[0]


def _file(value: Any) -> str:
    """The Python file that something is, or is of."""
    return (value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)) or "builtins"


def _has_no_say(value: Any) -> bool:
    """Whether nothing that is computed depends on a value: a library, a log."""
    return isinstance(value, logging.Logger) or (isinstance(value, ModuleType) and _is_of_a_library(value))


def _is_empty(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return True
    return False
