"""Matrix products that end in a gated unit or in its gradient, on the tensor cores of H100 and H200.

Gated units are bound by memory, and much of what they move is what the product before them has just written. Here
they are the end of that product, and take little time of their own: of the groups of warps of a program one loads, two
multiply, and one finishes the tile before, which waits for memory while the tensor cores work. Tiles are wide, since
it is the level 2 cache that limits them; at the card's power limit, where a training step runs, more than before.

Written in Gluon, Triton's language of layouts, barriers and groups of warps: the tensor cores stand still while
Triton's own kernels finish a tile, and those were no faster than two kernels. Gluon has no interpreter, and may change
with Triton, so this is an addition: whatever `takes` does not take goes the ordinary way.
"""

import functools
import warnings
from typing import Any

import torch

from ._activations import in_triton
from ._runtime import HAS_TRITON, INTERPRET, PLAIN, launch_device, num_sms, triton

try:
    if not HAS_TRITON or INTERPRET or not (3, 6) <= tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8):
        raise ImportError("Gluon is as it was tried in Triton 3.6 and 3.7")
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    HAS_GLUON = True
except ImportError:
    HAS_GLUON = False

if HAS_GLUON:
    # A tile of a product is ROWS x 256. Each multiplying group has a half of 128 columns, which it leaves to the
    # finishing group in two panels of 64 (what one row of swizzled shared memory holds).
    ROWS = gl.constexpr(128)
    HALF = gl.constexpr(128)
    PANEL = gl.constexpr(64)
    DEPTH = gl.constexpr(64)  # of the factors' common dimension, in one stage
    STAGES = gl.constexpr(3)  # of shared memory, loaded ahead
    SLAB = gl.constexpr(32)  # rows of a panel that are finished at a time: 16 numbers a thread
    GROUP = gl.constexpr(16)  # rows of tiles that are walked together, for the second factor to stay in the cache

    @gluon.jit
    def _shared(first_d, B_ROWS: gl.constexpr, B_COLUMNS: gl.constexpr):
        """Stages of both factors, panels of the result; barriers of stages loaded and free, halves full and empty."""
        a_s = gl.allocate_shared_memory(first_d.dtype, [STAGES, ROWS, DEPTH], first_d.layout)
        b_s = gl.allocate_shared_memory(first_d.dtype, [STAGES, B_ROWS, B_COLUMNS], first_d.layout)
        panels = gl.allocate_shared_memory(first_d.dtype, [4, ROWS, PANEL], first_d.layout)
        loaded = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        for stage in gl.static_range(STAGES):
            mbarrier.init(loaded.index(stage), count=1)
            mbarrier.init(free.index(stage), count=2)
        for half in gl.static_range(2):
            mbarrier.init(full.index(half), count=1)
            mbarrier.init(empty.index(half), count=1)
        fence_async_shared()
        return a_s, b_s, panels, loaded, free, full, empty

    @gluon.jit
    def _tiles(n_rows, n_cols, WIDTH: gl.constexpr):
        return gl.cdiv(n_rows, ROWS) * gl.cdiv(n_cols, WIDTH)

    @gluon.jit
    def _corner(tile, n_rows, n_cols, WIDTH: gl.constexpr):
        """First row and column of a tile; tiles are numbered column by column in groups of rows of tiles."""
        in_group = GROUP * gl.cdiv(n_cols, WIDTH)
        first = (tile // in_group) * GROUP
        height = gl.minimum(gl.cdiv(n_rows, ROWS) - first, GROUP)
        return (first + (tile % in_group) % height) * ROWS, ((tile % in_group) // height) * WIDTH

    @gluon.jit
    def _stage_to_fill(step, loaded, free, BYTES: gl.constexpr):
        """The stage of this step, once it is free, and the barrier that is to count the bytes loaded into it."""
        stage = step % STAGES
        mbarrier.wait(free.index(stage), ((step // STAGES) & 1) ^ 1)
        barrier = loaded.index(stage)
        mbarrier.expect(barrier, BYTES)
        return stage, barrier

    @gluon.jit
    def _multiply(half: gl.constexpr, a_s, b_s, panels, loaded, free, full, empty, tiles, steps, BY_ROWS: gl.constexpr):
        layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
        step = 0
        turn = 0
        for _ in range(gl.program_id(0), tiles, gl.num_programs(0)):
            total = gl.zeros((ROWS, HALF), gl.float32, layout)
            for k in range(steps):
                stage = step % STAGES
                mbarrier.wait(loaded.index(stage), (step // STAGES) & 1)
                if BY_ROWS:
                    b = b_s.index(stage).slice(half * HALF, HALF, 1)
                else:
                    b = b_s.index(stage).slice(half * HALF, HALF).permute((1, 0))
                total = warpgroup_mma(a_s.index(stage), b, total, use_acc=k > 0, is_async=True)
                total = warpgroup_mma_wait(1, deps=[total])  # for the product before this one
                mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), pred=k > 0)
                step += 1
            total = warpgroup_mma_wait(0, deps=[total])
            mbarrier.arrive(free.index((step + STAGES - 1) % STAGES))
            left, right = total.to(panels.dtype).reshape([ROWS, 2, PANEL]).permute([0, 2, 1]).split()
            mbarrier.wait(empty.index(half), (turn & 1) ^ 1)
            panels.index(2 * half).store(left)
            panels.index(2 * half + 1).store(right)
            mbarrier.arrive(full.index(half))
            turn += 1

    @gluon.jit
    def _slab(row, col, n_rows, n_cols):
        """Of a slab at (row, col): its rows and columns, from there, and which of them are inside the matrix."""
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])  # 16 bytes a thread, whole rows
        rows = gl.arange(0, SLAB, gl.SliceLayout(1, layout))[:, None]
        cols = gl.arange(0, PANEL, gl.SliceLayout(0, layout))[None, :]
        return rows, cols, (rows < n_rows - row) & (cols < n_cols - col)

    @gluon.jit
    def _load_slab(pointer, stride, row, col, n_rows, n_cols):
        rows, cols, mask = _slab(row, col, n_rows, n_cols)
        corner = pointer + (row.to(gl.int64) * stride + col)
        return gl.load(corner + (rows * stride + cols), mask=mask, other=0.0)

    @gluon.jit
    def _store_slab(pointer, stride, row, col, n_rows, n_cols, value):
        rows, cols, mask = _slab(row, col, n_rows, n_cols)
        corner = pointer + (row.to(gl.int64) * stride + col)
        gl.store(corner + (rows * stride + cols), value, mask=mask)

    @gluon.jit
    def _load_gradients(dy_d, weight_d, a_s, b_s, loaded, free, sizes):
        n_rows, n_cols, depth = sizes
        step = 0
        for tile in range(gl.program_id(0), _tiles(n_rows, n_cols, 2 * HALF), gl.num_programs(0)):
            row, col = _corner(tile, n_rows, n_cols, 2 * HALF)
            for k in range(0, depth, DEPTH):
                stage, barrier = _stage_to_fill(step, loaded, free, 3 * dy_d.block_type.nbytes)
                tma.async_copy_global_to_shared(dy_d, [row, k], barrier, a_s.index(stage))
                tma.async_copy_global_to_shared(weight_d, [k, col], barrier, b_s.index(stage))
                step += 1

    @gluon.jit
    def _finish_gradients(panels, full, empty, pointers, strides, sizes, ACTIVATE: gl.constexpr):
        gate_ptr, up_ptr, dgate_ptr, dup_ptr = pointers
        gate_stride, up_stride, dgate_stride, dup_stride = strides
        n_rows, n_cols, depth = sizes
        dtype: gl.constexpr = panels.dtype
        SLABS: gl.constexpr = ROWS // SLAB  # of a panel
        slabs = panels._reinterpret(dtype, [4 * SLABS, SLAB, PANEL], panels.layout)
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
        turn = 0
        for tile in range(gl.program_id(0), _tiles(n_rows, n_cols, 2 * HALF), gl.num_programs(0)):
            top, left = _corner(tile, n_rows, n_cols, 2 * HALF)
            row, col = top, left
            gate = _load_slab(gate_ptr, gate_stride, row, col, n_rows, n_cols)
            up = _load_slab(up_ptr, up_stride, row, col, n_rows, n_cols)
            for i in range(4 * SLABS):
                # The next slab's are under way while this one is computed.
                next_row = top + (i + 1) % SLABS * SLAB
                next_col = left + (i + 1) // SLABS * PANEL
                end = gl.where(i + 1 < 4 * SLABS, n_cols, 0)
                next_gate = _load_slab(gate_ptr, gate_stride, next_row, next_col, n_rows, end)
                next_up = _load_slab(up_ptr, up_stride, next_row, next_col, n_rows, end)
                half = i // (2 * SLABS)
                mbarrier.wait(full.index(half), turn & 1, pred=i % (2 * SLABS) == 0)
                dz = slabs.index(i).load(layout).to(gl.float32)
                mbarrier.arrive(empty.index(half), pred=(i + 1) % (2 * SLABS) == 0)
                value, slope = ACTIVATE(gate.to(gl.float32))
                dup = (dz * value).to(dtype)
                dgate = (dz * up.to(gl.float32) * slope).to(dtype)
                _store_slab(dup_ptr, dup_stride, row, col, n_rows, n_cols, dup)
                _store_slab(dgate_ptr, dgate_stride, row, col, n_rows, n_cols, dgate)
                row, col, gate, up = next_row, next_col, next_gate, next_up
            turn += 1

    @gluon.jit
    def _product_gradients_kernel(dy_d, weight_d, pointers, strides, sizes, ACTIVATE: gl.constexpr):
        a_s, b_s, panels, loaded, free, full, empty = _shared(dy_d, DEPTH, 2 * HALF)
        n_rows, n_cols, depth = sizes
        tiles = _tiles(n_rows, n_cols, 2 * HALF)
        steps = gl.cdiv(depth, DEPTH)
        gl.warp_specialize(
            [
                (_multiply, (0, a_s, b_s, panels, loaded, free, full, empty, tiles, steps, True)),
                (_multiply, (1, a_s, b_s, panels, loaded, free, full, empty, tiles, steps, True)),
                (_finish_gradients, (panels, full, empty, pointers, strides, sizes, ACTIVATE)),
                (_load_gradients, (dy_d, weight_d, a_s, b_s, loaded, free, sizes)),
            ],
            [4, 4, 1],
            [160, 168, 24],  # registers a thread; what is left of 512 for four warps of each is the first group's
        )

    @gluon.jit
    def _load_units(x_d, gate_d, up_d, a_s, b_s, loaded, free, sizes):
        n_rows, n_cols, depth = sizes
        step = 0
        for tile in range(gl.program_id(0), _tiles(n_rows, n_cols, HALF), gl.num_programs(0)):
            row, col = _corner(tile, n_rows, n_cols, HALF)
            for k in range(0, depth, DEPTH):
                stage, barrier = _stage_to_fill(
                    step, loaded, free, x_d.block_type.nbytes + 4 * gate_d.block_type.nbytes
                )
                tma.async_copy_global_to_shared(x_d, [row, k], barrier, a_s.index(stage))
                # Each multiplying group has 64 columns of gate, and beside them the same 64 of up.
                for half in gl.static_range(2):
                    at = [col + half * PANEL, k]
                    b = b_s.index(stage).slice(half * HALF, HALF)
                    tma.async_copy_global_to_shared(gate_d, at, barrier, b.slice(0, PANEL))
                    tma.async_copy_global_to_shared(up_d, at, barrier, b.slice(PANEL, PANEL))
                step += 1

    @gluon.jit
    def _finish_units(panels, full, empty, pointers, strides, sizes, ACTIVATE: gl.constexpr):
        gate_ptr, up_ptr, z_ptr = pointers
        gate_stride, up_stride, z_stride = strides
        n_rows, n_cols, depth = sizes
        dtype: gl.constexpr = panels.dtype
        SLABS: gl.constexpr = ROWS // SLAB  # of a panel
        slabs = panels._reinterpret(dtype, [4 * SLABS, SLAB, PANEL], panels.layout)
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
        turn = 0
        for tile in range(gl.program_id(0), _tiles(n_rows, n_cols, HALF), gl.num_programs(0)):
            top, left = _corner(tile, n_rows, n_cols, HALF)
            for i in range(2 * SLABS):
                half, at = i // SLABS, i % SLABS
                row, col = top + at * SLAB, left + half * PANEL
                mbarrier.wait(full.index(half), turn & 1, pred=at == 0)
                gate = slabs.index(2 * half * SLABS + at).load(layout)
                up = slabs.index((2 * half + 1) * SLABS + at).load(layout)
                mbarrier.arrive(empty.index(half), pred=at == SLABS - 1)
                value, _ = ACTIVATE(gate.to(gl.float32))
                z = (value * up.to(gl.float32)).to(dtype)
                _store_slab(gate_ptr, gate_stride, row, col, n_rows, n_cols, gate)
                _store_slab(up_ptr, up_stride, row, col, n_rows, n_cols, up)
                _store_slab(z_ptr, z_stride, row, col, n_rows, n_cols, z)
            turn += 1

    @gluon.jit
    def _gated_product_kernel(x_d, gate_d, up_d, pointers, strides, sizes, ACTIVATE: gl.constexpr):
        a_s, b_s, panels, loaded, free, full, empty = _shared(x_d, 2 * HALF, DEPTH)
        n_rows, n_cols, depth = sizes
        tiles = _tiles(n_rows, n_cols, HALF)
        steps = gl.cdiv(depth, DEPTH)
        gl.warp_specialize(
            [
                (_multiply, (0, a_s, b_s, panels, loaded, free, full, empty, tiles, steps, False)),
                (_multiply, (1, a_s, b_s, panels, loaded, free, full, empty, tiles, steps, False)),
                (_finish_units, (panels, full, empty, pointers, strides, sizes, ACTIVATE)),
                (_load_units, (x_d, gate_d, up_d, a_s, b_s, loaded, free, sizes)),
            ],
            [4, 4, 1],
            [160, 168, 24],
        )


_DEEPEST = 4096  # of the common dimension that was tried: the longer it is, the less the end of a product matters
_refused: list[str] = []  # why a kernel could not be compiled or launched


@functools.cache
def _is_hopper(index: int) -> bool:
    return torch.cuda.get_device_capability(index) == (9, 0)


def takes(rows: torch.Tensor, n_cols: int, weights: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    """Whether the kernels here can multiply rows [M, K] and these weights, and gain by it.

    Args:
        rows, weights: what is multiplied. Their own rows must lie 16 bytes, or a multiple, apart.
        n_cols: of the gate.
        others: what else is read.
    """
    if not (HAS_GLUON and rows.is_cuda and _is_hopper(rows.get_device())) or _refused:
        return False
    n_rows, depth = rows.shape
    return (
        rows.dtype in (torch.bfloat16, torch.float16)
        and all(type(t) in PLAIN and t.dtype == rows.dtype for t in (rows, *weights, *others))
        and depth <= _DEEPEST
        and triton.cdiv(n_rows, ROWS.value) * triton.cdiv(n_cols, 2 * HALF.value)
        >= num_sms(rows)  # or some would be idle
        and all(t.stride(1) == 1 and t.stride(0) % 8 == 0 and t.data_ptr() % 16 == 0 for t in (rows, *weights))
    )


def _launch(kernel: Any, factors: list[Any], tensors: tuple, depth: int, width: int, activation: str) -> bool:
    n_rows, n_cols = tensors[0].shape
    programs = min(num_sms(tensors[0]), triton.cdiv(n_rows, ROWS.value) * triton.cdiv(n_cols, width))
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    try:
        with launch_device(tensors[0]):
            described = [TensorDescriptor.from_tensor(matrix, block, layout) for matrix, block in factors]
            strides = tuple(t.stride(0) for t in tensors)
            kernel[(programs,)](
                *described, tensors, strides, (n_rows, n_cols, depth), in_triton(activation), num_warps=4
            )
    except Exception as error:
        _refused.append(f"{type(error).__name__}: {error}")
        warnings.warn(
            f"gated units are not fused into matrix products: their kernel failed: {_refused[0]}", stacklevel=2
        )
        return False
    return True


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
        False if the kernel could not be compiled or launched: then nothing is written, and the user is warned once.
    """
    panel = [PANEL.value, DEPTH.value]
    factors = [(x, [ROWS.value, DEPTH.value]), (gate_weight, panel), (up_weight, panel)]
    return _launch(_gated_product_kernel, factors, (gate, up, z), x.shape[1], HALF.value, activation)


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
        As `gated_product` does.
    """
    factors = [(dy, [ROWS.value, DEPTH.value]), (weight, [DEPTH.value, 2 * HALF.value])]
    return _launch(_product_gradients_kernel, factors, (gate, up, dgate, dup), dy.shape[1], 2 * HALF.value, activation)
