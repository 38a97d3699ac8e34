"""The module tree of a model as data, neighbours that are alike folded into one entry."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import nn

from .capture import join


@dataclass(frozen=True)
class Modules:
    """One module, or several that follow each other and are alike: same class, same graph, same modules inside.

    Attributes:
        path: of the first of them.
        name: in its parent: "mlp", or "0-31" for several.
        cls: the name of the class.
        count: how many there are.
        inside: whether the call of this module was dissolved into the code of one above.
        children: the modules inside (of the first).
    """

    path: str
    name: str
    cls: str
    count: int = 1
    inside: bool = False
    children: tuple[Modules, ...] = ()

    def walk(self) -> Iterator[Modules]:
        """This entry and all below."""
        yield self
        for child in self.children:
            yield from child.walk()


def module_tree(root: nn.Module, programs: Mapping[str, int], opaque: Mapping[str, str], inside: set[str]) -> Modules:
    """The tree of `root`. Modules are alike only if `programs` and `opaque` say the same of both."""

    def build(module: nn.Module, path: str, name: str) -> tuple[Modules, tuple]:
        children: list[Modules] = []
        last: tuple | None = None
        signatures = []
        for child_name, child in module._modules.items():
            if child is None:
                continue
            entry, signature = build(child, join(path, child_name), child_name)
            signatures.append((child_name, signature))
            if signature == last and _follows(children[-1], child_name):
                before = children[-1]
                first = before.name.split("-")[0]
                children[-1] = replace(before, name=f"{first}-{child_name}", count=before.count + 1)
            else:
                children.append(entry)
            last = signature
        cls = type(module).__name__
        entry = Modules(path, name or "(model)", cls, inside=path in inside, children=tuple(children))
        return entry, (cls, programs.get(path), opaque.get(path), path in inside, tuple(signatures))

    return build(root, "", "")[0]


def _follows(entry: Modules, name: str) -> bool:
    """Whether a child of this name is the next of a list that `entry` is a part of."""
    last = entry.name.split("-")[-1]
    return last.isdigit() and name.isdigit() and int(name) == int(last) + 1
