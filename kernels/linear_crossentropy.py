"""Cross entropy of a linear layer's output, a chunk of rows at a time, so the full logits never exist.

The gradients are computed with the loss, as in Liger Kernel (Hsu et al. 2024, https://arxiv.org/abs/2410.10989).
"""

import torch
import torch.nn.functional as F

from . import _hopper_sum, _unnormalised
from ._autograd import apply, once_differentiable
from ._linear import no_autocast
from ._operators import operator
from ._runtime import PLAIN, autocast_dtype, ceil_div, jit, launch_device, tl, triton, use_triton
from ._weight_grad import WeightGrad, columns_inside, empty_rows, padded, scale_to
from .counted_rows import CountedRows, capturing, rows_that_count
from .crossentropy import (
    check_loss_options,
    cross_entropy_reference,
    load_target_z,
    loss_of_stats,
    row_stats,
    write_row_grad,
    write_row_zeros,
    write_target_grad,
)

# Room for 2048 rows of 16-bit logits of the vocabularies of Qwen (151936, 152064): with 1000 rows, reading and writing
# the sum of the weight's gradient would take an H100 nearly as long as the matrix product that is added to it.
LOGITS_BUDGET = 608 * 2**20


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
    z_loss: float = 0.0,
    logits_budget: int = LOGITS_BUDGET,
    accumulate_in: torch.dtype | None = torch.float32,
    rows: CountedRows | torch.Tensor | None = None,
) -> torch.Tensor:
    """Plain PyTorch `linear_cross_entropy`; holds all logits, whatever the budget, and ignores `rows`.

    Arguments, results and errors are those of `linear_cross_entropy`.

    Examples:
        >>> import torch
        >>> from ligerfx.kernels import linear_cross_entropy_reference
        >>> x, weight, target = torch.randn(4, 8), torch.zeros(16, 8), torch.tensor([1, 5, 0, -100])
        >>> linear_cross_entropy_reference(x, weight, target)  # log 16
        tensor(2.7726)
    """
    check_loss_options("linear_cross_entropy", target, reduction, label_smoothing, softcap)
    _check(x, weight, target, bias, ignore_index, logits_budget, accumulate_in, rows)
    return cross_entropy_reference(
        F.linear(x, weight, bias),
        target,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        softcap=softcap,
        scale=scale,
        z_loss=z_loss,
    )


