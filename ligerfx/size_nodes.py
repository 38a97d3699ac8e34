"""Symbolic sizes of which torch may ask much.

To run one operation on fakes torch asks dozens of questions about sizes, and for each has sympy make, and try to
decide, an equation or inequality. While guards are suppressed, nobody looks at it: what counts is the answer for the
sizes at hand. Here a question knows its answer at once, and its expression is made when somebody asks for that, as for
one in fifty.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch.fx.experimental.sym_node import SymNode
from torch.utils._sympy.functions import FloorDiv

TRIED = (2, 11) <= tuple(map(int, torch.__version__.split(".")[:2])) <= (2, 15)
"""Whether torch's internals are those that this, and the copying of fakes, were written for. With others, torch's own
way is taken, and capture takes longer."""


def _question(name: str, answer: Callable[..., bool]) -> Callable[..., SymNode]:
    plain = getattr(SymNode, name)

    def ask(*operands: SymNode) -> SymNode:
        hints = [operand.hint for operand in operands]
        if None in hints:  # a size that only the data tell
            return plain(*operands)
        return Question(plain, operands, bool(answer(*hints)))

    return ask


def _number(name: str) -> Callable[..., SymNode]:
    plain = getattr(SymNode, name)

    def compute(*operands: SymNode) -> SymNode:
        if any(operand.hint is None or operand.pytype is not int for operand in operands):
            return SizeNode.of(plain(*operands))
        known, call = operands[0].shape_env.numbers, (name, *(operand.expr for operand in operands))
        if call not in known:  # the same sizes and strides, again and again
            known[call] = SizeNode.of(plain(*operands))
        return known[call]

    return compute


class SizeNode(SymNode):
    """A size whose comparisons with others are `Question`s.

    Its `shape_env` keeps `numbers`: the results of arithmetic on sizes at hand, by operation and operands, and the
    nodes of integers.
    """

    @staticmethod
    def of(node: SymNode) -> SymNode:
        """A node of torch's as one of these."""
        if type(node) is SymNode:
            node.__class__ = SizeNode
        return node

    @property
    def expr(self) -> sympy.Basic:
        # Where nothing is replaced torch asks more than it needs to.
        return SymNode.expr.fget(self) if self.shape_env.replacements else self._expr

    def maybe_as_int(self) -> int | None:
        expr = self.expr
        return int(expr) if expr.is_Integer else None if expr.is_Symbol else super().maybe_as_int()

    def wrap_int(self, num: int) -> SymNode:
        known = self.shape_env.numbers
        if num not in known:
            known[num] = self.of(super().wrap_int(num))
        return known[num]

    def wrap_bool(self, num: bool) -> SymNode:
        return self.of(super().wrap_bool(num))

    _eq, _ne = _question("_eq", operator.eq), _question("_ne", operator.ne)
    _lt, _le = _question("_lt", operator.lt), _question("_le", operator.le)
    _gt, _ge = _question("_gt", operator.gt), _question("_ge", operator.ge)
    _and_, _or_ = _question("_and_", operator.and_), _question("_or_", operator.or_)
    _sym_not = _question("_sym_not", operator.not_)

    _add, _sub, _mul, _neg = _number("_add"), _number("_sub"), _number("_mul"), _number("_neg")
    _sym_max, _sym_min = _number("_sym_max"), _number("_sym_min")

    def _mod(self, other: SymNode) -> SymNode:
        return self.of(super()._mod(other))  # which depends on what is known of the sizes: not kept

    def sym_sum(self, args: Any) -> SymNode:
        return self.of(super().sym_sum(args))

    def _int_floordiv(self, other: SymNode) -> SymNode:
        """In lowest terms, where a product is divided: torch has sympy's `simplify` bring both numbers there, which was
        a quarter of the first capture of a vision-language model."""
        a, b = self.expr, other.expr
        if self.hint is not None and other.hint and not a.is_Add:
            lowest = (a / b).as_numer_denom()
            if lowest != (a, b):
                return SizeNode(FloorDiv(*lowest), self.shape_env, int, self.hint // other.hint)
        return self.of(super()._int_floordiv(other))


class Question(SizeNode):
    """What is asked about sizes at hand: `plain`, torch's own method, makes the expression of `operands`."""

    def __init__(self, plain: Callable[..., SymNode], operands: tuple[SymNode, ...], answer: bool) -> None:
        self._asked: tuple | None = (plain, operands)
        super().__init__(None, operands[0].shape_env, bool, answer)

    @property
    def _expr(self) -> sympy.Basic:
        if self._asked is not None:
            plain, operands = self._asked
            self._made, self._asked = plain(*operands)._expr, None
        return self._made

    @_expr.setter
    def _expr(self, value: Any) -> None:
        self._made = value

    def expect_true(self, file: str, line: int) -> bool:
        return self.guard_bool(file, line)  # as torch does where there is an answer, once it has looked for one
