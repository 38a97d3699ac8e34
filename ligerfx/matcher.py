"""Stage 2: matching. Finds where a graph computes a pattern, and why it nearly does elsewhere.

A match is proposed and then proved. Proposing compares canonical values with every cast and every size left
out, and binds the pattern's parameters. Proving traces the pattern's function on exactly the inputs that were
bound, with their dtypes and symbolic shapes, and asks that its canonical value, rounding included, be the
canonical value of the graph. Only what is proved is rewritten.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch.fx import Graph, Node

from .canonical import SIZED, Canonicalizer, ConstantStr, Terms, decimal, is_cast, normal, number, op_name
from .capture import works_in_place
from .errors import CaptureError
from .pattern import Pattern, Variant, check_dimensions, split, weight
from .symbols import FakeInputs, expression
from .tracer import Tracer

if TYPE_CHECKING:
    from .numerics import Verified

NEARLY = 0.5
"""The share of a pattern that must have been recognised for a failure to be reported."""

UNPROVED, MISFIT, OBSTRUCTED = 0.995, 1.1, 1.2
"""How far a match came that was proposed but could not be used if it were proved, one whose inputs do not fit, and one
that was proved but cannot be used."""


@dataclass(eq=False)
class Match:
    """A proved occurrence of a pattern."""

    pattern: Pattern
    inputs: dict[str, Node]
    constants: dict[str, Any]
    outputs: list[Node]
    interior: set[Node]
    source: tuple[tuple[str, str], ...] = ()  # where the model computes this: (file:line, text), in order
    verified: Verified | None = None  # how the replacement compared with the operations here, if it was asked
    calls: list[Node] = field(default_factory=list)  # what took its place, once it is rewritten

    @property
    def reach(self) -> set[str]:
        """The modules, by path from the one that is matched, whose graphs the match takes part in."""
        return {node.meta.get("scope", "") for node in (*self.interior, *self.later_users())}

    @property
    def is_idle(self) -> bool:
        """Whether all that it would do is to hand on an input that nothing takes."""
        return self.pattern.forks is not None and len(self.outputs) == 1 and not self.later_users()

    def later_users(self) -> list[Node]:
        """What uses the input that the pattern forks, besides the match."""
        if self.pattern.forks is None:
            return []
        users = self.inputs[self.pattern.forks].users
        first = min(self.outputs)
        return [user for user in users if user not in self.interior and user > first]


@dataclass(eq=False)
class NearMiss:
    """Something that looks like a pattern and is not rewritten."""

    pattern: Pattern
    node: Node
    reason: str
    share: float  # of the pattern that was recognised

    @property
    def source(self) -> str:
        return self.node.meta.get("source", "?")


class _Fail(Exception):
    def __init__(self, reason: str | Callable[[], str], share: float = 1.0) -> None:
        super().__init__()
        self.reason = reason
        self.share = share


Bindings = dict[sympy.Symbol, sympy.Expr]


class View:
    """The canonical values of a graph, casts and roundings left out.

    With `cut`, arithmetic whose result is used more than once is taken as given: an input of the idiom may
    itself be a sum or a product, which would otherwise be multiplied out with the rest.
    """

    def __init__(self, graph: Graph, cut: bool = False) -> None:
        self.terms = Terms()
        self.values: dict[Node, sympy.Expr] = {}
        self.nodes_of: dict[sympy.Expr, list[Node]] = {}
        self.computed: dict[Node, sympy.Expr] = {}  # the same, but for the node itself, which is not cut
        self.inner: dict[sympy.Symbol, sympy.Expr] = {}  # what is behind the symbol of a cut node
        canonical = Canonicalizer(self.terms, rounding=False)
        for node in graph.nodes:
            if node.op == "output" or not isinstance(node.meta.get("val"), torch.Tensor):
                continue
            value = self.computed[node] = canonical.value(node)
            if cut and not value.is_Symbol and not is_cast(node) and _uses(node) > 1:
                self.inner[symbol := canonical.take(node)] = value
                value = symbol
            self.values[node] = value
            self.nodes_of.setdefault(value, []).append(node)
        self._operands: dict[tuple, tuple[sympy.Expr, list[sympy.Expr]]] = {}
        self.alike: dict[tuple, list[sympy.Expr]] = {}  # slices of one value, or views of one
        for value in self.nodes_of:
            term = self.terms.terms.get(value)
            if term is not None and term.op in SIZED:
                self.alike.setdefault((term.op, term.args), []).append(value)

    def operation(self, value: sympy.Expr) -> Any:
        """What computes a value: the name of a term's operation, or a class of sympy."""
        value = self.inner.get(value, value)
        return self.terms.terms[value].op if value in self.terms.terms else value.func

    def operands(self, value: sympy.Expr, func: Any) -> tuple[sympy.Expr, list[sympy.Expr]]:
        """The constant and the other operands of a value, seen as a sum or a product."""
        if (value, func) not in self._operands:
            self._operands[value, func] = split(value, func, lambda e: e.is_number)
        constant, others = self._operands[value, func]
        return constant, list(others)


