"""Gated linear units (Shazeer 2020, https://arxiv.org/abs/2002.05202): act(gate) * up. Some hold both within a limit
first (GPT-OSS, https://arxiv.org/abs/2508.10925).

The gate and the up projection come from two linear layers, or from one packed layer whose output is halved
(Phi-3). The packed form writes both gradients into one buffer, so it is tried first. Together with the down
projection, the product need not be kept for the backward, whose kernel can write it again.
"""

from __future__ import annotations

import functools
from functools import partial

from ligerfx.kernels import (
    clamped_glu,
    clamped_glu_reference,
    glu,
    glu_linear,
    glu_linear_reference,
    glu_reference,
    packed_clamped_glu,
    packed_clamped_glu_reference,
    packed_glu,
    packed_glu_linear,
    packed_glu_linear_reference,
    packed_glu_reference,
)
from ligerfx.pattern import Pattern, pattern


def _packed(activation: str) -> Pattern:
    def packed_glu_(gate_up: "... I"):
        return packed_glu_reference(gate_up, activation)

    packed_glu_.__name__ = f"packed_{activation}_glu"
    return pattern(replace=partial(packed_glu, activation=activation), idioms=["glu"])(packed_glu_)


def _separate(activation: str) -> Pattern:
    def glu_(gate: "... I", up: "... I"):
        return glu_reference(gate, up, activation)

    glu_.__name__ = f"{activation}_glu"
    return pattern(replace=partial(glu, activation=activation), idioms=["glu"])(glu_)


def _packed_linear(activation: str, fixed: dict) -> Pattern:
    def packed_linear(gate_up: "... 2I", weight: "H I", bias: "H" = None):
        return packed_glu_linear_reference(gate_up, weight, bias, activation)

    packed_linear.__name__ = f"packed_{activation}_glu_linear"
    return pattern(replace=partial(packed_glu_linear, activation=activation, **fixed), idioms=["glu"])(packed_linear)


def _separate_linear(activation: str, fixed: dict) -> Pattern:
    def linear(gate: "... I", up: "... I", weight: "H I", bias: "H" = None):
        return glu_linear_reference(gate, up, weight, bias, activation)

    linear.__name__ = f"{activation}_glu_linear"
    return pattern(replace=partial(glu_linear, activation=activation, **fixed), idioms=["glu"])(linear)


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


@functools.cache
def patterns(low_memory: bool) -> list[Pattern]:
    """Those with the down projection first, and packed before separate."""
    return [
        *CLAMPED,
        *(
            make(activation, {"recompute": low_memory})
            for make in (_packed_linear, _separate_linear)
            for activation in ACTIVATIONS
        ),
        *(make(activation) for make in (_packed, _separate) for activation in ACTIVATIONS),
    ]
