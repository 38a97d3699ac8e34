"""What matrix products that end in something more are made of, on the tensor cores of H100 and H200.

What follows a product is often bound by memory, and much of what it moves is what the product has just written. As the
end of that product it takes little time of its own: of the groups of warps of a program one loads, two multiply, and
one finishes the tile before, which waits for memory while the tensor cores work. Tiles are wide, since it is the level
2 cache that limits them; at the card's power limit, where a training step runs, more than before.

Written in Gluon, Triton's language of layouts, barriers and groups of warps: the tensor cores stand still while
Triton's own kernels finish a tile, and those were no faster than two kernels. Gluon has no interpreter, and may change
with Triton, so this is an addition: whatever `takes` does not take goes the ordinary way.
"""

import functools
import warnings
from typing import Any

import torch

from ._runtime import HAS_TRITON, INTERPRET, PLAIN, ceil_div, jit, launch_device, num_sms, tl, triton

TRIED = HAS_TRITON and (3, 6) <= tuple(map(int, triton.__version__.split(".")[:2])) <= (3, 9)
"""Whether Gluon is as it was when these kernels ran on an H100."""

try:
    if not TRIED or INTERPRET:
        raise ImportError("not for this Triton, or not compiled")
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

# A tile of a product is ROWS x 256. Each multiplying group has a half of 128 columns, which it leaves to the
# finishing group in two panels of 64 (what one row of swizzled shared memory holds).
ROWS = tl.constexpr(128)
HALF = tl.constexpr(128)
PANEL = tl.constexpr(64)
SLAB = tl.constexpr(32)  # rows of a panel that are finished at a time: 16 numbers a thread
SLABS = tl.constexpr(4)  # of a panel
GROUP = tl.constexpr(16)  # rows of tiles that are walked together, for the second factor to stay in the cache

# So much of the factors' common dimension has each stage of shared memory. The less, the sooner it is free again; but
# rows that lie along that dimension load best in whole lines, which are deep. On an H100, shallow stages made a product
# with one such factor 8 to 13% faster, and one with two 3 to 15% slower, or up to 5% faster if it was short.
DEEP = tl.constexpr(64)
SHALLOW = tl.constexpr(32)

