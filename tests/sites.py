"""How often a model computes each idiom, counted without ligerfx: by the classes of the modules that run, by the source
of these classes, and by the functions that the model's own code calls.

    with counted(model) as sites:
        model(**inputs)
    sites.total  # {"rms_norm": 5, "glu": 2, "rope": 2, "loss": 1}
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

_ACTIVATION = r"(?:\b\w*act(?:ivation)?(?:_fn|_func|_function)?\d*|silu|gelu|relu|\bglu_act)"
_NESTED = r"\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)"
_GLU = re.compile(
    rf"{_ACTIVATION}{_NESTED}\s*\*(?!\*)\s*[\w(]|[\w)]\s*\*\s*(?:self\.)?(?:F\.|nn\.functional\.)?{_ACTIVATION}\(|\bglu\b"
)
_ROTARY = re.compile(r"apply.*(rotary|rope)|apply_rope|^rotate_(queries|keys)|apply_rotary|apply_mrope")


@dataclass
class Sites:
    """Module paths (and, for losses, calls) at which each idiom was computed."""

    rms_norm: set[str] = field(default_factory=set)
    glu: set[str] = field(default_factory=set)
    rope: set[str] = field(default_factory=set)
    loss: list[str] = field(default_factory=list)

    @property
    def total(self) -> dict[str, int]:
        return {name: len(places) for name, places in vars(self).items()}


@functools.cache
def is_rms_norm(cls: type) -> bool:
    """By name, or because the class computes 1 / sqrt(mean(x^2)) and takes no mean off."""
    if cls.__module__.startswith("torch."):
        return cls is nn.RMSNorm
    if re.search("rms_?norm", cls.__name__, re.IGNORECASE):
        return True
    source = _source(cls)
    return "rsqrt(" in source and ".mean(" in source and not re.search(r"-\s*\w*mean|BatchNorm", source)


@functools.cache
def is_glu(cls: type) -> bool:
    """The class multiplies an activation of one thing with another thing."""
    if cls.__module__.startswith("torch.") or is_rms_norm(cls):
        return False
    return bool(_GLU.search(_source(cls)))


def _source(cls: type) -> str:
    """The code of the class itself, comments and docstrings left out."""
    try:
        source = inspect.getsource(cls)
    except (OSError, TypeError):
        return ""
    source = re.sub(r'"""[\s\S]*?"""', "", source)
    return re.sub(r"#.*", "", source)


@contextlib.contextmanager
def counted(model: nn.Module) -> Iterator[Sites]:
    """Counts in what runs meanwhile."""
    sites = Sites()
    paths = {id(module): path for path, module in model.named_modules()}
    running: list[str] = []
    depth = 0

    def enter(module: nn.Module, _: Any) -> None:
        path = paths.get(id(module), "?")
        running.append(path)
        if is_rms_norm(type(module)) and not any(is_rms_norm(type(child)) for child in module.children()):
            sites.rms_norm.add(path)  # (and no wrapper of one)
        if is_glu(type(module)):
            sites.glu.add(path)

    def leave(module: nn.Module, *_: Any) -> None:
        running.pop()

    def rotating(function: Callable) -> Callable:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            depth += 1
            try:
                return function(*args, **kwargs)
            finally:
                depth -= 1
                if depth == 0:
                    sites.rope.add(running[-1] if running else "")

        return wrapper

    def loss(*args: Any, **kwargs: Any) -> Any:
        sites.loss.append(running[-1] if running else "")
        return cross_entropy(*args, **kwargs)

    cross_entropy = F.cross_entropy
    with contextlib.ExitStack() as stack:
        for hook in (register_module_forward_pre_hook(enter), register_module_forward_hook(leave)):
            stack.callback(hook.remove)
        for owner, name, function in _rotary_functions(model):
            static = isinstance(inspect.getattr_static(owner, name), staticmethod)
            stack.callback(setattr, owner, name, inspect.getattr_static(owner, name))
            setattr(owner, name, staticmethod(rotating(function)) if static else rotating(function))
        stack.callback(setattr, F, "cross_entropy", cross_entropy)
        F.cross_entropy = loss
        yield sites


def _rotary_functions(model: nn.Module) -> Iterator[tuple[Any, str, Callable]]:
    """The functions and methods that rotate, in the source files and the classes of the model's modules."""
    classes = {cls for module in model.modules() for cls in type(module).__mro__}
    classes = {cls for cls in classes if cls.__module__.startswith("transformers.models.")}
    owners = [*classes, *{sys.modules[cls.__module__] for cls in classes}]
    for owner in owners:
        for name, value in list(vars(owner).items()):
            if _ROTARY.search(name) and (inspect.isfunction(value) or isinstance(value, staticmethod)):
                yield owner, name, getattr(owner, name)
