"""The gradient of a weight, summed over chunks of rows, and its scaling by the incoming gradient."""

from collections.abc import Sequence

import torch

from . import _hopper_sum
from ._hopper_sum import from_result, to_result
from ._runtime import ceil_div, jit, launch_device, num_sms, tl

SCALED = 4096
"""Numbers that are scaled at a time."""


@jit
def _scale_kernel(source_ptr, result_ptr, factor_ptr, n, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr)
    # In place, the gradient of a loss that is not scaled costs a launch and no pass over memory.
    if (not IN_PLACE) | (factor != 1.0):
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, n, step):
            offsets = start + tl.arange(0, BLOCK)
            x = tl.load(source_ptr + offsets, mask=offsets < n).to(tl.float32)
            tl.store(result_ptr + offsets, (x * factor).to(result_ptr.dtype.element_ty), mask=offsets < n)


def scale_to(source: torch.Tensor, factor: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    """result = source * factor, both contiguous; result may be source, but not overlap it otherwise."""
    if n := source.numel():
        with launch_device(source):
            in_place = result.data_ptr() == source.data_ptr()
            _scale_kernel[_grid(source)](source, result, factor, n, in_place, SCALED, num_warps=8)
    return result


def _grid(tensor: torch.Tensor) -> tuple[int]:
    return (min(ceil_div(tensor.numel(), SCALED), 16 * num_sms(tensor)),)


@jit
def _scale_rounded_kernel(result_ptr, rest_ptr, factor_ptr, n, BLOCK: tl.constexpr):
    """`_scale_kernel` in place, of a bfloat16 result, as int16, and what rounding took from it: it is rounded anew."""
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, n, step):
            offsets = start + tl.arange(0, BLOCK)
            rest = tl.load(rest_ptr + offsets, mask=offsets < n, other=0).to(tl.int8, bitcast=True)
            x = from_result(tl.load(result_ptr + offsets, mask=offsets < n, other=0), rest)
            result, _ = to_result(x * factor)
            tl.store(result_ptr + offsets, result, mask=offsets < n)


def padded(n_cols: int) -> int:
    """Numbers from row to row: rows start at multiples of 32 bytes, since products and losses need aligned vectors."""
    return ceil_div(n_cols, 16) * 16


def empty_rows(n_rows: int, n_cols: int, like: torch.Tensor) -> torch.Tensor:
    return torch.empty(n_rows, padded(n_cols), dtype=like.dtype, device=like.device)[:, :n_cols]


WIDTH = 256
"""Of a tile of a product; what is cut along the vocabulary is cut at multiples of it."""


def columns_inside(vocab: int, hidden: int, n_rows: int) -> int:
    """How many columns of [M, V] can lie in the memory of a result [V, H] that is a.T @ b of them, in few steps.

    They lie at its end. Once the product with a part of them is written, before them, their memory is free for the
    product with the next part. A quarter of the result is left free to begin with: then so many columns are free for
    each step. They and the columns outside take no more memory than the larger of [M, V] and [V, H], and a quarter of
    the other. With an eighth there are up to 8 parts, too narrow for the products to be as fast.
    """
    return 0 if vocab < 16 * WIDTH else 3 * vocab * min(hidden, n_rows) // (4 * n_rows) // WIDTH * WIDTH


