"""Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864), written by halves.

q and k of one attention layer are rotated together; they may differ in their number of heads. Where cos and
sin cover only the first part of the head dimension (Phi-3, GLM), the rest passes through. Where q and k are
normalised just before (Qwen 3, Gemma 3), one kernel does both.
"""

from __future__ import annotations

from functools import partial

import torch

from ligerfx.kernels import norm_rope, rms_norm_reference, rope, rope_reference
from ligerfx.pattern import Pattern, pattern

from .norm import KINDS


def _applies(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, **_) -> str | None:
    """The kernel rotates q and k of one dtype, with angles that are the same for all heads."""
    if q.dtype != k.dtype or cos.dtype != sin.dtype:
        return "q and k, or cos and sin, differ in dtype"
    if cos.shape != sin.shape or all(cos.shape[dim] != 1 for dim in (1, 2)):
        return f"cos {list(cos.shape)} and sin {list(sin.shape)} must have one shape and broadcast over the heads"
    return None


@pattern(replace=rope, idioms=["rope"], when=_applies)
def rotary(q: "B * * D", k: "B * * D", cos: "* * * D", sin: "* * * D"):
    return rope_reference(q, k, cos, sin)


@pattern(replace=rope, idioms=["rope"], when=_applies)
def partial_rotary(q: "B * * D", k: "B * * D", cos: "* * * R", sin: "* * * R"):
    return rope_reference(q, k, cos, sin)


def norm_rope_of_tokens(q, k, q_weight, k_weight, cos, sin, eps, **kind):
    """`norm_rope` of q and k [B, S, N, D]; gives [B, N, S, D], without a copy."""
    return norm_rope(q.transpose(1, 2), k.transpose(1, 2), q_weight, k_weight, cos, sin, eps, **kind)


def _normed(name: str, kind: dict, transposed: bool) -> Pattern:
    def normed_rotary(
        q: "B * * D", k: "B * * D", q_weight: "D", k_weight: "D", cos: "* * * D", sin: "* * * D", *, eps: float
    ):
        q, k = rms_norm_reference(q, q_weight, eps, **kind), rms_norm_reference(k, k_weight, eps, **kind)
        if transposed:
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        return rope_reference(q, k, cos, sin)

    normed_rotary.__name__ = f"{name}_rotary"
    replace = partial(norm_rope_of_tokens if transposed else norm_rope, **kind)
    return pattern(replace=replace, idioms=["rms_norm", "rms_norm", "rope"], when=_applies)(normed_rotary)


NORMED = [_normed(name, kind, transposed) for transposed in (True, False) for name, kind in KINDS.items()]
PATTERNS = [*NORMED, partial_rotary, rotary]
