"""The report: what was rewritten, what nearly matched and why not, what stayed opaque."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import sympy
import torch
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from .capture import join
from .symbols import expression

if TYPE_CHECKING:
    from .matcher import Match
    from .module import OptimizedModule, Program
    from .numerics import Verified

_TITLES = {
    "rms_norm": "RMSNorm",
    "rope": "RoPE",
    "glu": "GLU",
    "linear_cross_entropy": "logits + loss",
    "cross_entropy": "loss",
}


@dataclass(frozen=True)
class Rewrite:
    """One place where a kernel replaced the model's own operations."""

    pattern: str
    module: str  # path, "" for the model itself
    idioms: tuple[str, ...]
    source: tuple[tuple[str, str], ...]  # the replaced lines: (file:line, text)
    bytes_saved: int  # a token: intermediate results that are no longer written
    verified: Verified | None = None  # with `optimize(verify=True)`: how far it is from the original


@dataclass(frozen=True)
class Miss:
    """One place that looks like a pattern and was left alone."""

    pattern: str
    module: str
    idioms: tuple[str, ...]
    source: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What `optimize` did to a model. `print(report)` shows tables.

    Attributes:
        rewrites: every rewrite, by module.
        near_misses: places that were nearly rewritten, with the reason.
        opaque: module path -> why it could not be captured; these run as they are.
    """

    model: str
    rewrites: list[Rewrite] = field(default_factory=list)
    near_misses: list[Miss] = field(default_factory=list)
    opaque: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def of(model: OptimizedModule, opaque: dict[str, str], programs: dict[str, Program]) -> Report:
        elsewhere = inside_callers(programs)
        programs = {path: program for path, program in programs.items() if path not in elsewhere}
        rewrites = [
            Rewrite(m.pattern.name, path, m.pattern.idioms, m.source, bytes_saved(m), m.verified)
            for path, program in programs.items()
            for m in program.matches
        ]
        misses = [
            Miss(n.pattern.name, path, n.pattern.idioms, n.source, n.reason)
            for path, program in programs.items()
            for n in program.near_misses
        ]
        return Report(type(model).__name__, rewrites, misses, opaque)

    @property
    def idioms(self) -> dict[str, int]:
        """How many basic idioms were rewritten; a kernel that covers several counts for each."""
        counts = Counter(idiom for rewrite in self.rewrites for idiom in rewrite.idioms)
        return dict(counts.most_common())

    @property
    def summary(self) -> str:
        """One line: "65/65 RMSNorm, 32/32 RoPE, ..."."""
        missed = Counter(idiom for miss in self.near_misses for idiom in miss.idioms)
        found = Counter(self.idioms)
        parts = [f"{found[i]}/{found[i] + missed[i]} {_TITLES.get(i, i)}" for i in [*found, *(missed - found)]]
        return ", ".join(dict.fromkeys(parts)) or "nothing rewritten"

    def __rich__(self) -> Group:
        parts: list = [Text(f"{self.model}: {self.summary}", style="bold")]
        if self.rewrites:
            columns = ["pattern", "sites", "modules", "replaces", "saved / token"]
            verified = any(rewrite.verified for rewrite in self.rewrites)
            columns += ["difference"] * verified
            table = Table(*columns, title="rewrites", title_justify="left")
            for pattern, sites in _grouped(self.rewrites):
                lines = {source: None for site in sites for source, _ in site.source}
                saved = sum(site.bytes_saved for site in sites)
                cells = [pattern, str(len(sites)), _folded(s.module for s in sites), _span(lines), f"{saved:,} B"]
                cells += [_differences(sites)] * verified
                table.add_row(*cells)
            parts.append(table)
        if self.near_misses:
            table = Table("pattern", "modules", "at", "why not", title="near misses", title_justify="left")
            groups: dict[tuple, list[str]] = {}
            for miss in self.near_misses:
                groups.setdefault((miss.pattern, miss.source, miss.reason), []).append(miss.module)
            for (pattern, source, reason), modules in groups.items():
                table.add_row(pattern, _folded(modules), Text(source), Text(reason))
            parts.append(table)
        if self.opaque:
            table = Table("module", "why it stays as it is", title="opaque modules", title_justify="left")
            groups = {}
            for path, reason in self.opaque.items():
                groups.setdefault((reason,), []).append(path)
            for (reason,), modules in groups.items():
                table.add_row(_folded(modules), Text(reason))
            parts.append(table)
        return Group(*parts)

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=120, color_system=None)
        console.print(self)
        return console.file.getvalue().rstrip()


def inside_callers(programs: dict[str, Program]) -> set[str]:
    """The modules whose calls were dissolved into their callers, and run there."""
    return {join(path, inner) for path, program in programs.items() for inner in program.dissolved}


def bytes_saved(match: Match) -> int:
    """Bytes a token of the intermediate results inside a match."""
    total = sympy.Integer(0)
    for node in match.interior - set(match.outputs):
        val = node.meta["val"]
        if isinstance(val, torch.Tensor) and val.is_floating_point():
            total += sympy.Mul(*(expression(s) for s in val.shape)) * val.element_size()
    return int(total.subs(dict.fromkeys(total.free_symbols, 1)))


def _grouped(rewrites: list[Rewrite]) -> Iterator[tuple[str, list[Rewrite]]]:
    groups: dict[str, list[Rewrite]] = {}
    for rewrite in rewrites:
        groups.setdefault(rewrite.pattern, []).append(rewrite)
    yield from groups.items()


def _differences(sites: list[Rewrite]) -> str:
    """The largest differences that were found, as a share of the largest value."""
    found = [site.verified for site in sites if site.verified]
    lines = list(dict.fromkeys(v.problem for v in found if v.problem))
    for name in ("forward", "gradient"):
        values = [value for v in found if (value := getattr(v, name)) is not None]
        lines += [f"{name} {max(values):.1e}"] if values else []
    return "\n".join(lines)


def _folded(modules) -> str:
    """Module paths with layer numbers folded: `model.layers.*.mlp`."""
    folded = (re.sub(r"(?<=\.)\d+", "*", module) or "(model)" for module in modules)
    return "\n".join(f"{name} x{n}" if n > 1 else name for name, n in Counter(folded).items())


def _span(lines) -> str:
    """`modeling_x.py:56-60` for the source lines of a rewrite."""
    by_file: dict[str, list[int]] = {}
    for line in lines:
        file, _, number = line.rpartition(":")
        by_file.setdefault(file, []).append(int(number) if number.isdigit() else 0)
    return "\n".join(f"{f}:{min(n)}" + (f"-{max(n)}" if len(set(n)) > 1 else "") for f, n in by_file.items())
