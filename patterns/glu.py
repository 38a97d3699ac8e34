"""Gated linear units (Shazeer 2020, https://arxiv.org/abs/2002.05202): act(gate) * up.

The gate and the up projection come from two linear layers, or from one packed layer whose output is halved
(Phi-3). The packed form writes both gradients into one buffer, so it is tried first. Together with the down
projection, the product need not be kept for the backward, whose kernel can write it again.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ligerfx.kernels import (
    glu,
    glu_linear,
    glu_linear_reference,
    glu_reference,
    packed_glu,
    packed_glu_linear,
    packed_glu_linear_reference,
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


def _packed_linear(activation: Activation | str, fixed: dict) -> Pattern:
    def function(gate_up: "... 2I", weight: "H I", bias: "H" = None):
        return packed_glu_linear_reference(gate_up, weight, bias, activation)

    return _pattern(function, packed_glu_linear, f"packed_{activation}_glu_linear", activation, **fixed)


def _separate_linear(activation: Activation | str, fixed: dict) -> Pattern:
    def function(gate: "... I", up: "... I", weight: "H I", bias: "H" = None):
        return glu_linear_reference(gate, up, weight, bias, activation)

    return _pattern(function, glu_linear, f"{activation}_glu_linear", activation, **fixed)


ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


def patterns_of(activation: Activation | str, low_memory: bool) -> list[Pattern]:
    """Those with the down projection first, and packed before separate."""
    fixed = {"recompute": low_memory}
    return [
        _packed_linear(activation, fixed),
        _separate_linear(activation, fixed),
        _packed(activation),
        _separate(activation),
    ]


@functools.cache
def patterns(low_memory: bool) -> list[Pattern]:
    """In the same order, activation by activation within it."""
    by_activation = [patterns_of(activation, low_memory) for activation in ACTIVATIONS]
    return [pattern for alike in zip(*by_activation, strict=True) for pattern in alike]