class WeightGrad:
    """The sum of the chunks' products a.T @ b, [V, H], in the weight's own dtype or in more bits.

    A float32 sum of a 16-bit result would take three times the result's memory while it is rounded. Here it takes
    twice: about half of its rows lie in the memory of the result, and rounding frees that memory as it goes. It is
    rounded by the backward, which knows the incoming gradient, so once. Rounding at the end of the forward would
    free half of it a little earlier, but not lower the peak: that is in the forward, while there is a chunk of
    logits as well.

    One of 24 bits takes one and a half times the result's memory. Its last product rounds, and leaves what that took
    for `scaled`, which rounds anew where the incoming gradient is not 1: see `_hopper_sum`.
    """

    def __init__(self, weight: torch.Tensor, bits: int | None = None):
        """bits: 32, or 24 where `_hopper_sum.takes` it, or None for those of the weight."""
        vocab, hidden = weight.shape
        self.result = torch.empty(vocab, hidden, dtype=weight.dtype, device=weight.device)
        self.empty = True
        self.parts = [self.result]
        self.lower = None
        if bits == 24:
            self.parts = [self.result.view(torch.int16)]
            self.lower = torch.empty(vocab, hidden, dtype=torch.uint8, device=weight.device)
        elif bits == 32 and weight.dtype != torch.float32:
            # Some more rows outside the result than in it, for `scaled` to begin with; whole tiles.
            outside = min(vocab, ceil_div(vocab // 2 + vocab // 128 + 1, WIDTH) * WIDTH)
            inside = self.result.view(-1)[: 2 * (vocab - outside) * hidden].view(torch.float32)
            self.parts = [
                torch.empty(outside, hidden, dtype=torch.float32, device=weight.device),
                inside.view(vocab - outside, hidden),
            ]

    def room(self, n_rows: int) -> list[torch.Tensor]:
        """Memory for the a [M, V] of the only chunk, in parts of columns; `add` uses it up.

        Most of it is the result's own: see `columns_inside`.
        """
        (vocab, hidden), flat = self.result.shape, self.result.view(-1)
        inside = columns_inside(vocab, hidden, n_rows)
        parts, start = [], 0
        while start < inside:
            # Where the part begins, and what is written of the result when it has been used must end.
            at = flat.numel() - n_rows * (inside - start)
            end = min(inside, at // hidden // WIDTH * WIDTH)
            parts.append(flat[at : at + n_rows * (end - start)].view(n_rows, end - start))
            start = end
        return [*parts, empty_rows(n_rows, vocab - inside, self.result)]

    def add(self, a: Sequence[torch.Tensor], b: torch.Tensor, last: bool) -> bool:
        """Adds a.T @ b, of a [M, V] in parts of columns and b [M, H]. A sum in more bits takes one part.

        last: nothing will be added after it.

        Returns:
            False if a kernel failed: then the sum is of no value.
        """
        first, self.empty = self.empty, False
        if self.lower is not None:
            return _hopper_sum.add_product(*self.parts, self.lower, *a, b, first, last)
        if len(a) == 1:
            totals, a = self.parts, a[0].split([part.shape[0] for part in self.parts], dim=1)
        else:
            totals = self.result.split([part.shape[1] for part in a])
        for total, columns in zip(totals, a, strict=True):
            if total.shape[0]:
                add_product(total, columns.t(), b, overwrite=first)
        return True

    def scaled(self, factor: torch.Tensor) -> torch.Tensor:
        """The sum times factor in the weight's dtype; the memory of the sum is used up."""
        if self.empty:
            return self.result.zero_()
        if self.lower is not None:
            with launch_device(self.result):
                _scale_rounded_kernel[_grid(self.result)](
                    *self.parts, self.lower, factor, self.result.numel(), SCALED, num_warps=8
                )
            return self.result
        if len(self.parts) == 1:
            return scale_to(self.result, factor, self.result)
        outside, inside = self.parts
        offset, end = outside.shape[0], inside.shape[0]
        # Row i of `inside` goes to row offset + i of the result, which overlaps rows from (offset + i) / 2 on of
        # `inside`. So the last offset - end rows go first, over nothing, and each step can move twice as many.
        while end:
            start = max(0, 2 * end - offset)
            scale_to(inside[start:end], factor, self.result[offset + start : offset + end])
            end = start
        scale_to(outside, factor, self.result[:offset])
        return self.result


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, overwrite: bool) -> None:
    """total += a @ b, or total = a @ b."""
    dtype = {}
    if total.dtype != a.dtype:
        if a.is_cuda:
            dtype = {"out_dtype": total.dtype}
        else:
            a, b = a.to(total.dtype), b.to(total.dtype)
    if overwrite:
        torch.mm(a, b, out=total, **dtype)
    else:
        torch.addmm(total, a, b, out=total, **dtype)
