"""The loss of a linear layer's output and its gradients, from exponentials that are never divided by their sum.

Softmax divides by a sum over the vocabulary, which is known only after the last logit. So one kernel writes logits, a
second reads them, and writes their gradient over them. Here the product itself ends in e = 2**(z - shift), z being the
logit in units of log(2), with a shift for each row that is known before; and it is x, and the gradient of x, that are
divided, which are far narrower. But for the labels' own part, and with a = slope / sum(e) of each row,

    dx = a * (e @ weight)        dweight = e.T @ (a * x)

The shift is the label's z, from a product of two vectors: so sum(e) is at least about 1, its logarithm is the loss, and
it is too large only where the loss is above 69. Such a row is shifted by its largest z instead, and the product done
again, which the host need not know.

At the label e is zero: its gradient, softmax - 1, would lose its digits there. `dx` and `dweight` get it in float32.
"""

import torch

from . import _hopper, _hopper_loss
from ._hopper_sum import from_24_bits, to_24_bits
from ._runtime import ceil_div, jit, launch_device, tl
from ._weight_grad import WeightGrad, add_product
from .crossentropy import LOG_2, through_softcap, to_z

LARGEST = tl.constexpr(2.0**100)
"""sum(e) above which the product is done again. bfloat16 goes on to 2**127: products of e must not overflow either."""

MOST_ROWS = 4096
"""Of the gradient of x that are in float32 at a time."""


