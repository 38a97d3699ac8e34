"""The gradient of a weight, summed over chunks of rows, and its scaling by the incoming gradient."""

import torch

from ._runtime import ceil_div, launch_device, num_sms, tl, triton


@triton.jit
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
    n, block = source.numel(), 4096
    grid = min(ceil_div(n, block), 16 * num_sms(source))
    if n:
        with launch_device(source):
            in_place = result.data_ptr() == source.data_ptr()
            _scale_kernel[(grid,)](source, result, factor, n, in_place, block, num_warps=8)
    return result


class WeightGrad:
    """The sum of the chunks' products a @ b, [V, H], in float32 or in the weight's own dtype.

    A float32 sum of a 16-bit result would take three times the result's memory while it is rounded. Here it takes
    twice: about half of its rows lie in the memory of the result, and rounding frees that memory as it goes. It is
    rounded by the backward, which knows the incoming gradient, so once. Rounding at the end of the forward would
    free half of it a little earlier, but not lower the peak: that is in the forward, while there is a chunk of
    logits as well.
    """

    def __init__(self, weight: torch.Tensor, wide: bool):
        vocab, hidden = weight.shape
        self.result = torch.empty(vocab, hidden, dtype=weight.dtype, device=weight.device)
        self.empty = True
        self.parts = [self.result]
        if wide and weight.dtype != torch.float32:
            # Some more rows outside the result than in it, for `scaled` to begin with; whole tiles.
            outside = min(vocab, ceil_div(vocab // 2 + vocab // 128 + 1, 256) * 256)
            inside = self.result.view(-1)[: 2 * (vocab - outside) * hidden].view(torch.float32)
            self.parts = [
                torch.empty(outside, hidden, dtype=torch.float32, device=weight.device),
                inside.view(vocab - outside, hidden),
            ]

    def add(self, a: torch.Tensor, b: torch.Tensor) -> None:
        start = 0
        for part in self.parts:
            rows = a[start : start + part.shape[0]]
            start += part.shape[0]
            if rows.shape[0]:
                add_product(part, rows, b, overwrite=self.empty)
        self.empty = False

    def scaled(self, factor: torch.Tensor) -> torch.Tensor:
        """The sum times factor in the weight's dtype; the memory of the sum is used up."""
        if self.empty:
            return self.result.zero_()
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
