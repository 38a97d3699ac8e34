"""Cross entropy of a linear layer's output, a chunk of rows at a time, so the full logits never exist.

The gradients are computed with the loss, as in Liger Kernel (Hsu et al. 2024, https://arxiv.org/abs/2410.10989).
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from ._runtime import autocast_dtype, launch_device, num_warps_for, tl, triton, use_triton
from .crossentropy import (
    check_loss_options,
    cross_entropy_reference,
    row_loss,
    write_row_grad,
    write_row_zeros,
)


def linear_cross_entropy_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    scale: float = 1.0,
    logits_budget: int = 512 * 2**20,
) -> torch.Tensor:
    """Plain PyTorch `linear_cross_entropy`; holds all logits, whatever the budget."""
    check_loss_options("linear_cross_entropy", target, reduction, label_smoothing, softcap)
    _check(x, weight, target, bias, logits_budget)
    return cross_entropy_reference(
        F.linear(x, weight, bias),
        target,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        softcap=softcap,
        scale=scale,
    )


@triton.jit
def _loss_grad_kernel(
    logits_ptr,
    target_ptr,
    loss_ptr,
    factor_ptr,
    V,
    ignore_index,
    scale,
    SOFTCAP: tl.constexpr,
    SMOOTHING: tl.constexpr,
    WRITE_GRAD: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The loss of one row, and its gradient written over the row."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    row_ptr = logits_ptr + row * V
    if target == ignore_index:
        tl.store(loss_ptr + row, 0.0)
        if WRITE_GRAD:
            write_row_zeros(row_ptr, V, BLOCK)
    else:
        loss, lse = row_loss(row_ptr, target, V, scale, SOFTCAP, SMOOTHING, BLOCK)
        tl.store(loss_ptr + row, loss)
        if WRITE_GRAD:
            factor = 1.0
            if HAS_FACTOR:
                factor = tl.load(factor_ptr)
            if (target < 0) | (target >= V):
                factor = float("nan")
            # No warp may write before all have read the row.
            tl.debug_barrier()
            write_row_grad(row_ptr, row_ptr, target, lse, factor, V, scale, SOFTCAP, SMOOTHING, BLOCK)


def _chunk_rows(n_rows: int, vocab: int, itemsize: int, budget: int) -> int:
    rows = max(1, budget // (vocab * itemsize))
    if rows > 128:
        # Whole tiles for the matrix products.
        rows -= rows % 128
    return min(rows, n_rows)


def _accumulate(total: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """total + a @ b in float32, into total; a new tensor if total is None."""
    if a.dtype == torch.float32 or not a.is_cuda:
        a, b = a.float(), b.float()
        return torch.mm(a, b) if total is None else torch.addmm(total, a, b, out=total)
    if total is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


def _loss_and_grads(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    options: tuple,
    need_x: bool,
    need_w: bool,
    need_b: bool,
) -> tuple[torch.Tensor, dict[str, torch.Tensor | None], torch.Tensor | None]:
    """The loss, a dict of the wanted gradients, and a factor that they still lack (None: none).

    The gradient of x covers the rows in "kept" (None: all of them).
    """
    ignore_index, mean, smoothing, softcap, scale, budget = options
    x = x.reshape(-1, x.shape[-1])
    target = target.reshape(-1).contiguous()
    n_valid = (target != ignore_index).sum()
    kept = None
    # How many rows are kept decides the shapes, which a CUDA graph could not follow.
    if not (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        kept = (target != ignore_index).nonzero().squeeze(1)
        if kept.numel() == target.numel():
            kept = None
        else:
            x, target = x.index_select(0, kept), target.index_select(0, kept)
    n_rows, vocab = x.shape[0], weight.shape[0]
    need_grad = need_x or need_w or need_b
    factor = late_factor = None
    if mean:
        factor = 1.0 / n_valid.clamp(min=1).float()
        if x.dtype == torch.float16:
            # 1/n would push the gradients of the logits into float16's subnormals. Its power of two is left
            # to the backward instead, where it costs no second rounding.
            late_factor = torch.exp2(torch.floor(torch.log2(factor)))
            factor = factor / late_factor
    losses = torch.empty(n_rows, dtype=torch.float32, device=x.device)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else None
    dw = db = None
    if n_rows:
        rows = _chunk_rows(n_rows, vocab, x.element_size(), budget)
        # Several chunks need a float32 sum; so does float16, whose undivided sums could overflow.
        widen = rows < n_rows or x.dtype == torch.float16
        buffer = torch.empty(rows, vocab, dtype=x.dtype, device=x.device)
        # Few, wide programs: the second pass over a row finds it in L2 if not too many rows are under way.
        block = min(16384, max(128, triton.next_power_of_2(vocab)))
        for start in range(0, n_rows, rows):
            x_chunk, target_chunk = x[start : start + rows], target[start : start + rows]
            logits = buffer[: x_chunk.shape[0]]
            if bias is None:
                torch.mm(x_chunk, weight.t(), out=logits)
            else:
                torch.addmm(bias, x_chunk, weight.t(), out=logits)
            with launch_device(x):
                _loss_grad_kernel[(logits.shape[0],)](
                    logits, target_chunk, losses[start:], factor, vocab, ignore_index,
                    scale, softcap, smoothing, need_grad, mean, block, num_warps=num_warps_for(block),
                )  # fmt: skip
            if need_x:
                torch.mm(logits, weight, out=dx[start : start + rows])
            if need_w:
                dw = _accumulate(dw, logits.t(), x_chunk) if widen else torch.mm(logits.t(), x_chunk)
            if need_b:
                part = logits.sum(0, dtype=torch.float32)
                db = part if db is None else db.add_(part)
    if need_w and dw is None:
        dw = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    if need_b and db is None:
        db = torch.zeros_like(bias)
    loss = losses.sum()
    grads = {"x": dx, "weight": dw, "bias": db, "kept": kept}
    return (loss / n_valid if mean else loss), grads, late_factor


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, target, options, grad_enabled):
        needs = [grad_enabled and need for need in ctx.needs_input_grad[:3]]
        with torch.autocast(x.device.type, enabled=False):
            loss, grads, late_factor = _loss_and_grads(x, weight, bias, target, options, *needs)
        ctx.save_for_backward(x, weight, bias, target)
        ctx.options, ctx.needs = options, needs
        ctx.results = (grads, late_factor)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        x, weight, bias, target = ctx.saved_tensors
        # The first backward takes the stored gradients, to scale them in place and to free them; one that
        # comes again (retain_graph) computes them anew.
        results, ctx.results = ctx.results, None
        with torch.autocast(x.device.type, enabled=False):
            if results is None:
                results = _loss_and_grads(x, weight, bias, target, ctx.options, *ctx.needs)[1:]
            grads, late_factor = results
            # One dim: a 0-dim factor would be rounded to the gradient's dtype before the product.
            factor = (dloss if late_factor is None else dloss * late_factor).reshape(1)
            dx, kept = grads.pop("x"), grads.pop("kept")
            if dx is not None:
                torch.mul(dx, factor, out=dx)
                if kept is not None:
                    full = torch.zeros(target.numel(), dx.shape[1], dtype=dx.dtype, device=dx.device)
                    dx = full.index_copy_(0, kept, dx)
                dx = dx.view(x.shape)
            dw = _scaled(grads.pop("weight"), factor, weight)
            db = _scaled(grads.pop("bias"), factor, bias)
        return dx, dw, db, None, None, None


def _scaled(grad: torch.Tensor | None, factor: torch.Tensor, like: torch.Tensor | None) -> torch.Tensor | None:
    """grad * factor in the dtype of `like`, in one kernel, over grad where its dtype allows."""
    if grad is None:
        return None
    out = grad if grad.dtype == like.dtype else torch.empty_like(grad, dtype=like.dtype)
    return torch.mul(grad, factor, out=out)


def _check(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, bias: torch.Tensor | None, budget: int) -> None:
    tensors = [x, weight] if bias is None else [x, weight, bias]
    if not all(t.is_floating_point() for t in tensors):
        raise TypeError(f"linear_cross_entropy: expected floating-point inputs, got {[t.dtype for t in tensors]}")
    if len({t.dtype for t in tensors}) > 1 and autocast_dtype(x.device.type) is None:
        raise TypeError(
            "linear_cross_entropy: x, weight and bias must have one dtype outside autocast, "
            f"got {[t.dtype for t in tensors]}"
        )
    if (
        x.dim() == 0
        or weight.dim() != 2
        or weight.shape[1] != x.shape[-1]
        or target.shape != x.shape[:-1]
        or (bias is not None and bias.shape != weight.shape[:1])
    ):
        raise ValueError(
            "linear_cross_entropy: expected x [..., H], weight [V, H], target [...], bias [V] or None; got "
            f"{tuple(x.shape)}, {tuple(weight.shape)}, {tuple(target.shape)} and "
            f"{None if bias is None else tuple(bias.shape)}"
        )
    if budget <= 0:
        raise ValueError(f"linear_cross_entropy: logits_budget must be positive, got {budget}")


def linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    scale: float = 1.0,
    logits_budget: int = 512 * 2**20,
) -> torch.Tensor:
    """`cross_entropy(x @ weight.T + bias, target, ...)` with at most `logits_budget` bytes of logits held.

    If a gradient is wanted it is computed with the loss, chunk by chunk, and the backward only scales it; a
    second backward through the same graph computes it again. The weight's gradient is summed over chunks in
    float32.

    Args:
        x: [..., H], floating point.
        weight: [V, H], of x's dtype. Under autocast x, weight and bias are cast as for `F.linear`.
        target: [...], int64 class indices.
        bias: [V] or None.
        ignore_index, reduction, label_smoothing, softcap, scale: as for `cross_entropy`.
        logits_budget: bytes of logits held at once; one row of logits is held whatever the budget.

    Returns:
        float32 scalar.

    Raises:
        ValueError: for mismatched shapes, or an option outside its range.
        TypeError: if x, weight or bias is not floating point, their dtypes differ, or target is not int64.

    Rows with target ignore_index are dropped first, which waits for the device once per call (not while a
    CUDA graph is captured: then they are computed and given zero gradients). Targets out of range behave as
    in `cross_entropy`.

    Source: Hsu et al., "Liger Kernel: Efficient Triton Kernels for LLM Training", 2024, arXiv:2410.10989.
    """
    check_loss_options("linear_cross_entropy", target, reduction, label_smoothing, softcap)
    _check(x, weight, target, bias, logits_budget)
    dtype = autocast_dtype(x.device.type)
    if dtype is not None:
        x, weight, bias = (t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (x, weight, bias))
    if not use_triton(x, weight, bias) or target.device != x.device:
        return linear_cross_entropy_reference(
            x,
            weight,
            target,
            bias,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            softcap=softcap,
            scale=scale,
            logits_budget=logits_budget,
        )
    options = (
        ignore_index,
        reduction == "mean",
        float(label_smoothing),
        softcap,
        float(scale),
        logits_budget,
    )
    return _LinearCrossEntropy.apply(x, weight, bias, target, options, torch.is_grad_enabled())