def _uses(node: Node) -> int:
    """How often a value is used, casts of it aside. torch's own RMSNorm uses what it is given twice."""
    return sum(_uses(user) if is_cast(user) else 2 if op_name(user) == "rms_norm" else 1 for user in node.users)


class _Proofs:
    """What patterns compute on inputs like those of one capture: what a proof compares with."""

    def __init__(self, fakes: FakeInputs) -> None:
        self.fakes = fakes
        self.terms = Terms()
        self._traced: dict[tuple, Graph | _Fail] = {}
        self._wanted: dict[tuple, list[tuple[Node, sympy.Expr]]] = {}

    def symbols(self, inputs: Iterable[Node]) -> dict[Node, sympy.Symbol]:
        """Inputs by number, so that their values elsewhere are not worked out again."""
        inputs = dict.fromkeys(inputs)
        return {n: self.terms.symbol("leaf", (i,), (), n.meta["val"].dtype) for i, n in enumerate(inputs)}

    def wanted(
        self, variant: Variant, tensors: dict[str, torch.Tensor], constants: dict[str, Any],
        symbols: dict[str, sympy.Symbol],
    ) -> list[tuple[Node, sympy.Expr]]:  # fmt: skip
        """The outputs of a pattern, nodes of its own graph, with their values. Raises _Fail where it does not run."""
        like = {
            name: (tuple(map(expression, (*v.shape, *v.stride()))), v.dtype, v.device) for name, v in tensors.items()
        }
        call = variant, tuple(like.items()), tuple(constants.items())
        key = call, tuple(symbols.items())
        if key not in self._wanted:
            if call not in self._traced:
                self._traced[call] = self._trace(variant, tensors, constants)
            graph = self._traced[call]
            if isinstance(graph, _Fail):
                raise graph
            values = Canonicalizer(self.terms, {n: symbols[n.target] for n in graph.nodes if n.op == "placeholder"})
            self._wanted[key] = [(node, normal(values.value(node))) for node in _results(graph)]
        return self._wanted[key]

    def _trace(self, variant: Variant, tensors: dict[str, torch.Tensor], constants: dict[str, Any]) -> Graph | _Fail:
        """The pattern's own graph on inputs like these."""
        # Each input is a tensor object of its own, also where the model passes one node twice.
        fakes = {name: self.fakes.like(v) for name, v in tensors.items()}
        arguments = dict.fromkeys(variant.absent) | constants | fakes
        pattern = variant.pattern
        ordered = {name: arguments[name] for name in (*pattern.tensors, *pattern.constants)}
        try:
            return Tracer(fakes=self.fakes).trace_function(pattern.function, ordered)
        except (CaptureError, RuntimeError, TypeError, ValueError, IndexError) as error:
            return _Fail(f"the pattern does not run on these inputs: {error}")


