"""RMS normalisation of every head of q and k, then rotary position embedding, as in Qwen3 (Yang et al. 2025,
https://arxiv.org/abs/2505.09388)."""

import functools
from typing import NamedTuple

import torch

from ._autograd import apply, once_differentiable
from ._operators import operator
from ._runtime import jit, launch_device, num_sms, tl, triton, use_triton
from .rmsnorm import check_cast, rms_norm_reference, scale_of, sum_rows
from .rotary import (
    blocks_of,
    check_rope,
    empty_with_strides_of,
    load_heads,
    load_tables,
    numbers_of,
    rope_reference,
    rotate,
    split_heads,
    store_heads,
    strides_of,
    with_contiguous_rows,
    with_four_dims,
)


def norm_rope_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    cast: str = "before_weight",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain PyTorch `norm_rope`.

    Arguments, results and errors are those of `norm_rope`.

    Examples:
        >>> import torch
        >>> from ligerfx.kernels import norm_rope_reference
        >>> q, k, weight = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 5, 16), torch.ones(16)
        >>> cos, sin = torch.ones(1, 1, 5, 16), torch.zeros(1, 1, 5, 16)  # no rotation
        >>> q, k = norm_rope_reference(q, k, weight, weight, cos, sin)
        >>> torch.allclose(q.square().mean(-1), torch.ones(2, 4, 5), rtol=1e-3)
        True
    """
    _check(q, k, q_weight, k_weight, cos, sin, cast)
    normed = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        # In the order of its memory, where a model normalises it: a compiler fuses more of that.
        lies_as_tokens = x.transpose(1, 2).is_contiguous()
        y = rms_norm_reference(x.transpose(1, 2) if lies_as_tokens else x, weight, eps, offset=offset, cast=cast)
        normed.append(y.transpose(1, 2) if lies_as_tokens else y)
    return rope_reference(*normed, cos, sin)


class Tiling(NamedTuple):
    """What one program works on."""

    tokens: int  # at a time
    q_heads: int
    k_heads: int
    blocks: int  # of heads, so many of q and so many of k
    warps: int
    programs: int  # for each block of heads
    stages: int  # of Triton's software pipeline; 1 for none


@triton.jit
def _load_weight(w_ptr, D: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr):
    """The weight in tiles like those of a head."""
    return load_heads(w_ptr, 0, 0, 1, D, HALF, 1, BLOCK_HALF, BLOCK_REST)


@triton.jit
def _sum_of_products(a, b):
    """Row by row, over all tiles."""
    total = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32) + a[1].to(tl.float32) * b[1].to(tl.float32), axis=1)
    for i in tl.static_range(2, len(a)):
        total += tl.sum(a[i].to(tl.float32) * b[i].to(tl.float32), axis=1)
    return total


@triton.jit
def _normalise(x, w, eps, offset, D: tl.constexpr, HAS_OFFSET: tl.constexpr, CAST_AFTER: tl.constexpr):
    rstd = tl.rsqrt(_sum_of_products(x, x) / D + eps)
    y = ()
    for i in tl.static_range(len(x)):
        x_hat = x[i].to(tl.float32) * rstd[:, None]
        if not CAST_AFTER:
            x_hat = x_hat.to(x[i].dtype).to(tl.float32)
        tile = x_hat * scale_of(w[i], offset, HAS_OFFSET, CAST_AFTER)
        # Eager rounds before it rotates; where x and w differ in dtype, their product is float32.
        if CAST_AFTER or x[i].dtype == w[i].dtype:
            tile = tile.to(x[i].dtype)
        y = y + (tile,)
    return y


@triton.jit
def _gradients(
    x, dy, w, dw, tables, in_use, eps, offset, D: tl.constexpr, HAS_OFFSET: tl.constexpr, CAST_AFTER: tl.constexpr
):
    """(dx, dw with what these heads add to it); in_use tells which heads there are."""
    dn = rotate(dy, tables, True)  # of the norm's output
    # Heads that are not there are zeros, and could make their rstd infinite.
    rstd = tl.where(in_use, tl.rsqrt(_sum_of_products(x, x) / D + eps), 0.0)
    g = ()
    for i in tl.static_range(len(x)):
        g = g + (dn[i].to(tl.float32) * scale_of(w[i], offset, HAS_OFFSET, CAST_AFTER),)
    mean = _sum_of_products(g, x) * rstd / D  # of g * x_hat
    dx = ()
    sums = ()
    for i in tl.static_range(len(x)):
        x_hat = x[i].to(tl.float32) * rstd[:, None]
        dx = dx + ((g[i] - x_hat * mean[:, None]) * rstd[:, None],)
        if not CAST_AFTER:
            # The weight met the rounded x_hat in the forward pass.
            x_hat = x_hat.to(x[i].dtype).to(tl.float32)
        sums = sums + (dw[i] + dn[i].to(tl.float32) * x_hat,)
    return dx, sums


@jit
def _fwd_kernel(
    q_ptr,
    k_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    yq_ptr,
    yk_ptr,
    n_tokens,
    all_tokens,
    q_heads,
    k_heads,
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_token,
    k_head,
    yq_batch,
    yq_token,
    yq_head,
    yk_batch,
    yk_token,
    yk_head,
    cos_batch,
    cos_token,
    sin_batch,
    sin_token,
    eps,
    offset,
    D: tl.constexpr,
    HALF: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    CAST_AFTER: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    TOKENS: tl.constexpr,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
):
    """Some heads of some tokens, as in `rotary`."""
    first_q = tl.program_id(1) * Q_HEADS
    first_k = tl.program_id(1) * K_HEADS
    tables = ()
    q = ()
    k = ()
    for i in tl.static_range(TOKENS):
        token = tl.minimum(tl.program_id(0) * TOKENS + i, all_tokens - 1)
        b = (token // n_tokens).to(tl.int64)
        t = (token % n_tokens).to(tl.int64)
        q_row = q_ptr + b * q_batch + t * q_token
        k_row = k_ptr + b * k_batch + t * k_token
        q = q + (load_heads(q_row, q_head, first_q, q_heads, D, HALF, Q_HEADS, BLOCK_HALF, BLOCK_REST),)
        k = k + (load_heads(k_row, k_head, first_k, k_heads, D, HALF, K_HEADS, BLOCK_HALF, BLOCK_REST),)
        table = load_tables(
            cos_ptr + b * cos_batch + t * cos_token, sin_ptr + b * sin_batch + t * sin_token, HALF, BLOCK_HALF
        )
        tables = tables + (table,)
    q_weight = _load_weight(q_weight_ptr, D, HALF, BLOCK_HALF, BLOCK_REST)
    k_weight = _load_weight(k_weight_ptr, D, HALF, BLOCK_HALF, BLOCK_REST)
    for i in tl.static_range(TOKENS):
        token = tl.minimum(tl.program_id(0) * TOKENS + i, all_tokens - 1)
        b = (token // n_tokens).to(tl.int64)
        t = (token % n_tokens).to(tl.int64)
        yq = rotate(_normalise(q[i], q_weight, eps, offset, D, HAS_OFFSET, CAST_AFTER), tables[i], False)
        yk = rotate(_normalise(k[i], k_weight, eps, offset, D, HAS_OFFSET, CAST_AFTER), tables[i], False)
        yq_row = yq_ptr + b * yq_batch + t * yq_token
        yk_row = yk_ptr + b * yk_batch + t * yk_token
        store_heads(yq_row, yq, yq_head, first_q, q_heads, D, HALF, Q_HEADS, BLOCK_HALF, BLOCK_REST)
        store_heads(yk_row, yk, yk_head, first_k, k_heads, D, HALF, K_HEADS, BLOCK_HALF, BLOCK_REST)


@triton.jit
def _zeros(
    D: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr
):
    zeros = tl.zeros([HEADS, BLOCK_HALF], dtype=tl.float32)
    tiles = (zeros, zeros)
    if 2 * HALF < D:
        tiles = tiles + (tl.zeros([HEADS, BLOCK_REST], dtype=tl.float32),)
    return tiles


@triton.jit
def _store_sums(ptr, tiles, D: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr):
    """Write the sum over the heads, a row [D]."""
    sums = ()
    for i in tl.static_range(len(tiles)):
        sums = sums + (tl.sum(tiles[i], axis=0)[None, :],)
    store_heads(ptr, sums, 0, 0, 1, D, HALF, 1, BLOCK_HALF, BLOCK_REST)


@jit
def _bwd_kernel(
    q_ptr,
    k_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    dyq_ptr,
    dyk_ptr,
    dq_ptr,
    dk_ptr,
    dw_ptr,
    n_tokens,
    all_tokens,
    q_heads,
    k_heads,
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_token,
    k_head,
    dyq_batch,
    dyq_token,
    dyq_head,
    dyk_batch,
    dyk_token,
    dyk_head,
    dq_batch,
    dq_token,
    dq_head,
    dk_batch,
    dk_token,
    dk_head,
    cos_batch,
    cos_token,
    sin_batch,
    sin_token,
    eps,
    offset,
    D: tl.constexpr,
    HALF: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    CAST_AFTER: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    TOKENS: tl.constexpr,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Some heads of every so many-th token; dw is one row [2, D] of partial sums a program, None if not wanted."""
    first_q = tl.program_id(1) * Q_HEADS
    first_k = tl.program_id(1) * K_HEADS
    q_weight = _load_weight(q_weight_ptr, D, HALF, BLOCK_HALF, BLOCK_REST)
    k_weight = _load_weight(k_weight_ptr, D, HALF, BLOCK_HALF, BLOCK_REST)
    q_sums = _zeros(D, HALF, Q_HEADS, BLOCK_HALF, BLOCK_REST)
    k_sums = _zeros(D, HALF, K_HEADS, BLOCK_HALF, BLOCK_REST)
    for start in tl.range(tl.program_id(0) * TOKENS, all_tokens, tl.num_programs(0) * TOKENS, num_stages=STAGES):
        tables = ()
        q = ()
        k = ()
        dyq = ()
        dyk = ()
        for i in tl.static_range(TOKENS):
            token = tl.minimum(start + i, all_tokens - 1)
            # Past the last token there are no heads: nothing may be added to the sums twice.
            q_there = tl.where(start + i < all_tokens, q_heads, 0)
            k_there = tl.where(start + i < all_tokens, k_heads, 0)
            b = (token // n_tokens).to(tl.int64)
            t = (token % n_tokens).to(tl.int64)
            q_row = q_ptr + b * q_batch + t * q_token
            k_row = k_ptr + b * k_batch + t * k_token
            dyq_row = dyq_ptr + b * dyq_batch + t * dyq_token
            dyk_row = dyk_ptr + b * dyk_batch + t * dyk_token
            q = q + (load_heads(q_row, q_head, first_q, q_there, D, HALF, Q_HEADS, BLOCK_HALF, BLOCK_REST),)
            dyq = dyq + (load_heads(dyq_row, dyq_head, first_q, q_there, D, HALF, Q_HEADS, BLOCK_HALF, BLOCK_REST),)
            k = k + (load_heads(k_row, k_head, first_k, k_there, D, HALF, K_HEADS, BLOCK_HALF, BLOCK_REST),)
            dyk = dyk + (load_heads(dyk_row, dyk_head, first_k, k_there, D, HALF, K_HEADS, BLOCK_HALF, BLOCK_REST),)
            table = load_tables(
                cos_ptr + b * cos_batch + t * cos_token, sin_ptr + b * sin_batch + t * sin_token, HALF, BLOCK_HALF
            )
            tables = tables + (table,)
        for i in tl.static_range(TOKENS):
            token = tl.minimum(start + i, all_tokens - 1)
            q_there = tl.where(start + i < all_tokens, q_heads, 0)
            k_there = tl.where(start + i < all_tokens, k_heads, 0)
            b = (token // n_tokens).to(tl.int64)
            t = (token % n_tokens).to(tl.int64)
            q_in_use = first_q + tl.arange(0, Q_HEADS) < q_there
            k_in_use = first_k + tl.arange(0, K_HEADS) < k_there
            dq, q_sums = _gradients(
                q[i], dyq[i], q_weight, q_sums, tables[i], q_in_use, eps, offset, D, HAS_OFFSET, CAST_AFTER
            )
            dk, k_sums = _gradients(
                k[i], dyk[i], k_weight, k_sums, tables[i], k_in_use, eps, offset, D, HAS_OFFSET, CAST_AFTER
            )
            dq_row = dq_ptr + b * dq_batch + t * dq_token
            dk_row = dk_ptr + b * dk_batch + t * dk_token
            store_heads(dq_row, dq, dq_head, first_q, q_there, D, HALF, Q_HEADS, BLOCK_HALF, BLOCK_REST)
            store_heads(dk_row, dk, dk_head, first_k, k_there, D, HALF, K_HEADS, BLOCK_HALF, BLOCK_REST)
    if dw_ptr is not None:
        program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        dw_ptr += program.to(tl.int64) * 2 * D
        _store_sums(dw_ptr, q_sums, D, HALF, BLOCK_HALF, BLOCK_REST)
        _store_sums(dw_ptr + D, k_sums, D, HALF, BLOCK_HALF, BLOCK_REST)


@functools.cache
def forward_tiling(q_heads: int, k_heads: int, block_half: int) -> Tiling:
    q, k, blocks = split_heads(q_heads, k_heads, max(1, 2048 // block_half))
    return Tiling(1, q, k, blocks, min(2, max(1, max(q, k) * block_half // 512)), 0, 1)


@functools.cache
def backward_tiling(q_heads: int, k_heads: int, block_half: int, sms: int) -> Tiling:
    """Programs stay and walk over the tokens of their heads, two a multiprocessor, two tokens ahead.

    Measured on an H100: 82 to 85% of copy bandwidth; 74 to 80% with four programs and nothing read ahead.
    """
    q, k, blocks = split_heads(q_heads, k_heads, max(1, 1024 // block_half))
    warps = min(4, max(1, max(q, k) * block_half // 256))
    return Tiling(1, q, k, blocks, warps, -(-2 * sms // blocks), 3)


def _results(q, k, q_weight, k_weight, cos, sin, eps, offset, cast_after, head_dim):
    table_dtype = torch.promote_types(cos.dtype, sin.dtype)
    results = []
    for x, weight in (q, q_weight), (k, k_weight):
        dtype = x.dtype if cast_after else torch.promote_types(x.dtype, weight.dtype)
        results.append(empty_with_strides_of(x, torch.promote_types(dtype, table_dtype)))
    return tuple(results)


@operator(
    "norm_rope(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, float eps, float offset,"
    " bool cast_after, int head_dim) -> (Tensor, Tensor)",
    _results,
)
def _forward(q, k, q_weight, k_weight, cos, sin, eps, offset, cast_after, head_dim):
    """Of tensors with contiguous rows."""
    outputs = _results(q, k, q_weight, k_weight, cos, sin, eps, offset, cast_after, head_dim)
    width, heads = q.shape[3], (q.shape[head_dim], k.shape[head_dim])
    numbers = numbers_of(head_dim, heads, q.shape, cos.shape, strides_of(q, k, *outputs, cos, sin))
    half, block_half, block_rest = blocks_of(width, cos.shape[-1])
    tokens, q_block, k_block, blocks, warps, _, _ = forward_tiling(*heads, block_half)
    with launch_device(q):
        _fwd_kernel[(-(-numbers[1] // tokens), blocks)](
            q, k, q_weight, k_weight, cos, sin, *outputs, *numbers, eps, offset,
            width, half, offset != 0, cast_after, block_half, block_rest, tokens, q_block, k_block,
            num_warps=warps,
        )  # fmt: skip
    return outputs


def _gradient_results(q, k, q_weight, k_weight, cos, sin, dyq, dyk, eps, offset, cast_after, head_dim, need_dw):
    results = [empty_with_strides_of(x, x.dtype) for x, dy in ((q, dyq), (k, dyk)) if dy is not None]
    if need_dw:
        dtype = q_weight.dtype if q_weight.dtype == k_weight.dtype else torch.float32
        results.append(torch.empty(2 * q.shape[3], dtype=dtype, device=q.device))
    return results


@operator(
    "norm_rope_backward(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, Tensor? dyq,"
    " Tensor? dyk, float eps, float offset, bool cast_after, int head_dim, bool need_dw) -> Tensor[]",
    _gradient_results,
)
def _backward(q, k, q_weight, k_weight, cos, sin, dyq, dyk, eps, offset, cast_after, head_dim, need_dw):
    """The gradients of q and k, for each that has one of its output, and of both weights, in one tensor."""
    results = _gradient_results(
        q, k, q_weight, k_weight, cos, sin, dyq, dyk, eps, offset, cast_after, head_dim, need_dw
    )
    found = iter(results)
    width = q.shape[3]
    incoming, outgoing, heads = [], [], []
    for x, dy in (q, dyq), (k, dyk):
        # What is not wanted takes part with no heads.
        incoming.append(x if dy is None else with_contiguous_rows(dy))
        outgoing.append(x if dy is None else next(found))
        heads.append(0 if dy is None else x.shape[head_dim])
    strides = strides_of(q, k, *incoming, *outgoing, cos, sin)
    numbers = numbers_of(head_dim, tuple(heads), q.shape, cos.shape, strides)
    half, block_half, block_rest = blocks_of(width, cos.shape[-1])
    tokens, q_block, k_block, blocks, warps, programs, stages = backward_tiling(*heads, block_half, num_sms(q))
    programs = min(programs, -(-numbers[1] // tokens))
    partial = None
    if need_dw:
        partial = torch.empty(blocks * programs, 2 * width, dtype=torch.float32, device=q.device)
    with launch_device(q):
        _bwd_kernel[(programs, blocks)](
            q, k, q_weight, k_weight, cos, sin, *incoming, *outgoing, partial, *numbers, eps, offset,
            width, half, offset != 0, cast_after, block_half, block_rest, tokens, q_block, k_block, stages,
            num_warps=warps,
        )  # fmt: skip
        if need_dw:
            sum_rows(partial, next(found))
    return results


class _NormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, q_weight, k_weight, cos, sin, eps, offset, cast_after, head_dim):
        ctx.set_materialize_grads(False)
        q, k, cos, sin = (with_contiguous_rows(t) for t in (q, k, cos, sin))
        q_weight, k_weight = q_weight.contiguous(), k_weight.contiguous()
        ctx.save_for_backward(q, k, q_weight, k_weight, cos, sin)
        ctx.options = eps, offset, cast_after, head_dim
        outputs = _forward(q, k, q_weight, k_weight, cos, sin, *ctx.options)
        needed = ctx.needs_input_grad
        ctx.mark_non_differentiable(*(outputs[i] for i in (0, 1) if not (needed[i] or needed[2 + i])))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        needed = ctx.needs_input_grad
        wanted = [dy is not None and (needed[i] or needed[2 + i]) for i, dy in enumerate(dys)]
        if not any(wanted):
            return (None,) * 10
        tensors = ctx.saved_tensors
        dys = [dy if want else None for dy, want in zip(dys, wanted, strict=True)]
        found = iter(_backward(*tensors, *dys, *ctx.options, needed[2] or needed[3]))
        dx = [next(found) if want else None for want in wanted]
        dx = [d if need else None for d, need in zip(dx, needed[:2], strict=True)]
        dw = [None, None]
        if needed[2] or needed[3]:
            halves = next(found).chunk(2)
            for i in (0, 1):
                if wanted[i] and needed[2 + i]:
                    dw[i] = halves[i].to(tensors[2 + i].dtype)
        return *dx, *dw, None, None, None, None, None, None


def _check(q, k, q_weight, k_weight, cos, sin, cast) -> int:
    check_cast("norm_rope", cast)
    head_dim = check_rope("norm_rope", q, k, cos, sin)
    if not (q_weight.is_floating_point() and k_weight.is_floating_point()):
        raise TypeError(f"norm_rope: weights must be floating point, got {q_weight.dtype} and {k_weight.dtype}")
    if q_weight.shape != q.shape[-1:] or k_weight.shape != q.shape[-1:]:
        raise ValueError(
            f"norm_rope: weights must be [D], D the head size {q.shape[-1]}, "
            f"got {tuple(q_weight.shape)} and {tuple(k_weight.shape)}"
        )
    return head_dim


def norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    cast: str = "before_weight",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rms_norm` over the last dim of q and of k, each with its own weight, then `rope`.

    Args:
        q: [B, N, S, D], or [B, S, N, D]; floating point, any strides.
        k: [B, M, S, D], or [B, S, M, D]; the head counts N and M may differ.
        q_weight: [D], floating point; may have another dtype than q.
        k_weight: as q_weight.
        cos: as for `rope`: [B or 1, 1, S, R], or [B or 1, S, 1, R] for heads at dim 2; R even, R <= D.
        sin: as cos. If cos or sin requires a gradient the reference runs.
        eps, offset, cast: as for `rms_norm`. Its result is rounded, as by itself, before it is rotated.

    Returns:
        Rotated q and k, each in the promoted dtype of its norm, cos and sin, with its own strides if it is
        dense.

    Raises:
        ValueError: for another `cast`, or shapes other than those above.
        TypeError: if an input is not floating point.

    Source: Yang et al., "Qwen3 Technical Report", 2025, arXiv:2505.09388, section 2 (QK-Norm).

    Examples:
        >>> import torch
        >>> from ligerfx.kernels import norm_rope
        >>> q, k = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 5, 16)  # 4 and 2 heads, 5 tokens
        >>> q_weight, k_weight = torch.ones(16), torch.ones(16)
        >>> angles = torch.randn(1, 1, 5, 8).repeat(1, 1, 1, 2)
        >>> q, k = norm_rope(q, k, q_weight, k_weight, angles.cos(), angles.sin())
        >>> q.shape, k.shape
        (torch.Size([2, 4, 5, 16]), torch.Size([2, 2, 5, 16]))
    """
    table_grad = torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad)
    # Where layers are narrow, all heads of q together are up to twice as wide; and no operator takes the host longer.
    if table_grad or not use_triton(q, k, q_weight, k_weight, cos, sin, numbers=q.numel() // 2):
        return norm_rope_reference(q, k, q_weight, k_weight, cos, sin, eps, offset=offset, cast=cast)
    head_dim = _check(q, k, q_weight, k_weight, cos, sin, cast)
    cos, sin = with_four_dims(cos), with_four_dims(sin)
    return apply(
        _NormRope, q, k, q_weight, k_weight, cos, sin, float(eps), float(offset), cast == "after_weight", head_dim
    )
