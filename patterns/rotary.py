"""Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864), written by halves.

q and k of one attention layer are rotated together; they may differ in their number of heads. Where cos and
sin cover only the first part of the head dimension (Phi-3, GLM), the rest passes through.
"""

from __future__ import annotations

import torch

from ligerfx.kernels import rope, rope_reference
from ligerfx.pattern import pattern


def _applies(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> str | None:
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


PATTERNS = [partial_rotary, rotary]