def _results(graph: Graph) -> list[Node]:
    result = next(n for n in reversed(graph.nodes) if n.op == "output").args[0]
    return list(result) if isinstance(result, tuple) else [result]


def _difference(root: Node, want: Node, inputs: dict[str, Node]) -> str:
    """How a node differs from an output of a pattern that was traced on inputs like these."""
    a, b = want.meta["val"], root.meta["val"]
    if a.dtype != b.dtype:
        return f"expected a result in {a.dtype}, found {b.dtype}"
    if a.shape != b.shape:
        return f"expected a result of shape {list(a.shape)}, found {list(b.shape)}"
    terms = Terms()
    symbols = {node: terms.symbol("leaf", (node,), (), node.meta["val"].dtype) for node in inputs.values()}
    given = {n: symbols[inputs[n.target]] for n in want.graph.nodes if n.op == "placeholder"}
    values = Canonicalizer(terms, given).value(want), Canonicalizer(terms, dict(symbols)).value(root)
    expected, found = (describe(normal(value), terms) for value in values)
    return f"rounds at another place or differs in an attribute: expected {expected}, found {found}"


class Matcher:
    """Matches patterns against one graph."""

    def __init__(self, graph: Graph, fakes: FakeInputs) -> None:
        self.graph = graph
        self.fakes = fakes
        self.fakes.proofs = fakes.proofs or _Proofs(fakes)
        _merge_equal_views(graph)
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.view = View(graph)
        cut = View(graph, cut=True)
        self.views = [self.view, cut] if cut.inner else [self.view]
        self._kinds: dict[Node, tuple] = {}
        self._found: dict[tuple, Canonicalizer] = {}  # values as proofs see them, by what stands for the inputs
        self._looked_at: dict[tuple[Pattern, Node], Match | None] = {}
        self._roots: dict[Any, set[Node]] = {}  # where a pattern may match, by the operation that computes the node
        for view, node in itertools.product(self.views, self.view.values):
            if node.op not in ("placeholder", "get_attr"):
                self._roots.setdefault(view.operation(view.computed[node]), set()).add(node)
        self._proposals: dict[tuple, tuple] = {}  # what a Unifier finds, by the pattern's form, view and value

    def find(
        self, patterns: Sequence[Pattern], refuse: Callable[[Match], str | None] | None = None
    ) -> tuple[list[Match], list[NearMiss]]:
        """Matches that do not overlap, those of more benefit or that cover more first, and the best near miss at each
        other place.

        `refuse` is asked about each before it is chosen, and may say why it must not be; then others may match there.
        """
        misses: dict[Node, Unifier] = {}
        refused: list[NearMiss] = []
        matches: list[Match] = []
        taken: set[Node] = set()
        patterns = sorted(patterns, key=lambda pattern: -pattern.benefit)
        while True:
            candidates = self._candidates(patterns, taken, misses)
            before = len(matches)
            for *_, match in sorted(candidates, key=lambda c: c[:-1]):
                if match.interior & taken:
                    continue
                if refuse and (reason := refuse(match)):
                    refused.append(NearMiss(match.pattern, match.outputs[0], reason, 1.0))
                    self._looked_at = {k: None if m is match else m for k, m in self._looked_at.items()}
                    continue
                matches.append(match)
                taken |= match.interior
            if len(matches) - before == len(candidates):
                return matches, refused + _best(misses, taken, self.view.values)

    def _candidates(
        self, patterns: Sequence[Pattern], taken: set[Node], misses: dict[Node, Unifier]
    ) -> list[tuple[float, int, int, int, Match]]:
        """Matches that leave alone what is taken, each with its place in the order of preference. What lies inside
        one of them is not looked at again, unless that one is not chosen."""
        candidates: list[tuple[float, int, int, int, Match]] = []
        inside = set(taken)
        for rank, pattern in enumerate(patterns):
            outputs: set[Node] = set()
            for root in self._possible_roots(pattern):
                if root in inside or root in outputs:
                    continue
                if (pattern, root) not in self._looked_at:
                    self._looked_at[pattern, root] = self._match_at(pattern, root, misses)
                match = self._looked_at[pattern, root]
                if match is not None and not match.interior & taken:
                    candidates.append((-pattern.benefit, -len(match.interior), rank, -self.order[root], match))
                    outputs |= set(match.outputs)
                    inside |= match.interior - set(match.outputs)
        return candidates

    def _possible_roots(self, pattern: Pattern) -> list[Node]:
        """Nodes that are computed by the same operation as a pattern's first output, last ones first."""
        operations = {variant.operation for variant in pattern.variants}
        roots = self._roots.values() if None in operations else (self._roots.get(o, ()) for o in operations)
        return sorted(set().union(*roots), key=self.order.__getitem__, reverse=True)

    def _match_at(self, pattern: Pattern, root: Node, misses: dict[Node, Unifier]) -> Match | None:
        for variant, view in itertools.product(pattern.variants, self.views):
            unifier, value = Unifier(variant, view), view.computed[root]
            form, parameters = variant.form
            if (form, view, value) not in self._proposals:  # many patterns begin alike
                self._proposals[form, view, value] = unifier.proposals(value)
            proposals, unifier.share, unifier._reason = self._proposals[form, view, value]
            for numbered, unifier._done in proposals:
                bindings = {parameters[number]: bound for number, bound in numbered.items()}
                for match in self._prove(variant, {variant.search_order[0]: root}, bindings, unifier):
                    return match
            if (
                unifier.share > NEARLY
                and unifier.is_near
                and (root not in misses or unifier.share > misses[root].share)
            ):
                misses[root] = unifier
        return None

    def _prove(self, variant: Variant, roots: dict[int, Node], bindings: Bindings, unifier: Unifier) -> Iterator[Match]:
        """The usable matches that follow from a proposal: further outputs located, inputs chosen among nodes of
        equal value, each choice proved. `roots` holds the nodes of the outputs found so far."""
        cone = self._cone(roots.values())
        missing = next((i for i in variant.search_order if i not in roots), None)
        if missing is not None and any(s not in bindings for s in variant.parameters_in(variant.outputs[missing])):
            values = unifier.view.computed
            for root in reversed(values):
                if root in cone or root.op in ("placeholder", "get_attr"):
                    continue
                if not variant.may_be(missing, values[root], unifier.view.terms):
                    continue
                for more in unifier.unify(variant.outputs[missing], values[root], bindings):
                    yield from self._prove(variant, {**roots, missing: root}, more, unifier)
            return
        names = {s: n for n, s in variant.parameters.items()}
        constants = {}
        candidates: list[list[tuple[str, Node]]] = []
        for symbol, value in bindings.items():
            name = names[symbol]
            if variant.kinds[symbol] == "constant":
                constants[name] = _python_constant(value, variant.pattern.constants[name])
            else:
                nodes = [n for n in unifier.view.nodes_of[value] if n in cone]
                candidates.append([(name, n) for n in nodes])
        for choice in itertools.product(*candidates):
            inputs = dict(choice)
            match = None
            if missing is None:  # a proof would be in vain if this could not be used
                match = self._match(variant, inputs, constants, [roots[i] for i in sorted(roots)])
                if match.is_idle or self._is_obstructed(match, unifier, UNPROVED):
                    continue
            try:
                outputs = self._proved_outputs(variant, roots, inputs, constants)
            except _Fail as failure:
                unifier.note(failure.share, failure.reason)
                continue
            if match is None:
                match = self._match(variant, inputs, constants, outputs)
                if self._is_obstructed(match, unifier, OBSTRUCTED):
                    continue
            yield match

    def _match(
        self, variant: Variant, inputs: dict[str, Node], constants: dict[str, Any], outputs: list[Node]
    ) -> Match:
        interior = self._cone(outputs, stop=set(inputs.values()))
        interior = {n for n in interior if n.op not in ("placeholder", "get_attr") and _is_tensor(n)}
        ordered = {n: inputs[n] for n in variant.pattern.tensors if n in inputs}
        lines = [n.meta for n in sorted(interior, key=self.order.__getitem__) if "source" in n.meta]
        source = tuple(dict.fromkeys((meta["source"], meta["line"]) for meta in lines))
        return Match(variant.pattern, ordered, constants, outputs, interior, source)

    def _proved_outputs(
        self, variant: Variant, roots: dict[int, Node], inputs: dict[str, Node], constants: dict[str, Any]
    ) -> list[Node]:
        pattern = variant.pattern
        tensors = {name: node.meta["val"] for name, node in inputs.items()}
        problem = check_dimensions(pattern, tensors)
        if problem is None and pattern.when is not None:
            problem = pattern.when(**tensors, **constants)
        if problem is not None:
            raise _Fail(problem, MISFIT)
        proofs = self.fakes.proofs
        symbols = proofs.symbols(inputs[name] for name in pattern.tensors if name in inputs)
        wanted = proofs.wanted(variant, tensors, constants, {name: symbols[node] for name, node in inputs.items()})
        known = tuple(symbols.items())
        if known not in self._found:
            self._found[known] = Canonicalizer(proofs.terms, symbols)
        found = self._found[known]
        outputs: list[Node] = []
        for position, (want, value) in enumerate(wanted):
            computed = [n for n in self.view.values if n.op not in ("placeholder", "get_attr")]
            nodes = [roots[position]] if position in roots else computed
            kind = _kind(want)
            node = next((n for n in nodes if self._kind(n) == kind and normal(found.value(n)) == value), None)
            if node is None:
                root = roots.get(position, next(iter(roots.values())))
                raise _Fail(functools.partial(_difference, root, want, inputs))
            outputs.append(node)
        return outputs

    def _kind(self, node: Node) -> tuple:
        if node not in self._kinds:
            self._kinds[node] = _kind(node)
        return self._kinds[node]

    def _cone(self, roots: Iterable[Node], stop: set[Node] = frozenset()) -> set[Node]:
        """All nodes that the roots depend on, down to and without `stop`; parameters of leaf layers included."""
        seen: set[Node] = set()
        pending = list(roots)
        while pending:
            node = pending.pop()
            if node in seen or node in stop:
                continue
            seen.add(node)
            pending += node.all_input_nodes
            pending += node.meta.get("parameters", {}).values()
        return seen

    def _is_obstructed(self, match: Match, unifier: Unifier, share: float) -> bool:
        """Whether the match cannot be rewritten; the unifier is told why, for a match that came so far."""
        problem = self._obstacle(match)
        if problem is not None:
            unifier.note(share, problem)
        return problem is not None

    def _obstacle(self, match: Match) -> str | None:
        """Why a proved match cannot be rewritten, None where it can."""
        outputs = set(match.outputs)
        for node in sorted(match.interior, key=self.order.__getitem__):
            if mutates(node):
                return f"`{node}` works in place at {node.meta.get('source', '?')}"
            if node in outputs or self._follows_from(node, outputs, match.interior):
                continue
            for user in node.users:
                if user not in match.interior:
                    where = f" at {user.meta['source']}" if "source" in user.meta else ""
                    return f"`{node}` has a second user, `{user}`{where}"
        # Parameters can be read anywhere.
        last_input = max((self.order[n] for n in match.inputs.values() if n.op != "get_attr"), default=0)
        before_inputs = self._cone(match.inputs.values())
        kept = [n for n in match.interior if n in outputs or self._follows_from(n, outputs, match.interior)]
        for node in sorted(kept, key=self.order.__getitem__):
            outside = [user for user in node.users if user not in match.interior]
            if node in before_inputs or any(self.order[user] < last_input for user in outside):
                return f"`{node}` is used before the last input is there"
        for node in match.inputs.values():
            if change := _change_in_place(node):
                return f"its input `{node}` is changed in place at {change.meta.get('source', '?')}"
        for node in match.outputs if callable(match.pattern.replace) else ():
            reused = any(user in match.interior for user in node.users)  # what the kernel keeps for its backward
            if reused and (change := _change_in_place(node)):
                return f"its output `{node}` is changed in place at {change.meta.get('source', '?')}"
        # The replacement runs later than what it replaces: nothing may change in place meanwhile.
        users = {user for node in kept for user in node.users if user not in match.interior}
        start, end = min(self.order[n] for n in match.interior), min((self.order[u] for u in users), default=0)
        for node, position in self.order.items():
            if start < position < end and mutates(node):
                return f"`{node}` works in place at {node.meta.get('source', '?')}, before the result is used"
        return None

    def _follows_from(self, node: Node, outputs: set[Node], interior: set[Node]) -> bool:
        """True if the node only looks at outputs of the match in another way, so that it can stay."""
        inside = [n for n in node.all_input_nodes if n in interior]
        return (
            op_name(node) in _VIEWS
            and bool(inside)
            and all(n in outputs or self._follows_from(n, outputs, interior) for n in inside)
        )


