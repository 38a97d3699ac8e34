"""`explain`: why a module was rewritten, or was not, and what to write so that it is."""

from __future__ import annotations

import difflib
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group
from rich.padding import Padding
from rich.text import Text
from torch import nn

from .advice import advice, opaque_advice
from .errors import LigerfxError
from .module import OptimizedModule
from .optimize import optimize
from .pattern import Pattern
from .program_code import Code
from .recognition import PatternLine, closest, lines_of
from .report import Miss, Report, Rewrite, folded_paths


@dataclass(frozen=True)
class Missed:
    """A near miss with the pattern's lines and what to write."""

    miss: Miss
    lines: list[PatternLine]
    advice: str


@dataclass(frozen=True, repr=False)
class Explanation:
    """Why a module was rewritten or not. Prints as text, and shows as HTML in a notebook.

    Attributes:
        module: its path; "" for the model.
        cls: the name of its class.
        rewrites: calls that replaced operations of this module, or of those inside it.
        missed: places in it that nearly matched.
        closest: where nothing of this matched or nearly did: patterns that share most with it, and their lines.
        opaque: why it could not be captured.
        notes: what else there is to know: whose code it runs in, or that it has none.
    """

    module: str
    cls: str
    rewrites: list[Rewrite] = field(default_factory=list)
    missed: list[Missed] = field(default_factory=list)
    closest: list[tuple[Pattern, list[PatternLine]]] = field(default_factory=list)
    opaque: str | None = None
    notes: list[str] = field(default_factory=list)

    def groups(self) -> list[tuple[Rewrite, str]]:
        """The rewrites, those of equal layers once, each with the modules in whose code it stands."""
        groups: dict[tuple, list[Rewrite]] = {}
        for rewrite in self.rewrites:
            groups.setdefault((rewrite.pattern, rewrite.source), []).append(rewrite)
        return [(group[0], folded_paths(r.module for r in group).replace("\n", ", ")) for group in groups.values()]

    def __rich__(self) -> Group:
        parts: list[Any] = [Text(f"{self.module or '(model)'}: {self.cls}", style="bold")]
        parts += [Text(note) for note in self.notes]
        for rewrite, where in self.groups():
            parts.append(Text.assemble(("rewritten", "green"), f": {rewrite.pattern}, in the code of {where}"))
            parts += [Text(f"    {source}  {line}", style="dim") for source, line in rewrite.source]
        for missed in self.missed:
            miss = missed.miss
            parts.append(Text.assemble(("nearly", "yellow"), f": {miss.pattern} at {miss.source}  {miss.line}"))
            parts += _told(missed.lines)
            parts += [Padding(Text(f"why not: {miss.reason}"), (0, 0, 0, 4))]
            parts += [Padding(Text(f"what to write: {missed.advice}"), (0, 0, 0, 4))]
        if self.opaque:
            parts.append(Text.assemble(("not captured", "red"), f": {self.opaque}"))
            parts.append(Padding(Text(f"what to do: {opaque_advice(self.opaque)}"), (0, 0, 0, 4)))
        for pattern, lines in self.closest:
            parts.append(Text.assemble(("closest pattern", "yellow"), f": {pattern.name}"))
            parts += _told(lines)
        return Group(*parts)

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=120, color_system=None, force_jupyter=False)
        console.print(self)
        return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        from .html import explanation_html

        return explanation_html(self)


