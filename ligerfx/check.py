"""The check of a pattern when it is registered: its replacement computes what its function does.

The function and the replacement run on random inputs whose shapes follow from the annotations, in several dtypes, with
and without optional parameters, contiguous and not. Outputs, gradients and what happens to the inputs are compared.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import weakref
from collections.abc import Iterator
from typing import Any

import torch

from .errors import PatternError
from .numerics import compare, evaluate, random_tensor, widest, worst
from .pattern import Inputs, Pattern, bound_arguments, example
from .source import describe_error

DTYPES = (
    (torch.float32,),
    (torch.bfloat16,),
    (torch.float16,),
    (torch.bfloat16, torch.float32),  # parameters are often kept in a wider dtype than the states
)
"""Of the first floating-point parameter and of the others."""

SIZES = (((2, 6), 40), ((3,), 54), ((), 134))
"""Leading dimensions, and the largest of the named ones, where a tensor does not get too large."""

MOST_ELEMENTS = 2**15

CONSTANTS = (1.0, 2.5, 0.03125)
"""What a floating-point constant is multiplied by, from one size to the next."""

_checked: weakref.WeakKeyDictionary[Pattern, set[str]] = weakref.WeakKeyDictionary()


@torch.inference_mode(False)
def check_pattern(pattern: Pattern, device: torch.device | str = "cpu") -> int:
    """Checks that the pattern can be matched, and that its replacement computes what its function does.

    Args:
        pattern: what `ligerfx.pattern` made.
        device: where the function and the replacement run.

    Returns:
        On how many combinations of shapes, dtypes and optional parameters the two were compared. A combination with
        which the function does not run, or that `when` refuses, is left out.

    Raises:
        PatternError: the function cannot be traced; the replacement takes other names; it fails, writes to its inputs,
            or differs in an output or a gradient by more than rounding explains; or there is no input to compare on.

    Examples:
        >>> import torch, ligerfx
        >>> def double(x):
        ...     return x + x
        >>> @ligerfx.pattern(replace=double)
        ... def triple(x: "..."):
        ...     return x * 3
        >>> ligerfx.check_pattern(triple)
        Traceback (most recent call last):
        ...
        ligerfx.errors.PatternError: triple on x ... is ...: the largest difference is ...
    """
    where = torch.device(device).type
    if where in _checked.get(pattern, ()):
        return 0
    variants = pattern.variants  # raises where the function is not traceable
    check_names(pattern)
    compared, problem = 0, ""
    for variant, early in itertools.product(variants, (False, True) if pattern.early else (False,)):
        for tensors, constants, expanded in _inputs(pattern, variant.absent, device):
            outcome = _compare(pattern, tensors, constants, early, expanded)
            problem = outcome or problem
            compared += outcome is None
    if compared == 0:
        raise PatternError(
            f"{pattern.name}: there is no input to compare the replacement with the function on ({problem}): give "
            "sizes and constants with `example`"
        )
    _checked.setdefault(pattern, set()).add(where)
    return compared


def check_names(pattern: Pattern) -> None:
    """Raises PatternError where the replacement would not get what it needs, or not take what the pattern has."""
    given = [*pattern.tensors, *pattern.constants]
    taken: set[str] = set()
    for target in pattern.targets:
        if isinstance(target, functools.partial):
            if target.args:
                raise PatternError(f"{pattern.name}: give functools.partial its arguments by name")
            inputs = {name for v in target.keywords.values() if isinstance(v, Inputs) for name in v.names}
            if unknown := inputs - {name for name in pattern.tensors if name not in pattern.optional}:
                raise PatternError(
                    f"{pattern.name}: Inputs names {sorted(unknown)}, which are not tensors always there"
                )
            taken |= inputs
        function, arguments = bound_arguments(target, {name: name for name in given})
        name = getattr(function, "__name__", repr(function))
        parameters = inspect.signature(function).parameters.values()
        if positional := [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY]:
            raise PatternError(
                f"{pattern.name}: {name} gets its arguments by name: {', '.join(positional)} must have one"
            )
        named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        needed = [p.name for p in named if p.default is p.empty]
        if missing := [n for n in needed if n not in arguments]:
            raise PatternError(
                f"{pattern.name}: {name} needs {', '.join(missing)}, which is no parameter of the pattern: it has "
                f"{', '.join(given)}"
            )
        if absent := [n for n in needed if n in pattern.optional]:
            raise PatternError(
                f"{pattern.name}: {', '.join(absent)} may be absent, so {name} must have a default for it"
            )
        taken |= set(arguments)
    if left := [n for n in given if n not in taken]:
        raise PatternError(f"{pattern.name}: the replacement has no parameter {', '.join(left)}")


def replacement(pattern: Pattern, tensors: dict[str, Any], constants: dict[str, Any], early: bool = False) -> Any:
    """What the pattern's replacement gives, called with the arguments that the rewriter gives it."""
    given = {**tensors, **constants}
    made = {}
    if early:
        for name, make in pattern.early.items():
            function, arguments = bound_arguments(make, given)
            made[name] = function(**arguments)
    results = []
    for target in pattern.targets:
        function, arguments = bound_arguments(target, given)
        parameters = inspect.signature(function).parameters
        results.append(function(**arguments, **{name: value for name, value in made.items() if name in parameters}))
    return results[0] if callable(pattern.replace) else tuple(results)


