"""Symbolic sizes: fake inputs whose sizes are sympy symbols, and graph nodes made from size expressions."""

from __future__ import annotations

import contextlib
import functools
import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import sympy
import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import Source
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._mode_utils import no_dispatch
from torch.utils._sympy.functions import FloorDiv, Mod

from .errors import CaptureError
from .sharded import Whole
from .size_nodes import TRIED, SizeNode

Layout = tuple[tuple[sympy.Expr, ...], tuple[sympy.Expr, ...] | None, torch.dtype]
"""Sizes, strides (None: contiguous) and dtype of a tensor."""

_LARGE = 2**50
"""Bytes of memory that a fake is said to have: as much as any view of it needs."""


@dataclass(frozen=True)
class SizeSource(Source):
    """Names the input size that a symbol stands for."""

    label: str

    @property
    def name(self) -> str:
        return self.label

    @property
    def _name_template(self) -> str:
        return self.label


class _Sizes(ShapeEnv):
    """Symbolic sizes that stay symbols.

    Python code that needs one as a number runs a loop, say, whose graph would serve a single size: that is an error,
    and the module stays as it is. With `guessing`, questions are answered for the sizes at hand and leave no guard: for
    code whose graph is not wanted, and which has to go on.
    """

    guessing = False
    counting = False  # an operation asks how many pieces it gives: that may become a guard

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.numbers: dict[Any, Any] = {}  # see `SizeNode`

    def evaluate_sym_node(self, sym_node: Any, *args: Any, **kwargs: Any) -> Any:
        if self._suppress_guards_tls():
            if (hint := sym_node.hint) is not None:  # torch would first try to show that it is so for all sizes
                return sympy.sympify(hint)
        elif not sym_node.expr.is_number:
            if self.guessing:
                return sympy.sympify(self._guess(sym_node.expr) if sym_node.hint is None else sym_node.hint)
            if sym_node.pytype is int and not (self.counting and not sym_node.expr.is_symbol):
                raise CaptureError(
                    f"its Python code needs the size {sym_node.expr} as a number, to loop over it perhaps"
                )
        return super().evaluate_sym_node(sym_node, *args, **kwargs)

    def create_symintnode(self, sym: sympy.Expr, *, hint: Any, source: Any = None) -> torch.SymInt | int:
        size = super().create_symintnode(sym, hint=hint, source=source)
        if TRIED and isinstance(size, torch.SymInt):
            SizeNode.of(size.node)
        return size

    def _get_user_frame(self) -> FrameType:
        """Whose line asks for a size or a guard: nobody reads it here, and to find it torch imports its exporter."""
        return sys._getframe()

    def _guess(self, size: sympy.Basic) -> sympy.Basic:
        """A size, or what is asked about it, with a number for each size that the data tell."""
        known = self.backed_var_to_val
        return size.xreplace({symbol: known.get(symbol, sympy.Integer(UNKNOWN)) for symbol in size.free_symbols})


UNKNOWN = 11
"""Stands for a size that depends on the data, where somebody asks: the answer is a guard that no call can meet."""


