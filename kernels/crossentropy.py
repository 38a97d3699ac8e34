"""Cross entropy of logits, in one pass over them forward and one backward, without a float32 copy.

The log-sum-exp is accumulated online (Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867).
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from ._runtime import as_rows, launch_device, num_warps_for, tanh, tl, triton, use_triton


def cross_entropy_reference(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    scale: float = 1.0,
) -> torch.Tensor:
    """Plain PyTorch `cross_entropy`."""
    check_loss_options("cross_entropy", target, reduction, label_smoothing, softcap)
    _check(logits, target)
    z = logits.float()
    if scale != 1:
        z = z * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return F.cross_entropy(
        z.reshape(-1, z.shape[-1]),
        target.reshape(-1),
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


@triton.jit
def _transform(logit, scale, SOFTCAP: tl.constexpr):
    z = logit.to(tl.float32) * scale
    if SOFTCAP is not None:
        z = SOFTCAP * tanh(z / SOFTCAP)
    return z


@triton.jit
def row_loss(row_ptr, target, V, scale, SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, BLOCK: tl.constexpr):
    """(loss, log-sum-exp) of one row of logits. A target outside [0, V) is not read, and gives NaN."""
    inside = (target >= 0) & (target < V)
    # Read before the reductions below, whose barriers keep it ahead of a caller that overwrites the row.
    z_target = _transform(tl.load(row_ptr + target, mask=inside, other=float("nan")), scale, SOFTCAP)
    largest = float("-inf")
    total = 0.0
    z_sum = 0.0
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        mask = cols < V
        z = _transform(tl.load(row_ptr + cols, mask=mask, other=0.0), scale, SOFTCAP)
        if SMOOTHING > 0:
            z_sum += tl.sum(tl.where(mask, z, 0.0), axis=0)
        z = tl.where(mask, z, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(z, axis=0))
        # While every logit so far is -inf, subtracting the maximum would make NaN of exp(-inf).
        shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        total = total * tl.exp(largest - shift) + tl.sum(tl.exp(z - shift), axis=0)
        largest = new_largest
    lse = largest + tl.log(total)
    loss = lse - (1.0 - SMOOTHING) * z_target
    if SMOOTHING > 0:
        loss -= SMOOTHING * z_sum / V
    return loss, lse


@triton.jit
def write_row_grad(
    row_ptr,
    grad_ptr,
    target,
    lse,
    factor,
    V,
    scale,
    SOFTCAP: tl.constexpr,
    SMOOTHING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write factor * d loss / d logits of one row; grad_ptr may be row_ptr."""
    factor = factor * scale
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        mask = cols < V
        z = _transform(tl.load(row_ptr + cols, mask=mask, other=0.0), scale, SOFTCAP)
        grad = tl.exp(z - lse) - SMOOTHING / V - tl.where(cols == target, 1.0 - SMOOTHING, 0.0)
        if SOFTCAP is not None:
            ratio = z / SOFTCAP
            grad *= 1.0 - ratio * ratio
        tl.store(grad_ptr + cols, (grad * factor).to(grad_ptr.dtype.element_ty), mask=mask)


@triton.jit
def write_row_zeros(grad_ptr, V, BLOCK: tl.constexpr):
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        tl.store(grad_ptr + cols, tl.zeros([BLOCK], dtype=grad_ptr.dtype.element_ty), mask=cols < V)


