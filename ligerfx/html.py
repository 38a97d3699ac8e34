"""The report as HTML: one page, or part of a notebook. Nothing is loaded and no script runs."""

from __future__ import annotations

import functools
import html
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import jinja2
from markupsafe import Markup
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from .advice import advice, opaque_advice
from .listing import Line, folded
from .recognition import PatternLine, lines_of
from .report import TITLES, verified_text

if TYPE_CHECKING:
    from .diff import Diff
    from .explain import Explanation
    from .module_tree import Modules
    from .report import Miss, Report, Rewrite

CALL_COLOURS = 8
"""Calls of one module are told apart by so many colours, which then repeat."""


@dataclass
class Row:
    """A line of code on the page: highlighted, with the numbers of the calls that it belongs to."""

    code: Markup
    calls: list[int]
    missed: bool
    source: str = ""  # of the model's line, where it starts here
    origin: Markup = Markup()
    more: int = 0  # lines of further layers, left out


@dataclass
class Panel:
    """What is shown of one module: its calls, its near misses, its code before and after."""

    sites: list[Rewrite]
    misses: list[tuple[Miss, list[PatternLine]]]
    before: list[Row]
    after: list[Row]


@dataclass
class Entry:
    """A module in the tree, its panel and what is inside."""

    modules: Modules
    panel: Panel | None
    opaque: str | None
    reached: list[str]  # patterns of calls above that replaced operations of this module
    children: list[Entry] = field(default_factory=list)

    @property
    def is_telling(self) -> bool:
        return bool(self.panel or self.opaque or self.reached or any(child.is_telling for child in self.children))


def report_html(report: Report) -> str:
    """The report as a part of a page, with its style."""
    return _template("report.html.j2").render(
        report=report,
        titles=TITLES,
        counts=report.counts,
        tree=_entry(report, report.modules) if report.modules else None,
        saved=sum(rewrite.bytes_saved for rewrite in report.rewrites),
        verified_text=verified_text,
        advice=advice,
        featured=max(Counter(r.module for r in report.rewrites).items(), key=lambda item: item[1], default=("",))[0],
    )


def explanation_html(explanation: Explanation) -> str:
    return _template("explanation.html.j2").render(explanation=explanation, opaque_advice=opaque_advice)


def page(title: str, body: str) -> str:
    """A whole page around a part."""
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width">\n<title>{html.escape(title)}</title>\n'
        "<style>:root { color-scheme: light dark } body { margin: 0 } body > .lfx { min-height: 100vh }</style>\n"
        f"</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


@functools.cache
def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ligerfx", "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["python"] = lambda text: Markup("").join(_highlighted([text]))
    return environment.get_template(name)


def _entry(report: Report, modules: Modules) -> Entry:
    path = modules.path
    reached = [r.pattern for r in report.rewrites if path in r.reach and r.module != path]
    return Entry(
        modules,
        _panel(report, path),
        report.opaque.get(path),
        reached,
        [_entry(report, child) for child in modules.children],
    )


def _panel(report: Report, path: str) -> Panel | None:
    sites = [r for r in report.rewrites if r.module == path]
    misses = [m for m in report.near_misses if m.module == path]
    if not sites and not misses:
        return None
    code = report.code.get(path)
    if code is None:  # a report that was pickled is without code
        return Panel(sites, [(miss, []) for miss in misses], [], [])
    told = list(zip(misses, lines_of(code.near_misses, code.graph), strict=True))
    missed = {miss.node for miss in misses}
    owner: dict[str, list[int]] = {}
    for number, site in enumerate(sites):
        for name in site.replaced:
            owner.setdefault(name, []).append(number)
    calls = {name: [number] for number, site in enumerate(sites) for name in site.calls}
    for line in code.after:
        whole = line.text.partition(" = ")[2].partition("[")[0]
        if whole in calls:  # one of the results of a call
            calls.setdefault(line.name, calls[whole])
    return Panel(sites, told, list(_rows(code.before, owner, missed)), list(_rows(code.after, calls, missed)))


def _rows(lines: tuple[Line, ...], calls: dict[str, list[int]], missed: set[str]) -> Iterator[Row]:
    shown = list(folded(lines, lambda line: calls.get(line.name)))
    codes = _highlighted([line.text for line, _ in shown])
    origins = _highlighted([line.origin for line, _ in shown])
    last = ""
    for (line, more), code, origin in zip(shown, codes, origins, strict=True):
        starts = line.source not in ("", "?", last)
        last = line.source or last
        yield Row(
            code,
            [number % CALL_COLOURS for number in calls.get(line.name, ())],
            line.name in missed,
            line.source if starts else "",
            origin if starts else Markup(),
            more,
        )


def _highlighted(lines: list[str]) -> list[Markup]:
    """Each line as HTML, with the classes of Pygments."""
    if not lines:
        return []
    text = highlight("\n".join(lines), PythonLexer(stripnl=False, ensurenl=False), HtmlFormatter(nowrap=True))
    return [Markup(line) for line in text.split("\n")][: len(lines)]


def diff_html(diff: Diff) -> str:
    return _template("diff.html.j2").render(lines=diff.text.splitlines())
