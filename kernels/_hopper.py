"""The matrix product before a gated unit's gradient, in one kernel with it, on the tensor cores of H100 and H200.

A gated unit's gradient is bound by memory, and a third of its time goes to what the product before it has just
written. Here it is the end of that product, and costs little besides: a program has two groups of warps that
multiply and one that loads, and the two take turns. While one waits for memory with its tile, the other multiplies.

Written in Gluon, Triton's language of layouts, barriers and groups of warps: Triton's own kernels leave the tensor
cores idle at the end of a tile, which was no faster than two kernels. Gluon has no interpreter, and may change with
Triton, so this is an addition: whatever `takes` does not take goes the ordinary way.
"""

import functools
import warnings

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
    TILE = gl.constexpr(128)  # rows, and columns, of a tile
    DEPTH = gl.constexpr(64)  # of the factors' common dimension, what one stage holds
    STAGES = gl.constexpr(4)  # loaded ahead
    GROUP = gl.constexpr(8)  # rows of tiles that are walked together, for the second factor to stay in the cache

    @gluon.jit
    def _corner(tile, n_rows, n_cols):
        """First row and column of a tile; tiles are numbered column by column in groups of rows of tiles."""
        rows_of_tiles = gl.cdiv(n_rows, TILE)
        in_group = GROUP * gl.cdiv(n_cols, TILE)
        first = (tile // in_group) * GROUP
        height = gl.minimum(rows_of_tiles - first, GROUP)
        return (first + (tile % in_group) % height) * TILE, ((tile % in_group) // height) * TILE

    @gluon.jit
    def _next_to_fill(step, ready, free, BYTES: gl.constexpr):
        """The stage that loads of this step go to, once it is free, and the barrier that they complete."""
        stage = step % STAGES
        mbarrier.wait(free.index(stage), ((step // STAGES) & 1) ^ 1)
        barrier = ready.index(stage)
        mbarrier.expect(barrier, BYTES)
        return stage, barrier

    @gluon.jit
    def _product(a_s, b_s, ready, free, turns, who: gl.constexpr, turn, steps):
        """The sum of `steps` products of stages, [TILE, TILE]; waits for this group's turn and gives it on."""
        step = (2 * turn + who) * steps
        layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
        total = gl.zeros((TILE, TILE), gl.float32, layout)
        # Stages must be waited for in order: a barrier tells odd phases from even ones, and no more.
        mbarrier.wait(turns.index(who), (turn & 1) ^ (1 - who))
        for k in range(steps):
            stage = step % STAGES
            mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
            total = warpgroup_mma(a_s.index(stage), b_s.index(stage), total, use_acc=k > 0, is_async=True)
            total = warpgroup_mma_wait(1, deps=[total])  # the product before this one
            mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), pred=k > 0)
            step += 1
        mbarrier.arrive(turns.index(1 - who))
        total = warpgroup_mma_wait(0, deps=[total])
        mbarrier.arrive(free.index((step + STAGES - 1) % STAGES))
        return total

    @gluon.jit
    def _barriers():
        """ready and free of each stage, and the turns of the groups."""
        ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        for stage in gl.static_range(STAGES):
            mbarrier.init(ready.index(stage), count=1)
            mbarrier.init(free.index(stage), count=1)
        for who in gl.static_range(2):
            mbarrier.init(turns.index(who), count=1)
        fence_async_shared()
        return ready, free, turns

    @gluon.jit
    def _load(dy_d, weight_d, dy_s, weight_s, ready, free, sizes):
        n_rows, n_cols, depth = sizes
        step = 0
        tiles = gl.cdiv(n_rows, TILE) * gl.cdiv(n_cols, TILE)
        for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
            row, col = _corner(tile, n_rows, n_cols)
            for k in range(0, depth, DEPTH):
                stage, barrier = _next_to_fill(step, ready, free, 2 * dy_d.block_type.nbytes)
                tma.async_copy_global_to_shared(dy_d, [row, k], barrier, dy_s.index(stage))
                tma.async_copy_global_to_shared(weight_d, [k, col], barrier, weight_s.index(stage))
                step += 1

    @gluon.jit
    def _group(
        who: gl.constexpr, dy_s, weight_s, dz_s, ready, free, turns, pointers, strides, sizes, ACTIVATE: gl.constexpr
    ):
        gate_ptr, up_ptr, dgate_ptr, dup_ptr, z_ptr = pointers
        gate_stride, up_stride, dgate_stride, dup_stride, z_stride = strides
        n_rows, n_cols, depth = sizes
        # Of a tile, 16 rows at a time, whose rows are read and written whole, 16 bytes a thread.
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
        ROWS: gl.constexpr = 16
        dtype: gl.constexpr = dy_s.dtype
        steps = gl.cdiv(depth, DEPTH)
        tiles = gl.cdiv(n_rows, TILE) * gl.cdiv(n_cols, TILE)
        programs = gl.num_programs(0)
        turn = 0
        for tile in range(gl.program_id(0) + who * programs, tiles, 2 * programs):
            row, col = _corner(tile, n_rows, n_cols)
            dz = _product(dy_s, weight_s, ready, free, turns, who, turn, steps)
            turn += 1
            dz_s.index(who).store(dz.to(dtype))
            rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
            cols = col + gl.arange(0, TILE, gl.SliceLayout(0, layout))[None, :]
            for part in gl.static_range(TILE // ROWS):
                at = (rows + part * ROWS).to(gl.int64)[:, None]
                mask = (at < n_rows) & (cols < n_cols)
                gate = gl.load(gate_ptr + at * gate_stride + cols, mask=mask, other=0.0).to(gl.float32)
                up = gl.load(up_ptr + at * up_stride + cols, mask=mask, other=0.0).to(gl.float32)
                dy = dz_s.index(who).slice(part * ROWS, ROWS).load(layout).to(gl.float32)
                value, slope = ACTIVATE(gate)
                gl.store(dup_ptr + at * dup_stride + cols, (dy * value).to(dtype), mask=mask)
                gl.store(dgate_ptr + at * dgate_stride + cols, (dy * up * slope).to(dtype), mask=mask)
                if z_ptr is not None:
                    gl.store(z_ptr + at * z_stride + cols, (value * up).to(dtype), mask=mask)

    @gluon.jit
    def _kernel(dy_d, weight_d, pointers, strides, sizes, ACTIVATE: gl.constexpr):
        dy_s = gl.allocate_shared_memory(dy_d.dtype, [STAGES, TILE, DEPTH], dy_d.layout)
        weight_s = gl.allocate_shared_memory(dy_d.dtype, [STAGES, DEPTH, TILE], dy_d.layout)
        dz_s = gl.allocate_shared_memory(dy_d.dtype, [2, TILE, TILE], dy_d.layout)
        ready, free, turns = _barriers()
        gl.warp_specialize(
            [
                (_group, (0, dy_s, weight_s, dz_s, ready, free, turns, pointers, strides, sizes, ACTIVATE)),
                (_group, (1, dy_s, weight_s, dz_s, ready, free, turns, pointers, strides, sizes, ACTIVATE)),
                (_load, (dy_d, weight_d, dy_s, weight_s, ready, free, sizes)),
            ],
            [4, 1],
            [232, 24],
        )


_LIMIT = 4096  # of the common dimension: where it is longer, the libraries' products gain more than the fusion does
_refused: list[str] = []  # why the kernel could not be compiled or launched


@functools.cache
def _is_hopper(index: int) -> bool:
    return torch.cuda.get_device_capability(index) == (9, 0)


def _is_loadable(matrix: torch.Tensor) -> bool:
    """Whether the copy engine can load tiles of it."""
    return matrix.stride(1) == 1 and matrix.stride(0) % 8 == 0 and matrix.data_ptr() % 16 == 0


def takes(dy: torch.Tensor, weight: torch.Tensor, *others: torch.Tensor) -> bool:
    """Whether `glu_gradients` can compute dy @ weight, and gains by it; others are all that it reads besides."""
    if not (HAS_GLUON and dy.is_cuda and _is_hopper(dy.get_device())) or _refused:
        return False
    depth, n_cols = weight.shape
    tiles = triton.cdiv(dy.shape[0], TILE.value) * triton.cdiv(n_cols, TILE.value)
    return (
        dy.dtype in (torch.bfloat16, torch.float16)
        and all(type(t) in PLAIN and t.dtype == dy.dtype for t in (dy, weight, *others))
        and depth <= _LIMIT
        and tiles >= num_sms(dy)  # fewer leave some idle, and none has anything to overlap
        and _is_loadable(dy)
        and _is_loadable(weight)
    )


def glu_gradients(
    dy: torch.Tensor,
    weight: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    dgate: torch.Tensor,
    dup: torch.Tensor,
    z: torch.Tensor | None,
    activation: str,
) -> bool:
    """With dz = dy @ weight: dgate = dz * up * act'(gate), dup = dz * act(gate), and z = act(gate) * up.

    Args:
        dy, weight: [M, K] and [K, N], as `takes` wants them.
        gate, up: [M, N], with rows one stride apart.
        dgate, dup, z: [M, N] with such rows, to be written; z may be None.
        activation: as `in_triton` takes it.

    Returns:
        False if the kernel could not be compiled or launched: then nothing is written, and the user is warned once.
    """
    tensors = gate, up, dgate, dup, z
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    dy_d = TensorDescriptor.from_tensor(dy, [TILE.value, DEPTH.value], layout)
    weight_d = TensorDescriptor.from_tensor(weight, [DEPTH.value, TILE.value], layout)
    n_rows, n_cols = gate.shape
    tiles = triton.cdiv(n_rows, TILE.value) * triton.cdiv(n_cols, TILE.value)
    strides = tuple(0 if t is None else t.stride(0) for t in tensors)
    sizes = n_rows, n_cols, dy.shape[1]
    try:
        with launch_device(dy):
            grid = (min(tiles, num_sms(dy)),)
            _kernel[grid](dy_d, weight_d, tensors, strides, sizes, in_triton(activation), num_warps=4)
    except Exception as error:
        _refused.append(f"{type(error).__name__}: {error}")
        warnings.warn(
            f"ligerfx: gated units are not fused into matrix products, since their kernel failed: {_refused[0]}",
            stacklevel=2,
        )
        return False
    return True
