"""RMSNorm and the linear layers that read it: q, k and v, or gate and up, or one packed layer.

Together they need not keep the norm's result for the backward, and the gradients that meet there (one from each
layer, one from the residual stream) are added by the matrix products and the norm's kernel.
"""

from __future__ import annotations

from functools import partial

from ligerfx.kernels import rms_norm_linear, rms_norm_linear_reference
from ligerfx.pattern import Inputs, Pattern, pattern

from .norm import KINDS, with_parameters


def _norm_linear(layers: int, biased: bool, added: bool, norm: str, kind: dict) -> Pattern:
    """The pattern for so many linear layers, all with a bias or none, and for a norm of x or of x + residual."""
    weights = [f"weight{i}" for i in range(layers)]
    biases = [f"bias{i}" for i in range(layers)] if biased else []

    def norm_linear(x, norm_weight, *, eps, residual=None, **parameters):
        arguments = [[parameters[name] for name in names] for names in (weights, biases)]
        *outputs, h = rms_norm_linear_reference(
            x, norm_weight, arguments[0], arguments[1] or None, eps, residual=residual, **kind
        )
        return (*outputs, h) if added else tuple(outputs) if layers > 1 else outputs[0]

    dimensions = {"x": "... H"} | ({"residual": "... H"} if added else {}) | {"norm_weight": "H"}
    dimensions |= {name: f"N{i} H" for i, name in enumerate(weights)}
    dimensions |= {name: f"N{i}" for i, name in enumerate(biases)}
    with_parameters(norm_linear, dimensions)
    norm_linear.__name__ = f"{'add_' if added else ''}{norm}_linear_x{layers}"
    fixed = {"weights": Inputs(*weights)} | ({"biases": Inputs(*biases)} if biased else {}) | kind
    # The stream that goes on is an output where it is computed here, and otherwise the input again.
    forks = None if added else "x"
    return pattern(replace=partial(rms_norm_linear, **fixed), idioms=["rms_norm"], forks=forks)(norm_linear)


PATTERNS = [
    _norm_linear(layers, biased, added, norm, kind)
    for layers in (3, 2, 1)
    for biased in (True, False)
    for added in (True, False)
    for norm, kind in KINDS.items()
]
