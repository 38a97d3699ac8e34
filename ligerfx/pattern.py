"""Patterns: idioms written as plain PyTorch functions.

    @pattern(replace=kernels.rms_norm)
    def rms_norm(x: "... H", weight: "H", *, eps: float):
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
        return weight * h.to(x.dtype)

One function is what is searched for, the reference, and the proof of every match. Positional parameters are
tensors; the annotation names their dimensions ("..." for any number of leading ones, "*" for any size, "2I" for
twice the size I, "int" or "complex" first for a tensor of such), and equal names must be equal sizes. Keyword-only
parameters are constants that the match captures. A parameter with default None is optional: the idiom is searched for
with it and without.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch

from .canonical import SIZED, Canonicalizer, Terms, constant
from .errors import PatternError
from .source import describe_error
from .tracer import Tracer

_DTYPES = {"int": torch.int64, "complex": torch.complex64}
"""What may stand before the dimensions of a tensor that does not hold floats."""

_SIZES = (120, 52, 22, 10, 6, 4, 2)

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


@dataclass(eq=False)
class Variant:
    """The canonical form of a pattern for one choice of its optional parameters."""

    pattern: Pattern
    terms: Terms
    parameters: dict[str, sympy.Symbol]
    outputs: list[sympy.Expr]
    absent: frozenset[str]
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
    def size(self) -> int:
        """How many comparisons it takes to recognise the first output."""
        return self._size(self.outputs[self.search_order[0]])

    def _size(self, value: sympy.Expr) -> int:
        if value in self.terms.terms:
            return 1 + sum(self._size(a) for a in self.terms.terms[value].args)
        return (1 if value.args else 0) + sum(self._size(a) for a in value.args)

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

    def may_be(self, output: int, value: sympy.Expr, terms: Terms) -> bool:
        """False where an output is one operation and `value` another: nothing needs to be tried."""
        want = self.terms.terms.get(self.outputs[output])
        have = terms.terms.get(value)
        return want is None or want.op in SIZED or (have is not None and have.op == want.op)

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

    Raises:
        PatternError: the function's signature is not that of a pattern.
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
        targets = replace if callable(replace) else tuple(replace)
        return Pattern(
            function,
            targets,
            (function.__name__,) if idioms is None else tuple(idioms),
            when,
            forks,
            early or {},
            tensors,
            constants,
            frozenset(optional),
        )

    return decorate


def _variant(pattern: Pattern, absent: set[str]) -> Variant:
    sizes: dict[str, int] = {}
    arguments: dict[str, Any] = {}
    parameters: dict[str, sympy.Symbol] = {}
    for name, dims in pattern.tensors.items():
        if name in absent:
            arguments[name] = None
            continue
        shape, dtype = example(dims or "...", sizes)
        arguments[name] = torch.empty(shape, dtype=dtype, device="meta")  # cheaper than a fake
        parameters[name] = sympy.Symbol(name, real=True)
    for name, kind in pattern.constants.items():
        if name in absent:
            arguments[name] = None
            continue
        parameters[name] = sympy.Symbol(name, real=True)
        arguments[name] = constant(parameters[name], _EXAMPLES[kind])
    try:
        graph = Tracer().trace_function(pattern.function, arguments, meta=True)
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
    return Variant(pattern, terms, parameters, outputs, frozenset(absent))


def example(dims: str, sizes: dict[str, int]) -> tuple[list[int], torch.dtype]:
    """A shape and dtype for a dimension string; each name gets an even size of its own, later ones less than half."""
    shape: list[int] = []
    dtype = torch.float32
    for dim in dims.split():
        if dim in _DTYPES:
            dtype = _DTYPES[dim]
        elif dim == "...":
            shape += [2, 6]
        elif dim == "*":
            shape.append(1)
        elif dim.isdigit():
            shape.append(int(dim))
        else:
            factor, name = _factor(dim)
            shape.append(factor * sizes.setdefault(name, _SIZES[min(len(sizes), len(_SIZES) - 1)]))
    return shape, dtype


def _factor(dim: str) -> tuple[int, str]:
    """("2I") -> (2, "I"); ("H") -> (1, "H")."""
    name = dim.lstrip("0123456789")
    return int(dim[: -len(name)] or 1), name


def check_dimensions(pattern: Pattern, tensors: dict[str, torch.Tensor]) -> str | None:
    """None where the shapes of the tensors agree with the pattern's annotations, else what does not."""
    sizes: dict[str, Any] = {}
    for name, tensor in tensors.items():
        dims = [d for d in (pattern.tensors[name] or "...").split() if d not in _DTYPES]
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
