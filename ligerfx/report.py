"""The report: what was rewritten, what nearly matched and why not, what stayed opaque."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from .capture import join
from .cost import Cost
from .module_tree import Modules, module_tree
from .program_code import Code
from .size_names import SizeNames

if TYPE_CHECKING:
    from .matches import Match
    from .module import OptimizedModule, Program
    from .numerics import Verified

TITLES = {
    "rms_norm": "RMSNorm",
    "layer_norm": "LayerNorm",
    "rope": "RoPE",
    "glu": "GLU",
    "linear_cross_entropy": "logits + loss",
    "cross_entropy": "loss",
}


@dataclass(frozen=True)
class Rewrite:
    """One place where a kernel replaced the model's own operations.

    Attributes:
        pattern: the name of the pattern.
        module: path of the module in whose code the call stands; "" is the model itself.
        idioms: the basic idioms that the call covers.
        source: the replaced lines of the model: (file:line, text).
        bytes_saved: a token: intermediate results that are no longer written.
        reach: paths of the modules whose operations were replaced: `module`, and those dissolved into it.
        inputs: parameter of the pattern -> dtype and shape, as "bfloat16 [B, S, 64]".
        constants: what the match captured.
        calls: names of the calls in the module's code.
        replaced: names of what they replaced in the code before.
        cost: what the replaced code cost and what its replacement costs, a token.
        verified: how far it is from the original on random inputs, where `optimize` was asked to compare them.
    """

    pattern: str
    module: str
    idioms: tuple[str, ...]
    source: tuple[tuple[str, str], ...]
    bytes_saved: int
    reach: tuple[str, ...] = ()
    inputs: dict[str, str] = field(default_factory=dict, hash=False)
    constants: dict[str, Any] = field(default_factory=dict, hash=False)
    calls: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    cost: Cost = Cost()
    verified: Verified | None = None


@dataclass(frozen=True)
class Miss:
    """One place that looks like a pattern and was left alone.

    Attributes:
        pattern, module, idioms: as for a `Rewrite`.
        source: `file:line` of the model's code.
        reason: what stopped the pattern.
        line: the text at `source`.
        node: the name of the value in the module's code.
        share: how much of the pattern was recognised; 1 and more if all of it was, and it could not be used.
    """

    pattern: str
    module: str
    idioms: tuple[str, ...]
    source: str
    reason: str
    line: str = ""
    node: str = ""
    share: float = 0.0

    @property
    def difference(self) -> tuple[str, str] | None:
        """What the pattern has and what the model has, where the reason is a difference between them."""
        found = re.fullmatch(r"(?s)(.*?)\bexpected (.*), found (.*)", self.reason)
        if found is None:
            return None
        prefix = found[1] if found[1].endswith(": ") and len(found[1]) < 40 else ""
        return prefix + found[2], prefix + found[3]


@dataclass(frozen=True, repr=False)
class Report:
    """What `optimize` did to a model. `print(report)` shows tables; in a notebook it shows itself as a page.

    Attributes:
        rewrites: every rewrite, by module.
        near_misses: places that were nearly rewritten, with the reason.
        opaque: module path -> why it could not be captured; these run as they are.
        modules: the module tree, identical neighbours folded.
        sizes: the symbols in shapes -> where they come from, as {"B": "size 0 of input_ids"}.
        code: module path -> its code before and after; of a report that was pickled, none.

    Examples:
        >>> import torch, ligerfx
        >>> block = torch.nn.Sequential(torch.nn.RMSNorm(64, eps=1e-6), torch.nn.Linear(64, 64))
        >>> report = ligerfx.optimize(block, torch.randn(2, 5, 64)).report
        >>> print(report.summary)
        1/1 RMSNorm
        >>> report.rewrites[0].inputs["x"]
        'float32 [s0, s1, 64]'
    """

    model: str
    rewrites: list[Rewrite] = field(default_factory=list)
    near_misses: list[Miss] = field(default_factory=list)
    opaque: dict[str, str] = field(default_factory=dict)
    modules: Modules | None = None
    sizes: dict[str, str] = field(default_factory=dict)
    code: dict[str, Code] = field(default_factory=dict, compare=False)

    def __deepcopy__(self, memo: dict) -> Report:
        return self  # nothing in it changes

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"code": {}}  # the graphs stay with the process

    @staticmethod
    def of(model: OptimizedModule, opaque: dict[str, str], programs: dict[str, Program]) -> Report:
        # A module whose calls were dissolved into its caller runs there.
        elsewhere = inside_callers(programs)
        running = {path: program for path, program in programs.items() if path not in elsewhere}
        sizes = SizeNames(programs[""].capture.graph)
        told: dict[int, dict] = {}  # of a match that twins share
        rewrites = []
        misses = []
        for path, program in running.items():
            for match, cost in zip(program.matches, program.costs, strict=True):
                if id(match) not in told:
                    told[id(match)] = _details(match, sizes) | {
                        "bytes_saved": cost.written_before - cost.written_after,
                        "cost": cost,
                    }
                reach = tuple(sorted(join(path, inner) for inner in match.reach))
                named = {"pattern": match.pattern.name, "module": path, "idioms": match.pattern.idioms}
                rewrites.append(Rewrite(**named, source=match.source, reach=reach, **told[id(match)]))
            for miss in program.near_misses:
                line = miss.node.meta.get("line", "")
                details = miss.source, miss.reason, line, miss.node.name, miss.share
                misses.append(Miss(miss.pattern.name, path, miss.pattern.idioms, *details))
        modules = module_tree(model, {path: id(program) for path, program in programs.items()}, opaque, elsewhere)
        codes = {id(program): Code.of(program) for program in programs.values()}
        code = {path: codes[id(program)] for path, program in programs.items()}
        return Report(type(model).__name__, rewrites, misses, opaque, modules, sizes.legend, code)

    @property
    def idioms(self) -> dict[str, int]:
        """How many basic idioms were rewritten; a kernel that covers several counts for each."""
        counts = Counter(idiom for rewrite in self.rewrites for idiom in rewrite.idioms)
        known = list(TITLES)
        return dict(sorted(counts.items(), key=lambda c: (-c[1], known.index(c[0]) if c[0] in known else len(known))))

    @property
    def counts(self) -> list[tuple[str, int, int]]:
        """For each idiom its name, how often it was rewritten, and how often it was found or nearly found."""
        missed = Counter(idiom for miss in self.near_misses for idiom in miss.idioms)
        found = Counter(self.idioms)
        counts = [(TITLES.get(i, i), found[i], found[i] + missed[i]) for i in [*found, *(missed - found)]]
        return list(dict.fromkeys(counts))

    @property
    def summary(self) -> str:
        """One line: "65/65 RMSNorm, 32/32 RoPE, ..."."""
        return ", ".join(f"{n}/{total} {title}" for title, n, total in self.counts) or "nothing rewritten"

    @property
    def cost(self) -> Cost:
        """What all replaced code together cost for a token, and what its replacements do; `report.cost * tokens` for a
        batch.

        Examples:
            >>> import torch, ligerfx
            >>> class Gate(torch.nn.Module):
            ...     def forward(self, gate, up):
            ...         return torch.nn.functional.silu(gate) * up
            >>> report = ligerfx.optimize(Gate(), (torch.zeros(2, 5, 64), torch.zeros(2, 5, 64))).report
            >>> report.cost.moved_before, report.cost.moved_after  # five rows of 64 float32 numbers, and three
            (1280, 768)
        """
        return sum((rewrite.cost for rewrite in self.rewrites), Cost())

    def __rich__(self) -> Group:
        parts: list = [Text(f"{self.model}: {self.summary}", style="bold")]
        if self.rewrites:
            verified = any(rewrite.verified for rewrite in self.rewrites)
            columns = ["pattern", "sites", "modules", "replaces", "saved / token", *(["verified"] if verified else [])]
            table = _table("rewrites", *columns)
            for pattern, sites in _grouped(self.rewrites):
                lines = {source: None for site in sites for source, _ in site.source}
                saved = sum(site.bytes_saved for site in sites)
                row = [pattern, str(len(sites)), folded_paths(s.module for s in sites), span(lines), f"{saved:,} B"]
                if verified:
                    row.append("\n".join(dict.fromkeys(verified_text(site) for site in sites)))
                table.add_row(*row)
            parts.append(table)
        if self.near_misses:
            table = _table("near misses", "pattern", "modules", "at", "why not")
            groups: dict[tuple, list[str]] = {}
            for miss in self.near_misses:
                groups.setdefault((miss.pattern, miss.source, miss.reason), []).append(miss.module)
            for (pattern, source, reason), modules in groups.items():
                table.add_row(pattern, folded_paths(modules), Text(source), _coloured(reason))
            parts.append(table)
        if self.opaque:
            table = _table("opaque modules", "module", "why it stays as it is")
            groups = {}
            for path, reason in self.opaque.items():
                groups.setdefault((reason,), []).append(path)
            for (reason,), modules in groups.items():
                table.add_row(folded_paths(modules), Text(reason))
            parts.append(table)
        return Group(*parts)

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=120, color_system=None, force_jupyter=False)
        console.print(self)
        return console.file.getvalue().rstrip()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        from .html import report_html  # what a plain report does not need

        return report_html(self)

    def to_html(self, path: str | Path | None = None) -> str:
        """The report as one HTML page that needs nothing else; written to `path` as well, if there is one.

        Examples:
            >>> import torch, ligerfx
            >>> page = ligerfx.optimize(torch.nn.RMSNorm(64), torch.randn(2, 64)).report.to_html()
            >>> page.startswith("<!doctype html>"), "http" in page
            (True, False)
        """
        from .html import page

        text = page(f"ligerfx: {self.model}", self._repr_html_())
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dicts, lists, strings and numbers."""
        return {
            "model": self.model,
            "summary": self.summary,
            "idioms": self.idioms,
            "sizes": self.sizes,
            "rewrites": [asdict(rewrite) for rewrite in self.rewrites],
            "near_misses": [
                asdict(miss) | dict(zip(("expected", "found"), miss.difference or (None, None), strict=True))
                for miss in self.near_misses
            ],
            "opaque": self.opaque,
        }

    def to_json(self, path: str | Path | None = None) -> str:
        """`to_dict` as JSON; written to `path` as well, if there is one.

        Examples:
            >>> import json, torch, ligerfx
            >>> report = ligerfx.optimize(torch.nn.RMSNorm(64), torch.randn(2, 64)).report
            >>> json.loads(report.to_json())["idioms"]
            {'rms_norm': 1}
        """
        text = json.dumps(self.to_dict(), indent=1, default=str)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text


