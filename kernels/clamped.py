"""Gated linear units whose inputs are held within a limit (GPT-OSS, DeepSeek V4, MiniMax M3).

(up + offset) * gate * sigmoid(alpha * gate), of gate no larger than the limit and up no larger in size.
"""

import torch
import torch.nn.functional as F

from ._autograd import apply
from ._runtime import use_triton
from .gated import GLU, check_gate_and_up, check_gate_up


def clamped_glu_reference(
    gate: torch.Tensor, up: torch.Tensor, limit: float, alpha: float = 1.0, offset: float = 0.0
) -> torch.Tensor:
    """Plain PyTorch `clamped_glu`.

    Arguments, results and errors are those of `clamped_glu`.

    Examples:
        >>> import torch
        >>> from ligerfx.kernels import clamped_glu_reference
        >>> gate, up = torch.tensor([0.0, 9.0]), torch.tensor([5.0, -9.0])
        >>> clamped_glu_reference(gate, up, limit=7.0, offset=1.0).round(decimals=2)
        tensor([  0.0000, -41.9600])
    """
    _check(gate, up, limit)
    gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    activated = F.silu(gate) if alpha == 1 else gate * torch.sigmoid(gate * alpha)
    return (up + offset if offset else up) * activated


def packed_clamped_glu_reference(
    gate_up: torch.Tensor, limit: float, alpha: float = 1.0, offset: float = 0.0, *, interleaved: bool = False
) -> torch.Tensor:
    """Plain PyTorch `packed_clamped_glu`.

    Arguments, results and errors are those of `packed_clamped_glu`.

    Examples:
        >>> import torch
        >>> from ligerfx.kernels import packed_clamped_glu_reference
        >>> packed_clamped_glu_reference(torch.tensor([9.0, -9.0]), 7.0, offset=1.0).round(decimals=2)
        tensor([-41.9600])
    """
    _check_packed(gate_up, limit)
    return clamped_glu_reference(*_unpacked(gate_up, interleaved), limit, alpha, offset)


def _unpacked(gate_up: torch.Tensor, interleaved: bool) -> tuple[torch.Tensor, ...]:
    return (gate_up[..., ::2], gate_up[..., 1::2]) if interleaved else gate_up.chunk(2, dim=-1)


def _activation(alpha: float) -> str:
    """g * sigmoid(alpha * g), as `in_triton` takes it."""
    if alpha == 1:
        return "silu"
    return (
        f"def activate(x):\n    sigmoid = 1.0 / (1.0 + tl.exp({-alpha!r} * x))\n"
        f"    return x * sigmoid, sigmoid * (1.0 + {alpha!r} * x * (1.0 - sigmoid))\n"
    )


def _check_limit(op: str, limit: float) -> None:
    if not limit > 0:
        raise ValueError(f"{op}: limit must be positive, got {limit}")


def _check(gate: torch.Tensor, up: torch.Tensor, limit: float) -> None:
    _check_limit("clamped_glu", limit)
    check_gate_and_up("clamped_glu", gate, up)


def _check_packed(gate_up: torch.Tensor, limit: float) -> None:
    _check_limit("packed_clamped_glu", limit)
    check_gate_up("packed_clamped_glu", gate_up)


def clamped_glu(
    gate: torch.Tensor, up: torch.Tensor, limit: float, alpha: float = 1.0, offset: float = 0.0
) -> torch.Tensor:
    """(u + offset) * g * sigmoid(alpha * g), where g = min(gate, limit) and u is up held within -limit and limit.

    Computed in float32 and rounded once; the backward computes it again from gate and up. Where a limit holds, the
    gradient is zero; where it is just met, what that of this torch's `clamp` is.

    Args:
        gate: [..., I], floating point. Rows one stride apart (halves of a packed tensor) are not copied.
        up: [..., I], floating point.
        limit: positive.
        alpha: the steepness of the sigmoid: 1 is SiLU.
        offset: what is added to up.

    Returns:
        [..., I], contiguous, in the promoted dtype of gate and up.

    Raises:
        ValueError: for gate and up of different shapes, or a limit that is not positive.
        TypeError: if an input is not floating point.

    Source: OpenAI, "gpt-oss-120b & gpt-oss-20b Model Card", 2025, arXiv:2508.10925, section 2.2.

    Examples:
        >>> import torch
        >>> from ligerfx.kernels import clamped_glu
        >>> gate, up = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
        >>> no_limit = torch.nn.functional.silu(gate) * up
        >>> torch.allclose(clamped_glu(gate, up, limit=100.0), no_limit, atol=1e-6)
        True
    """
    _check(gate, up, limit)
    if not use_triton(gate, up):
        return clamped_glu_reference(gate, up, limit, alpha, offset)
    return apply(GLU, gate, up, _activation(float(alpha)), float(limit), float(offset), False)


def packed_clamped_glu(
    gate_up: torch.Tensor, limit: float, alpha: float = 1.0, offset: float = 0.0, *, interleaved: bool = False
) -> torch.Tensor:
    """`clamped_glu` of the two halves of the last dim, or of its even and its odd elements.

    Args:
        gate_up: [..., 2 * I], floating point; the gate first.
        limit, alpha, offset: as for `clamped_glu`.
        interleaved: the elements of gate and of up take turns.

    Returns:
        [..., I], contiguous, in gate_up's dtype. The gradient is one [..., 2 * I] tensor.

    Raises:
        ValueError: for a last dim of odd size, or a limit that is not positive.
        TypeError: if gate_up is not floating point.

    Source: as for `clamped_glu`.

    Examples:
        >>> import torch
        >>> from ligerfx.kernels import clamped_glu, packed_clamped_glu
        >>> gate_up = torch.randn(2, 3, 16)
        >>> pairs = packed_clamped_glu(gate_up, 7.0, 1.702, 1.0, interleaved=True)
        >>> torch.allclose(pairs, clamped_glu(gate_up[..., ::2], gate_up[..., 1::2], 7.0, 1.702, 1.0))
        True
    """
    _check_packed(gate_up, limit)
    if not use_triton(gate_up):
        return packed_clamped_glu_reference(gate_up, limit, alpha, offset, interleaved=interleaved)
    return apply(GLU, gate_up, None, _activation(float(alpha)), float(limit), float(offset), interleaved)