@jit
def _shift_kernel(
    x_ptr, w_ptr, target_ptr, shift_ptr, label_ptr, x_stride, w_stride, V, H, ignore_index, scale,
    SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """label is the target where it counts and is inside the vocabulary, else -1, with a shift that makes e zero."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    has_label = (target >= 0) & (target < V) & (target != ignore_index)
    w_ptr += tl.where(has_label, target, 0) * w_stride
    dots = tl.zeros([BLOCK], tl.float32)
    for start in range(0, H, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * x_stride + cols, mask=cols < H, other=0.0).to(tl.float32)
        dots += x * tl.load(w_ptr + cols, mask=cols < H, other=0.0).to(tl.float32)
    z = to_z(tl.sum(dots, axis=0), scale, SOFTCAP)
    tl.store(shift_ptr + row, tl.where(has_label, z, float("inf")))
    tl.store(label_ptr + row, tl.where(has_label, target, -1).to(tl.int32))


@jit
def _row_kernel(
    target_ptr, label_ptr, shift_ptr, exponent_ptr, sums_ptr, tops_ptr, factor_ptr, needed_ptr, again_ptr,
    loss_ptr, a_ptr, hot_ptr, n_rows, n_sums, ignore_index, scale, z_loss,
    SOFTCAP: tl.constexpr, HAS_FACTOR: tl.constexpr, ROWS: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Each row's loss, a, and `hot`, the gradient of its label's logit. Sets shift and `again` of rows that
    overflowed."""
    if tl.load(needed_ptr) != 0:
        rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        mask = rows < n_rows
        sums = tl.zeros([SUMS, ROWS], tl.float32)
        tops = tl.full([SUMS, ROWS], float("-inf"), tl.float32)
        for start in range(0, n_sums, SUMS):
            parts = start + tl.arange(0, SUMS)
            offsets = parts.to(tl.int64)[:, None] * n_rows + rows[None, :]
            inside = (parts < n_sums)[:, None] & mask[None, :]
            sums += tl.load(sums_ptr + offsets, mask=inside, other=0.0)
            tops = tl.maximum(tops, tl.load(tops_ptr + offsets, mask=inside, other=float("-inf")))
        has_label = tl.load(label_ptr + rows, mask=mask, other=-1) >= 0
        total = tl.where(has_label, tl.sum(sums, axis=0), 1.0)
        shift = tl.load(shift_ptr + rows, mask=mask, other=0.0)
        overflow = total > LARGEST
        tl.store(shift_ptr + rows, tl.max(tops, axis=0), mask=overflow)
        tl.store(again_ptr + rows * 0, 1, mask=overflow)

        # Without a label, but not ignored: outside the vocabulary, and NaN.
        exponent = tl.load(exponent_ptr + rows, mask=has_label, other=float("nan"))
        loss = (tl.log2(total) - exponent) * LOG_2
        lse = (tl.log2(total) + shift) * LOG_2
        factor = scale
        if HAS_FACTOR:
            factor *= tl.load(factor_ptr)
        slope = factor * (1.0 + 2.0 * z_loss * lse)
        counts = tl.load(target_ptr + rows, mask=mask, other=ignore_index) != ignore_index
        a = tl.where(counts, slope / total, 0.0)
        hot = through_softcap(slope * (tl.exp2(exponent) / total) - factor, exponent + shift, SOFTCAP)
        tl.store(loss_ptr + rows, tl.where(counts, loss + z_loss * lse * lse, 0.0), mask=mask)
        tl.store(a_ptr + rows, a, mask=mask)
        tl.store(hot_ptr + rows, tl.where(counts, hot, 0.0), mask=mask)


@jit
def _dx_kernel(product_ptr, a_ptr, hot_ptr, label_ptr, w_ptr, to_ptr, dx_ptr, w_stride, H, BLOCK: tl.constexpr):
    """dx = a * product + hot * weight[label]; to_ptr: which row of dx, or None for the same."""
    row = tl.program_id(0).to(tl.int64)
    a, hot, label = tl.load(a_ptr + row), tl.load(hot_ptr + row), tl.load(label_ptr + row).to(tl.int64)
    labelled = tl.where(label >= 0, H, 0)  # columns of the label's row
    to = row
    if to_ptr is not None:
        to = tl.load(to_ptr + row)
    for start in range(0, H, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        mask = cols < H
        w = tl.load(w_ptr + label * w_stride + cols, mask=cols < labelled, other=0.0).to(tl.float32)
        dx = a * tl.load(product_ptr + row * H + cols, mask=mask, other=0.0) + hot * w
        tl.store(dx_ptr + to * H + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@jit
def _add_labels_kernel(
    outside_ptr, inside_ptr, lower_ptr, x_ptr, hot_ptr, label_ptr, order_ptr, from_ptr, x_stride, n_outside, V, n_rows,
    H, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds hot * x of the rows that have a label to its row of the sum, which is in two parts, in their order.

    lower_ptr: None, or the lower 8 of the sum's 24 bits.

    Labels are sorted. Where a new one begins, a program adds all rows that have it.
    """
    start = tl.program_id(0)
    label = tl.load(label_ptr + start)
    before = tl.load(label_ptr + start - 1, mask=start > 0, other=-1)
    if (label >= 0) & (label < V) & (label != before):
        cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        sum_ptr = tl.where(label < n_outside, outside_ptr + label * H, inside_ptr + (label - n_outside) * H) + cols
        total = tl.load(sum_ptr, mask=cols < H, other=0)
        if lower_ptr is not None:
            total = from_24_bits(total, tl.load(lower_ptr + label * H + cols, mask=cols < H, other=0))
        total = total.to(tl.float32)
        row = tl.load(order_ptr + start)
        hot = tl.load(hot_ptr + row)
        if from_ptr is not None:
            row = tl.load(from_ptr + row)
        total += hot * tl.load(x_ptr + row * x_stride + cols, mask=cols < H, other=0.0).to(tl.float32)
        start += 1
        while tl.load(label_ptr + start, mask=start < n_rows, other=-1) == label:
            at = start + tl.arange(0, ROWS)
            same = tl.load(label_ptr + at, mask=at < n_rows, other=-1) == label
            rows = tl.load(order_ptr + at, mask=same, other=0)
            hots = tl.load(hot_ptr + rows, mask=same, other=0.0)
            if from_ptr is not None:
                rows = tl.load(from_ptr + rows, mask=same, other=0)
            mask = same[:, None] & (cols < H)[None, :]
            x = tl.load(x_ptr + rows[:, None] * x_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
            total += tl.sum(hots[:, None] * x, axis=0)
            start += ROWS
        if lower_ptr is not None:
            total, lower = to_24_bits(total)
            tl.store(lower_ptr + label * H + cols, lower, mask=cols < H)
        tl.store(sum_ptr, total.to(outside_ptr.dtype.element_ty), mask=cols < H)


def takes(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, options: tuple) -> bool:
    """Whether `loss_and_dx` can take rows [M, H], as many as a chunk has, with these options of the loss.

    float16 does not reach far enough for e.
    """
    if bias is not None or options[-1] > 0 or x.dtype != torch.bfloat16:
        return False
    return _hopper.takes(x, weight.shape[0], [weight], [])


def loss_and_dx(
    x: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    room: list[torch.Tensor],
    losses: torch.Tensor,
    hot: torch.Tensor,
    factor: torch.Tensor | None,
    options: tuple,
    dx: torch.Tensor | None,
    to: torch.Tensor | None,
) -> torch.Tensor | None:
    """Losses of a chunk of rows, their gradient of x, and what its part of the weight's gradient is made of.

    Args:
        x, weight, target: [M, H], [V, H], [M], of which nothing but the target may be anything.
        room: [M, V] of x's dtype, to be written, in parts of columns, as `exponentials` takes them.
        losses, hot: [M], float32, to be written: the loss of each row, and the gradient of its label's logit.
        factor: of all gradients, a float32 scalar; None: 1.
        options: as `linear_cross_entropy` hands them on.
        dx, to: gradient of x, to be written, in rows `to` (None: the first M); None if not wanted.

    Returns:
        a [M]: room.T @ (a * x) and what `add_labels` adds are the gradient of the weight. None if a kernel failed:
        then nothing of value is written.
    """
    ignore_index, scale, z_loss, softcap, _ = options
    (n_rows, hidden), vocab = x.shape, weight.shape[0]
    n_sums = ceil_div(vocab, _hopper_loss.COLUMNS)
    shift, exponent, a = torch.empty(3, n_rows, dtype=torch.float32, device=x.device)
    sums, tops = torch.empty(2, n_sums, n_rows, dtype=torch.float32, device=x.device)
    label = torch.empty(n_rows, dtype=torch.int32, device=x.device)
    # Whether the product is needed: once, and again. Rows of 16 bytes, as all that kernels are compiled for.
    needed = torch.zeros(3, 4, dtype=torch.int32, device=x.device)
    needed[0].fill_(1)
    with launch_device(x):
        _shift_kernel[(n_rows,)](
            x, weight, target, shift, label, x.stride(0), weight.stride(0), vocab, hidden, ignore_index, scale,
            softcap, 512, num_warps=4,
        )  # fmt: skip
        for turn in range(2):
            if not _hopper_loss.exponentials(
                x, weight, scale, softcap, shift, label, needed[turn], room, exponent, sums, tops
            ):
                return None
            _row_kernel[(ceil_div(n_rows, 8),)](
                target, label, shift, exponent, sums, tops, factor, needed[turn], needed[turn + 1],
                losses, a, hot, n_rows, n_sums, ignore_index, scale, z_loss,
                softcap, factor is not None, 8, 256, num_warps=4,
            )  # fmt: skip
        del sums, tops  # as large as the product below
        if dx is not None:
            _write_dx(room, weight, a, hot, label, to, dx)
    return a


def _write_dx(
    room: list[torch.Tensor],
    weight: torch.Tensor,
    a: torch.Tensor,
    hot: torch.Tensor,
    label: torch.Tensor,
    to: torch.Tensor | None,
    dx: torch.Tensor,
) -> None:
    """dx of `loss_and_dx`, from the exponentials in room; launches on the current device."""
    (n_rows,), hidden = a.shape, weight.shape[1]
    weights = weight.split([part.shape[1] for part in room])
    rows = ceil_div(n_rows, ceil_div(n_rows, MOST_ROWS))
    for start in range(0, n_rows, rows):
        piece = slice(start, start + rows)
        product = torch.empty(min(rows, n_rows - start), hidden, dtype=torch.float32, device=a.device)
        for i, (part, columns) in enumerate(zip(room, weights, strict=True)):
            add_product(product, part[piece], columns, overwrite=i == 0)
        _dx_kernel[(product.shape[0],)](
            product, a[piece], hot[piece], label[piece], weight, None if to is None else to[piece],
            dx[piece] if to is None else dx, weight.stride(0), hidden, 1024, num_warps=4,
        )  # fmt: skip


def add_labels(dw: WeightGrad, x: torch.Tensor, target: torch.Tensor, hot: torch.Tensor, kept: torch.Tensor | None):
    """Add the labels' own part to the gradient of the weight.

    Args:
        x, kept: the rows are those of x [..., H] at `kept`, or all.
        target, hot: of these rows.
    """
    label, order = target.sort(stable=True)
    n_rows, hidden = hot.shape[0], x.shape[1]
    outside, inside = dw.parts[0], dw.parts[-1]
    with launch_device(x):
        _add_labels_kernel[(n_rows, ceil_div(hidden, 1024))](
            outside, inside, dw.lower, x, hot, label, order, kept, x.stride(0), outside.shape[0], dw.result.shape[0],
            n_rows, hidden, 8, 1024, num_warps=8,
        )  # fmt: skip
