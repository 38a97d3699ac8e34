"""Gated units with an activation that nobody wrote a kernel for: the kernel is written from the sympy expression of
the activation and its derivative."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import sympy
import torch
from sympy.printing.pycode import PythonCodePrinter

from .canonical import Canonicalizer, Terms
from .errors import PatternError
from .pattern import Pattern, pattern
from .source import describe_error
from .tracer import Tracer

_X = sympy.Symbol("x", real=True)


class sigmoid(sympy.Function):  # noqa: N801
    """1 / (1 + exp(-x)) under its own name, whose derivative overflows nowhere."""

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return self * (1 - self)


class _Printer(PythonCodePrinter):
    """Expressions as Triton code."""

    def _print_Function(self, expr: sympy.Expr) -> str:
        argument = self._print(expr.args[0])
        name = type(expr).__name__
        if name == "sigmoid":
            return f"(1.0 / (1.0 + tl.exp(-({argument}))))"
        if name == "Heaviside":
            return f"tl.where({argument} > 0, 1.0, 0.0)"
        if name == "tanh":
            return f"tanh({argument})"
        if name in ("exp", "erf", "cos", "sin"):
            return f"tl.{name}({argument})"
        raise PatternError(f"{name} has no Triton code")

    _print_exp = _print_erf = _print_cos = _print_sin = _print_tanh = _print_Heaviside = _print_Function

    def _print_Max(self, expr: sympy.Expr) -> str:
        zero, other = sorted(expr.args, key=lambda a: not a.is_zero)
        if len(expr.args) != 2 or not zero.is_zero:
            raise PatternError(f"{expr} has no Triton code")
        argument = self._print(other)
        return f"tl.where({argument} <= 0, 0.0, {argument})"  # NaN passes, as it does in torch

    def _print_Pow(self, expr: sympy.Expr, **_: Any) -> str:
        base, exponent = self._print(expr.base), float(expr.exp)
        whole, half = divmod(abs(exponent), 1)
        if half not in (0, 0.5) or not 0 < abs(exponent) <= 8:
            raise PatternError(f"the power {exponent:g} has no Triton code")
        product = "*".join([f"({base})"] * int(whole) + [f"tl.sqrt({base})"] * (half == 0.5))
        return f"({product})" if exponent > 0 else f"(1.0 / ({product}))"

    def _print_Integer(self, expr: sympy.Expr) -> str:
        return f"{int(expr)}.0"

    def _print_Rational(self, expr: sympy.Expr) -> str:
        return repr(float(expr))

    def _print_Float(self, expr: sympy.Expr) -> str:
        return repr(float(expr))

    _print_NegativeOne = _print_One = _print_Zero = _print_Integer
    _print_Half = _print_Pi = _print_Rational


def expression_of(activation: Callable[[torch.Tensor], torch.Tensor], name: str) -> sympy.Expr:
    """What an elementwise function computes, over the symbol x.

    Raises:
        PatternError: it cannot be traced, or holds an operation that is no arithmetic on elements.
    """
    try:
        graph = Tracer().trace_function(lambda x: activation(x), {"x": torch.empty(4, device="meta")}, meta=True)
    except Exception as error:
        raise PatternError(f"{name}: not traceable: {describe_error(error)}") from error
    terms = Terms()
    canonical = Canonicalizer(terms, {n: _X for n in graph.nodes if n.op == "placeholder"}, rounding=False)
    (result,) = next(n for n in reversed(graph.nodes) if n.op == "output").args
    value = canonical.value(result)
    if unknown := [terms.terms[s].op for s in value.free_symbols if s in terms.terms]:
        raise PatternError(f"{name}: no kernel can be written for {', '.join(sorted(unknown))}")

    def named(power: sympy.Expr) -> sympy.Expr:
        exponential = power.base - 1
        return sigmoid(-exponential.args[0]) ** -power.exp if isinstance(exponential, sympy.exp) else power

    return value.replace(lambda e: e.is_Pow and e.exp.is_negative and e.base.is_Add, named)


def source_of(value: sympy.Expr) -> str:
    """A function that gives an activation and its derivative, in Triton's words."""
    slope = sympy.diff(value, _X).replace(lambda e: e.is_Pow and e.is_number, lambda e: sympy.Float(float(e)))
    shared, (value, slope) = sympy.cse([value, slope], symbols=sympy.numbered_symbols("t"))
    printer = _Printer()
    lines = [f"    {symbol} = {printer.doprint(expr)}\n" for symbol, expr in shared]
    return f"def activate(x):\n{''.join(lines)}    return {printer.doprint(value)}, {printer.doprint(slope)}\n"


