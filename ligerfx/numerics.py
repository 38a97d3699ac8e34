"""Numbers: random inputs, outputs and gradients of a function, and how far two such results lie apart.

What a replacement may differ by is earned, not chosen: the more the function's own result in this dtype differs from
its result in a wider one, the more the replacement's may.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

EARNED = 3
"""How many times the function's own error is allowed: once for it, and twice as much for the replacement's own."""

SLACK = {torch.float64: 64, torch.float32: 64, torch.bfloat16: 2, torch.float16: 2}
"""And so many units of the dtype's precision at the largest value: sums of thousands of numbers, in another order."""

NARROW_INSIDE = 1 / 8
"""And so many units of the narrowest input's precision: of a single number, such as a loss, the function's own error
may be small by chance."""

Values = dict[str, torch.Tensor | None]
"""Outputs ("output", or "output 0", ...) and gradients ("gradient of x") by name; None where there is none."""


@dataclass(frozen=True)
class Difference:
    """The largest difference of one output or gradient, in absolute values.

    Attributes:
        where: which output or gradient.
        found, expected: the two values that differ most.
        allowed: the largest difference that rounding can explain.
        scale: the largest value expected.
        index: where they stand in a tensor of this shape and dtype.
        problem: what is wrong where there are no two values to compare.
    """

    where: str
    found: float
    expected: float
    allowed: float
    scale: float
    index: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    problem: str = ""

    @property
    def size(self) -> float:
        if self.problem or math.isnan(self.found) != math.isnan(self.expected):
            return math.inf
        return 0.0 if self.found == self.expected or math.isnan(self.found) else abs(self.found - self.expected)

    @property
    def relative(self) -> float:
        """The size as a share of the largest value expected."""
        return self.size / self.scale if self.scale else self.size

    @property
    def passes(self) -> bool:
        return self.size <= self.allowed

    @property
    def excess(self) -> float:
        """How many times the allowed difference it is."""
        return 0.0 if self.size == 0 else self.size / self.allowed if self.allowed else math.inf

    def __str__(self) -> str:
        what = f"{self.where} ({str(self.dtype).removeprefix('torch.')} {list(self.shape)})"
        if self.problem:
            return f"{what}: {self.problem}"
        at = f" at {list(self.index)}" if self.index else ""
        return (
            f"{what} is {self.found:.6g}{at}, not {self.expected:.6g}: "
            f"the largest difference is {self.size:.2g}, rounding explains {self.allowed:.2g}"
        )


@dataclass(frozen=True)
class Verified:
    """How a replacement compared with the operations that it replaces, on inputs like those of its place.

    Attributes:
        forward: the largest difference of an output, as a share of the largest value; None where nothing was compared.
        gradient: the same of the gradients of the inputs; None where there are none.
        problem: why nothing was compared.
    """

    forward: float | None = None
    gradient: float | None = None
    problem: str = ""


def random_tensor(
    shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator, integers_below: int
) -> torch.Tensor:
    """Normal numbers, or integers from 0 to the bound, on the generator's device."""
    device = generator.device
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, generator=generator, device=device).to(dtype)
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator, device=device) < 0.5
    return torch.randint(max(integers_below, 1), shape, generator=generator, device=device, dtype=dtype)


