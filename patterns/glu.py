"""Gated linear units (Shazeer 2020, https://arxiv.org/abs/2002.05202): act(gate) * up.

The gate and the up projection come from two linear layers, or from one packed layer whose output is halved
(Phi-3). The packed form writes both gradients into one buffer, so it is tried first.
"""

from __future__ import annotations

from functools import partial

from ligerfx.kernels import glu, glu_reference, packed_glu, packed_glu_reference
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


ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
PATTERNS = [make(activation) for make in (_packed, _separate) for activation in ACTIVATIONS]