def generated_glu(activation: Callable[[torch.Tensor], torch.Tensor], name: str | None = None) -> Pattern:
    """A pattern for `activation(gate) * up`, with a Triton kernel written from the activation.

    As the kernels of the library do, it keeps gate and up for the backward, which computes the activation again, and
    computes in float32. Where a pattern of the library fits, that one is taken (`benefit` is -1). On CPU tensors the
    activation itself runs, unless Triton's interpreter is on.

    Args:
        activation: a function of one tensor, element by element, of arithmetic, `exp`, `tanh`, `erf`, `sigmoid`,
            `silu`, `gelu`, `relu`, `sin`, `cos`, `square`, `sqrt`.
        name: what the pattern is called: `{name}_glu`. Default: the function's name.

    Returns:
        A pattern with the parameters gate and up, both [..., I] and floating point, for `optimize(patterns=...)` or
        `register`.

    Raises:
        PatternError: something else is computed, or the value or the derivative that was derived is not what torch
            computes, on 4001 numbers from -100 to 100.

    Example:
        >>> import torch, ligerfx
        >>> snake = ligerfx.generated_glu(lambda x: x + torch.sin(x) ** 2, "snake")
        >>> class Gated(torch.nn.Module):
        ...     def forward(self, gate, up):
        ...         return up * (gate + gate.sin().square())
        >>> inputs = torch.ones(2, 3, 8), torch.ones(2, 3, 8)
        >>> ligerfx.optimize(Gated(), inputs, patterns=[snake]).report.idioms
        {'glu': 1}
    """
    name = name or getattr(activation, "__name__", type(activation).__name__).strip("<>")
    source = source_of(expression_of(activation, name))
    check_source(activation, source, name)
    from .kernels.generated import GeneratedGLU  # which imports Triton

    kernel = GeneratedGLU(source)

    def glu(gate: "... I", up: "... I"):  # noqa: F722
        return activation(gate) * up

    def generated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return kernel(gate, up) if kernel.takes(gate, up) else activation(gate) * up

    glu.__name__ = generated.__name__ = f"{name}_glu"
    return pattern(replace=generated, idioms=["glu"], benefit=-1)(glu)


def check_source(activation: Callable, source: str, name: str) -> None:
    """Raises PatternError where what the source computes in float32 is not what torch gives in float64."""
    names = ("exp", "erf", "cos", "sin", "sqrt", "where")
    namespace = {"tl": SimpleNamespace(**{n: getattr(torch, n) for n in names}), "tanh": torch.tanh}
    exec(source, namespace)
    x = torch.linspace(-100, 100, 4001)
    wide = x.double().requires_grad_()
    truth = activation(wide)
    (slope,) = torch.autograd.grad(truth.sum(), wide)
    for what, found, expected in zip(
        ("value", "derivative"), namespace["activate"](x), (truth.detach(), slope), strict=True
    ):
        found = torch.as_tensor(found).expand(x.shape).double()
        representable = expected.abs() < torch.finfo(torch.float32).max
        wrong = ~((found - expected).abs() <= 1e-5 * expected.abs().clamp(min=1)) & representable
        if wrong.any():
            at = int(wrong.nonzero()[0])
            raise PatternError(
                f"{name}: the {what} that was derived is {found[at]:.6g} at {x[at]:g}, and torch gives "
                f"{expected[at]:.6g}: no kernel can be written for this form of it"
            )
