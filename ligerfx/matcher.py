"""Stage 2: matching. Finds where a graph computes a pattern, and why it nearly does elsewhere.

A match is proposed and then proved. Proposing compares canonical values with every cast and every size left
out, and binds the pattern's parameters. Proving traces the pattern's function on exactly the inputs that were
bound, with their dtypes and symbolic shapes, and asks that its canonical value, rounding included, be the
canonical value of the graph. Only what is proved is rewritten.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node

from .algebra import normal
from .canonical import Canonicalizer
from .dissolve import Borders
from .graph_view import View
from .matches import Match, Places, between, obstacle
from .near_misses import MISFIT, NEARLY, OBSTRUCTED, UNPROVED, NearMiss, best_near_misses
from .operations import op_name
from .pattern import Pattern, Variant, check_dimensions
from .proofs import NoProof, Proofs, difference
from .symbols import FakeInputs
from .unifier import Bindings, Unifier


class Matcher:
    """Matches patterns against one graph, or `within` a part of it: what crosses the borders of modules."""

    def __init__(self, graph: Graph, fakes: FakeInputs, within: Borders | None = None) -> None:
        self.graph = graph
        self.fakes = fakes
        self.within = within
        self.fakes.proofs = fakes.proofs or Proofs(fakes)
        _merge_equal_views(graph)
        self.places = Places(graph)
        self.view = View(graph, within=within)
        self.views = [self.view]
        if self.view.has_shared:
            self.views.append(View(graph, cut=True, within=within))
        self._kinds: dict[Node, tuple] = {}
        self._found: dict[tuple, Canonicalizer] = {}  # values as proofs see them, by what stands for the inputs
        self._looked_at: dict[tuple[Pattern, Node], Match | None] = {}
        self._further: dict[tuple, dict[sympy.Expr, list[Bindings]]] = {}  # what further outputs may be, by value
        self._tried: set[tuple] = set()  # choices of outputs and inputs that led to no match
        self._proposals: dict[tuple, tuple] = {}  # what a Unifier finds, by the pattern's form, view and value

    def find(
        self, patterns: Sequence[Pattern], refuse: Callable[[Match], str | None] | None = None
    ) -> tuple[list[Match], list[NearMiss]]:
        """Matches that do not overlap, those of more benefit or that cover more first, and the best near miss at each
        other place (of a graph searched `within` a part, where they are not asked for, only some).

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
                return matches, refused + best_near_misses(misses, taken, self.view.values)

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
                    candidates.append((-pattern.benefit, -len(match.interior), rank, -self.places.order[root], match))
                    outputs |= set(match.outputs)
                    inside |= match.interior - set(match.outputs)
        return candidates

    def _possible_roots(self, pattern: Pattern) -> list[Node]:
        """Nodes that are computed by the same operation as a pattern's first output, last ones first."""
        operations = {variant.operations[variant.search_order[0]] for variant in pattern.variants}
        found = {n for view, operation in itertools.product(self.views, operations) for n in view.nodes_by(operation)}
        return sorted(found, key=self.places.order.__getitem__, reverse=True)

    def _match_at(self, pattern: Pattern, root: Node, misses: dict[Node, Unifier]) -> Match | None:
        for variant, view in itertools.product(pattern.variants, self.views):
            value, first = view.computed[root], variant.search_order[0]
            if self._is_out_of_question(variant, first, view, value):
                continue
            unifier = Unifier(variant, view)
            form, parameters = variant.form
            if (form, view, value) not in self._proposals:  # many patterns begin alike
                self._proposals[form, view, value] = unifier.proposals(value)
            proposals, unifier.share, unifier.why = self._proposals[form, view, value]
            for numbered, unifier.done in proposals:
                bindings = {parameters[number]: bound for number, bound in numbered.items()}
                for match in self._prove(variant, {first: root}, bindings, unifier):
                    return match
            if unifier.share > NEARLY and unifier.is_near and _tells_more(unifier, misses.get(root)):
                misses[root] = unifier
        return None

    def _is_out_of_question(self, variant: Variant, output: int, view: View, value: sympy.Expr) -> bool:
        """Whether a value lacks an operation without which it is no such output, where nobody asks how near it comes:
        at the borders of modules, in graphs of several modules each. In large ones it is every other place."""
        return self.within is not None and not variant.needed[output] <= view.made_of(value)

    def _prove(self, variant: Variant, roots: dict[int, Node], bindings: Bindings, unifier: Unifier) -> Iterator[Match]:
        """The usable matches that follow from a proposal: further outputs located, inputs chosen among nodes of
        equal value, each choice proved. `roots` holds the nodes of the outputs found so far."""
        cone = self.places.cone_of(roots.values())
        missing = next((i for i in variant.search_order if i not in roots), None)
        if missing is not None and any(s not in bindings for s in variant.parameters_in(variant.outputs[missing])):
            # Several nodes may have one value, casts of it for example: here, and among those found already.
            known = variant, missing, unifier.view, frozenset(bindings.items())
            further = self._further.setdefault(known, {})
            for root in unifier.view.nodes_by(variant.operations[missing]):
                if self.places.has(cone, root):
                    continue
                value = unifier.view.computed[root]
                if self._is_out_of_question(variant, missing, unifier.view, value):
                    continue
                if value not in further:
                    further[value] = list(unifier.unify(variant.outputs[missing], value, bindings))
                for more in further[value]:
                    yield from self._prove(variant, {**roots, missing: root}, more, unifier)
            unifier.note_missing(variant.outputs[missing])
            return
        names = {s: n for n, s in variant.parameters.items()}
        constants = {}
        candidates: list[list[tuple[str, Node]]] = []
        for symbol, value in bindings.items():
            name = names[symbol]
            if variant.kinds[symbol] == "constant":
                constants[name] = _python_constant(value, variant.pattern.constants[name])
            else:
                nodes = [n for n in unifier.view.nodes_of[value] if self.places.has(cone, n)]
                candidates.append([(name, n) for n in nodes])
        if missing is None and self._is_hopeless(roots, candidates, unifier):
            return
        for choice in itertools.product(*candidates):
            inputs = dict(choice)
            attempt = variant, tuple(roots.items()), tuple(sorted(inputs.items())), tuple(constants.items())
            if attempt in self._tried:  # what is proposed in both views
                continue
            self._tried.add(attempt)
            match = None
            if missing is None:  # a proof would be in vain if this could not be used
                match = self._match(variant, inputs, constants, [roots[i] for i in sorted(roots)])
                if match.is_idle or self._is_obstructed(match, unifier, UNPROVED):
                    continue
            try:
                outputs = self._proved_outputs(variant, roots, inputs, constants)
            except NoProof as failure:
                unifier.note(failure.share, failure.reason)
                continue
            if match is None:
                match = self._match(variant, inputs, constants, outputs)
                if self._is_obstructed(match, unifier, OBSTRUCTED):
                    continue
            yield match

    def _is_hopeless(self, roots: dict[int, Node], candidates: list[list[tuple[str, Node]]], unifier: Unifier) -> bool:
        """Whether, whatever inputs are chosen, an output is used before another's input is there."""
        order, cone = self.places.order, self.places.cone_of(roots.values())
        first = (min((order[n] for _, n in nodes if n.op != "get_attr"), default=0) for nodes in candidates)
        last_input = max(first, default=0)
        for root in roots.values():
            if any(order[user] < last_input and not self.places.has(cone, user) for user in root.users):
                unifier.note(UNPROVED, f"`{root}` is used before the last input is there")
                return True
        return False

    def _match(
        self, variant: Variant, inputs: dict[str, Node], constants: dict[str, Any], outputs: list[Node]
    ) -> Match:
        interior = between(outputs, set(inputs.values()))
        interior = {n for n in interior if n.op not in ("placeholder", "get_attr") and _is_tensor(n)}
        ordered = {n: inputs[n] for n in variant.pattern.tensors if n in inputs}
        lines = [n.meta for n in sorted(interior, key=self.places.order.__getitem__) if "source" in n.meta]
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
            raise NoProof(problem, MISFIT)
        proofs = self.fakes.proofs
        symbols = proofs.symbols(inputs[name] for name in pattern.tensors if name in inputs)
        wanted = proofs.wanted(variant, tensors, constants, {name: symbols[node] for name, node in inputs.items()})
        known = tuple(symbols.items())
        if known not in self._found:
            self._found[known] = Canonicalizer(proofs.terms, symbols)
        found = self._found[known]
        outputs: list[Node] = []
        for position, (want, value) in enumerate(wanted):
            computed = [n for n in self.view.computed if n.op not in ("placeholder", "get_attr")]
            nodes = [roots[position]] if position in roots else computed
            kind = _kind(want)
            node = next((n for n in nodes if self._kind(n) == kind and normal(found.value(n)) == value), None)
            if node is None:
                root = roots.get(position, next(iter(roots.values())))
                raise NoProof(functools.partial(difference, root, want, inputs))
            outputs.append(node)
        return outputs

    def _kind(self, node: Node) -> tuple:
        if node not in self._kinds:
            self._kinds[node] = _kind(node)
        return self._kinds[node]

    def _is_obstructed(self, match: Match, unifier: Unifier, share: float) -> bool:
        """Whether the match cannot be rewritten; the unifier is told why, for a match that came so far."""
        problem = obstacle(match, self.places)
        if problem is not None:
            unifier.note(share, problem)
        return problem is not None


def _tells_more(attempt: Unifier, other: Unifier | None) -> bool:
    """Whether one attempt at a node says better than another why there is no match: that of a pattern of fewer idioms,
    since each idiom has one of its own, and then the one that got further."""
    if other is None:
        return True
    idioms, others = (len(unifier.variant.pattern.idioms) for unifier in (attempt, other))
    return attempt.share > other.share if idioms == others else idioms < others


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
