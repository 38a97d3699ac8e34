"""Which patterns are searched for: those of one call, those registered for the process, those of the library."""

from __future__ import annotations

import importlib
import warnings
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch.utils.hooks import RemovableHandle

from .check import check_pattern
from .errors import OptimizeError, PatternError
from .pattern import Pattern

_registered: OrderedDict[int, tuple[Pattern, ...]] = OrderedDict()


def register(*patterns: Pattern) -> RemovableHandle:
    """Lets every later `optimize` of this process look for these patterns, too, before those of the library.

    Each is checked first (see `check_pattern`), on the GPU if there is one. Models that are already optimised stay as
    they are.

    Args:
        patterns: what `ligerfx.pattern` made.

    Returns:
        A handle. Its `remove()` ends the registration, and so does leaving a `with` block that it opens.

    Raises:
        PatternError: one of them is no pattern, or fails the check. None is registered then.

    Examples:
        >>> import torch, ligerfx
        >>> def square(x):
        ...     return torch.square(x)
        >>> @ligerfx.pattern(replace=square)
        ... def squared(x: "..."):
        ...     return x * x
        >>> class Squared(torch.nn.Module):
        ...     def forward(self, x):
        ...         return x ** 2
        >>> with ligerfx.register(squared):
        ...     print(ligerfx.optimize(Squared(), torch.ones(2, 3)).report.idioms)
        {'squared': 1}
        >>> ligerfx.optimize(Squared(), torch.ones(2, 3)).report.idioms
        {}
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for pattern in patterns:
        if not isinstance(pattern, Pattern):
            raise PatternError(f"register expects ligerfx patterns, not {pattern!r}: decorate with @ligerfx.pattern")
        check_pattern(pattern, device)
    handle = RemovableHandle(_registered)
    _registered[handle.id] = patterns
    return handle


def patterns_for(patterns: Sequence[Pattern], defaults: bool, low_memory: bool, device: torch.device) -> list[Pattern]:
    """What one call of `optimize` looks for: the patterns that it is given, checked on the model's device, then the
    registered ones and the library's.

    Raises:
        OptimizeError: `patterns` is no list, or holds something else.
        PatternError: one of `patterns` fails the check.
    """
    from .patterns import default_patterns

    if isinstance(patterns, Pattern):
        raise OptimizeError(f"patterns must be a list: patterns=[{patterns.name}]")
    known = {*default_patterns(False), *default_patterns(True)}  # checked by our tests
    for pattern in patterns:
        if not isinstance(pattern, Pattern):
            raise OptimizeError(f"patterns must hold ligerfx patterns, not {pattern!r}: decorate with @ligerfx.pattern")
        if pattern not in known:
            check_pattern(pattern, "cpu" if device.type == "meta" else device)
    found = list(patterns)
    if defaults:
        found += [pattern for registered in _registered.values() for pattern in registered]
        found += default_patterns(low_memory)
    return list(dict.fromkeys(found))


def references(patterns: Sequence[Pattern]) -> list[tuple]:
    """Where each pattern is found in another process: (None, low_memory, name) in the library, (module, qualified name)
    elsewhere. One that no module holds has a name alone, (name,)."""
    from .patterns import default_patterns

    library = {pattern: (None, low, pattern.name) for low in (True, False) for pattern in default_patterns(low)}
    found = []
    for pattern in patterns:
        where = pattern.function.__module__, pattern.function.__qualname__
        found.append(library.get(pattern) or (where if _held(*where) is pattern else (pattern.name,)))
    return found


def referenced(references: Sequence[tuple]) -> list[Pattern]:
    """The patterns again, those of one's own checked. What is not found or fails the check is left out, with a warning:
    the calls that it would match run as in the original."""
    from .patterns import default_patterns

    library = {(None, low, pattern.name): pattern for low in (True, False) for pattern in default_patterns(low)}
    found, lost = [], {}
    for reference in references:
        pattern = library.get(reference) or (_held(*reference) if len(reference) == 2 else None)
        try:
            if not isinstance(pattern, Pattern):
                raise PatternError("no module holds it under its name")
            if reference not in library:
                check_pattern(pattern)
            found.append(pattern)
        except PatternError as error:
            lost[reference[-1]] = str(error)
    if lost:
        reasons = "; ".join(f"{name} ({reason})" for name, reason in lost.items())
        warnings.warn(
            f"an optimised model was loaded without some of its patterns: {reasons}. What they would match runs as in "
            "the original: let a module hold them at its top level, or optimise the loaded model with patterns=[...]",
            stacklevel=3,
        )
    return found


def _held(module: str, name: str) -> object:
    """What a module holds under a name; None if there is no such thing."""
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None
