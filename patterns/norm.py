"""RMSNorm (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467): x / sqrt(mean(x^2) + eps) * weight.

Models differ in where they round to the dtype of the input, and that changes the bits:
Llama rounds before it applies the weight, OLMo 2 and torch.nn.RMSNorm after, Gemma after, with weight 1 + w.

In a residual stream the norm's input is used again, by the addition at the end of the block. Then the kernel hands
it on, and its backward adds the gradients of both paths; where the input is itself a sum, the kernel computes that.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial

import torch

from ligerfx.kernels import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
from ligerfx.pattern import Pattern, pattern

KINDS = {
    "rms_norm_one_plus_weight": {"offset": 1.0, "cast": "after_weight"},
    "rms_norm_rounded_first": {"cast": "before_weight"},
    "rms_norm_rounded_last": {"cast": "after_weight"},
}
"""The ways of rounding, and where the weights are stored around zero."""


def with_parameters(function: Callable, dimensions: dict[str, str]) -> None:
    """Gives a function of **parameters the signature of a pattern with these tensors and the constant eps."""
    Parameter = inspect.Parameter
    function.__signature__ = inspect.Signature(
        [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, annotation=dims) for name, dims in dimensions.items()]
        + [Parameter("eps", Parameter.KEYWORD_ONLY, annotation=float)]
    )


def _plain(name: str, kind: dict) -> Pattern:
    def norm(x: "... H", weight: "H", *, eps: float):
        return rms_norm_reference(x, weight, eps, **kind)

    norm.__name__ = name
    return pattern(replace=partial(rms_norm, **kind), idioms=["rms_norm"])(norm)


def _forked(name: str, kind: dict) -> Pattern:
    def forked(x: "... H", weight: "H", *, eps: float):
        return rms_norm_reference(x, weight, eps, **kind)

    forked.__name__ = f"forked_{name}"
    replace = partial(add_rms_norm, residual=None, **kind)
    return pattern(replace=replace, idioms=["rms_norm"], forks="x")(forked)


def _added(name: str, kind: dict) -> Pattern:
    def added(x: "... H", residual: "... H", weight: "H", *, eps: float):
        return add_rms_norm_reference(x, residual, weight, eps, **kind)

    added.__name__ = f"add_{name}"
    return pattern(replace=partial(add_rms_norm, **kind), idioms=["rms_norm"])(added)


def _rms_norm_without_weight(x, eps):
    return rms_norm(x, x.new_ones(x.shape[-1]), eps)


@pattern(replace=_rms_norm_without_weight, idioms=["rms_norm"])
def rms_norm_without_weight(x: "... H", *, eps: float):
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


PATTERNS = [make(name, kind) for make in (_added, _forked, _plain) for name, kind in KINDS.items()]
PATTERNS.append(rms_norm_without_weight)