if HAS_GLUON:
    # As Triton 3.8 and 3.9 call them, or as releases before did.
    load_block = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
    reinterpret = getattr(gl.shared_memory_descriptor, "reinterpret", None) or gl.shared_memory_descriptor._reinterpret

    SLAB_LAYOUT = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))  # 16 bytes a thread, whole rows
    hopper_jit = functools.partial(jit, language=gluon)

    @functools.cache
    def stage_layout(n_columns: int) -> Any:
        """Of a block of a factor in shared memory."""
        return gl.NVMMASharedLayout(swizzle_byte_width=min(128, 2 * n_columns), element_bitwidth=16, rank=2)

    PANEL_LAYOUT = gl.constexpr(stage_layout(PANEL.value))

    @gluon.jit
    def stages(a_d, b_d, STAGES: gl.constexpr, B_ROWS: gl.constexpr, B_COLUMNS: gl.constexpr):
        """Shared memory for blocks of both factors, and barriers of stages loaded and free."""
        A_ROWS: gl.constexpr = a_d.block_type.shape[0]
        A_COLUMNS: gl.constexpr = a_d.block_type.shape[1]
        a_s = gl.allocate_shared_memory(a_d.dtype, [STAGES, A_ROWS, A_COLUMNS], a_d.layout)
        b_s = gl.allocate_shared_memory(b_d.dtype, [STAGES, B_ROWS, B_COLUMNS], b_d.layout)
        loaded = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for stage in gl.static_range(STAGES):
            mbarrier.init(loaded.index(stage), count=1)
            mbarrier.init(free.index(stage), count=2)
        return a_s, b_s, loaded, free

    @gluon.jit
    def halves():
        """Barriers of halves of a tile that are full and empty; the last that are made."""
        full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        for half in gl.static_range(2):
            mbarrier.init(full.index(half), count=1)
            mbarrier.init(empty.index(half), count=1)
        fence_async_shared()
        return full, empty

    @gluon.jit
    def allocate_panels(dtype: gl.constexpr):
        return gl.allocate_shared_memory(dtype, [4, ROWS, PANEL], PANEL_LAYOUT)

    @gluon.jit
    def count_tiles(n_rows, n_cols, WIDTH: gl.constexpr):
        return gl.cdiv(n_rows, ROWS) * gl.cdiv(n_cols, WIDTH)

    @gluon.jit
    def corner(tile, n_rows, n_cols, WIDTH: gl.constexpr):
        """First row and column of a tile; tiles are numbered column by column in groups of rows of tiles."""
        in_group = GROUP * gl.cdiv(n_cols, WIDTH)
        first = (tile // in_group) * GROUP
        height = gl.minimum(gl.cdiv(n_rows, ROWS) - first, GROUP)
        return (first + (tile % in_group) % height) * ROWS, ((tile % in_group) // height) * WIDTH

    @gluon.jit
    def stage_to_fill(step, loaded, free, BYTES: gl.constexpr):
        """The stage of this step, once it is free, and the barrier that is to count the bytes loaded into it."""
        STAGES: gl.constexpr = free.shape[0]
        stage = step % STAGES
        mbarrier.wait(free.index(stage), ((step // STAGES) & 1) ^ 1)
        barrier = loaded.index(stage)
        mbarrier.expect(barrier, BYTES)
        return stage, barrier

    @gluon.jit
    def load_factors(a_d, b_d, a_s, b_s, loaded, free, tiles, sizes, A_TURNED: gl.constexpr, B_TURNED: gl.constexpr):
        """For a product of tiles of 256 columns.

        A factor's rows are those of the product, or its columns; or if it is turned, of the common dimension.
        """
        DEPTH: gl.constexpr = b_s.shape[1 if B_TURNED else 2]
        n_rows, n_cols, depth = sizes
        step = 0
        for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
            row, col = corner(tile, n_rows, n_cols, 2 * HALF)
            for k in range(0, depth, DEPTH):
                stage, barrier = stage_to_fill(step, loaded, free, a_d.block_type.nbytes + b_d.block_type.nbytes)
                load_block(a_d, [k, row] if A_TURNED else [row, k], barrier, a_s.index(stage))
                load_block(b_d, [k, col] if B_TURNED else [col, k], barrier, b_s.index(stage))
                step += 1

    @gluon.jit
    def _leave(total, panels, half: gl.constexpr, BITS: gl.constexpr):
        """16: panels of 64 columns, rounded. 24: a pair of upper 16 and lower 8 bits, both of 128 columns; cut, which
        takes half the time of rounding, of warps that could multiply."""
        if BITS == 24:
            uppers, lowers = panels
            bits = total.to(gl.int32, bitcast=True)
            uppers.index(half).store((bits >> 16).to(gl.int16))
            lowers.index(half).store((bits >> 8).to(gl.uint8))
        else:
            left, right = total.to(panels.dtype).reshape([ROWS, 2, PANEL]).permute([0, 2, 1]).split()
            panels.index(2 * half).store(left)
            panels.index(2 * half + 1).store(right)

    @gluon.jit
    def multiply(
        half: gl.constexpr, a_s, b_s, panels, loaded, free, full, empty, tiles, steps,
        A_TURNED: gl.constexpr, B_TURNED: gl.constexpr, BITS: gl.constexpr,
    ):  # fmt: skip
        layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
        STAGES: gl.constexpr = free.shape[0]
        step = 0
        turn = 0
        for _ in range(gl.program_id(0), tiles, gl.num_programs(0)):
            total = gl.zeros((ROWS, HALF), gl.float32, layout)
            for k in range(steps):
                stage = step % STAGES
                mbarrier.wait(loaded.index(stage), (step // STAGES) & 1)
                a = a_s.index(stage)
                if A_TURNED:
                    a = a.permute((1, 0))
                if B_TURNED:
                    b = b_s.index(stage).slice(half * HALF, HALF, 1)
                else:
                    b = b_s.index(stage).slice(half * HALF, HALF).permute((1, 0))
                total = warpgroup_mma(a, b, total, use_acc=k > 0, is_async=True)
                total = warpgroup_mma_wait(1, deps=[total])  # for the product before this one
                mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), pred=k > 0)
                step += 1
            total = warpgroup_mma_wait(0, deps=[total])
            mbarrier.arrive(free.index((step + STAGES - 1) % STAGES))
            mbarrier.wait(empty.index(half), (turn & 1) ^ 1)
            _leave(total, panels, half, BITS)
            mbarrier.arrive(full.index(half))
            turn += 1

    @gluon.jit
    def slabs_of(panels):
        return reinterpret(panels, panels.dtype, [4 * SLABS, SLAB, PANEL], panels.layout)

    @gluon.jit
    def slab_at(row, col, n_rows, n_cols):
        """Of a slab at (row, col): its rows and columns, from there, and which of them are inside the matrix."""
        rows = gl.arange(0, SLAB, gl.SliceLayout(1, SLAB_LAYOUT))[:, None]
        cols = gl.arange(0, PANEL, gl.SliceLayout(0, SLAB_LAYOUT))[None, :]
        return rows, cols, (rows < n_rows - row) & (cols < n_cols - col)

    @gluon.jit
    def load_slab(pointer, stride, row, col, n_rows, n_cols):
        rows, cols, mask = slab_at(row, col, n_rows, n_cols)
        corner = pointer + (row.to(gl.int64) * stride + col)
        # Read once, so it need not keep factors out of the level 2 cache.
        return gl.load(corner + (rows * stride + cols), mask=mask, other=0.0, eviction_policy="evict_first")

    @gluon.jit
    def store_slab(pointer, stride, row, col, n_rows, n_cols, value):
        rows, cols, mask = slab_at(row, col, n_rows, n_cols)
        corner = pointer + (row.to(gl.int64) * stride + col)
        gl.store(corner + (rows * stride + cols), value, mask=mask)


_DEEPEST = 4096  # of the common dimension that was tried: the longer it is, the less the end of a product matters
_refused: list[str] = []  # why a kernel could not be compiled or launched


@functools.cache
def _is_hopper(index: int) -> bool:
    return torch.cuda.get_device_capability(index) == (9, 0)


def loads(matrices: list[torch.Tensor]) -> bool:
    """Whether the kernels here can load these, and run on their GPU."""
    first = matrices[0]
    return (
        HAS_GLUON
        and not _refused
        and first.is_cuda
        and _is_hopper(first.get_device())
        and first.dtype in (torch.bfloat16, torch.float16)
        and all(
            type(t) in PLAIN and t.dtype == first.dtype
            and t.stride(1) == 1 and t.stride(0) >= t.shape[1] and t.stride(0) % 8 == 0 and t.data_ptr() % 16 == 0
            for t in matrices
        )
    )  # fmt: skip


def takes(rows: torch.Tensor, n_cols: int, weights: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    """Whether the kernels here can multiply rows [M, K] and these weights, and gain by it.

    Args:
        rows, weights: what is multiplied. Their own rows must lie 16 bytes, or a multiple, apart.
        n_cols: of the product; where there are two, of one of them.
        others: what else is read.
    """
    n_rows, depth = rows.shape
    return (
        loads([rows, *weights])
        and all(type(t) in PLAIN and t.dtype == rows.dtype for t in others)
        and depth <= _DEEPEST
        and ceil_div(n_rows, ROWS.value) * ceil_div(n_cols, 2 * HALF.value) >= num_sms(rows)  # or some would be idle
    )


def _describe(matrix: torch.Tensor, block: list[int]) -> Any:
    """`TensorDescriptor.from_tensor`, without what its constructor checks again: `loads` has."""
    descriptor = object.__new__(TensorDescriptor)
    descriptor.base = matrix
    descriptor.shape = matrix.shape
    descriptor.strides = matrix.stride()
    descriptor.block_shape = block
    descriptor.layout = stage_layout(block[1])
    return descriptor


def launch(
    kernel: Any, factors: list[tuple[torch.Tensor, list[int]]], n_rows: int, n_cols: int, width: int, *args: Any
) -> bool:
    """Launch kernel(factors..., *args), one program a multiprocessor, or less if there are fewer tiles.

    Args:
        factors: matrices, and the block of each that is loaded at a time.
        n_rows, n_cols, width: of the product, and the width of a tile of it.

    Returns:
        False if the kernel could not be compiled or launched: then nothing is written, and the user is warned once.
    """
    first = factors[0][0]
    programs = min(num_sms(first), ceil_div(n_rows, ROWS.value) * ceil_div(n_cols, width))
    try:
        with launch_device(first):
            described = [_describe(*factor) for factor in factors]
            kernel[(programs,)](*described, *args, num_warps=4)
    except Exception as error:
        _refused.append(f"{type(error).__name__}: {error}")
        warnings.warn(f"nothing is fused into matrix products: a kernel for that failed: {_refused[0]}", stacklevel=2)
        return False
    return True