class FakeInputs:
    """Makes fake tensors whose sizes are symbols. Equal sizes get the same symbol, as torch.compile does.

    Sizes 0 and 1 are ordinary sizes, so a capture made with batch 2 serves batch 1.
    """

    def __init__(self, mode: FakeTensorMode | None = None) -> None:
        if mode is None:
            mode = FakeTensorMode(
                shape_env=_Sizes(specialize_zero_one=False, duck_shape=True), allow_non_fake_inputs=True
            )
            mode.cache_enabled = False  # each op runs once or twice: filling the cache costs more than it saves
        self.mode, self.shape_env = mode, mode.shape_env
        self.proofs: Any = None  # what patterns compute on inputs like these, which many places share
        self.results: dict[Any, Any] = {}  # of operations on fakes like these; see `shapes`
        self._sizes: dict[int, torch.SymInt] = {}
        self._layouts: dict[Layout, torch.Tensor] = {}

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """While active, operations on the fakes (and tensor factories) give fakes.

        The Python dispatcher is on as well: some of torch's C++ compositions cannot count symbolic sizes.
        """
        with self.mode, enable_python_dispatcher():
            yield

    def size(self, hint: int) -> torch.SymInt:
        """The symbol for an input size whose value is `hint`."""
        if hint not in self._sizes:
            self._sizes[hint] = self._new_size(hint, f"size_{hint}")
        return self._sizes[hint]

    def knows_sizes(self, fake: torch.Tensor) -> bool:
        """Whether no size depends on the data (as the number of elements that are not zero does)."""
        return all(map(self.knows_size, fake.shape))

    def knows_size(self, size: int | torch.SymInt) -> bool:
        return all(symbol in self.shape_env.backed_var_to_val for symbol in expression(size).free_symbols)

    def is_measured(self, value: Any) -> bool:
        """Whether a size of a tensor does not follow from those of the inputs."""
        return not symbols_of(value) <= {symbol for size in self._sizes.values() for symbol in symbols_of(size)}

    def _new_size(self, hint: int, name: str) -> torch.SymInt:
        source = SizeSource(name)
        symbol = self.shape_env.create_symbol(hint, source, DimDynamic.DYNAMIC, constraint_dim=None)
        return self.shape_env.create_symintnode(symbol, hint=hint, source=source)

    def of_expression(self, size: sympy.Expr | int) -> torch.SymInt | int:
        """The size that an expression over the symbols stands for."""
        if isinstance(size, int) or size.is_Integer:
            return int(size)
        hint = int(size.xreplace(self.shape_env.backed_var_to_val))
        return self.shape_env.create_symintnode(size, hint=hint)

    def own_size(self, size: int | torch.SymInt) -> torch.SymInt:
        """A symbol that no other size is equal to, for a number, or for a size that depends on the data."""
        hint = size if type(size) is int else UNKNOWN
        return self._new_size(hint, f"own_size_{len(self.shape_env.backed_var_to_val)}")

    def tensor(self, value: torch.Tensor, static_rows: bool = False) -> torch.Tensor:
        """A fake of `value`: sizes become symbols, except the width of hidden states (the last of three or
        more dimensions of a floating-point tensor), which belongs to the model and not to the batch. With
        `static_rows`, so does the last of two, unless an input has a size like it."""
        static_width = value.is_floating_point() and value.ndim >= 3
        if static_rows and value.is_floating_point() and value.ndim == 2:
            static_width = value.shape[-1] not in self._sizes
        sizes = [
            int(size) if static_width and dim == value.ndim - 1 else self.size(int(size))
            for dim, size in enumerate(value.shape)
        ]
        with self.mode:
            return torch.empty(sizes, dtype=value.dtype, device=value.device)

    def of_layout(
        self, sizes: Sequence[int | torch.SymInt], strides: Sequence[int | torch.SymInt] | None, dtype: torch.dtype,
        device: torch.device,
    ) -> torch.Tensor:  # fmt: skip
        """A new fake; without strides a contiguous one.

        torch takes 0.4 ms to make a tensor with symbolic sizes: that is done once for each layout, of which the fakes
        are copies with a memory of their own.
        """
        if not TRIED:
            with self.mode, self.shape_env.suppress_guards():
                return _empty(sizes, strides, dtype, device)
        layout = tuple(map(expression, sizes)), strides and tuple(map(expression, strides)), dtype
        with no_dispatch():
            if layout not in self._layouts:
                with self.shape_env.suppress_guards():
                    self._layouts[layout] = _empty(sizes, strides, dtype, "meta")
            copy = self._layouts[layout].detach()
            torch._functionalize_unsafe_set(copy, torch.empty(_LARGE, dtype=torch.uint8, device="meta"))
            return FakeTensor(self.mode, copy, device)

    def like(self, value: torch.Tensor) -> torch.Tensor:
        """A new fake with the sizes, strides, dtype and device of another."""
        return self.of_layout(value.shape, value.stride(), value.dtype, value.device)

    def parameter(self, value: torch.Tensor | Whole, device: torch.device | None = None) -> torch.Tensor:
        """A fake of a parameter or buffer, with its own static sizes. One on the meta device, in a call on another
        `device`, is offloaded: a hook will bring it there.

        It requires no gradient: capture must save nothing for a backward, since it may run inside a region
        whose saved tensors are counted (gradient checkpointing).
        """
        if isinstance(value, Whole):
            with self.mode:
                return torch.empty(value.shape, dtype=value.dtype, device=value.device)
        if value.is_meta and device is not None and device.type != "meta":
            with self.mode:
                return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
        fake = self.mode.from_tensor(value, static_shapes=True)
        return fake.requires_grad_(False) if fake.is_leaf else fake.detach()


