"""Readable names for symbolic sizes, for whoever looks at shapes."""

from __future__ import annotations

import sympy
import torch

from .symbols import expression


class SizeNames:
    """Readable names for symbolic sizes: s0, s1, ... in the order in which the inputs of a graph have them.

    Attributes:
        legend: name -> where it comes from, as {"s0": "size 0 of input_ids"}.
    """

    def __init__(self, graph: torch.fx.Graph) -> None:
        self._names: dict[sympy.Symbol, sympy.Symbol] = {}
        self.legend: dict[str, str] = {}
        for node in graph.nodes:
            if node.op == "placeholder":
                for dim, size in enumerate(getattr(node.meta.get("val"), "shape", ())):
                    expr = expression(size)
                    if expr.is_Symbol and expr not in self._names:
                        self.legend[str(self._name(expr))] = f"size {dim} of {node.name}"

    def _name(self, symbol: sympy.Symbol) -> sympy.Symbol:
        return self._names.setdefault(symbol, sympy.Symbol(f"s{len(self._names)}"))

    def shape(self, tensor: torch.Tensor) -> str:
        """The shape of a fake: "[s0, s1, 64]"."""
        sizes = [expression(size) for size in tensor.shape]
        return f"[{', '.join(str(size.xreplace({s: self._name(s) for s in size.free_symbols})) for size in sizes)}]"

    def describe(self, tensor: torch.Tensor) -> str:
        """Dtype and shape: "bfloat16 [s0, s1, 64]"."""
        return f"{str(tensor.dtype).removeprefix('torch.')} {self.shape(tensor)}"