@triton.jit
def _fwd_kernel(
    logits_ptr,
    target_ptr,
    loss_ptr,
    lse_ptr,
    row_stride,
    V,
    ignore_index,
    scale,
    SOFTCAP: tl.constexpr,
    SMOOTHING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    if target == ignore_index:
        tl.store(loss_ptr + row, 0.0)
        tl.store(lse_ptr + row, 0.0)
    else:
        loss, lse = row_loss(logits_ptr + row * row_stride, target, V, scale, SOFTCAP, SMOOTHING, BLOCK)
        tl.store(loss_ptr + row, loss)
        tl.store(lse_ptr + row, lse)


@triton.jit
def _bwd_kernel(
    logits_ptr,
    target_ptr,
    lse_ptr,
    factor_ptr,
    grad_ptr,
    row_stride,
    V,
    ignore_index,
    scale,
    SOFTCAP: tl.constexpr,
    SMOOTHING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    grad_row = grad_ptr + row * V
    if target == ignore_index:
        write_row_zeros(grad_row, V, BLOCK)
    else:
        factor = tl.load(factor_ptr)
        if (target < 0) | (target >= V):
            factor = float("nan")
        write_row_grad(
            logits_ptr + row * row_stride, grad_row, target, tl.load(lse_ptr + row), factor,
            V, scale, SOFTCAP, SMOOTHING, BLOCK,
        )  # fmt: skip


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, ignore_index, mean, smoothing, softcap, scale):
        rows = as_rows(logits)
        target = target.reshape(-1).contiguous()
        n_rows, vocab = rows.shape
        losses = torch.empty(n_rows, dtype=torch.float32, device=rows.device)
        lse = torch.empty_like(losses)
        block = _block(vocab)
        options = (ignore_index, scale, softcap, smoothing)
        with launch_device(rows):
            _fwd_kernel[(n_rows,)](
                rows,
                target,
                losses,
                lse,
                rows.stride(0),
                vocab,
                *options,
                block,
                num_warps=num_warps_for(block),
            )
        n_valid = (target != ignore_index).sum() if mean else None
        ctx.save_for_backward(logits, target, lse, n_valid)
        ctx.options = options
        loss = losses.sum()
        return loss / n_valid if mean else loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        logits, target, lse, n_valid = ctx.saved_tensors
        rows = as_rows(logits)
        n_rows, vocab = rows.shape
        grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        factor = dloss if n_valid is None else dloss / n_valid
        block = _block(vocab)
        with launch_device(rows):
            _bwd_kernel[(n_rows,)](
                rows, target, lse, factor, grad, rows.stride(0), vocab, *ctx.options, block,
                num_warps=num_warps_for(block),
            )  # fmt: skip
        return grad, None, None, None, None, None, None


def _block(vocab: int) -> int:
    """4096 logits at a time, on 8 warps: rows that share a multiprocessor hide each other's reductions."""
    return min(4096, max(128, triton.next_power_of_2(vocab)))


def check_loss_options(
    op: str, target: torch.Tensor, reduction: str, label_smoothing: float, softcap: float | None
) -> None:
    if target.dtype != torch.int64:
        raise TypeError(f"{op}: target must be int64, got {target.dtype}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"{op}: reduction must be 'mean' or 'sum', got {reduction!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{op}: label_smoothing must be between 0 and 1, got {label_smoothing}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{op}: softcap must be positive or None, got {softcap}")


def _check(logits: torch.Tensor, target: torch.Tensor) -> None:
    if not logits.is_floating_point():
        raise TypeError(f"cross_entropy: logits must be floating point, got {logits.dtype}")
    if logits.dim() == 0 or logits.shape[:-1] != target.shape:
        raise ValueError(
            "cross_entropy: expected logits [..., V] and target [...], "
            f"got {tuple(logits.shape)} and {tuple(target.shape)}"
        )


def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    scale: float = 1.0,
) -> torch.Tensor:
    """Cross entropy between target and z = softcap * tanh(scale * logits / softcap), all in float32.

    Args:
        logits: [..., V], floating point; never written to.
        target: [...], int64 class indices.
        ignore_index: rows with this target add nothing to the loss and get zero gradients.
        reduction: "mean" (over the rows not ignored; NaN if there are none, as in PyTorch) or "sum".
        label_smoothing: weight in [0, 1] of the uniform distribution in the target.
        softcap: bound of the logits (Gemma 2); None leaves z = scale * logits.
        scale: factor on the logits (Cohere, Granite).

    Returns:
        float32 scalar. The gradient of the logits has their dtype.

    Raises:
        ValueError: for mismatched shapes, or a reduction, label_smoothing or softcap outside the above.
        TypeError: if logits is not floating point or target not int64.

    On the Triton path a target that is neither ignore_index nor in [0, V) is not read out of bounds; it makes
    the loss and its row's gradient NaN. (PyTorch raises on the CPU and fails a device assertion on CUDA.)

    Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018, arXiv:1805.02867.
    """
    check_loss_options("cross_entropy", target, reduction, label_smoothing, softcap)
    _check(logits, target)
    if not use_triton(logits) or target.device != logits.device:
        return cross_entropy_reference(
            logits,
            target,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            softcap=softcap,
            scale=scale,
        )
    return _CrossEntropy.apply(
        logits, target, ignore_index, reduction == "mean", float(label_smoothing), softcap, float(scale)
    )
