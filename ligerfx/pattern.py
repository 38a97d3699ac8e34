"""Patterns: idioms written as plain PyTorch functions.

    @pattern(replace=kernels.rms_norm)
    def rms_norm(x: "... H", weight: "H", *, eps: float):
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
        return weight * h.to(x.dtype)

One function is what is searched for, the reference, and the proof of every match. Positional parameters are
tensors; the annotation names their dimensions ("..." for any number of leading ones, "*" for any size, "2I" for
twice the size I, "int" or "complex" first for a tensor of such numbers), and equal names must be equal sizes.
Keyword-only parameters are constants that the match captures. A parameter with default None is optional: the idiom is
searched for with it and without.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node

from .algebra import constant
from .canonical import Canonicalizer
from .errors import PatternError
from .recorder import Recorder
from .source import describe_error
from .terms import SIZED, Terms

KINDS = {"int": torch.int64, "complex": torch.complex64}
"""What a dimension string may begin with, where the tensor is not of floating-point numbers."""

_EXAMPLES: dict[str, Any] = {"float": 0.4375, "int": -100, "str": "mean"}


@dataclass(eq=False)
class Pattern:
    """An idiom and what replaces it. Made by `pattern`."""

    function: Callable
    replace: Callable | tuple[Callable, ...]
    idioms: tuple[str, ...]
    when: Callable[..., str | None] | None = None
    forks: str | None = None
    early: dict[str, Callable] = field(default_factory=dict)
    inside: Callable | None = None
    benefit: float = 0
    example: dict[str, Any] = field(default_factory=dict)  # dimension or constant -> a value that suits the pattern
    tensors: dict[str, str | None] = field(default_factory=dict)  # name -> dimensions
    constants: dict[str, str] = field(default_factory=dict)  # name -> type name
    optional: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        return self.function.__name__

    @functools.cached_property
    def variants(self) -> list[Variant]:
        """The canonical forms to search for, one for each choice of optional parameters, largest first."""
        choices = itertools.product(*([True, False] for _ in self.optional))
        present = [dict(zip(sorted(self.optional), choice, strict=True)) for choice in choices]
        return [_variant(self, {n for n, there in p.items() if not there}) for p in present]

    @functools.cached_property
    def depth(self) -> int:
        """How many operations, one after the other, lead from an input to an output."""
        found: dict[Node, int] = {}
        for node in self.variants[0].graph.nodes:
            found[node] = 1 + max((found[given] for given in node.all_input_nodes), default=-1)
        return max(found.values())

    @property
    def targets(self) -> tuple[Callable, ...]:
        """What replaces the idiom: one function, or one for each output."""
        return (self.replace,) if callable(self.replace) else self.replace

    def example_constant(self, name: str) -> Any:
        """A value for a constant, while there is no match to take it from."""
        return self.example.get(name, _EXAMPLES[self.constants[name]])

    def example_sizes(self) -> dict[str, int]:
        """The sizes of dimensions that the pattern itself gives."""
        return {name: value for name, value in self.example.items() if name not in self.constants}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Computes the idiom in plain PyTorch."""
        return self.function(*args, **kwargs)


@dataclass(frozen=True)
class Inputs:
    """Stands for a tuple of matched inputs among the fixed arguments of a replacement:
    `replace=partial(f, weights=Inputs("q_weight", "k_weight"))`."""

    names: tuple[str, ...]

    def __init__(self, *names: str) -> None:
        object.__setattr__(self, "names", names)


def bound_arguments(target: Callable, given: dict[str, Any]) -> tuple[Callable, dict[str, Any]]:
    """The function behind a replacement, without what `functools.partial` fixes, and the arguments that it gets: those
    that were fixed, and of those given the ones that it has a parameter for (all, if it takes **kwargs)."""
    fixed: dict[str, Any] = {}
    if isinstance(target, functools.partial):
        fixed, target = dict(target.keywords), target.func
        for name, value in fixed.items():
            if isinstance(value, Inputs):
                fixed[name] = tuple(given[n] for n in value.names)
    parameters = inspect.signature(target).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if not takes_all and (unknown := fixed.keys() - parameters.keys()):  # to leave one out is to compute something else
        raise TypeError(f"{target.__name__} has no parameter {', '.join(sorted(unknown))}")
    return target, {name: v for name, v in (given | fixed).items() if name in parameters or takes_all}


