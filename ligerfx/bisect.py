"""Finding the rewrite that changes a number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .errors import OptimizeError
from .optimize import optimize
from .report import Rewrite


@dataclass(frozen=True)
class Culprit:
    """The first rewrite with which a number differs.

    Attributes:
        rewrite: the rewrite.
        number: how many rewrites are applied with it: `optimize(model, max_rewrites=number - 1)` is still good.
        expected: the number with no rewrite.
        before: the number with those before it.
        found: the number with this one as well.
    """

    rewrite: Rewrite
    number: int
    expected: float
    before: float
    found: float

    def __str__(self) -> str:
        place = self.rewrite.module or "the model"
        lines = "".join(f"\n  {source}: {text}" for source, text in self.rewrite.source)
        return (
            f"{self.rewrite.pattern} in {place}, rewrite {self.number}: {self.found:.9g} instead of {self.before:.9g} "
            f"(the original: {self.expected:.9g}){lines}"
        )


def bisect(
    model: nn.Module,
    check: Callable[[nn.Module], float],
    example_inputs: Any = None,
    *,
    rtol: float = 1e-3,
    atol: float = 0.0,
    **options: Any,
) -> Culprit | None:
    """Finds the first rewrite, in the order of `report.rewrites`, that changes a number by more than a tolerance.

    The model is optimised anew with more or fewer rewrites, as often as halving their number takes. So the number
    must come out the same each time (seed what is random), and is taken to stay wrong with more rewrites.

    Args:
        model: the original model; it is not changed.
        check: gives the number of a model: a loss, the norm of a gradient, one logit. Its calls of the model should
            be like `example_inputs`: others run as in the original.
        example_inputs: as for `optimize`.
        rtol, atol: a number is right if it differs from the original's by at most `atol + rtol * abs(original's)`.
        **options: further options of `optimize`, such as `patterns`.

    Returns:
        The rewrite and the numbers, or None where the number is right with all of them.

    Raises:
        OptimizeError: as `optimize`; or `check` does not give one number.

    Examples:
        >>> import torch, ligerfx
        >>> def wrong(x):
        ...     return torch.tanh(x) * 1.01
        >>> @ligerfx.pattern(replace=wrong)
        ... def tanh(x: "..."):
        ...     return torch.tanh(x)
        >>> ligerfx.bisect(torch.nn.RMSNorm(8), lambda m: m(torch.ones(2, 8)).sum(), torch.ones(2, 8)) is None
        True
    """

    def number(m: nn.Module) -> float:
        value = check(m)
        try:
            return float(value.detach() if isinstance(value, torch.Tensor) else value)
        except (TypeError, ValueError) as error:
            raise OptimizeError(f"check must give one number, not {value!r}") from error

    def with_rewrites(count: int | None) -> float:
        return number(optimize(model, example_inputs, max_rewrites=count, **options))

    def is_right(value: float) -> bool:
        return value == expected or abs(value - expected) <= atol + rtol * abs(expected)

    rewrites = optimize(model, example_inputs, **options).report.rewrites
    expected = number(model)
    good, bad = 0, len(rewrites)
    before, found = expected, with_rewrites(bad)
    if is_right(found) or not rewrites:
        return None
    while bad - good > 1:
        middle = (good + bad) // 2
        value = with_rewrites(middle)
        if is_right(value):
            good, before = middle, value
        else:
            bad, found = middle, value
    return Culprit(rewrites[bad - 1], bad, expected, before, found)
