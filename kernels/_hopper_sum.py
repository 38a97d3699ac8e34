"""A sum of matrix products that takes 24 bits a number between them, on H100 and H200: see _hopper.py.

What is between two products need not be exact where the result is bfloat16: 24 of float32's 32 bits, 16 of them
significant digits, are 8 more than it has. The upper 16 lie in the memory of the result, 8 more beside it. So the sum
takes half as much as the result besides, where a float32 sum would take as much again, and adding to it moves a quarter
less. The last product leaves the result itself, and beside it what rounding took from it, which is for scaling it.
"""

import torch

from . import _hopper
from ._hopper import HALF, HAS_GLUON, ROWS, SHALLOW
from ._runtime import ceil_div, num_sms, tl, triton

SUM_ROWS = tl.constexpr(16)  # of a half of a tile that are finished at a time
SUM_SLABS = tl.constexpr(8)  # of a half of a tile


@triton.jit
def from_24_bits(upper, lower):
    """The float32 of which these are the upper 16 bits and the 8 bits after them."""
    return ((upper.to(tl.int32) << 16) | (lower.to(tl.int32) << 8)).to(tl.float32, bitcast=True)


@triton.jit
def to_24_bits(x):
    """x, rounded to 24 bits, as `from_24_bits` takes them."""
    bits = x.to(tl.int32, bitcast=True)
    bits += tl.where(x == x, 0x80, 0)  # rounding NaN could carry into the sign
    return (bits >> 16).to(tl.int16), (bits >> 8).to(tl.uint8)


@triton.jit
def from_result(rounded, rest):
    """The float32 of which `to_result` gave these."""
    return ((rounded.to(tl.int32) << 16) + (rest.to(tl.int32) << 8)).to(tl.float32, bitcast=True)


