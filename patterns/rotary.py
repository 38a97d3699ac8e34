"""Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864).

q and k of one attention layer are rotated together; they may differ in their number of heads. Where cos and
sin cover only the first part of the head dimension (Phi-3, GLM), the rest passes through. Where q and k are
normalised just before (Qwen 3, Gemma 3), one kernel does both.

What rotates is pairs of elements: those of two halves, or neighbours (GPT-J, Cohere, GLM), which may end up in two
halves (DeepSeek). cos and sin hold a value for each element or one for each pair, or are the two parts of a complex
number (Llama 4).
"""

from __future__ import annotations

from functools import partial

import torch

from ligerfx.kernels import norm_rope, rms_norm_reference, rope, rope_reference
from ligerfx.pattern import Pattern, pattern

from .norm import KINDS


def _applies(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, **_) -> str | None:
    """The kernel rotates q and k of one dtype, with angles that are the same for all heads."""
    if q is k:
        return "q and k are one tensor"
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


def _turned(x, cos, sin):
    """`rope_reference` of one tensor, of any number of dimensions."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


def _with_batch(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """All four with a batch in front, one of one row where they have none."""
    return tuple(x if x.dim() == 4 else x.unsqueeze(0) for x in (q, k, cos, sin))


def _applies_with_batch(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> str | None:
    return "q and k are one tensor" if q is k else _applies(*_with_batch(q, k, cos, sin))


def _rope_of_tables(q, k, cos, sin):
    return rope(*_with_batch(q, k, cos, sin))


@pattern(replace=_rope_of_tables, idioms=["rope"], when=_applies_with_batch)
def rotary_of_tables(q: "B * * D", k: "B * * D", cos: "* * D", sin: "* * D"):
    """cos and sin by position alone: the patches of an image (Pixtral)."""
    return _turned(q, cos, sin), _turned(k, cos, sin)


def _rope_of_packed(q, k, cos, sin):
    return tuple(x.squeeze(0) for x in _rope_of_tables(q, k, cos, sin))


@pattern(replace=_rope_of_packed, idioms=["rope"], when=_applies_with_batch)
def packed_rotary(q: "* * D", k: "* * D", cos: "* * D", sin: "* * D"):
    """The rows of a batch one after the other, without padding: patches of several images (Qwen2-VL)."""
    return _turned(q, cos, sin), _turned(k, cos, sin)


def _alone_applies(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> str | None:
    return _applies(x, torch.empty_like(x), cos, sin)


def _rope_alone(x, cos, sin, pairs="halves"):
    """`rope` of x and of no heads."""
    nothing = x.narrow(1 if cos.shape[1] == 1 else 2, 0, 0)
    return rope(x, nothing, cos, sin, pairs=pairs)[0]


def _alone(name: str, rotated: str) -> Pattern:
    """Where the keys come from another layer, only q is rotated."""

    def alone(x, cos: "* * * R", sin: "* * * R"):
        return rope_reference(x, x, cos, sin)[0]

    alone.__name__ = name
    alone.__annotations__ |= {"x": f"B * * {rotated}"}
    return pattern(replace=_rope_alone, idioms=["rope"], when=_alone_applies)(alone)


def _rope_in_fp32(x, cos, sin):
    return _rope_alone(x.float(), cos.float(), sin.float(), "neighbours").to(x.dtype)


@pattern(replace=_rope_in_fp32, idioms=["rope"], when=_alone_applies)
def rotary_of_neighbours_alone(x: "B * * R", cos: "* * * R", sin: "* * * R"):
    """q, k and what attention gives (DeepSeek V4), each by itself and in float32."""
    h = x.float()
    return rope_reference(h, h, cos, sin, pairs="neighbours")[0].to(x.dtype)


def _pairwise(name: str, rotated: str, **order) -> Pattern:
    """cos and sin with one value for each pair."""

    def half_tables(q: "B * * D", k: "B * * D", cos: "* * * R", sin: "* * * R"):
        return rope_reference(q, k, cos, sin, half_tables=True, **order)

    half_tables.__name__ = name
    dims = {"q": f"B * * {rotated}", "k": f"B * * {rotated}"}
    half_tables.__annotations__ = {"cos": "* * * R", "sin": "* * * R", **dims}
    return pattern(replace=partial(rope, half_tables=True, **order), idioms=["rope"], when=_applies)(half_tables)


def _neighbours(rotated: str) -> Pattern:
    def neighbours(q, k, cos: "* * * R", sin: "* * * R"):
        return rope_reference(q, k, cos, sin, pairs="neighbours")

    neighbours.__name__ = "rotary_of_neighbours" if rotated == "R" else "partial_rotary_of_neighbours"
    neighbours.__annotations__ |= {"q": f"B * * {rotated}", "k": f"B * * {rotated}"}
    return pattern(replace=partial(rope, pairs="neighbours"), idioms=["rope"], when=_applies)(neighbours)


def _repeated(rotated: str) -> Pattern:
    """One value for each pair, written twice before it is used."""

    def repeated(q, k, cos: "* * * R", sin: "* * * R"):
        tables = (t.repeat_interleave(2, dim=-1) for t in (cos, sin))
        return rope_reference(q, k, *tables, pairs="neighbours")

    repeated.__name__ = "rotary_of_neighbours_repeated" if rotated == "2R" else "partial_rotary_of_neighbours_repeated"
    repeated.__annotations__ |= {"q": f"B * * {rotated}", "k": f"B * * {rotated}"}
    replace = partial(rope, pairs="neighbours", half_tables=True)
    return pattern(replace=replace, idioms=["rope"], when=_applies)(repeated)


def _turned_back(q, k, cos, sin):
    return rope(q, k, cos, -sin)


@pattern(replace=_turned_back, idioms=["rope"], when=_applies)
def backward_rotary(q: "B * * D", k: "B * * D", cos: "* * * D", sin: "* * * D"):
    half = q.shape[-1] // 2

    def apply(x):
        return x * cos + torch.cat((x[..., half:], -x[..., :half]), dim=-1) * sin

    return apply(q), apply(k)


def _rope_of_complex(q, k, turn):
    cos, sin = (t.contiguous() for t in (turn.real, turn.imag))
    return rope(q, k, cos, sin, pairs="neighbours", half_tables=True)


def _complex_applies(q: torch.Tensor, k: torch.Tensor, turn: torch.Tensor) -> str | None:
    if q is k:
        return "q and k are one tensor"
    if q.dtype != torch.float32 or k.dtype != torch.float32 or turn.dtype != torch.complex64:
        return f"q {q.dtype}, k {k.dtype} and the turn {turn.dtype} must be float32 and complex64"
    if turn.requires_grad or all(turn.shape[dim] != 1 for dim in (1, 2)):
        return f"the turn {list(turn.shape)} must broadcast over the heads"
    return None


@pattern(replace=_rope_of_complex, idioms=["rope"], when=_complex_applies)
def complex_rotary(q: "B * * 2R", k: "B * * 2R", turn: "complex * * * R"):
    def apply(x):
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turn).flatten(3)

    return apply(q), apply(k)


def norm_rope_of_tokens(q, k, q_weight, k_weight, cos, sin, eps, *, offset=0.0, cast="before_weight"):
    """`norm_rope` of q and k [B, S, N, D]; gives [B, N, S, D], without a copy."""
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    return norm_rope(q, k, q_weight, k_weight, cos, sin, eps, offset=offset, cast=cast)


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
PATTERNS = [
    *NORMED,
    partial_rotary,
    rotary,
    rotary_of_tables,
    packed_rotary,
    _pairwise("rotary_by_pairs", "2R"),
    _pairwise("rotary_of_neighbours_by_pairs", "2R", pairs="neighbours"),
    _pairwise("rotary_of_neighbours_to_halves", "2R", pairs="neighbours_to_halves"),
    _repeated("2R"),
    _repeated("D"),
    _neighbours("R"),
    backward_rotary,
    complex_rotary,
    _alone("partial_rotary_alone", "D"),
    _alone("rotary_alone", "R"),
    rotary_of_neighbours_alone,
]