def evaluate(
    function: Callable,
    tensors: dict[str, torch.Tensor],
    upstream: Sequence[torch.Tensor] | Callable[[torch.Tensor], torch.Tensor],
) -> tuple[Values, list[torch.Tensor]]:
    """Outputs and gradients of `function(**tensors)`, and the upstream gradients that were used: those given, or one
    made for each output. Names of one tensor are names of one leaf."""
    leaves: dict[int, torch.Tensor] = {}
    for tensor in tensors.values():
        if id(tensor) not in leaves:
            leaves[id(tensor)] = tensor.detach().requires_grad_(tensor.is_floating_point())
    with torch.enable_grad():
        result = function(**{name: leaves[id(tensor)] for name, tensor in tensors.items()})
        # An operation on each computes what is deferred.
        outputs = [t + 0 for t in (result if isinstance(result, (tuple, list)) else (result,))]
        if not callable(upstream) and len(outputs) != len(upstream):
            raise ValueError(f"gives {len(outputs)} results, not {len(upstream)}")
        if callable(upstream):
            upstream = [upstream(t) for t in outputs]
        named = {id(tensor): name for name, tensor in reversed(tensors.items()) if tensor.is_floating_point()}
        pairs = zip(outputs, upstream, strict=True)
        with_graph = [(t, u.to(t.dtype)) for t, u in pairs if t.requires_grad and t.shape == u.shape]
        gradients = [None] * len(named)
        if with_graph and named:
            gradients = torch.autograd.grad(
                [t for t, _ in with_graph], [leaves[i] for i in named], [u for _, u in with_graph], allow_unused=True
            )
    names = [f"output {i}" for i in range(len(outputs))] if len(outputs) > 1 else ["output"]
    values: Values = dict(zip(names, (t.detach() for t in outputs), strict=True))
    values |= {f"gradient of {name}": g for name, g in zip(named.values(), gradients, strict=True)}
    return values, list(upstream)


def widest(function: Callable, tensors: dict[str, torch.Tensor], upstream: Sequence[torch.Tensor]) -> Values | None:
    """The same in a wider dtype, if the function runs in one."""
    narrow = {t.dtype for t in tensors.values() if t.is_floating_point()}
    for dtype in (torch.float64,) if torch.float32 in narrow else (torch.float32,):
        wide = {id(t): t.to(dtype) if t.is_floating_point() else t for t in tensors.values()}
        try:
            return evaluate(function, {n: wide[id(t)] for n, t in tensors.items()}, upstream)[0]
        except (RuntimeError, TypeError, ValueError):
            continue
    return None


def compare(found: Values, expected: Values, truth: Values | None) -> list[Difference]:
    """The largest difference of each output and gradient, earned by that of `expected` from `truth`."""
    eps = max(torch.finfo(v.dtype).eps for v in expected.values() if v is not None and v.is_floating_point())
    return [
        _compare(name, found.get(name), value, (truth or {}).get(name), NARROW_INSIDE * eps)
        for name, value in expected.items()
    ]


def _compare(
    where: str,
    found: torch.Tensor | None,
    expected: torch.Tensor | None,
    truth: torch.Tensor | None,
    least: float,
) -> Difference:
    like = found if expected is None else expected
    if like is None:
        return Difference(where, 0.0, 0.0, 0.0, 0.0, (), (), torch.float32)
    if found is None or (expected is not None and (found.shape != expected.shape or found.dtype != expected.dtype)):
        got = "none" if found is None else f"{found.dtype} {list(found.shape)}"
        nan = math.nan
        return Difference(where, nan, nan, 0.0, 0.0, (), tuple(like.shape), like.dtype, f"the replacement gives {got}")
    a = found.double()
    b = torch.zeros_like(a) if expected is None else expected.double()
    if a.numel() == 0:
        return Difference(where, 0.0, 0.0, 0.0, 0.0, (), tuple(like.shape), like.dtype)
    finite = b[b.isfinite()].abs()
    scale = finite.max().item() if finite.numel() else 0.0
    own = torch.zeros((), dtype=torch.float64) if truth is None else (b - truth.double()).abs()
    own = own[own.isfinite()]
    slack = 0.0
    if like.dtype.is_floating_point:
        slack = max(SLACK[like.dtype] * torch.finfo(like.dtype).eps, least)
    allowed = EARNED * (own.max().item() if own.numel() else 0.0) + slack * scale
    distance = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs().nan_to_num(math.inf, math.inf))
    position = int(distance.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(position), a.shape)) if a.ndim else ()
    return Difference(
        where, a.flatten()[position].item(), b.flatten()[position].item(), allowed, scale, index, tuple(like.shape),
        like.dtype,
    )  # fmt: skip


def worst(differences: Sequence[Difference]) -> Difference:
    """The one that exceeds most what is allowed."""
    return max(differences, key=lambda difference: difference.excess)
