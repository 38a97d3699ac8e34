"""Gated linear units, act(gate) * up (Shazeer 2020, https://arxiv.org/abs/2002.05202)."""

import functools
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from ._activations import IN_TORCH, Activation, in_torch, in_triton, key_of
from ._autograd import apply, once_differentiable
from ._operators import operator
from ._runtime import as_rows, jit, launch_device, tl, triton, use_triton


def glu_reference(gate: torch.Tensor, up: torch.Tensor, activation: str | Activation = "silu") -> torch.Tensor:
    """Plain PyTorch `glu`.

    Arguments, results and errors are those of `glu`.

    Examples:
        >>> import torch
        >>> from ligerfx.kernels import glu_reference
        >>> glu_reference(torch.tensor([-1.0, 2.0]), torch.tensor([3.0, 3.0]), "relu")
        tensor([0., 6.])
    """
    check_glu("glu", gate, up, activation)
    return gated(gate, up, activation)


def packed_glu_reference(gate_up: torch.Tensor, activation: str | Activation = "silu") -> torch.Tensor:
    """Plain PyTorch `packed_glu`.

    Arguments, results and errors are those of `packed_glu`.

    Examples:
        >>> import torch
        >>> from ligerfx.kernels import packed_glu_reference
        >>> packed_glu_reference(torch.tensor([-1.0, 2.0, 3.0, 3.0]), "relu")  # the gate is the first half
        tensor([0., 6.])
    """
    check_packed_glu("packed_glu", gate_up, activation)
    gate, up = gate_up.chunk(2, dim=-1)
    return gated(gate, up, activation)


def gated(gate, up, activation):
    """`glu_reference`, for arguments that were checked."""
    return in_torch(activation)(gate) * up


@triton.jit
def _load(gate_ptr, up_ptr, row, gate_stride, up_stride, first, n_cols, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr):
    """gate and up from column `first` on; where they take turns, both from gate_ptr."""
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
def _unit(gate, up, dy, ACTIVATE: tl.constexpr, LIMIT: tl.constexpr, AT_LIMIT: tl.constexpr, OFFSET: tl.constexpr):
    """y and, from its gradient, those of gate and up. For what a kernel does not use of them, nothing is loaded or
    computed. AT_LIMIT: whether a gradient passes where the limit is met, and not exceeded."""
    held_gate = gate
    factor = up
    if LIMIT is not None:
        # Written so that NaN passes, as it does in torch.clamp.
        held_gate = tl.where(gate > LIMIT, LIMIT, gate)
        factor = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
    if OFFSET != 0:
        factor = factor + OFFSET
    value, slope = ACTIVATE(held_gate)
    dgate = dy * factor * slope
    dup = dy * value
    if LIMIT is not None:
        size = tl.abs(up)
        dgate = tl.where(gate <= LIMIT if AT_LIMIT else gate < LIMIT, dgate, 0.0)
        dup = tl.where(size <= LIMIT if AT_LIMIT else size < LIMIT, dup, 0.0)
    return value * factor, dgate, dup