@dataclass(eq=False)
class Variant:
    """The canonical form of a pattern for one choice of its optional parameters."""

    pattern: Pattern
    terms: Terms
    parameters: dict[str, sympy.Symbol]
    outputs: list[sympy.Expr]
    absent: frozenset[str]
    graph: Graph  # what the function does, step by step
    values: dict[Node, sympy.Expr]  # and what each step computes
    _constant: dict[sympy.Expr, bool] = field(default_factory=dict)
    _operands: dict[sympy.Expr, tuple[sympy.Expr, list[sympy.Expr]]] = field(default_factory=dict)

    @functools.cached_property
    def kinds(self) -> dict[sympy.Symbol, str]:
        """Whether a symbol is a tensor parameter or a constant."""
        return {s: "tensor" if name in self.pattern.tensors else "constant" for name, s in self.parameters.items()}

    @functools.cached_property
    def search_order(self) -> list[int]:
        """The outputs, those that bind most parameters first, later ones before earlier ones."""
        count = [len(self.parameters_in(output)) for output in self.outputs]
        return sorted(range(len(count)), key=lambda i: (-count[i], -i))

    @functools.cached_property
    def operations(self) -> list[Any]:
        """What computes each output, as `View.operation` tells it; None if it varies."""
        return [self._operation(value) for value in self.outputs]

    def _operation(self, value: sympy.Expr) -> Any:
        if value in self.terms.terms:
            operation = self.terms.terms[value].op
            return None if operation in SIZED else operation
        if (value.is_Add or value.is_Mul) and len(self.operands(value)[1]) == 1:
            return None
        return None if value in self.kinds else value.func

    @functools.cached_property
    def form(self) -> tuple[str, list[sympy.Symbol]]:
        """What the output that is searched for first is, with numbers in place of the parameters' names, and the
        parameters in that order."""
        numbers: dict[sympy.Symbol, int] = {}

        def numbered(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(numbered, value))
            value = getattr(value, "symbol", value)
            if value in self.kinds:
                dimensions = self.pattern.tensors.get(str(value)) or ""
                return "parameter", self.kinds[value], "..." in dimensions, numbers.setdefault(value, len(numbers))
            if value in self.terms.terms:
                term = self.terms.terms[value]
                return term.op, numbered(term.attrs), numbered(term.args)
            return (value.func, numbered(value.args)) if getattr(value, "args", ()) else value

        return repr(numbered(self.outputs[self.search_order[0]])), list(numbers)

    @functools.cached_property
    def needed(self) -> list[frozenset]:
        """For each output, the operations and functions that go into whatever it may be unified with."""
        return [frozenset(self._needed(value)) for value in self.outputs]

    def _needed(self, value: sympy.Expr) -> Iterator[Any]:
        if self.is_constant(value) or value in self.kinds:
            return
        args = value.args
        if value in self.terms.terms:
            term = self.terms.terms[value]
            args = term.args
            if term.op not in SIZED:
                yield term.op
        elif isinstance(value, FUNCTIONS):
            yield value.func
        for arg in args:
            yield from self._needed(arg)

    @functools.cached_property
    def size(self) -> int:
        """How many comparisons it takes to recognise the first output."""
        return self._size(self.outputs[self.search_order[0]])

    def _size(self, value: sympy.Expr) -> int:
        if value in self.terms.terms:
            return 1 + sum(self._size(a) for a in self.terms.terms[value].args)
        return weight(value) + sum(self._size(a) for a in value.args)

    def is_constant(self, value: sympy.Expr) -> bool:
        """Whether a value is made of numbers and captured constants."""
        if value not in self._constant:
            self._constant[value] = all(self.kinds.get(s) == "constant" for s in value.free_symbols)
        return self._constant[value]

    def operands(self, value: sympy.Expr) -> tuple[sympy.Expr, list[sympy.Expr]]:
        """The constant and the other operands of a sum or product, those first that can match little."""
        if value not in self._operands:
            constant, others = split(value, value.func, self.is_constant)
            self._operands[value] = constant, sorted(others, key=self._generality)
        constant, others = self._operands[value]
        return constant, list(others)

    def _generality(self, value: sympy.Expr) -> int:
        if value in self.kinds:
            return 3
        return 0 if any(s in self.terms.terms for s in value.free_symbols) else 1

    def parameters_in(self, value: sympy.Expr) -> set[sympy.Symbol]:
        """The parameters that a canonical value of this variant depends on."""
        found: set[sympy.Symbol] = set()
        for symbol in value.free_symbols:
            if symbol in self.kinds:
                found.add(symbol)
            elif symbol in self.terms.terms:
                for arg in self.terms.terms[symbol].args:
                    found |= self.parameters_in(arg)
        return found