class Unifier:
    """Binds a pattern variant's parameters so that its canonical value becomes a given one."""

    def __init__(self, variant: Variant, view: View) -> None:
        self.variant = variant
        self.view = view
        self.share = 0.0
        self.size = variant.size
        self._reason: str | Callable[[], str] | bool = False
        self._done = 0

    @property
    def is_near(self) -> bool:
        """Whether the proposal that came furthest is one to tell of."""
        return bool(self._reason)

    @property
    def reason(self) -> str:
        """Why the proposal that came furthest failed."""
        return self._reason() if callable(self._reason) else self._reason

    def note(self, share: float, reason: str | Callable[[], str] | bool) -> None:
        """Keeps the reason of the failure that came furthest, False where there is nothing to tell. Text is made only
        where it is shown."""
        if share > max(self.share, NEARLY):  # a proposal that failed halfway never outranks one that was made
            self.share, self._reason = share, reason

    def _fail(self, expected: sympy.Expr, found: sympy.Expr) -> None:
        told = not found.is_number or self.variant.is_constant(expected)  # else what is expected is not there at all
        self.note(
            self._progress,
            told and (lambda: f"expected {self._expected(expected)}, found {self._found(found)}"),
        )

    def _found(self, value: sympy.Expr) -> str:
        return describe(value, self.view.terms)

    @property
    def _progress(self) -> float:
        return min(self._done / self.size, 0.99)

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
            ({number[symbol]: v for symbol, v in bound.items()}, self._done) for bound in self.unify(first, value, {})
        ]
        return found, self.share, self._reason

    def may_unify(self, p: sympy.Expr, t: sympy.Expr, done: int = 0) -> bool:
        """False where `unify`, with nothing bound, fails after so few comparisons that it is not even a near miss.

        `done` is how many have succeeded, and goes up as `_done` does. Only what is compared first is looked at.
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
            if bound[p] == t or (t.is_number and _close(bound[p], t)):
                yield bound
            else:
                self.note(self._progress, lambda: f"expected {p} = {self._found(bound[p])}, found {self._found(t)}")
        elif kind == "tensor":
            if t in self.view.nodes_of:
                yield {**bound, p: t}
            else:
                share = min(self._progress, NEARLY + 0.01)  # mostly another failure tells more
                told = not t.is_number
                self.note(share, told and (lambda: f"{p}: {self._found(t)} is no value that the model computes"))
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
                before = self.share, self._reason
                if not any(True for _ in self._counted(self.unify(p.base, t.base, bound))):
                    self.share, self._reason = before
                    self.note(self._progress, False)
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
        return "..." in (self.variant.pattern.tensors.get(str(parameter)) or "")

    def _counted(self, results: Iterator[Bindings], weight: int = 1) -> Iterator[Bindings]:
        self._done += weight
        try:
            yield from results
        finally:
            self._done -= weight

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
            solutions = [t] if p == symbol else sympy.solve(sympy.Eq(p, t), symbol)
            for solution in solutions:
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
            if self._done or want.op not in ("linear", "stack", "cat"):  # none by itself is a sign of an idiom
                count = f"{want.op}: expected {len(want.args)} operands, found {len(have.args)}"
                self.note(max(self._progress, NEARLY + 0.1), count)
            return
        attrs = want.attrs[: SIZED.get(want.op, len(want.attrs))]
        for name_value, found in zip(attrs, have.attrs, strict=False):
            extended = self._unify_attribute(name_value, found, bound)
            if extended is None:
                text = f"{want.op}: expected {_attribute(name_value)}, found {_attribute(found)}"
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
                # `sigmoid(a) * b` is no silu of a, unless one of the two is made of the other.
                related = any(self.view.terms.are_related(whole, bound[a]) for a in known)
                told = related or not all(map(self._is_activation, known))
                self.note(
                    self._progress,
                    told
                    and (
                        lambda: (
                            f"expected {', '.join(f'{a} = {self._found(bound[a])}' for a in known)}, "
                            f"found {self._found(whole)}"
                        )
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
            told = not self._is_activation(p)
            self.note(self._progress, told and (lambda: f"expected {self._expected(p)} as well"))
        for index, t in enumerate(have):
            for more in self.unify(p, t, bound):
                yield from self._assign(rest, have[:index] + have[index + 1 :], func, more)


def _is_root(value: sympy.Expr) -> bool:
    return value.is_Pow and value.exp.is_number and not value.exp.is_integer


def _unlike(a: sympy.Expr, b: sympy.Expr) -> bool:
    return a.is_number and b.is_number and not _close(a, b)


def describe(expr: sympy.Expr, terms: Terms, depth: int = 6) -> str:
    """A value as readable text. What is deeper inside is left out: written out, a value that is used twice is there
    twice, and so a graph of many layers has no end."""
    if depth == 0:
        return "..."
    names = {s: sympy.Symbol(_term_text(terms.terms[s], terms, depth)) for s in expr.free_symbols if s in terms.terms}
    text = sympy.sstr(expr.xreplace(names), full_prec=False)
    return text if len(text) <= 160 else text[:157] + "..."


def _term_text(term: Any, terms: Terms, depth: int) -> str:
    if term.op == "leaf":
        return str(term.attrs[0])
    inner = [describe(a, terms, depth - 1) for a in term.args]
    if term.op == "linear" and len(inner[0]) > 24:  # whose weight says which it is
        inner[0] = "..."
    attrs = [_attribute(a) for a in term.attrs]
    return f"{term.op}({', '.join(inner + attrs)})"


def _attribute(value: Any) -> str:
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str):
        return f"{value[0]}={_attribute(value[1])}"
    if isinstance(value, tuple):
        return f"({', '.join(_attribute(v) for v in value)})"
    if isinstance(value, ConstantStr) or hasattr(value, "symbol"):
        return str(value.symbol)
    return str(value)


@functools.lru_cache(maxsize=4096)
def _without(operands: tuple[sympy.Expr, ...], taken: tuple[sympy.Expr, ...], func: Any) -> sympy.Expr | None:
    """A product divided by others (or a sum less others), None where that is no simpler."""
    whole, part = func(*operands), func(*taken)
    rest = decimal(whole / part if func is sympy.Mul else whole - part)
    fewer = len(func.make_args(rest)) < len(func.make_args(whole))
    return rest if fewer or rest.count_ops() < max(whole.count_ops(), 1) else None


def _close(a: sympy.Expr, b: sympy.Expr) -> bool:
    if a == b or not (a.is_number and b.is_number):
        return a == b
    a, b = (float(n) if n.is_Float or n.is_Rational else complex(n) for n in (a, b))
    return abs(a - b) <= 1e-7 * max(abs(a), abs(b))


def _python_constant(value: sympy.Expr, kind: str) -> Any:
    if kind == "str":
        return str(value)
    return int(value) if kind == "int" else float(value)


def _kind(node: Node) -> tuple:
    """Dtype, device and sizes at hand: where they differ, so do the results."""
    val = node.meta["val"]
    return val.dtype, val.device, tuple(s.node.hint if isinstance(s, torch.SymInt) else s for s in val.shape)


def _is_tensor(node: Node) -> bool:
    val = node.meta.get("val")
    return isinstance(val, (torch.Tensor, tuple, list))


_VIEWS = {
    "view", "reshape", "flatten", "unflatten", "view_as", "reshape_as", "transpose", "permute", "t", "swapaxes",
    "expand", "expand_as", "broadcast_to", "unsqueeze", "squeeze", "getitem", "select", "narrow", "chunk", "split",
    "unbind", "detach", "contiguous", "to", "float", "half", "bfloat16", "double", "type", "type_as",
}  # fmt: skip
"""Operations whose result may share memory with what they are given."""


def _merge_equal_views(graph: Graph) -> None:
    """Makes one node of equal views with a dimension more: models let a table broadcast once for q and once for k, and
    an idiom has one input of each."""
    first: dict[tuple, Node] = {}
    for node in graph.nodes:
        index = node.args[1] if op_name(node) == "getitem" else ()
        broadcasts = op_name(node) == "unsqueeze" or (isinstance(index, tuple) and None in index)
        if not broadcasts or len(node.all_input_nodes) > 1:  # an index may be a tensor, which makes a copy
            continue
        other = first.setdefault((node.target, repr(node.args), repr(node.kwargs)), node)
        if other is not node:
            node.replace_all_uses_with(other)
            graph.erase_node(node)


def _change_in_place(node: Node) -> Node | None:
    """What changes the node, or a view of it, in place."""
    for user in node.users:
        if mutates(user) and (node in user.args[:1] or node in user.kwargs.values()):
            return user
        if op_name(user) in _VIEWS and (change := _change_in_place(user)):
            return change
    return None


def mutates(node: Node) -> bool:
    """Whether the node changes a tensor in place."""
    return works_in_place(op_name(node) or "", node.kwargs)


def _best(misses: dict[Node, Unifier], taken: set[Node], values: dict[Node, sympy.Expr]) -> list[NearMiss]:
    """Near misses away from any match, one for each place: of neighbouring ones the most complete."""
    kept: list[NearMiss] = []
    covered = taken | {n for n, value in values.items() if any(values.get(t) == value for t in taken)}
    for node, miss in sorted(misses.items(), key=lambda item: -item[1].share):
        pattern = miss.variant.pattern
        place = neighbourhood(node, miss.size)
        if place & covered:
            continue
        pair = len(pattern.variants[0].outputs) > 1  # its outputs alone look alike
        reason = miss.reason
        if not (pair and any(k.pattern is pattern and k.reason == reason for k in kept)):
            kept.append(NearMiss(pattern, node, reason, miss.share))
            covered |= place
    return kept


def neighbourhood(node: Node, reach: int) -> set[Node]:
    """The node and the operations up to `reach` steps before it, inputs and parameters left out."""
    seen: set[Node] = set()
    front = {node}
    for _ in range(reach + 1):
        seen |= front
        front = {i for n in front for i in n.all_input_nodes if i.op in ("call_function", "call_method")} - seen
    return seen
