"""Unification: the values of a pattern's parameters with which it computes a given value.

Sums and products match in any order, their constants as one number; a parameter that is bound is divided out. Where
nothing fits, the reason of the attempt that came furthest is kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import sympy

from .algebra import decimal, number
from .graph_view import View
from .near_misses import NEARLY
from .pattern import Variant, weight
from .terms import SIZED, Terms, attribute_text, describe

Bindings = dict[sympy.Symbol, sympy.Expr]


class Unifier:
    """Binds a pattern variant's parameters so that its canonical value becomes a given one."""

    def __init__(self, variant: Variant, view: View) -> None:
        self.variant = variant
        self.view = view
        self.share = 0.0
        self.size = variant.size
        self.why: str | Callable[[], str] | bool = False
        self.done = 0

    @property
    def is_near(self) -> bool:
        """Whether the proposal that came furthest is one to tell of."""
        return bool(self.why)

    @property
    def reason(self) -> str:
        """Why the proposal that came furthest failed."""
        return self.why() if callable(self.why) else self.why

    def note(self, share: float, reason: str | Callable[[], str], told: Callable[[], bool] | bool = True) -> None:
        """Keeps the reason of the failure that came furthest, False where there is nothing to tell. Text is made only
        where it is shown, and `told` is asked only of a failure that came so far."""
        if share > max(self.share, NEARLY):  # a proposal that failed halfway never outranks one that was made
            self.share, self.why = share, (told if isinstance(told, bool) else told()) and reason

    def _fail(self, expected: sympy.Expr, found: sympy.Expr) -> None:
        told = not found.is_number or self.variant.is_constant(expected)  # else what is expected is not there at all
        self.note(self._progress, lambda: f"expected {self._expected(expected)}, found {self._found(found)}", told)

    def note_missing(self, output: sympy.Expr) -> None:
        """Keeps that there is no such further output, if nothing that came near it has been kept."""
        self.note(self._progress, lambda: f"expected {self._expected(output)} as well")

    def _found(self, value: sympy.Expr) -> str:
        return describe(value, self.view.terms)

    @property
    def _progress(self) -> float:
        return min(self.done / self.size, 0.99)

    def _expected(self, value: sympy.Expr) -> str:
        return describe(value, self.variant.terms)

    def proposals(self, value: sympy.Expr) -> tuple[list[tuple[dict[int, sympy.Expr], int]], float, Any]:
        """Bindings under which the first output is `value`, by the numbers of the parameters in `Variant.form` and each
        with how many comparisons it took; and the failure that came furthest."""
        first = self.variant.outputs[self.variant.search_order[0]]
        if not self.may_unify(first, value):
            return [], 0.0, False
        number = {symbol: i for i, symbol in enumerate(self.variant.form[1])}
        found = [
            ({number[symbol]: v for symbol, v in bound.items()}, self.done) for bound in self.unify(first, value, {})
        ]
        return found, self.share, self.why

    def may_unify(self, p: sympy.Expr, t: sympy.Expr, done: int = 0) -> bool:
        """False where `unify`, with nothing bound, fails after so few comparisons that it is not even a near miss.

        `done` is how many have succeeded, and goes up as the attribute does. Only what is compared first is looked at.
        """
        variant = self.variant
        if done > NEARLY * self.size or p in variant.kinds:
            return True
        if variant.is_constant(p):
            return t.is_number
        t = self.view.inner.get(t, t)
        if p.is_Symbol:
            want, have = variant.terms.terms[p], self.view.terms.terms.get(t)
            if have is None or have.op != want.op:
                return want.op in SIZED and self.may_unify(want.args[0], t, done)
            return len(have.args) != len(want.args) or self.may_unify(want.args[0], have.args[0], done + 1)
        if p.is_Add or p.is_Mul:
            constant, want = variant.operands(p)
            if t.func != p.func and (len(want) > 1 or not (p.is_Mul or constant in variant.kinds)):
                return False
            _, have = self.view.operands(t, p.func)
            if constant in variant.kinds and len(have) > len(want):
                return True
            return any(self.may_unify(want[0], operand, done + 1) for operand in have)
        return (
            p.func == t.func and len(p.args) == len(t.args) and self.may_unify(p.args[0], t.args[0], done + weight(p))
        )

    def unify(self, p: sympy.Expr, t: sympy.Expr, bound: Bindings) -> Iterator[Bindings]:
        """All extensions of `bound` under which the pattern value `p` is the graph value `t`."""
        kind = self.variant.kinds.get(p)
        if kind is not None and p in bound:
            if bound[p] in (t, self.view.terms.written.get(t)) or (t.is_number and _close(bound[p], t)):
                yield bound
            else:
                self.note(self._progress, lambda: f"expected {p} = {self._found(bound[p])}, found {self._found(t)}")
        elif kind == "tensor":
            value = t if t in self.view.nodes_of else self.view.terms.written.get(t)
            if value in self.view.nodes_of:
                yield {**bound, p: value}
            else:
                share = min(self._progress, NEARLY + 0.01)  # mostly another failure tells more
                told = not t.is_number
                self.note(share, lambda: f"{p}: {self._found(t)} is no value that the model computes", told)
        elif self.variant.is_constant(p):
            yield from self._unify_number(p, t, bound)
        elif t in self.view.inner:  # taken as given, but the pattern has more than a parameter here
            yield from self.unify(p, self.view.inner[t], bound)
        elif p.is_Symbol:
            yield from self._unify_term(p, t, bound)
        elif p.is_Add or p.is_Mul:
            yield from self._unify_sum(p, t, bound)
        elif p.func == t.func and len(p.args) == len(t.args):
            if p.is_Pow and _unlike(p.exp, t.exp) and not (_is_root(p) and self._has_root(t)):
                # x / mean(x**2) is nearly a norm, x / sum(x) is none.
                before = self.share, self.why
                if not any(True for _ in self._counted(self.unify(p.base, t.base, bound))):
                    self.share, self.why = before
                    self.note(self._progress, "", told=False)
                    return
            yield from self._counted(self._unify_all(list(zip(p.args, t.args, strict=True)), bound), weight(p))
        else:
            self._fail(p, t)

    def _has_root(self, value: sympy.Expr) -> bool:
        """Whether there is a root in a value, or in what its terms are made of."""
        terms = [self.view.terms.terms[s] for s in value.free_symbols if s in self.view.terms.terms]
        powers = (
            power for part in (value, *(a for term in terms for a in term.args)) for power in part.atoms(sympy.Pow)
        )
        return any(map(_is_root, powers))

    def _is_activation(self, parameter: sympy.Expr) -> bool:
        """Whether a parameter is a tensor of any number of leading dimensions. An idiom that lacks one of those is
        another: an MLP without a gate."""
        return "..." in (self.variant.pattern.tensors.get(getattr(parameter, "name", "")) or "")

    def _counted(self, results: Iterator[Bindings], weight: int = 1) -> Iterator[Bindings]:
        self.done += weight
        try:
            yield from results
        finally:
            self.done -= weight

    def _unify_all(self, pairs: list[tuple[sympy.Expr, sympy.Expr]], bound: Bindings) -> Iterator[Bindings]:
        if not pairs:
            yield bound
            return
        (p, t), *rest = pairs
        for more in self.unify(p, t, bound):
            yield from self._unify_all(rest, more)

    def _unify_number(self, p: sympy.Expr, t: sympy.Expr, bound: Bindings) -> Iterator[Bindings]:
        if not t.is_number:
            name = f"{p}: " if p in self.variant.kinds else ""
            self.note(
                self._progress,
                lambda: f"{name}expected a constant, found {self._found(t)}",
            )
            return
        free = p.free_symbols
        if free & bound.keys():
            p = p.xreplace({s: v for s, v in bound.items() if s in free})
            free = p.free_symbols
        if not free and _close(p, t):
            yield bound
        elif len(free) == 1:
            (symbol,) = free
            for solution in (t,) if p == symbol else _solutions(p, t, symbol):
                if solution.is_number:
                    yield {**bound, symbol: solution}
        else:
            self._fail(p, t)

    def _unify_term(self, p: sympy.Symbol, t: sympy.Expr, bound: Bindings) -> Iterator[Bindings]:
        want = self.variant.terms.terms[p]
        have = self.view.terms.terms.get(t)
        if want.op in SIZED and (have is None or have.op != want.op):
            yield from self.unify(want.args[0], t, bound)  # sizes are compared when the match is proved
            return
        if have is None or have.op != want.op:
            self._fail(p, t)
            return
        if len(have.args) != len(want.args):
            if self.done or want.op not in ("linear", "stack", "cat"):  # none by itself is a sign of an idiom
                count = f"{want.op}: expected {len(want.args)} operands, found {len(have.args)}"
                self.note(max(self._progress, NEARLY + 0.1), count)
            return
        attrs = want.attrs[: SIZED.get(want.op, len(want.attrs))]
        for name_value, found in zip(attrs, have.attrs, strict=False):
            extended = self._unify_attribute(name_value, found, bound)
            if extended is None:
                text = f"{want.op}: expected {attribute_text(name_value)}, found {attribute_text(found)}"
                self.note(self._progress, text)
                return
            bound = extended
        yield from self._counted(self._unify_all(list(zip(want.args, have.args, strict=True)), bound))
        if want.op in SIZED and self.variant.kinds.get(want.args[0]) == "tensor":
            # A slice of a slice is one slice, a view of a view one view: what stands between may be the parameter.
            for value in self.view.alike.get((have.op, have.args), ()):
                if value != t:
                    yield from self._counted(self.unify(want.args[0], value, bound))

    def _unify_attribute(self, want: Any, have: Any, bound: Bindings) -> Bindings | None:
        if isinstance(want, tuple) and isinstance(have, tuple) and len(want) == len(have):
            for w, h in zip(want, have, strict=True):
                extended = self._unify_attribute(w, h, bound)
                if extended is None:
                    return None
                bound = extended
            return bound
        symbol = getattr(want, "symbol", None)
        if symbol is None:
            return bound if want == have else None
        value = sympy.Symbol(have) if isinstance(have, str) else number(have)
        if symbol in bound:
            return bound if bound[symbol] == value else None
        return {**bound, symbol: value}

    def _unify_sum(self, p: sympy.Expr, t: sympy.Expr, bound: Bindings) -> Iterator[Bindings]:
        """Sums and products, in any order; the constants of both sides are compared as one."""
        func = p.func
        want_constant, want = self.variant.operands(p)
        have_constant, have = self.view.operands(t, func)
        if len(want) == 1 and want_constant.is_number and self.variant.kinds.get(want[0]) == "tensor":
            value = func(*have) if t.func == func or p.is_Mul else t
            if not _close(want_constant, have_constant):
                value = decimal(t / want_constant if p.is_Mul else t - want_constant)
            yield from self._counted(self.unify(want[0], value, bound))
            return
        alone = p.is_Mul or want_constant in self.variant.kinds  # `x + eps` is x where eps is 0
        if t.func != func and not (alone and len(want) == 1):
            self._fail(p, t)
            return
        over = None
        if want_constant.is_number and not _close(want_constant, have_constant):
            # What is over may belong to a parameter: `silu(gate) * (2 * up)`.
            over = decimal(have_constant / want_constant if p.is_Mul else have_constant - want_constant)
            have, want_constant, have_constant = [over, *have], sympy.Integer(0), sympy.Integer(0)
        if want_constant in self.variant.kinds and have_constant == func.identity and len(have) > len(want):
            alike = self._ops(want, self.variant.terms) & self._ops(have, self.view.terms)
            self.note(
                0.9 if alike else self._progress,
                lambda: f"{want_constant}: expected a constant, found none in {self._found(t)}",
            )
            return
        found = False
        for more in self._unify_number(want_constant, have_constant, bound):
            for bindings in self._counted(self._assign(want, have, func, more)):
                found = True
                yield bindings
        if over is not None and not found and any(self._assign(want, have[1:], func, bound)):
            self.note(0.99, lambda: f"found {self._found(over)} besides")

    def _ops(self, values: list, terms: Terms) -> set[str]:
        return {terms.terms[v].op for v in values if v in terms.terms}

    def _assign(self, want: list, have: list, func: Any, bound: Bindings) -> Iterator[Bindings]:
        known = [a for a in want if a in bound and self.variant.kinds.get(a) == "tensor"]
        if known:
            # Bound parameters are divided out (or subtracted): they may themselves be sums and products.
            rest = _without(tuple(have), tuple(bound[a] for a in known), func)
            if rest is None:
                whole = func(*have)
                self.note(
                    self._progress,
                    lambda: (
                        f"expected {', '.join(f'{a} = {self._found(bound[a])}' for a in known)}, "
                        f"found {self._found(whole)}"
                    ),
                    # `sigmoid(a) * b` is no silu of a, unless one of the two is made of the other.
                    told=lambda: (
                        not all(map(self._is_activation, known))
                        or any(self.view.terms.are_related(whole, bound[a]) for a in known)
                    ),
                )
                return
            want = [a for a in want if a not in known]
            have = [] if rest == func.identity else list(rest.args) if rest.func is func else [rest]
        if not want:
            if not have:
                yield bound
            else:
                self.note(
                    self._progress,
                    lambda: f"found {self._found(func(*have))} besides",
                )
            return
        p, *rest = want
        if not rest and len(have) > 1 and self.variant.kinds.get(p) == "tensor":
            yield from self.unify(p, func(*have), bound)
            return
        if not have:
            self.note(
                self._progress,
                lambda: f"expected {self._expected(p)} as well",
                told=lambda: not self._is_activation(p),
            )
        for index, t in enumerate(have):
            for more in self.unify(p, t, bound):
                yield from self._assign(rest, have[:index] + have[index + 1 :], func, more)