FUNCTIONS = (sympy.Function, sympy.Max)


def weight(value: sympy.Expr) -> int:
    """What it counts for that a step is recognised: products and sums are everywhere, functions tell."""
    return 2 if isinstance(value, FUNCTIONS) else 1 if value.args else 0


def split(value: sympy.Expr, func: Any, is_constant: Callable[[sympy.Expr], bool]) -> tuple[sympy.Expr, list]:
    """The constant part and the other operands of a value, seen as a sum or a product."""
    operands = value.args if value.func == func else (value,)
    constants = [a for a in operands if is_constant(a)]
    return func(*constants), [a for a in operands if a not in constants]


def pattern(
    *,
    replace: Callable | Sequence[Callable],
    idioms: Sequence[str] | None = None,
    when: Callable[..., str | None] | None = None,
    forks: str | None = None,
    early: dict[str, Callable] | None = None,
    inside: Callable | None = None,
    benefit: float = 0,
    example: dict[str, Any] | None = None,
) -> Callable[[Callable], Pattern]:
    """Turns a plain PyTorch function into a pattern.

    Args:
        replace: what computes the idiom instead; gets the pattern's parameters by name (those that it has). A
            `functools.partial` adds fixed arguments. For a pattern with several outputs, either a function that
            returns them all or one function for each.
        idioms: the basic idioms that a match covers, for the report. Default: the function's name.
        when: gets the matched tensors (fakes) and constants by name; returns None, or why it does not apply.
        forks: the name of an input that `replace` gives back as one more output, the last. What uses that input
            later (a residual addition) takes it from there, so that the kernel's backward can add both gradients.
        early: further arguments of `replace`, each made by a function of some inputs and constants, by name. Where
            these follow from the module's own inputs, it is called at the start of the forward.
        inside: what computes all outputs where a layer lends its parameters (see `capture.lends_parameters`): gets
            that module, as `head`, in place of them.
        benefit: where matches overlap, the one of the pattern with the larger benefit is taken; between equals the
            one that covers more, then the one whose pattern is listed first.
        example: sizes of dimensions and values of constants, by name, with which the function runs and `when`
            agrees: for tracing it, and for the check when it is registered. Default: small even sizes.

    Returns:
        A decorator. The `Pattern` that it makes of a function can still be called as that function.

    Raises:
        PatternError: the function's signature is not that of a pattern.

    Examples:
        >>> import torch, ligerfx
        >>> def lean(x, cap):
        ...     return torch.tanh(x / cap) * cap
        >>> @ligerfx.pattern(replace=lean)
        ... def soft_cap(x: "... V", *, cap: float):
        ...     return cap * torch.tanh(x / cap)
        >>> soft_cap.name, soft_cap.tensors, soft_cap.constants
        ('soft_cap', {'x': '... V'}, {'cap': 'float'})
    """

    def decorate(function: Callable) -> Pattern:
        tensors: dict[str, str | None] = {}
        constants: dict[str, str] = {}
        optional = set()
        for parameter in inspect.signature(function).parameters.values():
            annotation = parameter.annotation
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
                is_dimensions = isinstance(annotation, str) and "Tensor" not in annotation
                tensors[parameter.name] = annotation.strip("'\"") if is_dimensions else None
            elif parameter.kind is parameter.KEYWORD_ONLY:
                text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
                base = text.split("|")[0].strip()
                if base not in _EXAMPLES:
                    raise PatternError(
                        f"{function.__name__}: constant {parameter.name!r} must be annotated float, int or str, "
                        f"not {text!r}"
                    )
                constants[parameter.name] = base
            else:
                raise PatternError(f"{function.__name__}: *args and **kwargs have no meaning in a pattern")
            if parameter.default is None:
                optional.add(parameter.name)
        if not tensors:
            raise PatternError(f"{function.__name__}: a pattern needs at least one tensor parameter")
        if forks is not None and (forks not in tensors or not callable(replace)):
            raise PatternError(
                f"{function.__name__}: forks={forks!r} must name a tensor parameter, and `replace` be one function"
            )
        for target in (replace,) if callable(replace) else replace:
            try:
                inspect.signature(target)
            except ValueError as error:
                raise PatternError(
                    f"{function.__name__}: {target!r} does not tell its parameters: replace by a Python function that "
                    "calls it"
                ) from error
        known = {dim for dims in tensors.values() for dim in names_in(dims or "")} | set(constants)
        if unknown := set(example or {}) - known:
            raise PatternError(f"{function.__name__}: example names {sorted(unknown)}, which no annotation does")
        return Pattern(
            function,
            replace if callable(replace) else tuple(replace),
            (function.__name__,) if idioms is None else tuple(idioms),
            when,
            forks,
            early or {},
            inside,
            benefit,
            example or {},
            tensors,
            constants,
            frozenset(optional),
        )

    return decorate