def explain(model: nn.Module, module: str = "", example_inputs: Any = None, **options: Any) -> Explanation:
    """Why a module of a model was rewritten or not, and what to write so that it is.

    Args:
        model: what `optimize` returned; or any model, which is then optimised here, without being changed.
        module: path of a module in it, as "model.layers.0.mlp"; "" is the model itself.
        example_inputs: one call of it, as for `optimize`; for a model that has not been optimised.
        **options: the other arguments of `optimize`, for such a model.

    Returns:
        The explanation: prints as text, shows as a page in a notebook, and has its parts as attributes.

    Raises:
        LigerfxError: there is no such module, or `model` is a part of an optimised model.
        OptimizeError: the model cannot be optimised.

    Examples:
        >>> import torch, ligerfx
        >>> class Norm(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.weight = torch.nn.Parameter(torch.ones(64))
        ...     def forward(self, x):
        ...         return self.weight * (x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6))
        >>> explanation = ligerfx.explain(Norm(), example_inputs=torch.randn(2, 5, 64))
        >>> explanation.missed[0].miss.reason
        'mean: expected (-1), found (-2)'
    """
    gm = model if isinstance(model, OptimizedModule) else optimize(model, example_inputs, **options)
    if "report" not in vars(gm):
        raise LigerfxError("this is a part of an optimised model: pass the whole, and the path of this module in it")
    report: Report = gm.report
    named = dict(gm.named_modules())
    if module not in named:
        near = difflib.get_close_matches(module, named, n=1, cutoff=0.4)
        hint = f", did you mean {near[0]!r}?" if near else ": named_modules() lists them"
        raise LigerfxError(f"{report.model} has no module {module!r}{hint}")
    rewrites = [r for r in report.rewrites if _concerns(report, r, module)]
    missed = list(_missed(report, module))
    opaque = report.opaque.get(module)
    found = bool(rewrites or missed or opaque)
    code = report.code.get(module)
    nearest: list[tuple[Pattern, list[PatternLine]]] = []
    if not found and code is not None and code.graph is not None:
        nearest = closest(gm._ligerfx_session.patterns, code.graph, list(code.graph.nodes))[:2]
    notes = _notes(report, named[module], module, code, found, bool(nearest))
    return Explanation(module, type(named[module]).__name__, rewrites, missed, nearest, opaque, notes)


def _concerns(report: Report, rewrite: Rewrite, module: str) -> bool:
    """Whether a rewrite replaced operations of a module, of one inside it, or the call of a layer."""
    if module == "" or any(path == module or path.startswith(module + ".") for path in rewrite.reach):
        return True
    inside = rewrite.module == "" or module.startswith(rewrite.module + ".")
    call = f"self.{module[len(rewrite.module) + 1 if rewrite.module else 0 :]}("
    before = report.code[rewrite.module].before if inside else ()
    return any(line.name in rewrite.replaced and call in line.text for line in before)


def _missed(report: Report, module: str) -> Iterator[Missed]:
    told: set[tuple] = set()
    by_module: dict[str, list[Miss]] = {}
    for miss in report.near_misses:
        by_module.setdefault(miss.module, []).append(miss)
    for path, misses in by_module.items():
        code = report.code[path]
        found = lines_of(code.near_misses, code.graph)
        for miss, near, lines in zip(misses, code.near_misses, found, strict=True):
            scope = ".".join(p for p in (path, near.node.meta.get("scope", "") if near else "") if p)
            within = module == "" or any(p == module or p.startswith(module + ".") for p in (path, scope))
            key = miss.pattern, miss.source, miss.reason
            if within and key not in told:
                told.add(key)
                yield Missed(miss, lines, advice(miss))


def _notes(report: Report, module: nn.Module, path: str, code: Code | None, found: bool, nearest: bool) -> list[str]:
    notes = []
    caller = next((p for p, other in report.code.items() if _inside(path, p, other.dissolved)), None)
    if caller is not None:
        notes.append(f"Its operations stand in the code of {caller or 'the model'}, since a call reaches across both.")
    if path in report.opaque or found:
        return notes
    if code is not None:
        notes.append(
            "No pattern comes near what it computes." if not nearest else
            "No pattern matches here or nearly does. If the closest ones do what this should do, write it like them; "
            "if it does something else, a pattern of your own says so (docs/patterns.md)."
        )  # fmt: skip
    elif type(module).__module__.split(".")[0] == "torch":
        notes.append("A layer of torch, which stays one call; no rewrite reads its parameters.")
    elif not any(True for _ in module.parameters()) and not any(True for _ in module.buffers()):
        notes.append("It owns no parameters, so it has no code of its own: its operations stand in its caller's code.")
    else:
        notes.append("It was not called in the call that was captured, or is inside a module that was not captured.")
    return notes


def _inside(path: str, caller: str, dissolved: frozenset[str]) -> bool:
    prefix = caller + "." if caller else ""
    return path.startswith(prefix) and path[len(prefix) :] in dissolved


def _told(lines: list[PatternLine]) -> list[Padding]:
    """The lines of a pattern, marked + where the model has them and - where it has not."""
    signs = {True: ("+ ", "green"), False: ("- ", "red"), None: ("  ", "dim")}
    return [Padding(Text(signs[line.found][0] + line.text, signs[line.found][1]), (0, 0, 0, 4)) for line in lines]