def _empty(sizes: Sequence, strides: Sequence | None, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    if strides is None:
        return torch.empty(sizes, dtype=dtype, device=device)
    return torch.empty_strided(sizes, strides, dtype=dtype, device=device)


def expression(size: int | torch.SymInt) -> sympy.Expr:
    """The sympy expression of a size."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def first_expression(size: int | torch.SymInt) -> sympy.Expr:
    """The expression of a size as it was at first: a guard may have made a number of it, or another size."""
    return size.node._expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def symbols_of(value: Any) -> set[sympy.Symbol]:
    """The symbols in the sizes of a tensor, or in a size."""
    sizes = value.shape if isinstance(value, torch.Tensor) else [value] if isinstance(value, torch.SymInt) else []
    return {symbol for size in sizes for symbol in first_expression(size).free_symbols}


_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    sympy.Add: operator.add,
    sympy.Mul: operator.mul,
    FloorDiv: operator.floordiv,
    Mod: operator.mod,
    sympy.Pow: operator.pow,
}


def bind_sizes(
    tensor: torch.Tensor, node: torch.fx.Node | Callable[[], torch.fx.Node], known: dict[sympy.Expr, Any]
) -> None:
    """Lets `size_node` take the sizes of `tensor`, for which `node` stands, that `known` does not have yet."""

    def measured(dim: int) -> torch.fx.Node:
        found = node if isinstance(node, torch.fx.Node) else node()
        return found.graph.call_method("size", (found, dim))

    for dim, size in enumerate(tensor.shape):
        expr = expression(size)
        if not expr.is_Integer:
            known.setdefault(expr, functools.partial(measured, dim))


def size_node(expr: sympy.Expr, graph: torch.fx.Graph, known: dict[sympy.Expr, Any]) -> Any:
    """A node (or an int) that computes `expr` from the sizes in `known`, which it extends.

    `known` maps expressions to nodes, or to functions that make the node on first use.
    Raises CaptureError for an expression over sizes that no placeholder of this graph has.
    """
    if expr.is_Integer:
        return int(expr)
    if expr in known:
        entry = known[expr]
        if not isinstance(entry, torch.fx.Node):
            entry = known[expr] = entry()
        return entry
    if (whole := _by_a_known_part(expr, graph, known)) is not None:
        known[expr] = whole
        return whole
    if type(expr) not in _OPERATORS:
        raise CaptureError(f"the size {expr} does not follow from the sizes of the inputs")
    first, *rest = expr.args
    result = size_node(first, graph, known)
    for arg in rest:
        value = size_node(arg, graph, known)
        result = graph.call_function(_OPERATORS[type(expr)], (result, value))
    known[expr] = result
    return result


def _by_a_known_part(expr: sympy.Expr, graph: torch.fx.Graph, known: dict[sympy.Expr, Any]) -> torch.fx.Node | None:
    """`expr` by way of a size in `known` that is itself a product or a sum, where its own symbols are not known: of
    flattened rows [B * S, H], no more than B * S."""
    if expr.free_symbols <= known.keys():
        return None
    for part in [k for k in known if not k.is_Symbol and not k.is_Integer]:
        name = sympy.Dummy(integer=True)
        rest = expr.subs(part, name)
        if name in rest.free_symbols and rest.free_symbols - {name} <= known.keys():
            return size_node(rest, graph, {**known, name: size_node(part, graph, known)})
    return None
