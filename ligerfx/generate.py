"""Gated units with an activation that nobody wrote a kernel for: the kernel is written from the sympy expression of
the activation and its derivative."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import sympy
import torch
from sympy.printing.pycode import PythonCodePrinter

from .canonical import Canonicalizer
from .errors import PatternError
from .pattern import Pattern
from .recorder import Recorder
from .source import describe_error
from .terms import Terms

_X = sympy.Symbol("x", real=True)


class sigmoid(sympy.Function):  # noqa: N801
    """1 / (1 + exp(-x)) under its own name, whose derivative overflows nowhere."""

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return self * (1 - self)


class softplus(sympy.Function):  # noqa: N801
    """log(1 + exp(x)) under its own name, which overflows nowhere."""

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return sigmoid(self.args[0])


class log1p(sympy.Function):  # noqa: N801
    """log(1 + x) under its own name, which is exact for small x, too."""

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return 1 / (1 + self.args[0])


_ELEMENTWISE = {
    "log": sympy.log,
    "log1p": log1p,
    "softplus": softplus,
    "log_sigmoid": lambda a: -softplus(-a),
    "mish": lambda a: a * sympy.tanh(softplus(a)),
}
"""Of what is no arithmetic to the matcher: what it computes of one tensor."""


class _Printer(PythonCodePrinter):
    """Expressions as Triton code."""

    def _print_Function(self, expr: sympy.Expr) -> str:
        argument = self._print(expr.args[0])
        name = type(expr).__name__
        if name == "sigmoid":
            return f"(1.0 / (1.0 + tl.exp(-({argument}))))"
        if name == "softplus":
            return f"({_positive(argument)} + log1p(tl.exp(-tl.abs({argument}))))"
        if name == "Heaviside":
            return f"tl.where({argument} > 0, 1.0, 0.0)"
        if name in ("tanh", "log1p"):
            return f"{name}({argument})"
        if name in ("exp", "log", "erf", "cos", "sin"):
            return f"tl.{name}({argument})"
        raise PatternError(f"{name} has no Triton code")

    _print_exp = _print_log = _print_log1p = _print_erf = _print_tanh = _print_Function
    _print_cos = _print_sin = _print_Heaviside = _print_Function

    def _print_Max(self, expr: sympy.Expr) -> str:
        zero, other = sorted(expr.args, key=lambda a: not a.is_zero)
        if len(expr.args) != 2 or not zero.is_zero:
            raise PatternError(f"{expr} has no Triton code")
        return _positive(self._print(other))

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


def _positive(argument: str) -> str:
    return f"tl.where({argument} <= 0, 0.0, {argument})"  # NaN passes, as it does in torch


def expression_of(activation: Callable[[torch.Tensor], torch.Tensor], name: str) -> sympy.Expr:
    """What an elementwise function computes, over the symbol x.

    Raises:
        PatternError: it cannot be traced, or holds an operation that is no arithmetic on elements.
    """
    try:
        graph = Recorder().trace_function(lambda x: activation(x), {"x": torch.empty(4, device="meta")}, meta=True)
    except Exception as error:
        raise PatternError(f"{name}: not traceable: {describe_error(error)}") from error
    terms = Terms()
    canonical = Canonicalizer(terms, {n: _X for n in graph.nodes if n.op == "placeholder"}, rounding=False)
    (result,) = next(n for n in reversed(graph.nodes) if n.op == "output").args
    value = _resolved(canonical.value(result), terms, name)

    def named(power: sympy.Expr) -> sympy.Expr:
        exponential = power.base - 1
        return sigmoid(-exponential.args[0]) ** -power.exp if isinstance(exponential, sympy.exp) else power

    def named_log(log: sympy.Expr) -> sympy.Expr:
        inner = log.args[0] - 1
        return softplus(inner.args[0]) if isinstance(inner, sympy.exp) else log1p(inner) if log.args[0].is_Add else log

    value = value.replace(sympy.log, lambda a: named_log(sympy.log(a, evaluate=False)))
    value = value.replace(log1p, lambda a: softplus(a.args[0]) if isinstance(a, sympy.exp) else log1p(a))
    return value.replace(lambda e: e.is_Pow and e.exp.is_negative and e.base.is_Add, named)


def _resolved(value: sympy.Expr, terms: Terms, name: str) -> sympy.Expr:
    """The value with the functions that its terms stand for."""
    known = {}
    for symbol in value.free_symbols & terms.terms.keys():
        term = terms.terms[symbol]
        args, kwargs = term.attrs if len(term.attrs) == 2 else (None, ())
        if term.op not in _ELEMENTWISE or args != (("operand", 1),) or any(option for _, option in kwargs):
            raise PatternError(f"{name}: no kernel can be written for {term.op}")
        known[symbol] = _ELEMENTWISE[term.op](_resolved(term.args[0], terms, name))
    return value.xreplace(known)


def in_sigmoids(value: sympy.Expr) -> sympy.Expr:
    """The value with sigmoids for exponentials: a rational function of exp(a), which may be infinite over infinite
    far out, is one of sigmoid(a), which is between 0 and 1."""
    value = sympy.nsimplify(value, rational=True)
    names: dict[sympy.Symbol, sympy.Expr] = {}
    left = sorted(value.atoms(sympy.exp), key=sympy.default_sort_key)
    while left:
        first = left[0].args[0]
        ratios = {e: sympy.cancel(e.args[0] / first) for e in left}
        ratios = {e: ratio for e, ratio in ratios.items() if ratio.is_Rational}
        unit = sympy.Rational(math.gcd(*(r.p for r in ratios.values())), math.lcm(*(r.q for r in ratios.values())))
        share = sympy.Dummy()
        names[share] = sigmoid(unit * first)
        value = value.xreplace({e: (share / (1 - share)) ** (ratio / unit) for e, ratio in ratios.items()})
        left = [e for e in left if e not in ratios]
    return sympy.cancel(value).xreplace(names)


def source_of(value: sympy.Expr) -> str:
    """A function that gives an activation and its derivative, in Triton's words."""
    slope = sympy.diff(value, _X).replace(lambda e: e.is_Pow and e.is_number, lambda e: sympy.Float(float(e)))
    shared, (value, slope) = sympy.cse([value, slope], symbols=sympy.numbered_symbols("t"))
    printer = _Printer()
    lines = [f"    {symbol} = {printer.doprint(expr)}\n" for symbol, expr in shared]
    return f"def activate(x):\n{''.join(lines)}    return {printer.doprint(value)}, {printer.doprint(slope)}\n"


