"""Root-mean-square layer normalisation (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467).

Alone, or together with the residual addition before it (`add_rms_norm`).
"""

import functools

import torch

from ._autograd import apply, once_differentiable
from ._operators import operator
from ._runtime import is_dense_with_rows, jit, launch_device, tl, triton, use_triton, with_layout_of


def rms_norm_reference(
    x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, *, offset: float = 0.0, cast: str = "before_weight"
) -> torch.Tensor:
    """Plain PyTorch `rms_norm`, in the order of operations of the Hugging Face models.

    Arguments, results and errors are those of `rms_norm`.

    Examples:
        >>> import torch
        >>> from ligerfx.kernels import rms_norm_reference
        >>> x, weight = torch.tensor([[3.0, -4.0], [0.0, 2.0]]), torch.ones(2)
        >>> rms_norm_reference(x, weight, eps=0.0).square().mean(-1)  # every row has a mean square of 1
        tensor([1., 1.])
    """
    check_rms_norm("rms_norm", x, weight, cast)
    return _normed(x, weight, eps, offset, cast)


def _normed(x, weight, eps, offset, cast):
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    if cast == "before_weight":
        return (weight if offset == 0 else offset + weight) * h.to(x.dtype)
    h = h * (weight.float() if offset == 0 else offset + weight.float())
    return h.to(x.dtype)


