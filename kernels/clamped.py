"""Gated linear units whose inputs are held within a limit (GPT-OSS, DeepSeek V4, MiniMax M3).

(up + offset) * gate * sigmoid(alpha * gate), of gate no larger than the limit and up no larger in size.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from ._operators import operator
from ._runtime import as_rows, jit, launch_device, tl, triton, use_triton
from .gated import check_gate_and_up, check_gate_up, grid_of


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


@triton.jit
def _load(gate_ptr, up_ptr, row, gate_stride, up_stride, first, n_cols, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr):
    if INTERLEAVED:
        cols = 2 * first + tl.arange(0, 2 * BLOCK)
        both = tl.load(gate_ptr + row * gate_stride + cols, mask=cols < 2 * n_cols, other=0.0).to(tl.float32)
        gate, up = tl.split(tl.reshape(both, [BLOCK, 2]))
    else:
        cols = first + tl.arange(0, BLOCK)
        gate = tl.load(gate_ptr + row * gate_stride + cols, mask=cols < n_cols, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + row * up_stride + cols, mask=cols < n_cols, other=0.0).to(tl.float32)
    return gate, up


@triton.jit
def _terms(gate, up, limit, alpha, offset):
    """The two factors, and the slope of the second. Written so that NaN passes, as it does in torch.clamp."""
    gate = tl.where(gate > limit, limit, gate)
    up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    sigmoid = 1.0 / (1.0 + tl.exp(-alpha * gate))
    return up + offset, gate * sigmoid, sigmoid * (1.0 + alpha * gate * (1.0 - sigmoid))


@jit
def _fwd_kernel(
    gate_ptr,
    up_ptr,
    y_ptr,
    gate_stride,
    up_stride,
    n_cols,
    col_blocks,
    limit,
    alpha,
    offset,
    INTERLEAVED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    row = (pid // col_blocks).to(tl.int64)
    first = (pid % col_blocks).to(tl.int64) * BLOCK
    gate, up = _load(gate_ptr, up_ptr, row, gate_stride, up_stride, first, n_cols, INTERLEAVED, BLOCK)
    shifted, activated, _ = _terms(gate, up, limit, alpha, offset)
    cols = first + tl.arange(0, BLOCK)
    tl.store(y_ptr + row * n_cols + cols, (shifted * activated).to(y_ptr.dtype.element_ty), mask=cols < n_cols)


@jit
def _bwd_kernel(
    dy_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    dy_stride,
    gate_stride,
    up_stride,
    dgate_stride,
    dup_stride,
    n_cols,
    col_blocks,
    limit,
    alpha,
    offset,
    NEED_DGATE: tl.constexpr,
    NEED_DUP: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    row = (pid // col_blocks).to(tl.int64)
    first = (pid % col_blocks).to(tl.int64) * BLOCK
    cols = first + tl.arange(0, BLOCK)
    mask = cols < n_cols
    dy = tl.load(dy_ptr + row * dy_stride + cols, mask=mask, other=0.0).to(tl.float32)
    gate, up = _load(gate_ptr, up_ptr, row, gate_stride, up_stride, first, n_cols, INTERLEAVED, BLOCK)
    shifted, activated, slope = _terms(gate, up, limit, alpha, offset)
    dgate = tl.where(gate <= limit, dy * shifted * slope, 0.0)
    dup = tl.where(tl.abs(up) <= limit, dy * activated, 0.0)
    if INTERLEAVED:
        pairs = 2 * first + tl.arange(0, 2 * BLOCK)
        both = tl.interleave(dgate, dup).to(dgate_ptr.dtype.element_ty)
        tl.store(dgate_ptr + row * dgate_stride + pairs, both, mask=pairs < 2 * n_cols)
    else:
        if NEED_DGATE:
            tl.store(dgate_ptr + row * dgate_stride + cols, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
        if NEED_DUP:
            tl.store(dup_ptr + row * dup_stride + cols, dup.to(dup_ptr.dtype.element_ty), mask=mask)


def _unpacked(gate_up: torch.Tensor, interleaved: bool) -> tuple[torch.Tensor, ...]:
    return (gate_up[..., ::2], gate_up[..., 1::2]) if interleaved else gate_up.chunk(2, dim=-1)


def _result(gate, up, limit, alpha, offset, interleaved):
    if up is None:
        return torch.empty((*gate.shape[:-1], gate.shape[-1] // 2), dtype=gate.dtype, device=gate.device)
    return torch.empty(gate.shape, dtype=torch.promote_types(gate.dtype, up.dtype), device=gate.device)


def _rows(gate: torch.Tensor, up: torch.Tensor | None, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor, int]:
    """gate and up as rows, and how many columns each has; both are the packed one where it is interleaved."""
    if up is not None:
        return as_rows(gate), as_rows(up), gate.shape[-1]
    packed = as_rows(gate)
    gate, up = (packed, packed) if interleaved else packed.chunk(2, dim=-1)
    return gate, up, packed.shape[-1] // 2


@operator(
    "clamped_glu(Tensor gate, Tensor? up, float limit, float alpha, float offset, bool interleaved) -> Tensor", _result
)
def _forward(gate, up, limit, alpha, offset, interleaved):
    y = _result(gate, up, limit, alpha, offset, interleaved)
    gate, up, n_cols = _rows(gate, up, interleaved)
    programs, col_blocks, block = grid_of(gate.shape[0], n_cols)
    with launch_device(gate):
        _fwd_kernel[(programs,)](
            gate, up, y, gate.stride(0), up.stride(0), n_cols, col_blocks, limit, alpha, offset, interleaved, block,
            num_warps=4,
        )  # fmt: skip
    return y


def _gradients(dy, gate, up, limit, alpha, offset, interleaved, need_gate, need_up):
    pairs = (gate, need_gate), (up, need_up)
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x, need in pairs if need]


@operator(
    "clamped_glu_backward(Tensor dy, Tensor gate, Tensor? up, float limit, float alpha, float offset, "
    "bool interleaved, bool need_gate, bool need_up) -> Tensor[]",
    _gradients,
)
def _backward(dy, gate, up, limit, alpha, offset, interleaved, need_gate, need_up):
    results = _gradients(dy, gate, up, limit, alpha, offset, interleaved, need_gate, need_up)
    grads = iter(results)
    dgate, dup = (as_rows(next(grads)) if need else None for need in (need_gate, need_up))
    if up is None and not interleaved:
        dgate, dup = dgate.chunk(2, dim=-1)
    gate, up, n_cols = _rows(gate, up, interleaved)
    dy = as_rows(dy)
    programs, col_blocks, block = grid_of(gate.shape[0], n_cols)
    tensors = dy, gate, up, dgate, dup
    strides = [0 if t is None else t.stride(0) for t in tensors]
    with launch_device(gate):
        _bwd_kernel[(programs,)](
            *tensors, *strides, n_cols, col_blocks, limit, alpha, offset,
            dgate is not None, dup is not None, interleaved, block, num_warps=4,
        )  # fmt: skip
    return results


class _ClampedGLU(torch.autograd.Function):
    """gate is the packed gate and up if up is None."""

    @staticmethod
    def forward(ctx, gate, up, *options):
        ctx.save_for_backward(gate, up)
        ctx.options = options
        return _forward(gate, up, *options)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        need_gate, need_up = ctx.needs_input_grad[:2]
        grads = iter(_backward(dy, gate, up, *ctx.options, need_gate, need_up))
        return (*(next(grads) if need else None for need in (need_gate, need_up)), *[None] * len(ctx.options))


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
    gradient is zero.

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
    return _ClampedGLU.apply(gate, up, float(limit), float(alpha), float(offset), False)


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
    return _ClampedGLU.apply(gate_up, None, float(limit), float(alpha), float(offset), interleaved)
