"""Root-mean-square layer normalisation (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467)."""

import torch
from torch.autograd.function import once_differentiable

from ._runtime import (
    is_dense_with_rows,
    launch_device,
    num_sms,
    num_warps_for,
    tl,
    triton,
    use_triton,
    with_layout_of,
)


def rms_norm_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    cast: str = "before_weight",
) -> torch.Tensor:
    """Plain PyTorch `rms_norm`, in the order of operations of the Hugging Face models."""
    _check(x, weight, cast)
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    if cast == "before_weight":
        return (weight if offset == 0 else offset + weight) * h.to(x.dtype)
    h = h * (weight.float() if offset == 0 else offset + weight.float())
    return h.to(x.dtype)


@triton.jit
def _scale(w_ptr, cols, col_mask, offset, HAS_OFFSET: tl.constexpr, CAST_AFTER: tl.constexpr):
    w = tl.load(w_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)
    if HAS_OFFSET:
        w = w + offset
        if not CAST_AFTER:
            # Eager adds the offset in the weight's own dtype.
            w = w.to(w_ptr.dtype.element_ty).to(tl.float32)
    return w


@triton.jit
def _fwd_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    rstd_ptr,
    n_rows,
    eps,
    offset,
    H: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    CAST_AFTER: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_H)
    col_mask = cols < H
    mask = (rows < n_rows)[:, None] & col_mask[None, :]
    offsets = rows[:, None] * H + cols[None, :]
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    w = _scale(w_ptr, cols, col_mask, offset, HAS_OFFSET, CAST_AFTER)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / H + eps)
    x_hat = x * rstd[:, None]
    if not CAST_AFTER:
        x_hat = x_hat.to(x_ptr.dtype.element_ty).to(tl.float32)
    y = x_hat * w[None, :]
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(rstd_ptr + rows, rstd, mask=rows < n_rows)


@triton.jit
def _bwd_kernel(
    dy_ptr,
    x_ptr,
    w_ptr,
    rstd_ptr,
    dx_ptr,
    dw_ptr,
    n_rows,
    offset,
    H: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    CAST_AFTER: tl.constexpr,
    NEED_DX: tl.constexpr,
    NEED_DW: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    cols = tl.arange(0, BLOCK_H)
    col_mask = cols < H
    w = _scale(w_ptr, cols, col_mask, offset, HAS_OFFSET, CAST_AFTER)
    # One partial sum per tile element: the sum over ROWS waits until after the loop.
    dw = tl.zeros([ROWS, BLOCK_H], dtype=tl.float32)
    for start in range(tl.program_id(0) * ROWS, n_rows, tl.num_programs(0) * ROWS):
        rows = start + tl.arange(0, ROWS).to(tl.int64)
        row_mask = rows < n_rows
        mask = row_mask[:, None] & col_mask[None, :]
        offsets = rows[:, None] * H + cols[None, :]
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows, mask=row_mask, other=0.0)
        x_hat = x * rstd[:, None]
        if NEED_DX:
            g = dy * w[None, :]
            mean = tl.sum(g * x_hat, axis=1) / H
            dx = (g - x_hat * mean[:, None]) * rstd[:, None]
            tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if NEED_DW:
            if not CAST_AFTER:
                # The weight met the rounded x_hat in the forward pass.
                x_hat = x_hat.to(x_ptr.dtype.element_ty).to(tl.float32)
            dw += dy * x_hat
    if NEED_DW:
        tl.store(dw_ptr + tl.program_id(0).to(tl.int64) * H + cols, tl.sum(dw, axis=0), mask=col_mask)


def _tile(hidden: int) -> tuple[int, int, int]:
    """(rows, columns, warps) of a tile: short rows, such as attention heads, share one of 2048 elements."""
    block = max(16, triton.next_power_of_2(hidden))
    rows = max(1, 2048 // block)
    return rows, block, num_warps_for(rows * block)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, offset, cast_after):
        if not is_dense_with_rows(x):
            x = x.contiguous()
        weight = weight.contiguous()
        hidden = x.shape[-1]
        n_rows = x.numel() // hidden
        dtype = x.dtype if cast_after else torch.promote_types(x.dtype, weight.dtype)
        # x is walked in memory order, and empty_like has its strides: any order of the leading dims is kept.
        y = torch.empty_like(x, dtype=dtype)
        rstd = torch.empty(n_rows, dtype=torch.float32, device=x.device)
        rows, block, warps = _tile(hidden)
        with launch_device(x):
            _fwd_kernel[(triton.cdiv(n_rows, rows),)](
                x, weight, y, rstd, n_rows, eps, offset,
                hidden, offset != 0, cast_after, rows, block, num_warps=warps,
            )  # fmt: skip
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset, ctx.cast_after = offset, cast_after
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, rstd = ctx.saved_tensors
        need_dx, need_dw = ctx.needs_input_grad[:2]
        hidden = x.shape[-1]
        n_rows = rstd.numel()
        dy = with_layout_of(dy, x)
        rows, block, warps = _tile(hidden)
        # Programs stay and walk over the rows, about 512 threads of them a multiprocessor: enough to keep
        # loads in flight, few enough that the partial sums of dweight stay small beside x and dy.
        programs = min(triton.cdiv(n_rows, rows), num_sms(x) * max(1, 16 // warps))
        dx = torch.empty_like(x) if need_dx else None
        partial = torch.empty(programs, hidden, dtype=torch.float32, device=x.device) if need_dw else None
        with launch_device(x):
            _bwd_kernel[(programs,)](
                dy, x, weight, rstd, dx, partial, n_rows, ctx.offset,
                hidden, ctx.offset != 0, ctx.cast_after, need_dx, need_dw, rows, block, num_warps=warps,
            )  # fmt: skip
        dw = partial.sum(0).to(weight.dtype) if need_dw else None
        return dx, dw, None, None, None


def _check(x: torch.Tensor, weight: torch.Tensor, cast: str) -> None:
    if cast not in ("before_weight", "after_weight"):
        raise ValueError(f"rms_norm: cast must be 'before_weight' or 'after_weight', got {cast!r}")
    if not (x.is_floating_point() and weight.is_floating_point()):
        raise TypeError(f"rms_norm: x and weight must be floating point, got {x.dtype} and {weight.dtype}")
    if x.dim() == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"rms_norm: expected x [..., H] and weight [H], got {tuple(x.shape)} and {tuple(weight.shape)}"
        )


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    cast: str = "before_weight",
) -> torch.Tensor:
    """x / sqrt(mean(x^2, -1) + eps), scaled by (offset + weight); the statistics are in float32.

    Args:
        x: [..., H], floating point.
        weight: [H], floating point; may have another dtype than x.
        eps: added to the mean square.
        offset: added to the weight (1 in Gemma, whose weights are stored around zero).
        cast: "before_weight" rounds the normalised x to x's dtype, then multiplies (Llama; the result has the
            promoted dtype of x and weight). "after_weight" multiplies in float32, then rounds to x's dtype
            (Gemma, OLMo 2, `torch.nn.RMSNorm`).

    Returns:
        [..., H]; for a dense x with contiguous last dim, with x's strides.

    Raises:
        ValueError: for another `cast`, or shapes other than [..., H] and [H].
        TypeError: if x or weight is not floating point.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, arXiv:1910.07467.
    """
    _check(x, weight, cast)
    if not use_triton(x, weight):
        return rms_norm_reference(x, weight, eps, offset=offset, cast=cast)
    return _RMSNorm.apply(x, weight, float(eps), float(offset), cast == "after_weight")
