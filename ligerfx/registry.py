"""Which patterns are searched for: those of one call, those registered for the process, those of the library."""

from __future__ import annotations

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
        OptimizeError: `patterns` holds something else.
        PatternError: one of `patterns` fails the check.
    """
    from .patterns import default_patterns

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
