"""RMSNorm and the gated MLP that reads it, with SwiGLU or GeGLU: the second half of a pre-norm layer.

One kernel call need not keep the norm's result for the backward, computes the gated unit at the end of the products
before it, and adds the gradients that meet at the norm and in the residual stream where they are computed.
"""

from __future__ import annotations

import functools
from functools import partial

from ligerfx.kernels import rms_norm_mlp, rms_norm_mlp_reference
from ligerfx.pattern import Pattern, pattern

from .norm import KINDS, with_parameters


def _norm_mlp(activation: str, packed: bool, added: bool, norm: str, kind: dict, recompute: bool) -> Pattern:
    """The pattern for separate weights of gate and up or a packed one, and for a norm of x or of x + residual."""

    def norm_mlp(x, norm_weight, gate_weight, weight, *, eps, up_weight=None, residual=None):
        y, h = rms_norm_mlp_reference(
            x, norm_weight, gate_weight, up_weight, weight, eps, residual=residual, activation=activation, **kind
        )
        return (y, h) if added else y

    dimensions = {"x": "... H"} | ({"residual": "... H"} if added else {}) | {"norm_weight": "H"}
    dimensions |= {"gate_weight": "2I H"} if packed else {"gate_weight": "I H", "up_weight": "I H"}
    dimensions |= {"weight": "N I"}
    with_parameters(norm_mlp, dimensions)
    norm_mlp.__name__ = f"{'add_' if added else ''}{norm}_{'packed_' if packed else ''}{activation}_glu_mlp"
    fixed = {"activation": activation, "recompute": recompute} | ({"up_weight": None} if packed else {}) | kind
    # The stream that goes on is an output where it is computed here, and otherwise the input again.
    forks = None if added else "x"
    return pattern(replace=partial(rms_norm_mlp, **fixed), idioms=["rms_norm", "glu"], forks=forks)(norm_mlp)


@functools.cache
def patterns(low_memory: bool) -> list[Pattern]:
    return [
        _norm_mlp(activation, packed, added, norm, kind, recompute=low_memory)
        for activation in ("silu", "gelu_tanh")
        for packed in (True, False)
        for added in (True, False)
        for norm, kind in KINDS.items()
    ]
