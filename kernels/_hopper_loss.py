"""The product of a linear layer that ends in exponentials of its logits, on H100 and H200: see _hopper.py."""

import itertools
from collections.abc import Sequence

import torch

from . import _hopper
from ._hopper import DEEP, HALF, HAS_GLUON, ROWS
from .crossentropy import LOG2_E

if HAS_GLUON:
    from triton.experimental.gluon.language.nvidia.hopper import mbarrier

    from ._hopper import (
        PANEL,
        SLAB,
        SLAB_LAYOUT,
        SLABS,
        allocate_panels,
        corner,
        count_tiles,
        gl,
        gluon,
        halves,
        hopper_jit,
        load_factors,
        multiply,
        slab_at,
        slabs_of,
        stages,
        store_slab,
    )

    @gluon.jit
    def _load_rows(pointer, row, n_rows):
        """One number of each row of a slab, -1 beyond the last row."""
        rows = row + gl.arange(0, SLAB, gl.SliceLayout(1, SLAB_LAYOUT))
        return gl.load(pointer + rows, mask=rows < n_rows, other=-1)

    @gluon.jit
    def _part_at(col, parts):
        """Where the row 0 of the result's part with this column would have column 0, and from row to row there."""
        results, strides, ends = parts
        result, stride = results[0], strides[0]
        for i in gl.static_range(1, len(results)):
            result = gl.where(col >= ends[i - 1], results[i] - ends[i - 1], result)
            stride = gl.where(col >= ends[i - 1], strides[i], stride)
        return result, stride

    @gluon.jit
    def _finish_exponentials(panels, full, empty, pointers, parts, scale, tiles, sizes, SOFTCAP: gl.constexpr):
        shift_ptr, label_ptr, exponent_ptr, sum_ptr, top_ptr = pointers
        n_rows, n_cols, depth = sizes
        slabs = slabs_of(panels)
        turn = 0
        for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
            top, left = corner(tile, n_rows, n_cols, 2 * HALF)
            result_ptr, stride = _part_at(left, parts)
            for i in range(2 * SLABS):
                half, at = i // SLABS, i % SLABS
                row, col = top + at * SLAB, left + half * HALF
                shift = _load_rows(shift_ptr, row, n_rows)
                label = _load_rows(label_ptr, row, n_rows)
                total = gl.full([SLAB], 0.0, gl.float32, gl.SliceLayout(1, SLAB_LAYOUT))
                largest = gl.full([SLAB], float("-inf"), gl.float32, gl.SliceLayout(1, SLAB_LAYOUT))
                mbarrier.wait(full.index(half), turn & 1, pred=at == 0)
                for panel in gl.static_range(2):
                    rows, cols, mask = slab_at(row, col + panel * PANEL, n_rows, n_cols)
                    logits = slabs.index((2 * half + panel) * SLABS + at).load(SLAB_LAYOUT)
                    if panel == 1:
                        mbarrier.arrive(empty.index(half), pred=at == SLABS - 1)
                    z = logits.to(gl.float32) * scale
                    if SOFTCAP is not None:
                        ratio = 1.0 - 2.0 / (gl.exp2(z * (2.0 / SOFTCAP)) + 1.0)  # the hyperbolic tangent
                        z = ratio * (SOFTCAP * LOG2_E)
                    z = gl.where(mask, z, float("-inf"))
                    exponent = z - shift[:, None]
                    value = gl.exp2(exponent)
                    total += gl.sum(value, axis=1)
                    largest = gl.maximum(largest, gl.max(z, axis=1))
                    is_label = cols == label[:, None] - (col + panel * PANEL)
                    gl.store(exponent_ptr + row + (rows + 0 * cols), exponent, mask=is_label & mask)
                    if SOFTCAP is not None:
                        value *= 1.0 - ratio * ratio
                    value = gl.where(is_label, 0.0, value).to(panels.dtype)
                    store_slab(result_ptr, stride, row, col + panel * PANEL, n_rows, n_cols, value)
                rows = row + gl.arange(0, SLAB, gl.SliceLayout(1, SLAB_LAYOUT))
                stats = (col // HALF).to(gl.int64) * n_rows + rows
                inside = (rows < n_rows) & (col < n_cols)
                gl.store(sum_ptr + stats, total, mask=inside)
                gl.store(top_ptr + stats, largest, mask=inside)
            turn += 1

    @hopper_jit
    def _exponentials_kernel(x_d, weight_d, pointers, needed_ptr, parts, scale, n_rows, widths, SOFTCAP: gl.constexpr):
        n_cols, depth = widths
        sizes = (n_rows, n_cols, depth)
        tiles = gl.where(gl.load(needed_ptr) != 0, count_tiles(n_rows, n_cols, 2 * HALF), 0)
        steps = gl.cdiv(depth, DEEP)
        a_s, b_s, loaded, free = stages(x_d, weight_d, 3, 2 * HALF, DEEP)
        panels = allocate_panels(x_d.dtype)
        full, empty = halves()
        gl.warp_specialize(
            [
                (multiply, (0, a_s, b_s, panels, loaded, free, full, empty, tiles, steps, False, False, 16)),
                (multiply, (1, a_s, b_s, panels, loaded, free, full, empty, tiles, steps, False, False, 16)),
                (_finish_exponentials, (panels, full, empty, pointers, parts, scale, tiles, sizes, SOFTCAP)),
                (load_factors, (x_d, weight_d, a_s, b_s, loaded, free, tiles, sizes, False, False)),
            ],
            [4, 4, 1],
            [160, 168, 24],
        )


COLUMNS = 128
"""How many columns of the result share a sum and a maximum."""

PARTS = 4
"""Of the result, that the kernel tells apart at least: few have more."""

NOWHERE = 2**30
"""Where a part begins that there is not."""


def exponentials(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: float,
    softcap: float | None,
    shift: torch.Tensor,
    label: torch.Tensor,
    needed: torch.Tensor,
    result: Sequence[torch.Tensor],
    exponent: torch.Tensor,
    sums: torch.Tensor,
    tops: torch.Tensor,
) -> bool:
    """2**(z - shift) of z, the logits x @ weight.T, rounded, scaled, capped and times log2(e); 0 at the label.

    Args:
        x, weight: [M, K] and [V, K], as `takes` wants them.
        shift, label: [M], float32 and int32. No label: one that is no column, such as -1.
        needed: int32 scalar; 0: nothing is to be done.
        result: [M, V], to be written, in parts of columns: all but the last multiples of twice `COLUMNS`; the rows of
            each one stride apart. With a softcap, times the slope of the cap.
        exponent: [M], float32, to be written: z - shift at the label, of the rows that have one.
        sums, tops: [V / COLUMNS, M], rounded up, float32, to be written: of 2**(z - shift), the label's included, the
            sum over the columns, and the largest z.

    Returns:
        As `launch` does.
    """
    factors = [(x, [ROWS.value, DEEP.value]), (weight, [2 * HALF.value, DEEP.value])]
    pointers = (shift, label, exponent, sums, tops)
    # Always so many, or another kernel would be compiled where the number of rows, and so that of parts, changes.
    missing = PARTS - len(result)
    parts = [*result, *[result[-1]] * missing]
    ends = [*itertools.accumulate(part.shape[1] for part in result[:-1]), *[NOWHERE] * missing]
    parts = (tuple(parts), tuple(part.stride(0) for part in parts), tuple(ends))
    n_rows, (n_cols, depth) = x.shape[0], weight.shape
    return _hopper.launch(
        _exponentials_kernel, factors, n_rows, n_cols, 2 * HALF.value,
        pointers, needed, parts, scale * LOG2_E.value, n_rows, (n_cols, depth), softcap,
    )  # fmt: skip
