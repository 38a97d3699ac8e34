"""Gated linear units (Shazeer 2020, https://arxiv.org/abs/2002.05202): act(gate) * up. Some hold both within a limit
first (GPT-OSS, https://arxiv.org/abs/2508.10925).

The gate and the up projection come from two linear layers, or from one packed layer whose output is halved
(Phi-3). The packed form writes both gradients into one buffer, so it is tried first. Together with the down
projection, the product need not be kept for the backward, whose kernel can write it again; together with all three
projections, it is the end of a matrix product.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ligerfx.kernels import (
    clamped_glu,
    clamped_glu_reference,
    glu,
    glu_linear,
    glu_linear_reference,
    glu_mlp,
    glu_mlp_reference,
    glu_reference,
    packed_clamped_glu,
    packed_clamped_glu_reference,
    packed_glu,
    packed_glu_linear,
    packed_glu_linear_reference,
    packed_glu_mlp,
    packed_glu_mlp_reference,
    packed_glu_reference,
)
from ligerfx.pattern import Pattern, pattern

if TYPE_CHECKING:
    from ligerfx.kernels._activations import Activation


def _pattern(function: Callable, kernel: Callable, name: str, activation: Activation | str, **fixed: Any) -> Pattern:
    function.__name__ = name
    if isinstance(activation, str):
        return pattern(replace=partial(kernel, activation=activation, **fixed), idioms=["glu"])(function)

    def replacement(*args: Any, **kwargs: Any) -> torch.Tensor:  # whose name says in generated code what it computes
        return kernel(*args, activation=activation, **fixed, **kwargs)

    replacement.__name__, replacement.__module__ = name, kernel.__module__
    replacement.__signature__ = inspect.signature(function)
    return pattern(replace=replacement, idioms=["glu"], benefit=-1)(function)  # kernels written by hand come first


def _packed(activation: Activation | str) -> Pattern:
    def function(gate_up: "... I"):
        return packed_glu_reference(gate_up, activation)

    return _pattern(function, packed_glu, f"packed_{activation}_glu", activation)


def _separate(activation: Activation | str) -> Pattern:
    def function(gate: "... I", up: "... I"):
        return glu_reference(gate, up, activation)

    return _pattern(function, glu, f"{activation}_glu", activation)


def _packed_mlp(activation: Activation | str, fixed: dict) -> Pattern:
    def function(x: "... H", gate_up_weight: "2I H", weight: "N I", bias: "N" = None):
        return packed_glu_mlp_reference(x, gate_up_weight, weight, bias, activation)

    return _pattern(function, packed_glu_mlp, f"packed_{activation}_glu_mlp", activation, **fixed)


def _separate_mlp(activation: Activation | str, fixed: dict) -> Pattern:
    def function(x: "... H", gate_weight: "I H", up_weight: "I H", weight: "N I", bias: "N" = None):
        return glu_mlp_reference(x, gate_weight, up_weight, weight, bias, activation)

    return _pattern(function, glu_mlp, f"{activation}_glu_mlp", activation, **fixed)


def _packed_linear(activation: Activation | str, fixed: dict) -> Pattern:
    def function(gate_up: "... 2I", weight: "H I", bias: "H" = None):
        return packed_glu_linear_reference(gate_up, weight, bias, activation)

    return _pattern(function, packed_glu_linear, f"packed_{activation}_glu_linear", activation, **fixed)


def _separate_linear(activation: Activation | str, fixed: dict) -> Pattern:
    def function(gate: "... I", up: "... I", weight: "H I", bias: "H" = None):
        return glu_linear_reference(gate, up, weight, bias, activation)

    return _pattern(function, glu_linear, f"{activation}_glu_linear", activation, **fixed)


def _clamped(name: str, interleaved: bool) -> Pattern:
    def packed(gate_up: "... I", *, limit: float, alpha: float, offset: float):
        return packed_clamped_glu_reference(gate_up, limit, alpha, offset, interleaved=interleaved)

    packed.__name__ = name
    return pattern(replace=partial(packed_clamped_glu, interleaved=interleaved), idioms=["glu"])(packed)


@pattern(replace=clamped_glu, idioms=["glu"])
def clamped_glu_(gate: "... I", up: "... I", *, limit: float, alpha: float, offset: float):
    return clamped_glu_reference(gate, up, limit, alpha, offset)


clamped_glu_.function.__name__ = "clamped_glu"

CLAMPED = [_clamped("packed_clamped_glu", False), _clamped("interleaved_clamped_glu", True), clamped_glu_]

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")


def patterns_of(activation: Activation | str, low_memory: bool) -> list[Pattern]:
    """Those that cover more first, and packed before separate."""
    fixed = {"recompute": low_memory}
    return [
        _packed_mlp(activation, fixed),
        _separate_mlp(activation, fixed),
        _packed_linear(activation, fixed),
        _separate_linear(activation, fixed),
        _packed(activation),
        _separate(activation),
    ]


@functools.cache
def patterns(low_memory: bool) -> list[Pattern]:
    """In the same order, activation by activation within it."""
    by_activation = [patterns_of(activation, low_memory) for activation in ACTIVATIONS]
    return [*CLAMPED, *(pattern for alike in zip(*by_activation, strict=True) for pattern in alike)]
