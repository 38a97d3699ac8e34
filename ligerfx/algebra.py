"""Expressions and numbers in one form.

Algebraically equal expressions become equal ones: multiplied out, with the largest coefficient of a sum outside of a
power or product, and with one spelling of each constant. A captured constant of a pattern is a number that shows as a
symbol here.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import sympy


class Constant:
    """A captured constant of a pattern, while the pattern is traced: an ordinary number or string with a name."""

    symbol: sympy.Expr

    def __repr__(self) -> str:
        return str(self.symbol)


class ConstantFloat(Constant, float):
    def __neg__(self) -> ConstantFloat:
        return constant(-self.symbol, -float(self))


class ConstantInt(Constant, int):
    pass


class ConstantStr(Constant, str):
    pass


def constant(symbol: sympy.Expr, value: float | int | str) -> Any:
    """`value`, marked so that the canonical form shows `symbol` in its place."""
    cls = {float: ConstantFloat, int: ConstantInt, str: ConstantStr}[type(value)]
    marked = cls(value)
    marked.symbol = symbol
    return marked


@functools.lru_cache(maxsize=4096)
def normal(expr: sympy.Expr) -> sympy.Expr:
    """One form for algebraically equal expressions: multiplied out, floats rounded to what fp32 resolves."""
    expanded = decimal(sympy.expand(expr, power_base=False, power_exp=False, log=False))
    return expanded.xreplace({f: number(float(f"{float(f):.8g}")) for f in expanded.atoms(sympy.Float)})


def power(base: sympy.Expr, exponent: sympy.Expr) -> sympy.Expr:
    """`base**exponent`; of a sum, its largest coefficient is taken out: `(8*m + 8*e)**-0.5` is
    `8**-0.5 * (m + e)**-0.5`, whoever multiplied."""
    whole = exponent.is_Integer and exponent.is_positive
    base = decimal(sympy.expand(base, power_base=False, power_exp=False, log=False)) if base.is_Mul else base
    if whole or not exponent.is_number or not (base.is_Add or base.is_Mul):
        return base**exponent
    factor, rest = content(base)
    return number(float(factor) ** float(exponent)) * rest**exponent


def product(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr:
    """`a * b`; of sums, the largest coefficient is taken out."""
    (first, a), (second, b) = content(a), content(b)
    return sympy.Mul(first * second, a, b)


def content(expr: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
    """The largest coefficient of a sum, and the sum without it."""
    terms = [term for term in sympy.Add.make_args(expr) if not term.is_number] if expr.is_Add else []
    factor = max((abs(term.as_coeff_Mul()[0]) for term in terms), default=sympy.Integer(1))
    if factor in (0, 1) or not factor.is_real:
        return sympy.Integer(1), expr
    return factor, decimal(sympy.expand(expr / factor, power_base=False, power_exp=False, log=False))


@functools.lru_cache(maxsize=4096)
def decimal(expr: sympy.Expr) -> sympy.Expr:
    """`expr` with every fraction as a float and every whole float as an integer: one spelling of constants. The square
    of a root of 8 is 8."""
    constants = {a for a in expr.atoms(sympy.Rational, sympy.Float) if not a.is_Integer}
    return expr.xreplace({c: number(float(f"{float(c):.15g}")) for c in constants}) if constants else expr


def with_sigmoids(expr: sympy.Expr) -> sympy.Expr:
    """`exp(a) / (1 + exp(a))` and `1 - 1 / (1 + exp(a))` as the sigmoid that both are, `1 / (1 + exp(-a))`."""
    if not (expr.is_Mul or expr.is_Add):
        return expr
    operands = set(expr.args)
    for operand in expr.args:
        for factor in sympy.Mul.make_args(operand):
            a = _argument_of_sigmoid(factor)
            if a is None:
                continue
            mirrored = 1 / (1 + sympy.exp(a))
            if expr.is_Mul and (growth := sympy.exp(-a)) in operands:
                return with_sigmoids(sympy.Mul(mirrored, *(operands - {factor, growth})))
            rest = -sympy.Mul(*(f for f in sympy.Mul.make_args(operand) if f != factor))
            if expr.is_Add and (parts := set(sympy.Add.make_args(rest))) <= operands:
                return with_sigmoids(sympy.Add(rest * mirrored, *(operands - parts - {operand})))
    return expr


def _argument_of_sigmoid(expr: sympy.Expr) -> sympy.Expr | None:
    """The a of `1 / (1 + exp(-a))`, None for anything else."""
    if not (expr.is_Pow and expr.exp == -1 and expr.base.is_Add and len(expr.base.args) == 2):
        return None
    one, other = expr.base.args
    return -other.exp if one == 1 and isinstance(other, sympy.exp) else None


LARGEST = 8
"""Summands, multiplied out, of a value that an idiom may be found in. A matrix that is divided by the sums of its rows
and columns in turn (Sinkhorn) would have 2 to the power of their number."""


def expanded_size(expr: sympy.Expr) -> int:
    """How many summands there would be, numerator and denominator multiplied out."""
    if expr.is_Add:
        return sum(map(expanded_size, expr.args))
    if expr.is_Mul:
        return math.prod(map(expanded_size, expr.args))
    if expr.is_Pow and expr.exp.is_Integer:
        return min(expanded_size(expr.base) ** abs(int(expr.exp)), 2 * LARGEST)
    return 1


def number(value: float | int) -> sympy.Expr:
    if isinstance(value, Constant):
        return value.symbol
    if isinstance(value, float) and not value.is_integer():
        return sympy.Float(value) if math.isfinite(value) else sympy.Symbol(f"number_{value}")
    return sympy.Integer(int(value))