@triton.jit
def to_result(x):
    """The 16 bits of x in bfloat16, and what rounding took from it, in 256ths of their last place."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = tl.where(x == x, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0)
    rest = (bits - (rounded << 16) + 0x80) >> 8
    return rounded.to(tl.int16), tl.minimum(tl.maximum(rest, -128), 127).to(tl.int8)


if HAS_GLUON:
    from triton.experimental.gluon.language.nvidia.hopper import mbarrier

    from ._hopper import corner, count_tiles, gl, gluon, halves, hopper_jit, load_factors, multiply, reinterpret, stages

    # Rows of 128 numbers are 256 and 128 bytes. Of eight rows, no two have the same column in the same banks.
    UPPER_LAYOUT = gl.constexpr(gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
    LOWER_LAYOUT = gl.constexpr(gl.SwizzledSharedLayout(16, 1, 8, [1, 0]))
    SUM_LAYOUT = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))  # 16 and 8 bytes a thread, whole rows

    @gluon.jit
    def _slab_offsets(i, top, left, n_rows, n_cols):
        """Where the numbers of slab i of a tile lie in the sum, and which of them are inside it."""
        row, col = top + i % SUM_SLABS * SUM_ROWS, left + i // SUM_SLABS * HALF
        rows = gl.arange(0, SUM_ROWS, gl.SliceLayout(1, SUM_LAYOUT))[:, None]
        cols = gl.arange(0, HALF, gl.SliceLayout(0, SUM_LAYOUT))[None, :]
        inside = (i < 2 * SUM_SLABS) & (rows < n_rows - row) & (cols < n_cols - col)
        return (row.to(gl.int64) * n_cols + col) + (rows * n_cols + cols), inside

    @gluon.jit
    def _load_sum(pointers, i, tile):
        upper_ptr, lower_ptr = pointers
        offsets, inside = _slab_offsets(i, *tile)
        # It is read and written once, so it need not keep factors out of the level 2 cache.
        upper = gl.load(upper_ptr + offsets, mask=inside, other=0, eviction_policy="evict_first")
        return upper, gl.load(lower_ptr + offsets, mask=inside, other=0, eviction_policy="evict_first")

    @gluon.jit
    def _finish_slab(i, before, panels, full, empty, turn, pointers, tile, FIRST: gl.constexpr, LAST: gl.constexpr):
        """Adds slab i to what was there `before`."""
        uppers, lowers = panels
        upper_ptr, lower_ptr = pointers
        half = i // SUM_SLABS
        mbarrier.wait(full.index(half), turn & 1, pred=i % SUM_SLABS == 0)
        uppers = reinterpret(uppers, gl.int16, [2 * SUM_SLABS, SUM_ROWS, HALF], UPPER_LAYOUT)
        lowers = reinterpret(lowers, gl.uint8, [2 * SUM_SLABS, SUM_ROWS, HALF], LOWER_LAYOUT)
        total = from_24_bits(uppers.index(i).load(SUM_LAYOUT), lowers.index(i).load(SUM_LAYOUT))
        mbarrier.arrive(empty.index(half), pred=i % SUM_SLABS == SUM_SLABS - 1)
        if not FIRST:
            total += from_24_bits(before[0], before[1])
        offsets, inside = _slab_offsets(i, *tile)
        if LAST:
            upper, rest = to_result(total)
            lower = rest.to(gl.uint8, bitcast=True)
        else:
            upper, lower = to_24_bits(total)
        gl.store(lower_ptr + offsets, lower, mask=inside, eviction_policy="evict_first")
        gl.store(upper_ptr + offsets, upper, mask=inside, eviction_policy="evict_first")

    @gluon.jit
    def _finish_sum(panels, full, empty, pointers, tiles, sizes, FIRST: gl.constexpr, LAST: gl.constexpr):
        n_rows, n_cols, depth = sizes
        turn = 0
        for number in range(gl.program_id(0), tiles, gl.num_programs(0)):
            top, left = corner(number, n_rows, n_cols, 2 * HALF)
            tile = (top, left, n_rows, n_cols)
            if FIRST:
                for i in range(2 * SUM_SLABS):
                    _finish_slab(i, None, panels, full, empty, turn, pointers, tile, FIRST, LAST)
            else:
                # Four slabs are under way, each in registers of its own: to move one would be to wait for it.
                a, b = _load_sum(pointers, 0, tile), _load_sum(pointers, 1, tile)
                c, d = _load_sum(pointers, 2, tile), _load_sum(pointers, 3, tile)
                for i in range(0, 2 * SUM_SLABS, 4):
                    _finish_slab(i, a, panels, full, empty, turn, pointers, tile, FIRST, LAST)
                    a = _load_sum(pointers, i + 4, tile)
                    _finish_slab(i + 1, b, panels, full, empty, turn, pointers, tile, FIRST, LAST)
                    b = _load_sum(pointers, i + 5, tile)
                    _finish_slab(i + 2, c, panels, full, empty, turn, pointers, tile, FIRST, LAST)
                    c = _load_sum(pointers, i + 6, tile)
                    _finish_slab(i + 3, d, panels, full, empty, turn, pointers, tile, FIRST, LAST)
                    d = _load_sum(pointers, i + 7, tile)
            turn += 1

    @hopper_jit
    def _add_product_kernel(a_d, b_d, pointers, n_rows, widths, FIRST: gl.constexpr, LAST: gl.constexpr):
        sum_rows, sum_cols = widths
        sizes = (sum_rows, sum_cols, n_rows)
        tiles = count_tiles(sum_rows, sum_cols, 2 * HALF)
        steps = gl.cdiv(n_rows, SHALLOW)
        a_s, b_s, loaded, free = stages(a_d, b_d, 5, SHALLOW, 2 * HALF)
        uppers = gl.allocate_shared_memory(gl.int16, [2, ROWS, HALF], UPPER_LAYOUT)
        lowers = gl.allocate_shared_memory(gl.uint8, [2, ROWS, HALF], LOWER_LAYOUT)
        panels = (uppers, lowers)
        full, empty = halves()
        gl.warp_specialize(
            [
                (multiply, (0, a_s, b_s, panels, loaded, free, full, empty, tiles, steps, True, True, 24)),
                (multiply, (1, a_s, b_s, panels, loaded, free, full, empty, tiles, steps, True, True, 24)),
                (_finish_sum, (panels, full, empty, pointers, tiles, sizes, FIRST, LAST)),
                (load_factors, (a_d, b_d, a_s, b_s, loaded, free, tiles, sizes, True, True)),
            ],
            [4, 4, 1],
            [160, 168, 24],
        )


def takes(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `add_product` can sum the gradient of weight [V, H] over chunks of rows of x [M, H]."""
    vocab, hidden = weight.shape
    return (
        x.dtype == weight.dtype == torch.bfloat16
        and hidden % 8 == 0
        and _hopper.loads([x])
        and ceil_div(vocab, ROWS.value) * ceil_div(hidden, 2 * HALF.value) >= num_sms(x)
    )


def add_product(
    upper: torch.Tensor, lower: torch.Tensor, a: torch.Tensor, b: torch.Tensor, first: bool, last: bool
) -> bool:
    """The sum, plus a.T @ b.

    Args:
        upper, lower: [V, H], the memory of the bfloat16 result, as int16, and uint8; contiguous.
        a, b: [M, V] and [M, H], bfloat16, rows aligned to 16 bytes.
        first: the sum is nothing yet.
        last: upper becomes the result, lower the rest of it, as `to_result` gives them.

    Returns:
        As `launch` does.
    """
    factors = [(a, [SHALLOW.value, ROWS.value]), (b, [SHALLOW.value, 2 * HALF.value])]
    n_rows, n_cols = upper.shape
    return _hopper.launch(
        _add_product_kernel, factors, n_rows, n_cols, 2 * HALF.value,
        (upper, lower), len(a), (n_rows, n_cols), first, last,
    )  # fmt: skip
