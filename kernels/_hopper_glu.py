"""Matrix products that end in a gated unit or in its gradient, on H100 and H200: see _hopper.py."""

import torch

from . import _hopper
from ._activations import in_triton
from ._hopper import DEEP, HALF, HAS_GLUON, PANEL, ROWS, SHALLOW

if HAS_GLUON:
    from triton.experimental.gluon.language.nvidia.hopper import mbarrier

    from ._hopper import (
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
        load_block,
        load_factors,
        load_slab,
        multiply,
        slabs_of,
        stage_to_fill,
        stages,
        store_slab,
    )

    @gluon.jit
    def _finish_gradients(panels, full, empty, pointers, strides, sizes, ACTIVATE: gl.constexpr):
        gate_ptr, up_ptr, dgate_ptr, dup_ptr = pointers
        gate_stride, up_stride, dgate_stride, dup_stride = strides
        n_rows, n_cols, depth = sizes
        dtype: gl.constexpr = panels.dtype
        slabs = slabs_of(panels)
        turn = 0
        for tile in range(gl.program_id(0), count_tiles(n_rows, n_cols, 2 * HALF), gl.num_programs(0)):
            top, left = corner(tile, n_rows, n_cols, 2 * HALF)
            row, col = top, left
            gate = load_slab(gate_ptr, gate_stride, row, col, n_rows, n_cols)
            up = load_slab(up_ptr, up_stride, row, col, n_rows, n_cols)
            for i in range(4 * SLABS):
                # The next slab's are under way while this one is computed.
                next_row = top + (i + 1) % SLABS * SLAB
                next_col = left + (i + 1) // SLABS * PANEL
                end = gl.where(i + 1 < 4 * SLABS, n_cols, 0)
                next_gate = load_slab(gate_ptr, gate_stride, next_row, next_col, n_rows, end)
                next_up = load_slab(up_ptr, up_stride, next_row, next_col, n_rows, end)
                half = i // (2 * SLABS)
                mbarrier.wait(full.index(half), turn & 1, pred=i % (2 * SLABS) == 0)
                dz = slabs.index(i).load(SLAB_LAYOUT).to(gl.float32)
                mbarrier.arrive(empty.index(half), pred=(i + 1) % (2 * SLABS) == 0)
                value, slope = ACTIVATE(gate.to(gl.float32))
                dup = (dz * value).to(dtype)
                dgate = (dz * up.to(gl.float32) * slope).to(dtype)
                store_slab(dup_ptr, dup_stride, row, col, n_rows, n_cols, dup)
                store_slab(dgate_ptr, dgate_stride, row, col, n_rows, n_cols, dgate)
                row, col, gate, up = next_row, next_col, next_gate, next_up
            turn += 1

    @hopper_jit
    def _product_gradients_kernel(dy_d, weight_d, pointers, strides, n_rows, widths, ACTIVATE: gl.constexpr):
        a_s, b_s, loaded, free = stages(dy_d, weight_d, 6, SHALLOW, 2 * HALF)
        panels = allocate_panels(dy_d.dtype)
        full, empty = halves()
        n_cols, depth = widths
        sizes = (n_rows, n_cols, depth)
        tiles = count_tiles(n_rows, n_cols, 2 * HALF)
        steps = gl.cdiv(depth, SHALLOW)
        gl.warp_specialize(
            [
                (multiply, (0, a_s, b_s, panels, loaded, free, full, empty, tiles, steps, False, True, 16)),
                (multiply, (1, a_s, b_s, panels, loaded, free, full, empty, tiles, steps, False, True, 16)),
                (_finish_gradients, (panels, full, empty, pointers, strides, sizes, ACTIVATE)),
                (load_factors, (dy_d, weight_d, a_s, b_s, loaded, free, tiles, sizes, False, True)),
            ],
            [4, 4, 1],
            [160, 168, 24],  # registers a thread; what is left of 512 for four warps of each is the first group's
        )

    @gluon.jit
    def _load_units(x_d, gate_d, up_d, a_s, b_s, loaded, free, sizes):
        n_rows, n_cols, depth = sizes
        step = 0
        for tile in range(gl.program_id(0), count_tiles(n_rows, n_cols, HALF), gl.num_programs(0)):
            row, col = corner(tile, n_rows, n_cols, HALF)
            for k in range(0, depth, x_d.block_type.shape[1]):
                stage, barrier = stage_to_fill(step, loaded, free, x_d.block_type.nbytes + 4 * gate_d.block_type.nbytes)
                load_block(x_d, [row, k], barrier, a_s.index(stage))
                # Each multiplying group has 64 columns of gate, and beside them the same 64 of up.
                for half in gl.static_range(2):
                    at = [col + half * PANEL, k]
                    b = b_s.index(stage).slice(half * HALF, HALF)
                    load_block(gate_d, at, barrier, b.slice(0, PANEL))
                    load_block(up_d, at, barrier, b.slice(PANEL, PANEL))
                step += 1

    @gluon.jit
    def _finish_units(panels, full, empty, pointers, strides, sizes, ACTIVATE: gl.constexpr):
        gate_ptr, up_ptr, z_ptr = pointers
        gate_stride, up_stride, z_stride = strides
        n_rows, n_cols, depth = sizes
        dtype: gl.constexpr = panels.dtype
        slabs = slabs_of(panels)
        turn = 0
        for tile in range(gl.program_id(0), count_tiles(n_rows, n_cols, HALF), gl.num_programs(0)):
            top, left = corner(tile, n_rows, n_cols, HALF)
            for i in range(2 * SLABS):
                half, at = i // SLABS, i % SLABS
                row, col = top + at * SLAB, left + half * PANEL
                mbarrier.wait(full.index(half), turn & 1, pred=at == 0)
                gate = slabs.index(2 * half * SLABS + at).load(SLAB_LAYOUT)
                up = slabs.index((2 * half + 1) * SLABS + at).load(SLAB_LAYOUT)
                mbarrier.arrive(empty.index(half), pred=at == SLABS - 1)
                value, _ = ACTIVATE(gate.to(gl.float32))
                z = (value * up.to(gl.float32)).to(dtype)
                store_slab(gate_ptr, gate_stride, row, col, n_rows, n_cols, gate)
                store_slab(up_ptr, up_stride, row, col, n_rows, n_cols, up)
                store_slab(z_ptr, z_stride, row, col, n_rows, n_cols, z)
            turn += 1

    @hopper_jit
    def _gated_product_kernel(x_d, gate_d, up_d, pointers, strides, n_rows, widths, ACTIVATE: gl.constexpr):
        DEPTH: gl.constexpr = x_d.block_type.shape[1]
        a_s, b_s, loaded, free = stages(x_d, gate_d, 3 * DEEP // DEPTH, 2 * HALF, DEPTH)
        panels = allocate_panels(x_d.dtype)
        full, empty = halves()
        n_cols, depth = widths
        sizes = (n_rows, n_cols, depth)
        tiles = count_tiles(n_rows, n_cols, HALF)
        steps = gl.cdiv(depth, DEPTH)
        gl.warp_specialize(
            [
                (multiply, (0, a_s, b_s, panels, loaded, free, full, empty, tiles, steps, False, False, 16)),
                (multiply, (1, a_s, b_s, panels, loaded, free, full, empty, tiles, steps, False, False, 16)),
                (_finish_units, (panels, full, empty, pointers, strides, sizes, ACTIVATE)),
                (_load_units, (x_d, gate_d, up_d, a_s, b_s, loaded, free, sizes)),
            ],
            [4, 4, 1],
            [160, 168, 24],
        )


def gated_product(
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    z: torch.Tensor,
    activation: str,
) -> bool:
    """gate = x @ gate_weight.T, up = x @ up_weight.T, z = act(gate) * up.

    Args:
        x, gate_weight, up_weight: [M, K], [I, K] and [I, K], as `takes` wants them.
        gate, up, z: [M, I], to be written; rows one stride apart.
        activation: as `in_triton` takes it.

    Returns:
        As `launch` does.
    """
    (n_rows, depth), n_cols, tensors = x.shape, gate.shape[1], (gate, up, z)
    panel = [PANEL.value, (SHALLOW if depth <= 1024 else DEEP).value]
    factors = [(x, [ROWS.value, panel[1]]), (gate_weight, panel), (up_weight, panel)]
    arguments = tensors, tuple(t.stride(0) for t in tensors), n_rows, (n_cols, depth), in_triton(activation)
    return _hopper.launch(_gated_product_kernel, factors, n_rows, n_cols, HALF.value, *arguments)


def product_gradients(
    dy: torch.Tensor,
    weight: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    dgate: torch.Tensor,
    dup: torch.Tensor,
    activation: str,
) -> bool:
    """With dz = dy @ weight: dgate = dz * up * act'(gate) and dup = dz * act(gate).

    Args:
        dy, weight: [M, K] and [K, I], as `takes` wants them.
        gate, up: [M, I]; rows one stride apart.
        dgate, dup: [M, I], to be written; rows one stride apart.
        activation: as `in_triton` takes it.

    Returns:
        As `launch` does.
    """
    (n_rows, depth), n_cols, tensors = dy.shape, gate.shape[1], (gate, up, dgate, dup)
    factors = [(dy, [ROWS.value, SHALLOW.value]), (weight, [SHALLOW.value, 2 * HALF.value])]
    arguments = tensors, tuple(t.stride(0) for t in tensors), n_rows, (n_cols, depth), in_triton(activation)
    return _hopper.launch(_product_gradients_kernel, factors, n_rows, n_cols, 2 * HALF.value, *arguments)