@jit
def _loss_grad_kernel(
    logits_ptr,
    target_ptr,
    loss_ptr,
    factor_ptr,
    row_stride,
    V,
    ignore_index,
    scale,
    z_loss,
    SOFTCAP: tl.constexpr,
    SMOOTHING: tl.constexpr,
    WRITE_GRAD: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The loss of one row, and its gradient written over the row.

    The gradient's pass reads the row again, from the L2 cache as far as the rows under way fit in there.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    row_ptr = logits_ptr + row * row_stride
    if target == ignore_index:
        tl.store(loss_ptr + row, 0.0)
        if WRITE_GRAD:
            write_row_zeros(row_ptr, V, BLOCK)
    else:
        z_target = load_target_z(row_ptr, target, V, scale, SOFTCAP)
        largest, total, z_sum = row_stats(row_ptr, V, scale, SOFTCAP, SMOOTHING, BLOCK, 1, "evict_last")
        loss, lse = loss_of_stats(largest, total, z_sum, z_target, V, z_loss, SMOOTHING)
        tl.store(loss_ptr + row, loss)
        if WRITE_GRAD:
            factor = scale
            if HAS_FACTOR:
                factor *= tl.load(factor_ptr)
            if (target < 0) | (target >= V):
                factor = float("nan")
            weight = factor * (1.0 + 2.0 * z_loss * lse) / total
            constant = factor * SMOOTHING / V
            # No warp may write before all have read the row.
            tl.debug_barrier()
            write_row_grad(row_ptr, row_ptr, V, largest, weight, constant, scale, SOFTCAP, BLOCK, 1)
            hot = factor * (1.0 - SMOOTHING)
            write_target_grad(row_ptr, target, V, z_target, largest, weight, constant, hot, SOFTCAP)


def _tuning(vocab: int) -> tuple[int, int]:
    """(logits, warps) at a time.

    Measured on 2048 rows of 128256 and 151936 bfloat16 logits on an H100: 1.3 times as long as a copy. Loads
    pipelined, a part of the row kept in registers, programs that walk over rows, or several that share one, took as
    long or longer.
    """
    block = min(16384, max(128, triton.next_power_of_2(vocab)))
    return block, min(32, max(4, block // 256))


def loss_and_grad_(
    logits: torch.Tensor,
    target: torch.Tensor,
    losses: torch.Tensor,
    factor: torch.Tensor | None,
    want_grad: bool,
    options: tuple,
) -> None:
    """Write the loss of each row of logits to losses, and factor times its gradient over the logits if wanted."""
    n_rows, vocab = logits.shape
    block, warps = _tuning(vocab)
    with launch_device(logits):
        _loss_grad_kernel[(n_rows,)](
            logits, target, losses, factor, logits.stride(0), vocab, *options,
            want_grad, factor is not None, block, num_warps=warps,
        )  # fmt: skip


def _chunk_rows(n_rows: int, row_bytes: int, budget: int, spared: int = 0) -> int:
    """Rows a chunk: one chunk if the budget allows, else few of about the same size.

    The budget allows one chunk `spared` bytes more: what it takes less than chunks besides its logits.

    Rows in multiples of 512, where there are that many: the gradient of x, [rows, H], has few tiles, each a sum over
    the vocabulary, and most hidden sizes then fill the multiprocessors evenly.
    """
    most = max(1, budget // row_bytes)
    if n_rows <= most or n_rows * row_bytes <= budget + spared:
        return n_rows
    tile = next(tile for tile in (512, 128, 1) if tile <= most)
    n_chunks = ceil_div(n_rows, most - most % tile)
    return min(n_rows, ceil_div(ceil_div(n_rows, n_chunks), tile) * tile)


def _chunk_rows_and_bits(
    x: torch.Tensor, weight: torch.Tensor, n_rows: int, options: dict, need_w: bool, fuse: bool, fused: bool
) -> tuple[int, int | None]:
    """Rows a chunk, and bits of the sum of the weight's gradient, as `WeightGrad` takes them."""
    in_float32 = options["accumulate_in"] == torch.float32
    spared = 0  # by one chunk: a float32 sum over chunks, and what lies in the memory of the gradient
    if need_w and x.dtype == torch.bfloat16:
        inside = columns_inside(*weight.shape, n_rows) if fused else 0
        spared = 2 * (weight.numel() * in_float32 + inside * n_rows)
    chunk = _chunk_rows(n_rows, padded(weight.shape[0]) * x.element_size(), options["budget"], spared)
    if x.dtype == torch.float16:
        return chunk, 32  # it has not been divided by n, so even one product could overflow
    if chunk == n_rows or not in_float32:
        return chunk, None  # one product is no sum
    return chunk, 24 if fuse and _hopper_sum.takes(x, weight) else 32


def _loss_and_grads(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    rows: CountedRows,
    options: dict,
    need_x: bool,
    need_w: bool,
    need_b: bool,
    fuse: bool = True,
) -> tuple[torch.Tensor, tuple, torch.Tensor | None]:
    """The loss, the wanted gradients (x's, weight's, bias's), and a factor that they still lack (None: none).

    fuse: whether products may be our own, and end in exponentials or add to a sum in 24 bits, where that is possible.
    """
    if capturing(x):
        rows = CountedRows(target, rows.ignore_index)
    x = x.reshape(-1, x.shape[-1])
    target = target.reshape(-1).contiguous()
    kept = rows.kept()
    labels = target if kept is None else target.index_select(0, kept)
    n_rows, vocab = labels.shape[0], weight.shape[0]
    need_grad = need_x or need_w or need_b
    factor = late_factor = None
    if options["mean"]:
        factor = 1.0 / rows.n_valid.clamp(min=1).float()
        if x.dtype == torch.float16:
            # 1/n would push the gradients of the logits into float16's subnormals. Its power of two is left
            # to the backward instead, where it costs no second rounding.
            late_factor = torch.exp2(torch.floor(torch.log2(factor)))
            factor = factor / late_factor
    losses = torch.empty(n_rows, dtype=torch.float32, device=x.device)
    dx = dw = db = None
    if need_x:
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if kept is not None:
            dx.zero_()
    if need_b:
        db = torch.zeros(vocab, dtype=torch.float32, device=x.device)
    if n_rows:
        fused = fuse and need_grad and not need_b and _unnormalised.takes(x[:n_rows], weight, bias, options["loss"])
        chunk, bits = _chunk_rows_and_bits(x, weight, n_rows, options, need_w, fuse, fused)
        if need_w:
            dw = WeightGrad(weight, bits)
        hot = torch.zeros(n_rows, dtype=torch.float32, device=x.device) if fused else None
        # Of one chunk most lies in the memory of the gradient that is made of it.
        room = dw.room(n_rows) if fused and need_w and chunk == n_rows else [empty_rows(chunk, vocab, x)]
        for start in range(0, n_rows, chunk):
            part = slice(start, start + chunk)
            if kept is None:
                x_chunk, to = x[part], None
                dx_chunk = dx[part] if need_x else None
            else:
                x_chunk, to = x.index_select(0, kept[part]), kept[part]
                dx_chunk = dx
            chunk_room = [columns[: x_chunk.shape[0]] for columns in room]
            failed = False
            if fused:
                a = _unnormalised.loss_and_dx(
                    x_chunk, weight, labels[part], chunk_room, losses[part], hot[part], factor, options["loss"],
                    dx_chunk, to,
                )  # fmt: skip
                failed = a is None
                if need_w and not failed:
                    x_chunk = torch.mul(x_chunk, a[:, None], out=torch.empty_like(x_chunk))
            else:
                (logits,) = chunk_room
                if bias is None:
                    torch.mm(x_chunk, weight.t(), out=logits)
                else:
                    torch.addmm(bias, x_chunk, weight.t(), out=logits)
                loss_and_grad_(logits, labels[part], losses[part], factor, need_grad, options["loss"])
                if need_x and to is None:
                    torch.mm(logits, weight, out=dx_chunk)
                elif need_x:
                    dx_chunk.index_copy_(0, to, logits @ weight)
                if need_b:
                    db += logits.sum(0, dtype=torch.float32)
            if need_w and not failed:
                last = start + chunk >= n_rows
                if fused and last and start:  # the last product may round the sum, so they come before it
                    _unnormalised.add_labels(dw, x, labels, hot, kept)
                failed = not dw.add(chunk_room, x_chunk, last)
            if failed:
                del room, chunk_room, dx, dx_chunk, dw
                return _loss_and_grads(x, weight, bias, target, rows, options, need_x, need_w, need_b, fuse=False)
        if fused and need_w and chunk == n_rows:
            _unnormalised.add_labels(dw, x, labels, hot, kept)
    elif need_w:
        dw = WeightGrad(weight)
    loss = losses.sum()
    return (loss / rows.n_valid if options["mean"] else loss), (dx, dw, db), late_factor


def _scaled(results: list, dloss: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None) -> tuple:
    """The gradients that `_loss_and_grads` gave, times the incoming one. Their memory is used up."""
    (dx, dw, db), late_factor = results
    factor = dloss if late_factor is None else dloss * late_factor
    if dx is not None:
        dx = scale_to(dx, factor, dx).view(x.shape)
    if dw is not None:
        dw = dw.scaled(factor)
    if db is not None:
        db = scale_to(db, factor, torch.empty(bias.shape, dtype=bias.dtype, device=bias.device))
    return dx, dw, db


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, target, rows, options, grad_enabled):
        needs = [grad_enabled and need for need in ctx.needs_input_grad[:3]]
        with no_autocast(x):
            loss, *results = _loss_and_grads(x, weight, bias, target, rows, options, *needs)
        ctx.save_for_backward(x, weight, bias, target)
        ctx.rows, ctx.options, ctx.needs, ctx.results = rows, options, needs, results
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        x, weight, bias, target = ctx.saved_tensors
        # The first backward takes the stored gradients, to scale them in place and to free them; one that
        # comes again (retain_graph) computes them anew.
        results, ctx.results = ctx.results, None
        with no_autocast(x):
            if results is None:
                _, *results = _loss_and_grads(x, weight, bias, target, ctx.rows, ctx.options, *ctx.needs)
            return *_scaled(results, dloss, x, bias), None, None, None, None


_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor target, Scalar?[] loss, bool mean, int budget,"
    " ScalarType? accumulate_in, bool need_x, bool need_w, bool need_b"
)


def _loss_results(x, *_):
    return torch.empty((), dtype=torch.float32, device=x.device), torch.empty(0, device=x.device)


def _compute(x, weight, bias, target, loss, mean, budget, accumulate_in, need_x, need_w, need_b, holder=None):
    rows = getattr(holder, "rows", None) or rows_that_count(target, loss[0])
    options = {"loss": loss, "mean": mean, "budget": budget, "accumulate_in": accumulate_in}
    return _loss_and_grads(x, weight, bias, target, rows, options, need_x, need_w, need_b)


# A CUDA graph would know nothing of the memory of gradients that it does not return.
_UNSAFE = (torch.Tag.cudagraph_unsafe,)


@operator(f"linear_cross_entropy({_ARGUMENTS}, Tensor? rows) -> (Tensor loss, Tensor holder)", _loss_results, _UNSAFE)
def _loss_holding_grads(x, *args):
    """The loss, and an empty tensor that holds the gradients as an attribute.

    As results of their own they could not be scaled in place: each would be read and written once more, although the
    incoming gradient mostly is 1.
    """
    with no_autocast(x):
        loss, *results = _compute(x, *args)
    holder = torch.empty(0, device=x.device)
    holder.results = results
    return loss, holder


def _gradient_results(holder, dloss, x, weight, bias, target, loss, mean, budget, accumulate_in, *needs):
    wanted = [t for t, need in zip((x, weight, bias), needs, strict=True) if need]
    return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in wanted]


@operator(
    f"linear_cross_entropy_backward(Tensor holder, Tensor dloss, {_ARGUMENTS}) -> Tensor[]", _gradient_results, _UNSAFE
)
def _held_grads(holder, dloss, x, weight, bias, *args):
    """The wanted gradients, computed anew if a backward has had them or hooks on saved tensors copied the holder."""
    results, holder.results = getattr(holder, "results", None), None
    with no_autocast(x):
        if results is None:
            _, *results = _compute(x, weight, bias, *args)
        return [grad for grad in _scaled(results, dloss, x, bias) if grad is not None]


class _CompiledLinearCrossEntropy(torch.autograd.Function):
    """`_LinearCrossEntropy` for compilers, which keep nothing but tensors for the backward."""

    @staticmethod
    def forward(ctx, x, weight, bias, target, rows, options, grad_enabled):
        needs = [grad_enabled and need for need in ctx.needs_input_grad[:3]]
        loss, holder = _loss_holding_grads(x, weight, bias, target, *options.values(), *needs, rows)
        ctx.save_for_backward(holder, x, weight, bias, target)
        ctx.options, ctx.needs = options, needs
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        holder, *inputs = ctx.saved_tensors
        grads = iter(_held_grads(holder, dloss, *inputs, *ctx.options.values(), *ctx.needs))
        return *(next(grads) if need else None for need in ctx.needs), None, None, None, None


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    ignore_index: int,
    budget: int,
    accumulate_in: torch.dtype | None,
    rows: CountedRows | torch.Tensor | None,
) -> None:
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
    if accumulate_in not in (None, torch.float32):
        raise ValueError(f"linear_cross_entropy: accumulate_in must be torch.float32 or None, got {accumulate_in}")
    if isinstance(rows, CountedRows) and (
        (rows.size, rows.ignore_index, rows.n_valid.device) != (target.numel(), ignore_index, target.device)
    ):
        raise ValueError(
            f"linear_cross_entropy: rows come from a target of {rows.size} elements on {rows.n_valid.device} and "
            f"ignore_index {rows.ignore_index}; this call has {target.numel()} on {target.device} and {ignore_index}"
        )


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
    z_loss: float = 0.0,
    logits_budget: int = LOGITS_BUDGET,
    accumulate_in: torch.dtype | None = torch.float32,
    rows: CountedRows | torch.Tensor | None = None,
) -> torch.Tensor:
    """`cross_entropy(x @ weight.T + bias, target, ...)` with about `logits_budget` bytes of logits held.

    If a gradient is wanted it is computed with the loss, chunk by chunk, and the backward only scales it; a
    second backward through the same graph computes it again. With V, H of the weight and M rows of x, the forward
    takes the bytes of the logits, 2 M H for the gradient of x and 4 V H (`accumulate_in=None`: 2 V H) for
    that of the weight, if all are 16-bit. In bfloat16 H100 and H200 take 3 V H for it. There, without `bias` and
    `label_smoothing`, the logits of few rows, about up to 2 H, lie in the memory of the weight's gradient as far as
    they can: both together take 2 V max(M, H) and a quarter of 2 V min(M, H).

    Args:
        x: [..., H], floating point.
        weight: [V, H], of x's dtype. Under autocast x, weight and bias are cast as for `F.linear`.
        target: [...], int64 class indices.
        bias: [V] or None.
        ignore_index, reduction, label_smoothing, softcap, scale, z_loss: as for `cross_entropy`.
        logits_budget: bytes of logits held at once; one row of logits is held whatever the budget, and all are where
            that takes no more memory than chunks and a float32 sum over them, which one chunk does without.
        accumulate_in: dtype of the sum of the weight's gradient over chunks: float32, or None for the weight's
            dtype, which takes less memory and rounds it once a chunk. (Always float32 for float16, which could
            overflow.) Of a float32 sum whose result is bfloat16, H100 and H200 keep 24 bits between two chunks, 8 more
            than the result has. The matrix products themselves accumulate in float32 either way.
        rows: what `rows_that_count(target, ignore_index)` returned, if it was called before. The target must still
            be the same.

    Returns:
        float32 scalar.

    Raises:
        ValueError: for mismatched shapes, an option outside its range, or rows of another target's size, device or
            ignore_index.
        TypeError: if x, weight or bias is not floating point, their dtypes differ, or target is not int64.

    Rows with target ignore_index are dropped first, unless they are very few. Their number has to reach the host:
    without `rows` the call waits for the device, once. (While a CUDA graph is captured, nothing waits: the ignored rows
    are computed and get zero gradients.) Targets out of range behave as in `cross_entropy`.

    Source: Hsu et al., "Liger Kernel: Efficient Triton Kernels for LLM Training", 2024, arXiv:2410.10989.

    Examples:
        >>> import torch
        >>> from ligerfx.kernels import linear_cross_entropy
        >>> x, weight = torch.randn(2, 5, 8, requires_grad=True), torch.randn(100, 8, requires_grad=True)
        >>> target = torch.randint(100, (2, 5))
        >>> loss = linear_cross_entropy(x, weight, target)
        >>> expected = torch.nn.functional.cross_entropy((x @ weight.T).flatten(0, 1), target.flatten())
        >>> torch.allclose(loss, expected)
        True
        >>> loss.backward()
        >>> x.grad.shape, weight.grad.shape
        (torch.Size([2, 5, 8]), torch.Size([100, 8]))
    """
    check_loss_options("linear_cross_entropy", target, reduction, label_smoothing, softcap)
    _check(x, weight, target, bias, ignore_index, logits_budget, accumulate_in, rows)
    dtype = autocast_dtype(x.device.type)
    if dtype is not None:
        x, weight, bias = (t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (x, weight, bias))
    n_logits = target.numel() * weight.shape[0]
    if not use_triton(x, weight, bias, numbers=n_logits) or target.device != x.device:
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
            z_loss=z_loss,
            logits_budget=logits_budget,
            accumulate_in=accumulate_in,
            rows=rows,
        )
    options = {
        "loss": (ignore_index, float(scale), float(z_loss), softcap, float(label_smoothing)),
        "mean": reduction == "mean",
        "budget": logits_budget,
        "accumulate_in": accumulate_in,
    }
    if torch.compiler.is_compiling() or type(x) not in PLAIN:
        return _CompiledLinearCrossEntropy.apply(x, weight, bias, target, rows, options, torch.is_grad_enabled())
    if rows is None:
        rows = rows_that_count(target, ignore_index)
    return apply(_LinearCrossEntropy, x, weight, bias, target, rows, options, torch.is_grad_enabled())
