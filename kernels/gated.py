"""Gated linear units, act(gate) * up (Shazeer 2020, https://arxiv.org/abs/2002.05202)."""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from ._runtime import as_rows, launch_device, num_warps_for, tanh, tl, triton, use_triton

_ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def glu_reference(gate: torch.Tensor, up: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    """Plain PyTorch `glu`."""
    _check(gate, up, activation)
    return _ACTIVATIONS[activation](gate) * up


def packed_glu_reference(gate_up: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    """Plain PyTorch `packed_glu`."""
    _check_packed(gate_up, activation)
    gate, up = gate_up.chunk(2, dim=-1)
    return _ACTIVATIONS[activation](gate) * up


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    """(act(x), act'(x)); the compiler drops the derivative where it is not used."""
    if ACTIVATION == "silu":
        sigmoid = 1.0 / (1.0 + tl.exp(-x))
        value = x * sigmoid
        slope = sigmoid * (1.0 + x * (1.0 - sigmoid))
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        value = x * cdf
        slope = cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACTIVATION == "gelu_tanh":
        t = tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))
        value = 0.5 * x * (1.0 + t)
        inner = 0.7978845608028654 * (1.0 + 0.134145 * x * x)
        slope = 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner
    else:
        # Written so that NaN passes, as it does in torch.relu.
        value = tl.where(x <= 0, 0.0, x)
        slope = tl.where(x <= 0, 0.0, 1.0)
    return value, slope


