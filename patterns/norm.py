"""RMSNorm (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467): x / sqrt(mean(x^2) + eps) * weight.

Models differ in where they round to the dtype of the input, and that changes the bits:
Llama rounds before it applies the weight, OLMo 2 and torch.nn.RMSNorm after, Gemma after, with weight 1 + w.
"""

from __future__ import annotations

from functools import partial

from ligerfx.kernels import rms_norm, rms_norm_reference
from ligerfx.pattern import pattern


@pattern(replace=rms_norm, idioms=["rms_norm"])
def rms_norm_rounded_first(x: "... H", weight: "H", *, eps: float):
    return rms_norm_reference(x, weight, eps, cast="before_weight")


@pattern(replace=partial(rms_norm, cast="after_weight"), idioms=["rms_norm"])
def rms_norm_rounded_last(x: "... H", weight: "H", *, eps: float):
    return rms_norm_reference(x, weight, eps, cast="after_weight")


@pattern(replace=partial(rms_norm, offset=1.0, cast="after_weight"), idioms=["rms_norm"])
def rms_norm_one_plus_weight(x: "... H", weight: "H", *, eps: float):
    return rms_norm_reference(x, weight, eps, offset=1.0, cast="after_weight")


PATTERNS = [rms_norm_one_plus_weight, rms_norm_rounded_first, rms_norm_rounded_last]