def reference(pattern: Pattern, tensors: dict[str, Any], constants: dict[str, Any]) -> Any:
    """What the replacement must give: the function's results, and the input that it hands on."""
    results = pattern.function(**tensors, **constants)
    if pattern.forks is None:
        return results
    return (*(results if isinstance(results, (tuple, list)) else (results,)), tensors[pattern.forks])


def _inputs(
    pattern: Pattern, absent: frozenset[str], device: torch.device | str
) -> Iterator[tuple[dict[str, torch.Tensor], dict[str, Any], bool]]:
    """Tensors and constants by name, and whether the upstream gradients are to be expanded."""
    generator = torch.Generator(device).manual_seed(0)
    present = {name: dims or "..." for name, dims in pattern.tensors.items() if name not in absent}
    for (step, (leading, largest)), dtypes in itertools.product(enumerate(SIZES), DTYPES):
        while True:
            sizes = pattern.example_sizes()
            shapes = {name: example(dims, sizes, leading, largest) for name, dims in present.items()}
            if largest <= 4 or all(math.prod(shape) <= MOST_ELEMENTS for shape, _ in shapes.values()):
                break
            largest //= 2
        floating = [name for name, (_, kind) in shapes.items() if kind.is_floating_point]
        if len(floating) < len(dtypes):
            continue
        below = min(sizes.values(), default=2)
        tensors: dict[str, torch.Tensor] = {}
        for name, (shape, kind) in shapes.items():
            dtype = dtypes[0 if name == floating[0] else -1] if name in floating else kind
            tensors[name] = random_tensor(shape, dtype, generator, below)
            if step == 1 and shape:  # rows with a gap between them, as the halves of a packed projection have
                tensors[name] = tensors[name].repeat(*[1] * (len(shape) - 1), 2)[..., : shape[-1]]
        constants = {}
        for name, kind in pattern.constants.items():
            if name not in absent:
                value = pattern.example_constant(name)
                varies = kind == "float" and name not in pattern.example
                constants[name] = value * CONSTANTS[step] if varies else value
        yield tensors, constants, step == 2


def _compare(
    pattern: Pattern, tensors: dict[str, torch.Tensor], constants: dict[str, Any], early: bool, expanded: bool
) -> str | None:
    """Raises PatternError where the two differ; gives why they were not compared."""
    if pattern.when is not None and (reason := pattern.when(**tensors, **constants)):
        return f"`when`: {reason}"
    generator = torch.Generator(next(iter(tensors.values())).device).manual_seed(1)

    def seed(output: torch.Tensor) -> torch.Tensor:
        # Expanded, as the gradient of a sum is.
        shape = output.shape[-1:] if expanded else output.shape
        return random_tensor(shape, output.dtype, generator, 2).expand(output.shape)

    def function(**given: torch.Tensor) -> Any:
        return reference(pattern, given, constants)

    try:
        expected, upstream = evaluate(function, tensors, seed)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        return describe_error(error)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    context = f"{pattern.name} on " + ", ".join(
        [f"{name} {str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for name, t in tensors.items()]
        + [f"{name}={value!r}" for name, value in constants.items()]
    )
    try:
        found, _ = evaluate(lambda **given: replacement(pattern, given, constants, early), tensors, upstream)
    except Exception as error:
        raise PatternError(
            f"{context}: the replacement fails, the function does not ({describe_error(error)}). If it is not meant "
            "for such inputs, let `when` say so"
        ) from error
    for name, tensor in tensors.items():
        if not torch.equal(tensor, before[name]):
            raise PatternError(f"{context}: the replacement writes to its input {name}")
    largest = worst(compare(found, expected, widest(function, tensors, upstream)))
    if not largest.passes:
        raise PatternError(f"{context}: {largest}")
    return None
