"""Rotary position embedding in its rotate-half form (Su et al. 2021, https://arxiv.org/abs/2104.09864)."""

import torch
from torch.autograd.function import once_differentiable

from ._runtime import launch_device, tl, triton, use_triton


def _rotate_half(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def rope_reference(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain PyTorch `rope`, in the order of operations of the Hugging Face models."""
    _head_dim(q, k, cos, sin)
    rotated = cos.shape[-1]

    def apply(x: torch.Tensor) -> torch.Tensor:
        turned, rest = x[..., :rotated], x[..., rotated:]
        turned = (turned * cos) + (_rotate_half(turned) * sin)
        return turned if rotated == x.shape[-1] else torch.cat([turned, rest], dim=-1)

    return apply(q), apply(k)


@triton.jit
def _rotate_heads(
    x_ptr,
    y_ptr,
    x_head_stride,
    y_head_stride,
    n_heads,
    c1,
    c2,
    s1,
    s2,
    D: tl.constexpr,
    HALF: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    cols = tl.arange(0, BLOCK_HALF)
    for start in range(0, n_heads, BLOCK_HEADS):
        heads = start + tl.arange(0, BLOCK_HEADS)
        head_mask = (heads < n_heads)[:, None]
        mask = head_mask & (cols < HALF)[None, :]
        x_rows = x_ptr + heads.to(tl.int64)[:, None] * x_head_stride
        y_rows = y_ptr + heads.to(tl.int64)[:, None] * y_head_stride
        x1 = tl.load(x_rows + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(x_rows + HALF + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        if BACKWARD:
            y1 = x1 * c1[None, :] + x2 * s2[None, :]
            y2 = x2 * c2[None, :] - x1 * s1[None, :]
        else:
            y1 = x1 * c1[None, :] - x2 * s1[None, :]
            y2 = x2 * c2[None, :] + x1 * s2[None, :]
        tl.store(y_rows + cols[None, :], y1.to(y_ptr.dtype.element_ty), mask=mask)
        tl.store(y_rows + HALF + cols[None, :], y2.to(y_ptr.dtype.element_ty), mask=mask)
        if 2 * HALF < D:
            rest = 2 * HALF + tl.arange(0, BLOCK_REST)
            rest_mask = head_mask & (rest < D)[None, :]
            kept = tl.load(x_rows + rest[None, :], mask=rest_mask, other=0.0).to(tl.float32)
            tl.store(y_rows + rest[None, :], kept.to(y_ptr.dtype.element_ty), mask=rest_mask)


@triton.jit
def _rope_kernel(
    q_ptr,
    k_ptr,
    yq_ptr,
    yk_ptr,
    cos_ptr,
    sin_ptr,
    n_tokens,
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
    D: tl.constexpr,
    HALF: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """All heads of one token. Backward, q and k are the incoming gradients, yq and yk the outgoing ones."""
    b = (tl.program_id(0) // n_tokens).to(tl.int64)
    t = (tl.program_id(0) % n_tokens).to(tl.int64)
    cols = tl.arange(0, BLOCK_HALF)
    mask = cols < HALF
    cos_ptr += b * cos_batch + t * cos_token
    sin_ptr += b * sin_batch + t * sin_token
    c1 = tl.load(cos_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    c2 = tl.load(cos_ptr + HALF + cols, mask=mask, other=0.0).to(tl.float32)
    s1 = tl.load(sin_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    s2 = tl.load(sin_ptr + HALF + cols, mask=mask, other=0.0).to(tl.float32)
    _rotate_heads(
        q_ptr + b * q_batch + t * q_token, yq_ptr + b * yq_batch + t * yq_token, q_head, yq_head, q_heads,
        c1, c2, s1, s2, D, HALF, BACKWARD, BLOCK_HEADS, BLOCK_HALF, BLOCK_REST,
    )  # fmt: skip
    _rotate_heads(
        k_ptr + b * k_batch + t * k_token, yk_ptr + b * yk_batch + t * yk_token, k_head, yk_head, k_heads,
        c1, c2, s1, s2, D, HALF, BACKWARD, BLOCK_HEADS, BLOCK_HALF, BLOCK_REST,
    )  # fmt: skip


def _empty_like(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    y = torch.empty_like(x, dtype=dtype)
    return y if y.stride(-1) == 1 else torch.empty(x.shape, dtype=dtype, device=x.device)


def _launch(
    pairs: list[tuple[torch.Tensor, torch.Tensor] | None],
    cos: torch.Tensor,
    sin: torch.Tensor,
    head_dim: int,
    backward: bool,
) -> None:
    """Rotate each (source, destination) pair; where one is None it takes part with no heads."""
    token_dim = 3 - head_dim
    source = next(pair for pair in pairs if pair is not None)[0]
    batch, n_tokens, width = source.shape[0], source.shape[token_dim], source.shape[-1]
    tensors, heads = [], []
    for pair in pairs:
        x, y = pair or (source, source)
        tensors.append((x if x.stride(-1) == 1 else x.contiguous(), y))
        heads.append(x.shape[head_dim] if pair else 0)
    (q, yq), (k, yk) = tensors
    strides = [t.stride(d) for t in (q, k, yq, yk) for d in (0, token_dim, head_dim)]
    tables = []
    for table in (cos, sin):
        table = table if table.stride(-1) == 1 else table.contiguous()
        tables.append(table)
        strides += [table.stride(d) if table.shape[d] > 1 else 0 for d in (0, token_dim)]
    half = cos.shape[-1] // 2
    block_half = max(16, triton.next_power_of_2(half))
    # 2048 elements of each half: one or two steps for the head counts of common models. A smaller tile gets
    # fewer warps, to keep 16-byte accesses.
    block_heads = min(triton.next_power_of_2(max(heads)), max(1, 2048 // block_half))
    with launch_device(q):
        _rope_kernel[(batch * n_tokens,)](
            q, k, yq, yk, *tables, n_tokens, *heads, *strides, width, half, backward,
            block_heads, block_half, triton.next_power_of_2(max(1, width - 2 * half)),
            num_warps=min(4, max(1, block_heads * block_half // 256)),
        )  # fmt: skip


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, head_dim):
        ctx.set_materialize_grads(False)
        table_dtype = torch.promote_types(cos.dtype, sin.dtype)
        outputs = [_empty_like(x, torch.promote_types(x.dtype, table_dtype)) for x in (q, k)]
        _launch([(q, outputs[0]), (k, outputs[1])], cos, sin, head_dim, False)
        ctx.mark_non_differentiable(*(outputs[i] for i in (0, 1) if not ctx.needs_input_grad[i]))
        ctx.save_for_backward(cos, sin)
        ctx.head_dim = head_dim
        # The gradients take the outputs' strides.
        ctx.layouts = [(y.shape, y.stride(), x.dtype) for x, y in zip((q, k), outputs, strict=True)]
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, dyq, dyk):
        cos, sin = ctx.saved_tensors
        pairs = []
        for i, (dy, layout) in enumerate(zip((dyq, dyk), ctx.layouts, strict=True)):
            wanted = dy is not None and ctx.needs_input_grad[i]
            pairs.append((dy, torch.empty_strided(*layout[:2], dtype=layout[2], device=dy.device)) if wanted else None)
        if any(pair is not None for pair in pairs):
            _launch(pairs, cos, sin, ctx.head_dim, True)
        return *(None if pair is None else pair[1] for pair in pairs), None, None, None


def _head_dim(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> int:
    """Check the arguments and return which dim of q and k (1 or 2) counts the heads."""
    if not all(t.is_floating_point() for t in (q, k, cos, sin)):
        raise TypeError(f"rope: expected floating-point inputs, got {[t.dtype for t in (q, k, cos, sin)]}")
    shapes = f"got q {tuple(q.shape)}, k {tuple(k.shape)}, cos {tuple(cos.shape)}, sin {tuple(sin.shape)}"
    if q.dim() != 4 or k.dim() != 4 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"rope: q and k must be 4-D with equal batch and head size, {shapes}")
    if cos.shape != sin.shape or not 1 <= cos.dim() <= 4:
        raise ValueError(f"rope: cos and sin must have one shape of at most 4 dims, {shapes}")
    batch, *middle, rotated = (1,) * (4 - cos.dim()) + tuple(cos.shape)
    if rotated % 2 or rotated > q.shape[3]:
        raise ValueError(f"rope: the last dim of cos must be even and at most the head size, {shapes}")
    if batch in (1, q.shape[0]):
        for heads, tokens in ((1, 2), (2, 1)):
            same_tokens = q.shape[tokens] == k.shape[tokens]
            if middle[heads - 1] == 1 and same_tokens and middle[tokens - 1] in (1, q.shape[tokens]):
                return heads
    raise ValueError(f"rope: cos must be [B or 1, 1, S, R], or [B or 1, S, 1, R] for heads at dim 2, {shapes}")


def rope(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate q and k by position: x * cos + rotate_half(x) * sin on the first R dims, the others unchanged.

    Args:
        q: [B, N, S, D], or [B, S, N, D]; floating point, any strides.
        k: [B, M, S, D], or [B, S, M, D]; the head counts N and M may differ.
        cos: [B or 1, 1, S, R], or [B or 1, S, 1, R] for heads at dim 2; R even, R <= D. The two halves of the
            last dim may differ.
        sin: as cos. If cos or sin requires a gradient the reference runs.

    Returns:
        Rotated q and k, each in the promoted dtype of itself, cos and sin, with its own
        strides if it is dense.

    Raises:
        ValueError: for shapes other than those above.
        TypeError: if an input is not floating point.

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021,
    arXiv:2104.09864.
    """
    head_dim = _head_dim(q, k, cos, sin)
    table_grad = torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad)
    if table_grad or not use_triton(q, k, cos, sin):
        return rope_reference(q, k, cos, sin)
    if cos.dim() < 4:
        cos, sin = (t.reshape((1,) * (4 - t.dim()) + t.shape) for t in (cos, sin))
    return _Rope.apply(q, k, cos, sin, head_dim)