def _variant(pattern: Pattern, absent: set[str]) -> Variant:
    sizes = pattern.example_sizes()
    arguments: dict[str, Any] = {}
    parameters: dict[str, sympy.Symbol] = {}
    for name, dims in pattern.tensors.items():
        if name in absent:
            arguments[name] = None
            continue
        shape, dtype = example(dims or "...", sizes)
        arguments[name] = torch.empty(shape, dtype=dtype, device="meta")  # cheaper than a fake
        parameters[name] = sympy.Symbol(name, real=True)
    for name in pattern.constants:
        if name in absent:
            arguments[name] = None
            continue
        parameters[name] = sympy.Symbol(name, real=True)
        arguments[name] = constant(parameters[name], pattern.example_constant(name))
    try:
        graph = Recorder().trace_function(pattern.function, arguments, meta=True)
    except Exception as error:
        raise PatternError(f"{pattern.name}: not traceable: {describe_error(error)}") from error
    terms = Terms("p")
    cuts = {n: parameters[n.target] for n in graph.nodes if n.op == "placeholder"}
    canonical = Canonicalizer(terms, cuts, rounding=False)
    result = next(n for n in reversed(graph.nodes) if n.op == "output").args[0]
    outputs = [canonical.value(n) for n in (result if isinstance(result, tuple) else (result,))]
    for term in terms.terms.values():
        if term.op == "leaf":
            raise PatternError(f"{pattern.name}: `{term.attrs[0]}` is nothing that can be matched")
    values = {n: canonical.value(n) for n in graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)}
    return Variant(pattern, terms, parameters, outputs, frozenset(absent), graph, values)


def example(
    dims: str, sizes: dict[str, int], leading: Sequence[int] = (2, 6), largest: int = 120
) -> tuple[list[int], torch.dtype]:
    """A shape and dtype for a dimension string; each name gets an even size of its own, later ones
    less than half."""
    shape: list[int] = []
    dtype = torch.float32
    for dim in dims.split():
        if dim in KINDS:
            dtype = KINDS[dim]
        elif dim == "...":
            shape += leading
        elif dim == "*":
            shape.append(1)
        elif dim.isdigit():
            shape.append(int(dim))
        else:
            factor, name = _factor(dim)
            size = max(2, 2 * int(largest * 0.43 ** len(sizes) / 2))
            shape.append(factor * sizes.setdefault(name, size))
    return shape, dtype


def names_in(dims: str) -> set[str]:
    """The names of dimensions in a dimension string."""
    return {_factor(d)[1] for d in dims.split() if d not in (*KINDS, "...", "*") and not d.isdigit()}


def _factor(dim: str) -> tuple[int, str]:
    """("2I") -> (2, "I"); ("H") -> (1, "H")."""
    name = dim.lstrip("0123456789")
    return int(dim[: -len(name)] or 1), name


def check_dimensions(pattern: Pattern, tensors: dict[str, torch.Tensor]) -> str | None:
    """None where the shapes of the tensors agree with the pattern's annotations, else what does not."""
    sizes: dict[str, Any] = {}
    for name, tensor in tensors.items():
        dims = [d for d in (pattern.tensors[name] or "...").split() if d not in KINDS]
        shape = list(tensor.shape)
        if "..." in dims:
            at = dims.index("...")
            after = len(dims) - at - 1
            if len(shape) < len(dims) - 1:
                return f"{name}: expected shape [{' '.join(dims)}], found {list(tensor.shape)}"
            shape = shape[:at] + shape[len(shape) - after :]
            dims = dims[:at] + dims[at + 1 :]
        if len(shape) != len(dims):
            return f"{name}: expected shape [{' '.join(dims)}], found {list(tensor.shape)}"
        for dim, size in zip(dims, shape, strict=True):
            if dim == "*":
                continue
            if dim.isdigit():
                expected = int(dim)
            else:
                factor, key = _factor(dim)
                expected = factor * sizes.setdefault(key, size // factor)
            if expected != size:
                return f"{name}: expected size {dim} = {expected}, found {size}"
    return None