def generated_glu(
    activation: Callable[[torch.Tensor], torch.Tensor], name: str | None = None, *, low_memory: bool = False
) -> list[Pattern]:
    """Patterns for `activation(gate) * up`, with Triton kernels written from the activation.

    The unit is found by itself, with the down projection and with all projections, gate and up separate or packed. As
    the kernels of the library do, these keep gate and up for the backward, which computes the activation again, and
    compute in float32. Where a pattern of the library fits, that one is taken (`benefit` is -1). On CPU tensors the
    activation itself runs, unless Triton's interpreter is on.

    Args:
        activation: a function of one tensor, element by element, of arithmetic, `exp`, `log`, `log1p`, `tanh`, `erf`,
            `sigmoid`, `silu`, `gelu`, `relu`, `softplus`, `mish`, `logsigmoid`, `sin`, `cos`, `square`, `sqrt`.
        name: what the patterns are called: `{name}_glu`, `{name}_glu_linear`, `{name}_glu_mlp`, and the same with
            `packed_` before it. Default: the function's name.
        low_memory: whether the kernels with the down projection write activation(gate) * up again in the backward
            instead of keeping it.

    Returns:
        Patterns with the parameters gate and up, both [..., I], or gate_up [..., 2 I], the gate first, and, with the
        down projection, weight [H, I] and bias [H] or None; or those of `kernels.glu_mlp`; all floating point. For
        `optimize(patterns=...)`, or `register(*...)`.

    Raises:
        PatternError: something else is computed, or the value or the derivative that was derived is not what torch
            computes, on 4001 numbers from -100 to 100.

    Examples:
        >>> import torch, ligerfx
        >>> snake = ligerfx.generated_glu(lambda x: x + torch.sin(x) ** 2, "snake")
        >>> class Gated(torch.nn.Module):
        ...     def forward(self, gate, up):
        ...         return up * (gate + gate.sin().square())
        >>> inputs = torch.ones(2, 3, 8), torch.ones(2, 3, 8)
        >>> ligerfx.optimize(Gated(), inputs, patterns=snake).report.idioms
        {'glu': 1}
    """
    name = name or getattr(activation, "__name__", type(activation).__name__).strip("<>")
    from .kernels._activations import Activation  # imports Triton, which `import ligerfx` must not
    from .patterns import glu

    return glu.patterns_of(Activation(name, activation, checked_source(activation, name)), low_memory)


def checked_source(activation: Callable[[torch.Tensor], torch.Tensor], name: str) -> str:
    """The source of an activation and its derivative, in the first form that computes what torch does."""
    value = expression_of(activation, name)
    forms = [lambda: value]
    if value.has(sympy.exp, sigmoid):
        forms.append(lambda: in_sigmoids(value.replace(sigmoid, lambda a: 1 / (1 + sympy.exp(-a)))))
    problems = []
    for form in forms:
        try:
            source = source_of(form())
            problem = difference_from(activation, source)
        except PatternError as error:
            problem = str(error)
        if problem is None:
            return source
        problems.append(problem)
    raise PatternError(f"{name}: {problems[0]}")


def difference_from(activation: Callable[[torch.Tensor], torch.Tensor], source: str) -> str | None:
    """Where what the source computes in float32 is not what torch gives in float64; None if nowhere."""
    names = ("exp", "log", "erf", "cos", "sin", "sqrt", "abs", "where")
    namespace = {
        "tl": SimpleNamespace(**{n: getattr(torch, n) for n in names}),
        "tanh": torch.tanh,
        "log1p": torch.log1p,
    }
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
            return (
                f"the {what} that was derived is {found[at]:.6g} at {x[at]:g}, and torch gives {expected[at]:.6g}: no "
                "kernel can be written for this form of it"
            )
    return None