def add_rms_norm_reference(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    cast: str = "before_weight",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain PyTorch `add_rms_norm`.

    Arguments, results and errors are those of `add_rms_norm`.

    Examples:
        >>> import torch
        >>> from ligerfx.kernels import add_rms_norm_reference
        >>> y, h = add_rms_norm_reference(torch.ones(2, 4), torch.ones(2, 4), torch.ones(4), eps=0.0)
        >>> h[0], y[0]
        (tensor([2., 2., 2., 2.]), tensor([1., 1., 1., 1.]))
    """
    check_rms_norm("add_rms_norm", x, weight, cast, residual)
    return added_norm(x, residual, weight, eps, offset, cast)


def added_norm(x, residual, weight, eps, offset, cast):
    """`add_rms_norm_reference`, for arguments that were checked."""
    h = x
    if residual is not None:
        x, residual = _contiguous_first(x, residual)
        h = x + residual
    return _normed(h, weight, eps, offset, cast), h


def _contiguous_first(x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The summands, of which the first decides how the sum lies in memory: model code may take a `view` of it, which
    is always possible of a contiguous one."""
    swap = residual is not None and residual.is_contiguous() and not x.is_contiguous()
    return (residual, x) if swap else (x, residual)


# Kernels work on tiles [ROWS, BLOCK] of an [n_rows, H] tensor. Either a tile holds some short rows, or a row takes
# several tiles, side by side.


@triton.jit
def _place(start, n_rows, I, H: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # noqa: E741
    """(offsets from row `start`, mask) of tile I of the rows from there."""
    rows = tl.arange(0, ROWS)[:, None]
    cols = I * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = start + rows < n_rows
    if (I + 1) * BLOCK > H:
        mask = mask & (cols < H)
    return rows * H + cols, mask


@triton.jit
def _load(ptr, start, n_rows, H: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The tiles of the rows from `start`, zero beyond the edges; none where ptr is None."""
    tiles = ()
    if ptr is not None:
        ptr += tl.cast(start, tl.int64) * H
        for i in tl.static_range((H + BLOCK - 1) // BLOCK):
            offsets, mask = _place(start, n_rows, i, H, ROWS, BLOCK)
            tiles = tiles + (tl.load(ptr + offsets, mask=mask, other=0.0),)
    return tiles


@triton.jit
def _store(ptr, tile, start, n_rows, I, H: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # noqa: E741
    ptr += tl.cast(start, tl.int64) * H
    offsets, mask = _place(start, n_rows, I, H, ROWS, BLOCK)
    tl.store(ptr + offsets, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _tile_of(w, w_ptr, start, I, H: tl.constexpr, BLOCK: tl.constexpr, AGAIN: tl.constexpr):  # noqa: E741
    """Tile I of the weight: of its tiles w, or, AGAIN, read from memory. The row, start, is none below zero; but the
    compiler does not know, and so does not read it once for all rows."""
    if AGAIN:
        offsets, mask = _place(0, 1, I, H, 1, BLOCK)
        tile = tl.load(w_ptr + tl.minimum(start, 0) + offsets, mask=mask, other=0.0)
    else:
        tile = w[I]
    return tile


@triton.jit
def scale_of(w, offset, HAS_OFFSET: tl.constexpr, CAST_AFTER: tl.constexpr):
    """What a tile of the weight multiplies by, in float32."""
    scale = w.to(tl.float32)
    if HAS_OFFSET:
        scale = scale + offset
        if not CAST_AFTER:
            # Eager adds the offset in the weight's own dtype.
            scale = scale.to(w.dtype).to(tl.float32)
    return scale


@jit
def _fwd_kernel(
    x_ptr, r_ptr, w_ptr, h_ptr, y_ptr, rstd_ptr, n_rows, eps, offset,
    H: tl.constexpr, HAS_OFFSET: tl.constexpr, CAST_AFTER: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y is the norm of h = x + r; where r_ptr is None, of x."""
    start = tl.program_id(0) * ROWS
    x = _load(x_ptr, start, n_rows, H, ROWS, BLOCK)
    r = _load(r_ptr, start, n_rows, H, ROWS, BLOCK)
    w = _load(w_ptr, 0, 1, H, 1, BLOCK)
    h = ()
    squares = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for i in tl.static_range(len(x)):
        tile = x[i]
        if r_ptr is not None:
            tile = (x[i].to(tl.float32) + r[i].to(tl.float32)).to(h_ptr.dtype.element_ty)
            _store(h_ptr, tile, start, n_rows, i, H, ROWS, BLOCK)
        squares += tile.to(tl.float32) * tile.to(tl.float32)
        h = h + (tile,)
    rstd = tl.rsqrt(tl.sum(squares, axis=1) / H + eps)
    for i in tl.static_range(len(h)):
        h_hat = h[i].to(tl.float32) * rstd[:, None]
        if not CAST_AFTER:
            h_hat = h_hat.to(h[i].dtype).to(tl.float32)
        y = h_hat * scale_of(w[i], offset, HAS_OFFSET, CAST_AFTER)
        _store(y_ptr, y, start, n_rows, i, H, ROWS, BLOCK)
    rows = start + tl.arange(0, ROWS)
    tl.store(rstd_ptr + rows, rstd, mask=rows < n_rows)


@triton.jit
def _load_all(h_ptr, dy_ptr, dh_ptr, rstd_ptr, start, n_rows, H: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    h = _load(h_ptr, start, n_rows, H, ROWS, BLOCK)
    dy = _load(dy_ptr, start, n_rows, H, ROWS, BLOCK)
    dh = _load(dh_ptr, start, n_rows, H, ROWS, BLOCK)
    rows = start + tl.arange(0, ROWS)
    return h, dy, dh, tl.load(rstd_ptr + rows, mask=rows < n_rows, other=0.0)


@jit
def _bwd_kernel(
    dy_ptr, dh_ptr, h_ptr, w_ptr, rstd_ptr, dx_ptr, dw_ptr, y_ptr, n_rows, offset,
    H: tl.constexpr, HAS_OFFSET: tl.constexpr, CAST_AFTER: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """dx is dh + the gradient through the norm; dw is one row of partial sums a program.

    dh_ptr None: no dh. dx_ptr or dw_ptr None: not wanted. y_ptr: where to write y again, or None.
    """
    first = tl.program_id(0) * ROWS
    step = tl.num_programs(0) * ROWS
    tiles: tl.constexpr = (H + BLOCK - 1) // BLOCK
    w = () if AGAIN else _load(w_ptr, 0, 1, H, 1, BLOCK)
    # One partial sum per tile element: the sum over ROWS waits until after the loop.
    dw = ()
    for _ in tl.static_range(tiles):
        dw = dw + (tl.zeros([ROWS, BLOCK], dtype=tl.float32),)
    if ROWS > 1:
        coming = _load_all(h_ptr, dy_ptr, dh_ptr, rstd_ptr, first, n_rows, H, ROWS, BLOCK)
    for start in tl.range(first, n_rows, step, num_stages=STAGES):
        # What comes next is on its way while this is worked on: short rows by hand, long ones in Triton's pipeline.
        if ROWS > 1:
            h, dy, dh, rstd = coming
            coming = _load_all(h_ptr, dy_ptr, dh_ptr, rstd_ptr, start + step, n_rows, H, ROWS, BLOCK)
        else:
            h, dy, dh, rstd = _load_all(h_ptr, dy_ptr, dh_ptr, rstd_ptr, start, n_rows, H, ROWS, BLOCK)
        if dx_ptr is not None:
            dots = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
            for i in tl.static_range(tiles):
                weight = _tile_of(w, w_ptr, start, i, H, BLOCK, AGAIN)
                g = dy[i].to(tl.float32) * scale_of(weight, offset, HAS_OFFSET, CAST_AFTER)
                dots += g * h[i].to(tl.float32)
            mean = tl.sum(dots, axis=1) * rstd / H  # of g * h_hat
        if y_ptr is not None and (ROWS > 1 or dx_ptr is None):
            # y may lie over dy: no warp may write before all have read. The sum of one row over all warps makes sure
            # of that by itself; a barrier more, and Triton would not pipeline the loop.
            tl.debug_barrier()
        sums = ()
        for i in tl.static_range(tiles):
            h_hat = h[i].to(tl.float32) * rstd[:, None]
            weight = _tile_of(w, w_ptr, start, i, H, BLOCK, AGAIN)
            scale = scale_of(weight, offset, HAS_OFFSET, CAST_AFTER)
            if dx_ptr is not None:
                dx = (dy[i].to(tl.float32) * scale - h_hat * mean[:, None]) * rstd[:, None]
                if dh_ptr is not None:
                    dx += dh[i].to(tl.float32)
                _store(dx_ptr, dx, start, n_rows, i, H, ROWS, BLOCK)
            if not CAST_AFTER:
                # The weight met the rounded h_hat in the forward pass.
                h_hat = h_hat.to(h[i].dtype).to(tl.float32)
            if y_ptr is not None:
                _store(y_ptr, h_hat * scale, start, n_rows, i, H, ROWS, BLOCK)
            sums = sums + (dw[i] + dy[i].to(tl.float32) * h_hat,)
        dw = sums
    if dw_ptr is not None:
        for i in tl.static_range(tiles):
            _store(dw_ptr, tl.sum(dw[i], axis=0)[None, :], tl.program_id(0), tl.num_programs(0), i, H, 1, BLOCK)


@jit
def _sum_rows_kernel(x_ptr, y_ptr, n_rows, n_cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """y[c] = sum over r of x[r, c]."""
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    sums = tl.zeros([ROWS, COLS], dtype=tl.float32)
    for start in range(0, n_rows, ROWS):
        rows = start + tl.arange(0, ROWS)
        mask = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
        sums += tl.load(x_ptr + rows.to(tl.int64)[:, None] * n_cols + cols[None, :], mask=mask, other=0.0)
    tl.store(y_ptr + cols, tl.sum(sums, axis=0).to(y_ptr.dtype.element_ty), mask=cols < n_cols)


LONG = 12288
"""Columns beyond which the backward reads the weight anew for each row: it is in the L1 cache, registers are few."""


@functools.cache
def forward_tiling(hidden: int) -> tuple[int, int, int]:
    """(rows of a tile, columns of a tile, warps); a program has one tile, or one row.

    Short rows, such as attention heads, share 2048 elements. A long row has 16 to 31 elements a thread, in pieces
    of 8: one 16-byte load of a 16-bit dtype each, and little is lost where its length is no power of two.
    """
    if hidden <= 2048:
        block = max(16, 1 << (hidden - 1).bit_length())
        return 2048 // block, block, 4
    warps = min(32, 1 << (hidden // 512).bit_length() - 1)
    return 1, 256 * warps, warps


@functools.cache
def backward_tiling(hidden: int, element_bytes: int, device: int) -> tuple[int, int, int, int, int]:
    """(rows of a tile, columns of a tile, warps, most programs, stages of the pipeline).

    element_bytes is the size of an element of all inputs together; device is -1 for the interpreter.

    Programs stay and walk over the rows, so that the partial sums of dweight are few. An H100 in bfloat16 comes to
    these shares of the speed of a copy, from 10240 columns on with the residual's gradient; beyond 12288 there are no
    registers left for a pipeline, nor for the weight.

        columns     64  128  256  1024 | 2048  3072  4096  5120 | 8192 10240 12288 | 16384
        share, %    85   71   90    59 |   72    81    84    90 |   91    85    84 |    83
    """
    if hidden <= 1024:
        block = max(16, 1 << (hidden - 1).bit_length())
        rows, warps, resident, stages = 4096 // block, 4, 2, 1
    elif hidden <= 5120:
        rows, block, warps, resident, stages = 1, 1024, 4, 2, 3
    else:
        rows, block, warps, resident, stages = 1, 4096, 16, 1, 3 if hidden <= LONG else 1
    if device < 0:
        return rows, block, warps, resident, 1
    gpu = torch.cuda.get_device_properties(device)
    # Every stage but one has a buffer of whole tiles; 16 KiB are left for the sums.
    row_bytes = -(-hidden // block) * block * element_bytes
    buffers = (gpu.shared_memory_per_block_optin // resident - 2**14) // row_bytes
    return rows, block, warps, resident * gpu.multi_processor_count, max(1, min(stages, 1 + buffers))


def _norm_results(x, weight, eps, offset, cast_after):
    """(y, rstd) of a dense x: memory for what the kernel writes."""
    dtype = x.dtype if cast_after else torch.promote_types(x.dtype, weight.dtype)
    # x is walked in memory order, and empty_like has its strides: any order of the leading dims is kept.
    y = torch.empty_like(x, dtype=dtype)
    return y, torch.empty(x.numel() // weight.shape[0], dtype=torch.float32, device=x.device)


def _add_norm_results(x, residual, weight, eps, offset, cast_after):
    h = torch.empty_like(x, dtype=torch.promote_types(x.dtype, residual.dtype))
    y, rstd = _norm_results(h, weight, eps, offset, cast_after)
    return y, h, rstd


def _launch_forward(x, residual, weight, h, y, rstd, eps, offset, cast_after):
    hidden, n_rows = weight.shape[0], rstd.numel()
    rows, block, warps = forward_tiling(hidden)
    with launch_device(x):
        _fwd_kernel[(-(-n_rows // rows),)](
            x, residual, weight.contiguous(), h, y, rstd, n_rows, eps, offset,
            hidden, offset != 0, cast_after, rows, block, num_warps=warps,
        )  # fmt: skip


@operator(
    "rms_norm(Tensor x, Tensor weight, float eps, float offset, bool cast_after) -> (Tensor y, Tensor rstd)",
    _norm_results,
)
def _norm(x, weight, eps, offset, cast_after):
    y, rstd = _norm_results(x, weight, eps, offset, cast_after)
    _launch_forward(x, None, weight, None, y, rstd, eps, offset, cast_after)
    return y, rstd


@operator(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, float offset, bool cast_after)"
    " -> (Tensor y, Tensor h, Tensor rstd)",
    _add_norm_results,
)
def _add_norm(x, residual, weight, eps, offset, cast_after):
    y, h, rstd = _add_norm_results(x, residual, weight, eps, offset, cast_after)
    _launch_forward(x, residual, weight, h, y, rstd, eps, offset, cast_after)
    return y, h, rstd


def forward(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, offset: float, cast_after: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, h, rstd) by the kernel: the norm y of h = x + residual, and what `backward` needs; not differentiable.

    Without a residual h is x, or a dense copy of it. rstd is float32, one value a row in memory order.
    """
    if not is_dense_with_rows(x):
        x = x.contiguous()
    if residual is not None:
        return _add_norm(x, with_layout_of(residual, x), weight, eps, offset, cast_after)
    y, rstd = _norm(x, weight, eps, offset, cast_after)
    return y, x, rstd


def backward(
    dy: torch.Tensor,
    dh: torch.Tensor | None,
    h: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    offset: float,
    cast_after: bool,
    need_dx: bool,
    need_dw: bool,
    need_y: bool = False,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(gradient of h, gradient of weight) from those of y and h, and y again; None for what is not needed.

    h and rstd are those of `forward`. If y is needed dy is given up: y may be written over it.

    What is written again are the same values, rounded from the same products. (On a GPU, ptxas may fuse the last
    product of one of the kernels with its rounding: an element in thousands, near the middle between two numbers of
    a 16-bit dtype, then comes out as the other one.)
    """
    dy = with_layout_of(dy, h)
    dh = None if dh is None or not need_dx else with_layout_of(dh, h)
    found = iter(_backward(dy, dh, h, weight, rstd, offset, cast_after, need_dx, need_dw, need_y))
    dx, dw, y = (next(found) if need else None for need in (need_dx, need_dw, need_y))
    return dx, dw, y


def _backward_results(dy, dh, h, weight, rstd, offset, cast_after, need_dx, need_dw, need_y):
    dx = [torch.empty_like(h)] if need_dx else []
    dw = [torch.empty_like(weight, memory_format=torch.contiguous_format)] if need_dw else []
    return dx + dw + ([torch.empty_like(dy)] if need_y else [])


@operator(
    "rms_norm_backward(Tensor dy, Tensor? dh, Tensor h, Tensor weight, Tensor rstd, float offset, bool cast_after,"
    " bool need_dx, bool need_dw, bool need_y) -> Tensor[]",
    _backward_results,
    over_dy=False,
)
def _backward(dy, dh, h, weight, rstd, offset, cast_after, need_dx, need_dw, need_y, over_dy=True):
    """The needed ones of dx, dw and y; all tensors have h's layout."""
    hidden, n_rows = weight.shape[0], rstd.numel()
    element_bytes = sum(t.element_size() for t in (h, dy, dh) if t is not None)
    rows, block, warps, programs, stages = backward_tiling(hidden, element_bytes, h.get_device())
    programs = min(programs, -(-n_rows // rows))
    dx = torch.empty_like(h) if need_dx else None
    partial = torch.empty(programs, hidden, dtype=torch.float32, device=h.device) if need_dw else None
    y = None
    if need_y:
        y = dy if over_dy else torch.empty_like(dy)
    with launch_device(h):
        _bwd_kernel[(programs,)](
            dy, dh, h, weight.contiguous(), rstd, dx, partial, y, n_rows, offset,
            hidden, offset != 0, cast_after, rows, block, stages, hidden > LONG, num_warps=warps,
        )  # fmt: skip
        dw = None
        if need_dw:
            dw = torch.empty_like(weight, memory_format=torch.contiguous_format)
            sum_rows(partial, dw)
    return [t for t in (dx, dw, y) if t is not None]


def sum_rows(x: torch.Tensor, y: torch.Tensor) -> None:
    """Write the sum over the rows of x [R, C], contiguous float32, into y [C]; launches on the current device."""
    n_rows, n_cols = x.shape
    _sum_rows_kernel[(-(-n_cols // 16),)](x, y, n_rows, n_cols, 256, 16, num_warps=8)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, offset, cast_after):
        y, x, rstd = forward(x, None, weight, eps, offset, cast_after)
        ctx.save_for_backward(x, weight, rstd)
        ctx.options = offset, cast_after
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        dx, dw, _ = backward(dy, None, *ctx.saved_tensors, *ctx.options, *ctx.needs_input_grad[:2])
        return dx, dw, None, None, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, eps, offset, cast_after):
        ctx.set_materialize_grads(False)
        y, h, rstd = forward(x, residual, weight, eps, offset, cast_after)
        ctx.save_for_backward(h, weight, rstd)
        ctx.options = offset, cast_after
        ctx.dtypes = x.dtype, None if residual is None else residual.dtype
        # An input cannot be returned as it is: in-place operations on it would go unnoticed.
        out = h if residual is not None else x.view_as(x)
        if not any(ctx.needs_input_grad[:2]):
            ctx.mark_non_differentiable(out)
        return y, out

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dh):
        need_x, need_residual, need_weight = ctx.needs_input_grad[:3]
        d, dw = dh, None
        if dy is not None:
            h, weight, rstd = ctx.saved_tensors
            d, dw, _ = backward(dy, dh, h, weight, rstd, *ctx.options, need_x or need_residual, need_weight)
        x_dtype, residual_dtype = ctx.dtypes
        dx = d.to(x_dtype) if need_x and d is not None else None
        dresidual = d.to(residual_dtype) if need_residual and d is not None else None
        return dx, dresidual, dw, None, None, None


def check_cast(op: str, cast: str) -> None:
    if cast not in ("before_weight", "after_weight"):
        raise ValueError(f"{op}: cast must be 'before_weight' or 'after_weight', got {cast!r}")


def check_rms_norm(
    op: str, x: torch.Tensor, weight: torch.Tensor, cast: str, residual: torch.Tensor | None = None
) -> None:
    check_cast(op, cast)
    if not (x.is_floating_point() and weight.is_floating_point()):
        raise TypeError(f"{op}: x and weight must be floating point, got {x.dtype} and {weight.dtype}")
    if x.dim() == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(f"{op}: expected x [..., H] and weight [H], got {tuple(x.shape)} and {tuple(weight.shape)}")
    if residual is not None:
        if not residual.is_floating_point():
            raise TypeError(f"{op}: residual must be floating point, got {residual.dtype}")
        if residual.shape != x.shape:
            raise ValueError(
                f"{op}: x and residual must have one shape, got {tuple(x.shape)} and {tuple(residual.shape)}"
            )


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, *, offset: float = 0.0, cast: str = "before_weight"
) -> torch.Tensor:
    """x / sqrt(mean(x^2, -1) + eps), scaled by (offset + weight); the statistics are in float32.

    Args:
        x: [..., H], floating point.
        weight: [H], floating point; may have another dtype than x.
        eps: added to the mean square.
        offset: added to the weight (1 in Gemma, whose weights are stored around zero).
        cast: "before_weight" rounds the normalised x to x's dtype, then multiplies (Llama; the result has the
            promoted dtype of x and weight). "after_weight" multiplies in float32, then rounds to x's dtype
            (Gemma, OLMo 2, `torch.nn.RMSNorm`).

    Returns:
        [..., H]; for a dense x with contiguous last dim, with x's strides.

    Raises:
        ValueError: for another `cast`, or shapes other than [..., H] and [H].
        TypeError: if x or weight is not floating point.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, arXiv:1910.07467.

    Examples:
        >>> import torch
        >>> from ligerfx.kernels import rms_norm
        >>> x, weight = torch.tensor([[3.0, -4.0]], requires_grad=True), torch.tensor([2.0, 2.0])
        >>> y = rms_norm(x, weight, eps=0.0)  # the mean square is 12.5
        >>> y
        tensor([[ 1.6971, -2.2627]], grad_fn=...)
        >>> torch.equal(rms_norm(x, weight - 1, eps=0.0, offset=1.0), y)
        True
    """
    if not use_triton(x, weight):
        return rms_norm_reference(x, weight, eps, offset=offset, cast=cast)
    check_rms_norm("rms_norm", x, weight, cast)
    return apply(_RMSNorm, x, weight, float(eps), float(offset), cast == "after_weight")


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    cast: str = "before_weight",
) -> tuple[torch.Tensor, torch.Tensor]:
    """y = rms_norm(h) of the residual stream h = x + residual, and h itself.

    The backward adds the gradients that reach h through y and directly, in float32, and gives the one sum
    to both x and residual.

    Args:
        x: [..., H], floating point.
        residual: as x; may have another dtype. None stands for no addition: h is x.
        weight: [H], floating point; may have another dtype than x.
        eps, offset, cast: as for `rms_norm`.

    Returns:
        (y, h), each [..., H]; for a dense x with contiguous last dim, with x's strides. h has the promoted dtype of
        x and residual. Without a residual it shares x's memory, so that neither may be changed in place.

    Raises:
        ValueError: for another `cast`, or other shapes than those above.
        TypeError: if an input is not floating point.

    Examples:
        >>> import torch
        >>> from ligerfx.kernels import add_rms_norm
        >>> x, residual, weight = torch.randn(2, 5, 8), torch.randn(2, 5, 8), torch.ones(8)
        >>> y, h = add_rms_norm(x, residual, weight)
        >>> torch.equal(h, x + residual), y.shape
        (True, torch.Size([2, 5, 8]))
    """
    if not use_triton(x, residual, weight):
        return add_rms_norm_reference(x, residual, weight, eps, offset=offset, cast=cast)
    check_rms_norm("add_rms_norm", x, weight, cast, residual)
    x, residual = _contiguous_first(x, residual)
    return apply(_AddRMSNorm, x, residual, weight, float(eps), float(offset), cast == "after_weight")