def inside_callers(programs: dict[str, Program]) -> set[str]:
    """The modules whose calls were dissolved into their callers, and run there."""
    return {join(path, inner) for path, program in programs.items() for inner in program.dissolved}


def _details(match: Match, sizes: SizeNames) -> dict[str, Any]:
    return {
        "inputs": {name: sizes.describe(node.meta["val"]) for name, node in match.inputs.items()},
        "constants": dict(match.constants),
        "calls": tuple(node.name for node in match.calls),
        "replaced": tuple(sorted(node.name for node in match.interior)),
        "verified": match.verified,
    }


def verified_text(rewrite: Rewrite) -> str:
    """The differences of a rewrite that was compared with the original, on one line."""
    if rewrite.verified is None:
        return ""
    return rewrite.verified.problem or ", ".join(
        f"{name} {value:.1e}"
        for name in ("forward", "gradient")
        if (value := getattr(rewrite.verified, name)) is not None
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")  # names that are cut are no names
    return table


def _coloured(reason: str) -> Text:
    """A reason with what was expected in green and what was found in red."""
    text = Text(reason)
    if found := re.search(r"(?s)\bexpected (.*), found (.*)", reason):
        text.stylize("green", *found.span(1))
        text.stylize("red", *found.span(2))
    return text


def _grouped(rewrites: list[Rewrite]) -> Iterator[tuple[str, list[Rewrite]]]:
    groups: dict[str, list[Rewrite]] = {}
    for rewrite in rewrites:
        groups.setdefault(rewrite.pattern, []).append(rewrite)
    yield from groups.items()


def folded_paths(modules: Iterable[str]) -> str:
    """Module paths with layer numbers folded: `model.layers.*.mlp`."""
    folded: dict[str, list[str]] = {}
    for module in modules:
        folded.setdefault(re.sub(r"(?<=\.)\d+", "*", module), []).append(module)
    return "\n".join(f"{name} x{len(m)}" if len(m) > 1 else m[0] or "(model)" for name, m in folded.items())


def span(lines: Iterable[str]) -> str:
    """`modeling_x.py:56-60` for the source lines of a rewrite."""
    by_file: dict[str, list[int]] = {}
    for line in lines:
        file, _, number = line.rpartition(":")
        by_file.setdefault(file, []).append(int(number) if number.isdigit() else 0)
    return "\n".join(f"{f}:{min(n)}" + (f"-{max(n)}" if len(set(n)) > 1 else "") for f, n in by_file.items())