@jit
def _fwd_kernel(
    gate_ptr,
    up_ptr,
    y_ptr,
    gate_stride,
    up_stride,
    y_stride,
    n_cols,
    col_blocks,
    ACTIVATE: tl.constexpr,
    LIMIT: tl.constexpr,
    OFFSET: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    row = (pid // col_blocks).to(tl.int64)
    first = (pid % col_blocks).to(tl.int64) * BLOCK
    gate, up = _load(gate_ptr, up_ptr, row, gate_stride, up_stride, first, n_cols, INTERLEAVED, BLOCK)
    y, _, _ = _unit(gate, up, 0.0, ACTIVATE, LIMIT, True, OFFSET)
    cols = first + tl.arange(0, BLOCK)
    tl.store(y_ptr + row * y_stride + cols, y.to(y_ptr.dtype.element_ty), mask=cols < n_cols)


@jit
def _bwd_kernel(
    dy_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    z_ptr,
    dy_stride,
    gate_stride,
    up_stride,
    dgate_stride,
    dup_stride,
    z_stride,
    n_cols,
    col_blocks,
    ACTIVATE: tl.constexpr,
    LIMIT: tl.constexpr,
    AT_LIMIT: tl.constexpr,
    OFFSET: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What is not wanted is None; where gate and up take turns, so do their gradients, at dgate_ptr."""
    pid = tl.program_id(0)
    row = (pid // col_blocks).to(tl.int64)
    first = (pid % col_blocks).to(tl.int64) * BLOCK
    cols = first + tl.arange(0, BLOCK)
    mask = cols < n_cols
    dy = tl.load(dy_ptr + row * dy_stride + cols, mask=mask, other=0.0).to(tl.float32)
    gate, up = _load(gate_ptr, up_ptr, row, gate_stride, up_stride, first, n_cols, INTERLEAVED, BLOCK)
    z, dgate, dup = _unit(gate, up, dy, ACTIVATE, LIMIT, AT_LIMIT, OFFSET)
    if INTERLEAVED:
        pairs = 2 * first + tl.arange(0, 2 * BLOCK)
        both = tl.interleave(dgate, dup).to(dgate_ptr.dtype.element_ty)
        tl.store(dgate_ptr + row * dgate_stride + pairs, both, mask=pairs < 2 * n_cols)
    else:
        if dgate_ptr is not None:
            tl.store(dgate_ptr + row * dgate_stride + cols, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
        if dup_ptr is not None:
            tl.store(dup_ptr + row * dup_stride + cols, dup.to(dup_ptr.dtype.element_ty), mask=mask)
    if z_ptr is not None:
        # z may lie over dy: no warp may write before all have read.
        tl.debug_barrier()
        tl.store(z_ptr + row * z_stride + cols, z.to(z_ptr.dtype.element_ty), mask=mask)


def _grid_of(n_rows: int, n_cols: int) -> tuple[int, int, int]:
    """(programs, column blocks, block)."""
    block = min(1024, max(128, 1 << (n_cols - 1).bit_length()))
    col_blocks = -(-n_cols // block)
    return n_rows * col_blocks, col_blocks, block


def halves(gate: torch.Tensor, up: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """gate and up; where there is no up, gate is both of them, packed."""
    return gate.chunk(2, dim=-1) if up is None else (gate, up)


def _parts(gate, up, interleaved):
    """What the kernels take for gate and up."""
    return (gate, None) if interleaved else halves(gate, up)


def _layout(tensors, n_cols, interleaved):
    """(the tensors as rows, the strides of these, their number, columns); one row where there are no gaps."""
    if not interleaved and all(t is None or t.is_contiguous() for t in tensors):
        return tensors, (0,) * len(tensors), 1, tensors[0].numel()
    tensors = [None if t is None else as_rows(t) for t in tensors]
    return tensors, [0 if t is None else t.stride(0) for t in tensors], tensors[0].shape[0], n_cols


def _glu_result(gate, up, *options):
    gate, up = halves(gate, up)
    dtype = gate.dtype if gate.dtype == up.dtype else torch.promote_types(gate.dtype, up.dtype)
    return torch.empty(gate.shape, dtype=dtype, device=gate.device)


@operator(
    "glu(Tensor gate, Tensor? up, str activation, float? limit=None, float offset=0.0, bool interleaved=False)"
    " -> Tensor",
    _glu_result,
)
def glu_forward(
    gate: torch.Tensor,
    up: torch.Tensor | None,
    activation: str,
    limit: float | None = None,
    offset: float = 0.0,
    interleaved: bool = False,
) -> torch.Tensor:
    """act(gate) * (up + offset) by the kernel; not differentiable. gate is the packed gate and up if up is None.

    limit is as for `clamped_glu`, or None; interleaved as for `packed_clamped_glu`.
    """
    y = _glu_result(gate, up)
    tensors, strides, n_rows, n_cols = _layout((*_parts(gate, up, interleaved), y), y.shape[-1], interleaved)
    programs, col_blocks, block = _grid_of(n_rows, n_cols)
    with launch_device(gate):
        _fwd_kernel[(programs,)](
            *tensors, *strides, n_cols, col_blocks,
            in_triton(activation), limit, offset, interleaved, block, num_warps=4,
        )  # fmt: skip
    return y


def glu_backward(
    dy: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor | None,
    activation: str,
    need_gate: bool,
    need_up: bool,
    need_z: bool = False,
    *options: Any,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The gradients of gate and of up, and `glu_forward`'s result again, in dy's shape; None for what is not needed.

    gate and its gradient are packed if up is None. If the result is needed dy is given up: it may be written over dy.
    The options are those of `glu_forward` from limit on.
    """
    found = iter(_backward(dy, gate, up, activation, need_gate, need_up, need_z, *options))
    dgate, dup, z = (next(found) if need else None for need in (need_gate, need_up, need_z))
    return dgate, dup, z


@functools.cache
def clamp_has_gradient_at_limit() -> bool:
    """Whether `torch.clamp` hands the gradient on where its input is the limit: up to torch 2.13, and not in 2.14."""
    with _disable_current_modes(), torch.inference_mode(False), torch.enable_grad():
        x = torch.ones((), device="cpu", requires_grad=True)
        (slope,) = torch.autograd.grad(x.clamp(max=1.0), x)
    return bool(slope)


def _backward_results(dy, gate, up, activation, need_gate, need_up, need_z, *options):
    grads = [(gate, need_gate), (up, need_up)]
    results = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x, need in grads if need]
    return results + [torch.empty(dy.shape, dtype=dy.dtype, device=dy.device)] * need_z


@operator(
    "glu_backward(Tensor dy, Tensor gate, Tensor? up, str activation, bool need_gate, bool need_up, bool need_z,"
    " float? limit=None, float offset=0.0, bool interleaved=False) -> Tensor[]",
    _backward_results,
    over_dy=False,
)
def _backward(
    dy, gate, up, activation, need_gate, need_up, need_z, limit=None, offset=0.0, interleaved=False, over_dy=True
):
    results = _backward_results(dy, gate, up, activation, need_gate, need_up, need_z and not over_dy)
    if need_z and over_dy:
        dy = dy.contiguous()
        results.append(dy)
    grads = iter(results)
    dgate, dup, z = (next(grads) if need else None for need in (need_gate, need_up, need_z))
    if up is None and need_gate:
        dgate, dup = _parts(dgate.view(-1, dgate.shape[-1]), None, interleaved)
    tensors = dy, *_parts(gate, up, interleaved), dgate, dup, z
    tensors, strides, n_rows, n_cols = _layout(tensors, dy.shape[-1], interleaved)
    programs, col_blocks, block = _grid_of(n_rows, n_cols)
    with launch_device(gate):
        _bwd_kernel[(programs,)](
            *tensors, *strides, n_cols, col_blocks,
            in_triton(activation), limit, limit is None or clamp_has_gradient_at_limit(), offset, interleaved, block,
            num_warps=4,
        )  # fmt: skip
    return results


class GLU(torch.autograd.Function):
    """`glu_forward`, differentiable."""

    @staticmethod
    def forward(ctx, gate, up, activation, *options):
        ctx.save_for_backward(gate, up)
        ctx.activation, ctx.options = activation, options
        return glu_forward(gate, up, activation, *options)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        dgate, dup, _ = glu_backward(dy, gate, up, ctx.activation, *ctx.needs_input_grad[:2], False, *ctx.options)
        return dgate, dup, None, *[None] * len(ctx.options)


def check_activation(op: str, activation: str | Activation) -> None:
    if not isinstance(activation, Activation) and activation not in IN_TORCH:
        raise ValueError(f"{op}: activation must be one of {', '.join(IN_TORCH)}, got {activation!r}")


def _check_floating(op: str, *tensors: torch.Tensor) -> None:
    for tensor in tensors:
        if not tensor.is_floating_point():
            raise TypeError(f"{op}: expected floating-point inputs, got {tensor.dtype}")


def check_glu(op: str, gate: torch.Tensor, up: torch.Tensor, activation: str | Activation) -> None:
    check_activation(op, activation)
    check_gate_and_up(op, gate, up)


def check_packed_glu(op: str, gate_up: torch.Tensor, activation: str | Activation) -> None:
    check_activation(op, activation)
    check_gate_up(op, gate_up)


def check_gate_and_up(op: str, gate: torch.Tensor, up: torch.Tensor) -> None:
    _check_floating(op, gate, up)
    if gate.dim() == 0 or gate.shape != up.shape:
        raise ValueError(
            f"{op}: gate and up must have one shape [..., I], got {tuple(gate.shape)} and {tuple(up.shape)}"
        )


def check_gate_up(op: str, gate_up: torch.Tensor) -> None:
    _check_floating(op, gate_up)
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        raise ValueError(f"{op}: the last dim of gate_up must be even, got shape {tuple(gate_up.shape)}")


def glu(gate: torch.Tensor, up: torch.Tensor, activation: str | Activation = "silu") -> torch.Tensor:
    """act(gate) * up, computed in float32 and rounded once; the backward recomputes the activation.

    Args:
        gate: [..., I], floating point. Rows one stride apart (halves of a packed tensor) are not copied.
        up: [..., I], floating point.
        activation: "silu" (SwiGLU), "gelu" (with erf; GEGLU), "gelu_tanh", "relu" (ReGLU) or "relu2" (its square); or
            one that `ligerfx.generated_glu` has written a kernel for.

    Returns:
        [..., I], contiguous, in the promoted dtype of gate and up.

    Raises:
        ValueError: for an unknown activation, or gate and up of different shapes.
        TypeError: if an input is not floating point.

    Source: Shazeer, "GLU Variants Improve Transformer", 2020, arXiv:2002.05202.

    Examples:
        >>> import torch
        >>> from ligerfx.kernels import glu
        >>> gate, up = torch.randn(2, 5, 8, requires_grad=True), torch.randn(2, 5, 8)
        >>> y = glu(gate, up)
        >>> torch.allclose(y, torch.nn.functional.silu(gate) * up)
        True
        >>> y.sum().backward()
        >>> gate.grad.shape
        torch.Size([2, 5, 8])
    """
    if not use_triton(gate, up):
        return glu_reference(gate, up, activation)
    check_glu("glu", gate, up, activation)
    return apply(GLU, gate, up, key_of(activation))


def packed_glu(gate_up: torch.Tensor, activation: str | Activation = "silu") -> torch.Tensor:
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

    Examples:
        >>> import torch
        >>> from ligerfx.kernels import packed_glu
        >>> gate_up = torch.randn(2, 5, 16)
        >>> gate, up = gate_up.chunk(2, dim=-1)
        >>> torch.allclose(packed_glu(gate_up, "gelu"), torch.nn.functional.gelu(gate) * up)
        True
    """
    if not use_triton(gate_up):
        return packed_glu_reference(gate_up, activation)
    check_packed_glu("packed_glu", gate_up, activation)
    return apply(GLU, gate_up, None, key_of(activation))