def _is_root(value: sympy.Expr) -> bool:
    return value.is_Pow and value.exp.is_number and not value.exp.is_integer


def _unlike(a: sympy.Expr, b: sympy.Expr) -> bool:
    return a.is_number and b.is_number and not _close(a, b)


@functools.lru_cache(maxsize=4096)
def _solutions(value: sympy.Expr, wanted: sympy.Expr, symbol: sympy.Symbol) -> tuple[sympy.Expr, ...]:
    """The numbers for which a value is the one that is wanted. A model asked `-alpha = -1.702` 20 times."""
    return tuple(sympy.solve(sympy.Eq(value, wanted), symbol))


@functools.lru_cache(maxsize=4096)
def _without(operands: tuple[sympy.Expr, ...], taken: tuple[sympy.Expr, ...], func: Any) -> sympy.Expr | None:
    """A product divided by others (or a sum less others), None where that is no simpler."""
    whole, part = func(*operands), func(*taken)
    if not part.free_symbols <= whole.free_symbols:
        return None
    rest = decimal(whole / part if func is sympy.Mul else whole - part)
    fewer = len(func.make_args(rest)) < len(func.make_args(whole))
    return rest if fewer or rest.count_ops() < max(whole.count_ops(), 1) else None


def _close(a: sympy.Expr, b: sympy.Expr) -> bool:
    if a == b or not (a.is_number and b.is_number):
        return a == b
    a, b = (float(n) if n.is_Float or n.is_Rational else complex(n) for n in (a, b))
    return abs(a - b) <= 1e-7 * max(abs(a), abs(b))
