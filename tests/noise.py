"""Whether one of two noisy computations is further from the truth than the other, and not by chance.

Rounding errors of a whole model vary from batch to batch by factors, and now and then one of them is a hundred times
the others: another expert was chosen, for a rounding. A mean of squares is then that one batch. What is compared is the
ratio of the two errors of each batch: the mean of its logarithm, with a confidence interval. Of two computations that
round equally often it is 0 whatever the distribution, and no batch counts more than another.
"""

from __future__ import annotations

import math
from collections.abc import Callable

ALLOWED = 1.1
"""The ratio of errors up to which a computation is no worse."""

TOO_LARGE = {"loss": 1.5}
OTHERS_TOO_LARGE = 1.25
"""The ratio that must not pass. Loss is one number a batch, whose error may by chance be 0: it takes a hundred batches
to tell 1 from 1.5, and a thousand to tell it from 1.15."""

FIRST, MOST = 32, 1024
"""How many batches are looked at before the first decision, and in all."""

SURE, VERY_SURE = 3.0, 4.5
"""Standard errors of the mean: to pass, and to be called wrong. There are a thousand comparisons in a sweep, and up to
six looks at each: at 4.5 one in a hundred sweeps calls a model wrong that is not."""

NEGLIGIBLE = 1e-3
"""An error that is added to both, in squares: a quarter of the resolution of bf16, below which nothing is said."""

Errors = dict[str, float]


def compared(errors: Callable[[int], list[Errors]]) -> dict[str, dict[str, float] | int | list[str]]:
    """The ratio of the second of two computations' errors to the first's, by the kind of error, and which kinds are
    `wrong`: too large, or not shown to be small enough with as many batches as are looked at.

    `errors` gives both computations' errors for a batch by its number.
    """
    batches: list[list[Errors]] = []
    while True:
        batches += [errors(seed) for seed in range(len(batches), max(FIRST, 2 * len(batches)))]
        bounds = {kind: _bounds([(first[kind], second[kind]) for first, second in batches]) for kind in batches[0][0]}
        wrong = [kind for kind, (_, surely_above, _) in bounds.items() if surely_above > ALLOWED]
        open_ = [kind for kind, (*_, at_most) in bounds.items() if at_most > TOO_LARGE.get(kind, OTHERS_TOO_LARGE)]
        if wrong or not open_ or len(batches) >= MOST:
            return {
                "ratio": {kind: ratio for kind, (ratio, *_) in bounds.items()},
                "at most": {kind: at_most for kind, (*_, at_most) in bounds.items()},
                "wrong": wrong or open_,
                "batches": len(batches),
            }


def _bounds(pairs: list[tuple[float, float]]) -> tuple[float, float, float]:
    """The geometric mean of second / first, what it is very surely above, and what it is surely below."""
    if any(math.isfinite(a) and not math.isfinite(b) for a, b in pairs):
        return math.inf, math.inf, math.inf
    pairs = [(a, b) for a, b in pairs if math.isfinite(a)]  # the model itself may give NaN
    if len(pairs) < 2:
        return 1.0, 1.0, 1.0
    logs = [0.5 * math.log((b * b + NEGLIGIBLE**2) / (a * a + NEGLIGIBLE**2)) for a, b in pairs]
    mean = sum(logs) / len(logs)
    error = math.sqrt(sum((x - mean) ** 2 for x in logs) / (len(logs) - 1) / len(logs))
    return math.exp(mean), math.exp(mean - VERY_SURE * error), math.exp(mean + SURE * error)