@triton.jit
def _fwd_kernel(
    gate_ptr,
    up_ptr,
    y_ptr,
    gate_stride,
    up_stride,
    y_stride,
    n_cols,
    col_blocks,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    row = (pid // col_blocks).to(tl.int64)
    cols = (pid % col_blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < n_cols
    gate = tl.load(gate_ptr + row * gate_stride + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + cols, mask=mask, other=0.0).to(tl.float32)
    value, _ = _activate(gate, ACTIVATION)
    tl.store(y_ptr + row * y_stride + cols, (value * up).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
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
    NEED_DGATE: tl.constexpr,
    NEED_DUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    row = (pid // col_blocks).to(tl.int64)
    cols = (pid % col_blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < n_cols
    dy = tl.load(dy_ptr + row * dy_stride + cols, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + cols, mask=mask, other=0.0).to(tl.float32)
    value, slope = _activate(gate, ACTIVATION)
    if NEED_DGATE:
        up = tl.load(up_ptr + row * up_stride + cols, mask=mask, other=0.0).to(tl.float32)
        dgate = dy * up * slope
        tl.store(dgate_ptr + row * dgate_stride + cols, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
    if NEED_DUP:
        dup = dy * value
        tl.store(dup_ptr + row * dup_stride + cols, dup.to(dup_ptr.dtype.element_ty), mask=mask)


def _grid(tensors: list[torch.Tensor | None]) -> tuple[int, int, int, int]:
    """(programs, columns, column blocks, block) of [rows, I] tensors; contiguous ones are one long row."""
    n_rows, n_cols = tensors[0].shape
    if all(t is None or t.is_contiguous() for t in tensors):
        n_rows, n_cols = 1, n_rows * n_cols
    block = min(1024, max(128, triton.next_power_of_2(n_cols)))
    col_blocks = triton.cdiv(n_cols, block)
    return n_rows * col_blocks, n_cols, col_blocks, block


def _forward(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    y = torch.empty(gate.shape, dtype=torch.promote_types(gate.dtype, up.dtype), device=gate.device)
    gate, up, y_rows = as_rows(gate), as_rows(up), y.view(-1, y.shape[-1])
    programs, n_cols, col_blocks, block = _grid([gate, up, y_rows])
    with launch_device(gate):
        _fwd_kernel[(programs,)](
            gate, up, y_rows, gate.stride(0), up.stride(0), y_rows.stride(0),
            n_cols, col_blocks, activation, block, num_warps=num_warps_for(block),
        )  # fmt: skip
    return y


def _backward(
    dy: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    dgate: torch.Tensor | None,
    dup: torch.Tensor | None,
    activation: str,
) -> None:
    """Write the gradients into dgate and dup ([rows, I] with contiguous rows); None is skipped."""
    dy, gate, up = as_rows(dy), as_rows(gate), as_rows(up)
    programs, n_cols, col_blocks, block = _grid([dy, gate, up, dgate, dup])
    with launch_device(gate):
        _bwd_kernel[(programs,)](
            dy, gate, up, dgate, dup, dy.stride(0), gate.stride(0), up.stride(0),
            0 if dgate is None else dgate.stride(0), 0 if dup is None else dup.stride(0),
            n_cols, col_blocks, dgate is not None, dup is not None, activation, block,
            num_warps=num_warps_for(block),
        )  # fmt: skip


class _GLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, activation):
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return _forward(gate, up, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        grads = [
            torch.empty(t.shape, dtype=t.dtype, device=t.device) if needed else None
            for t, needed in zip((gate, up), ctx.needs_input_grad[:2], strict=True)
        ]
        dgate, dup = (None if g is None else g.view(-1, g.shape[-1]) for g in grads)
        _backward(dy, gate, up, dgate, dup, ctx.activation)
        return *grads, None


class _PackedGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up, activation):
        ctx.save_for_backward(gate_up)
        ctx.activation = activation
        return _forward(*gate_up.chunk(2, dim=-1), activation)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (gate_up,) = ctx.saved_tensors
        grad = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
        _backward(dy, *gate_up.chunk(2, dim=-1), *grad.view(-1, grad.shape[-1]).chunk(2, dim=-1), ctx.activation)
        return grad, None


def _check_activation(op: str, activation: str, *tensors: torch.Tensor) -> None:
    if activation not in _ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {', '.join(_ACTIVATIONS)}, got {activation!r}")
    for tensor in tensors:
        if not tensor.is_floating_point():
            raise TypeError(f"{op}: expected floating-point inputs, got {tensor.dtype}")


def _check(gate: torch.Tensor, up: torch.Tensor, activation: str) -> None:
    _check_activation("glu", activation, gate, up)
    if gate.dim() == 0 or gate.shape != up.shape:
        raise ValueError(
            f"glu: gate and up must have one shape [..., I], got {tuple(gate.shape)} and {tuple(up.shape)}"
        )


def _check_packed(gate_up: torch.Tensor, activation: str) -> None:
    _check_activation("packed_glu", activation, gate_up)
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        raise ValueError(f"packed_glu: the last dim of gate_up must be even, got shape {tuple(gate_up.shape)}")


def glu(gate: torch.Tensor, up: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    """act(gate) * up, computed in float32 and rounded once; the backward recomputes the activation.

    Args:
        gate: [..., I], floating point. Rows one stride apart (halves of a packed tensor) are not copied.
        up: [..., I], floating point.
        activation: "silu" (SwiGLU), "gelu" (with erf; GEGLU), "gelu_tanh" or "relu" (ReGLU).

    Returns:
        [..., I], contiguous, in the promoted dtype of gate and up.

    Raises:
        ValueError: for an unknown activation, or gate and up of different shapes.
        TypeError: if an input is not floating point.

    Source: Shazeer, "GLU Variants Improve Transformer", 2020, arXiv:2002.05202.
    """
    _check(gate, up, activation)
    if not use_triton(gate, up):
        return glu_reference(gate, up, activation)
    return _GLU.apply(gate, up, activation)


def packed_glu(gate_up: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    """`glu` of the two halves of the last dim: act(gate_up[..., :I]) * gate_up[..., I:].

    Args:
        gate_up: [..., 2 * I], floating point, the gate first.
        activation: as for `glu`.

    Returns:
        [..., I], contiguous, in gate_up's dtype. The gradient is one [..., 2 * I] tensor.

    Raises:
        ValueError: for an unknown activation, or a last dim of odd size.
        TypeError: if gate_up is not floating point.

    Source: Shazeer, "GLU Variants Improve Transformer", 2020, arXiv:2002.05202.
    """
    _check_packed(gate_up, activation)
    if not use_triton(gate_up):
        return packed_glu_reference(gate_up, activation)
    return _PackedGLU.apply(gate_up, activation)
