"""Activations of gated units: in torch, and with their derivatives in Triton."""

import functools
import itertools
import linecache
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ._runtime import log1p, tanh, tl, triton


@dataclass(frozen=True)
class Activation:
    """An activation that has no kernel written by hand.

    Attributes:
        name: what it is called.
        function: what it is in torch, of one tensor, element by element.
        source: of a function `activate(x)` that gives (act(x), act'(x)) of float32 numbers, in the words of Triton.
    """

    name: str
    function: Callable[[torch.Tensor], torch.Tensor]
    source: str

    def __str__(self) -> str:
        return self.name


IN_TORCH = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


@triton.jit
def _silu(x):
    sigmoid = 1.0 / (1.0 + tl.exp(-x))
    return x * sigmoid, sigmoid * (1.0 + x * (1.0 - sigmoid))


@triton.jit
def _gelu(x):
    cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    return x * cdf, cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def _gelu_tanh(x):
    t = tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))
    inner = 0.7978845608028654 * (1.0 + 0.134145 * x * x)
    return 0.5 * x * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner


@triton.jit
def _relu(x):
    # Written so that NaN passes, as it does in torch.relu.
    return tl.where(x <= 0, 0.0, x), tl.where(x <= 0, 0.0, 1.0)


@triton.jit
def _relu2(x):
    value = tl.where(x <= 0, 0.0, x)
    return value * value, 2.0 * value


_IN_TRITON = {"silu": _silu, "gelu": _gelu, "gelu_tanh": _gelu_tanh, "relu": _relu, "relu2": _relu2}
_numbers = itertools.count()


def in_torch(activation: str | Activation) -> Callable[[torch.Tensor], torch.Tensor]:
    return activation.function if isinstance(activation, Activation) else IN_TORCH[activation]


def key_of(activation: str | Activation) -> str:
    """What `in_triton` takes, and the schema of an operator: a name, or source."""
    return activation.source if isinstance(activation, Activation) else activation


@functools.cache
def in_triton(key: str) -> Any:
    """The Triton function that gives (act(x), act'(x)); a kernel that does not use one of them does not compute it."""
    if key in _IN_TRITON:
        return _IN_TRITON[key]
    # Triton asks for the source of what it compiles, so it is kept where Python looks lines up.
    source, filename = f"@triton.jit\n{key}", f"<ligerfx generated activation {next(_numbers)}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    namespace = {"tl": tl, "triton": triton, "tanh": tanh, "log1p": log1p, "__name__": __name__}
    exec(compile(source, filename, "exec"), namespace)
    return namespace["activate"]
