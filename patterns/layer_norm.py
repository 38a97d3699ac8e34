"""LayerNorm (Ba et al. 2016, https://arxiv.org/abs/1607.06450), written out as in Cohere's models.

torch has kernels for it, one in each direction, so that there is none in ligerfx: a model that calls
torch.nn.LayerNorm is left alone, and one that computes it step by step gets that call.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ligerfx.pattern import pattern


def _applies(x: torch.Tensor, weight: torch.Tensor, **_) -> str | None:
    """torch's kernels take one dtype, and compute in float32 where that is not wider."""
    if x.dtype == torch.float64:
        return "computes in float32 on float64 inputs"
    return None if x.dtype == weight.dtype else f"x is {x.dtype} and weight {weight.dtype}"


def torch_layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, eps: float):
    """`F.layer_norm` over the last dim, in the dtype of x also under autocast, which would widen it."""
    with torch.autocast(x.device.type, enabled=False):
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


@pattern(replace=torch_layer_norm, when=_applies)
def layer_norm(x: "... H", weight: "H", bias: "H" = None, *, eps: float):
    h = x.float()
    h = h - h.mean(-1, keepdim=True)
    h = weight.float() * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps))
    return (h if bias is None else h + bias.float()).to(x.dtype)


PATTERNS = [layer_norm]
