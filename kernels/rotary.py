"""Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864), by halves or by neighbours."""

import functools
from typing import NamedTuple

import torch

from ._autograd import apply, once_differentiable
from ._operators import operator
from ._runtime import ceil_div, jit, launch_device, tl, triton, use_triton

PAIRS = ("halves", "neighbours", "neighbours_to_halves")


def rope_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    pairs: str = "halves",
    half_tables: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain PyTorch `rope`, in the order of operations of the Hugging Face models.

    Arguments, results and errors are those of `rope`.

    Examples:
        >>> import torch
        >>> from ligerfx.kernels import rope_reference
        >>> q = torch.tensor([1.0, 2.0]).view(1, 1, 1, 2)  # a head of one pair, turned by a right angle
        >>> cos, sin = torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 1, 2)
        >>> rope_reference(q, q, cos, sin)[0].flatten()
        tensor([-2.,  1.])
    """
    check_rope("rope", q, k, cos, sin, pairs, half_tables)
    rotated = cos.shape[-1] * (2 if half_tables else 1)

    def turned(x: torch.Tensor) -> torch.Tensor:
        if half_tables:
            x1, x2 = _paired(x, pairs)
            return _joined(x1 * cos - x2 * sin, x2 * cos + x1 * sin, pairs)
        return (x * cos) + (_exchanged(x, pairs) * sin)

    if rotated == q.shape[-1]:
        return turned(q), turned(k)
    return tuple(torch.cat([turned(x[..., :rotated]), x[..., rotated:]], dim=-1) for x in (q, k))


def _paired(x: torch.Tensor, pairs: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The first and the second elements of all pairs."""
    half = x.shape[-1] // 2
    return (x[..., :half], x[..., half:]) if pairs == "halves" else (x[..., 0::2], x[..., 1::2])


def _exchanged(x: torch.Tensor, pairs: str) -> torch.Tensor:
    """(a, b) becomes (-b, a) in each pair."""
    x1, x2 = _paired(x, pairs)
    return _joined(-x2, x1, pairs)


def _joined(x1: torch.Tensor, x2: torch.Tensor, pairs: str) -> torch.Tensor:
    return torch.stack((x1, x2), dim=-1).flatten(-2) if pairs == "neighbours" else torch.cat((x1, x2), dim=-1)


@triton.jit
def _columns(HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, NEIGHBOURS: tl.constexpr):
    """Where the first and where the second elements of the pairs stand, and which of them there are."""
    index = tl.arange(0, BLOCK_HALF)[None, :]
    if NEIGHBOURS:
        first = 2 * index
        second = first + 1
    else:
        first = index
        second = HALF + index
    return first, second, index < HALF


@triton.jit
def load_heads(
    ptr,
    head_stride,
    first,
    n_heads,
    D: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    NEIGHBOURS: tl.constexpr = False,
):
    """HEADS heads of a token, zero from n_heads on: the first and the second elements of the pairs that rotate, and
    the rest if there is one."""
    heads = first + tl.arange(0, HEADS)
    head_mask = (heads < n_heads)[:, None]
    rows = ptr + heads.to(tl.int64)[:, None] * head_stride
    cols1, cols2, there = _columns(HALF, BLOCK_HALF, NEIGHBOURS)
    mask = head_mask & there
    tiles = (tl.load(rows + cols1, mask=mask, other=0.0), tl.load(rows + cols2, mask=mask, other=0.0))
    if 2 * HALF < D:
        rest = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
        tiles = tiles + (tl.load(rows + rest, mask=head_mask & (rest < D), other=0.0),)
    return tiles


@triton.jit
def store_heads(
    ptr,
    tiles,
    head_stride,
    first,
    n_heads,
    D: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    NEIGHBOURS: tl.constexpr = False,
):
    """Write what `load_heads` reads."""
    heads = first + tl.arange(0, HEADS)
    head_mask = (heads < n_heads)[:, None]
    rows = ptr + heads.to(tl.int64)[:, None] * head_stride
    cols1, cols2, there = _columns(HALF, BLOCK_HALF, NEIGHBOURS)
    mask = head_mask & there
    tl.store(rows + cols1, tiles[0].to(ptr.dtype.element_ty), mask=mask)
    tl.store(rows + cols2, tiles[1].to(ptr.dtype.element_ty), mask=mask)
    if 2 * HALF < D:
        rest = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
        tl.store(rows + rest, tiles[2].to(ptr.dtype.element_ty), mask=head_mask & (rest < D))


@triton.jit
def load_tables(
    cos_ptr,
    sin_ptr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    NEIGHBOURS: tl.constexpr = False,
    HALF_TABLES: tl.constexpr = False,
):
    """cos and sin of a token, each for the first and for the second elements of the pairs [1, BLOCK_HALF]."""
    cols1, cols2, mask = _columns(HALF, BLOCK_HALF, NEIGHBOURS and not HALF_TABLES)
    c1 = tl.load(cos_ptr + cols1, mask=mask, other=0.0)
    s1 = tl.load(sin_ptr + cols1, mask=mask, other=0.0)
    if HALF_TABLES:
        return c1, c1, s1, s1
    c2 = tl.load(cos_ptr + cols2, mask=mask, other=0.0)
    s2 = tl.load(sin_ptr + cols2, mask=mask, other=0.0)
    return c1, c2, s1, s2


@triton.jit
def rotate(tiles, tables, BACKWARD: tl.constexpr):
    """The tiles of `load_heads`, turned; backward, by the transposed matrix."""
    x1 = tiles[0].to(tl.float32)
    x2 = tiles[1].to(tl.float32)
    c1 = tables[0].to(tl.float32)
    c2 = tables[1].to(tl.float32)
    s1 = tables[2].to(tl.float32)
    s2 = tables[3].to(tl.float32)
    if BACKWARD:
        y1 = x1 * c1 + x2 * s2
        y2 = x2 * c2 - x1 * s1
    else:
        y1 = x1 * c1 - x2 * s1
        y2 = x2 * c2 + x1 * s2
    return (y1, y2) + tiles[2:]


@jit
def _rope_kernel(
    q_ptr,
    k_ptr,
    yq_ptr,
    yk_ptr,
    cos_ptr,
    sin_ptr,
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
    D: tl.constexpr,
    HALF: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    TOKENS: tl.constexpr,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    NEIGHBOURS_IN: tl.constexpr,
    NEIGHBOURS_OUT: tl.constexpr,
    HALF_TABLES: tl.constexpr,
):
    """Some heads of some tokens. Backward, q and k are the incoming gradients, yq and yk the outgoing ones."""
    first_q = tl.program_id(1) * Q_HEADS
    first_k = tl.program_id(1) * K_HEADS
    # All is loaded before anything is stored: a load does not overtake a store.
    tables = ()
    q = ()
    k = ()
    for i in tl.static_range(TOKENS):
        # At the end some programs turn the last token twice, to the same result.
        token = tl.minimum(tl.program_id(0) * TOKENS + i, all_tokens - 1)
        b = (token // n_tokens).to(tl.int64)
        t = (token % n_tokens).to(tl.int64)
        cos_row = cos_ptr + b * cos_batch + t * cos_token
        sin_row = sin_ptr + b * sin_batch + t * sin_token
        # Whole tables are in the order of the elements: that of the input, which is that of the output.
        table = load_tables(cos_row, sin_row, HALF, BLOCK_HALF, NEIGHBOURS_IN, HALF_TABLES)
        tables = tables + (table,)
        q_row = q_ptr + b * q_batch + t * q_token
        k_row = k_ptr + b * k_batch + t * k_token
        q = q + (load_heads(q_row, q_head, first_q, q_heads, D, HALF, Q_HEADS, BLOCK_HALF, BLOCK_REST, NEIGHBOURS_IN),)
        k = k + (load_heads(k_row, k_head, first_k, k_heads, D, HALF, K_HEADS, BLOCK_HALF, BLOCK_REST, NEIGHBOURS_IN),)
    for i in tl.static_range(TOKENS):
        token = tl.minimum(tl.program_id(0) * TOKENS + i, all_tokens - 1)
        b = (token // n_tokens).to(tl.int64)
        t = (token % n_tokens).to(tl.int64)
        yq = rotate(q[i], tables[i], BACKWARD)
        yk = rotate(k[i], tables[i], BACKWARD)
        yq_row = yq_ptr + b * yq_batch + t * yq_token
        yk_row = yk_ptr + b * yk_batch + t * yk_token
        store_heads(yq_row, yq, yq_head, first_q, q_heads, D, HALF, Q_HEADS, BLOCK_HALF, BLOCK_REST, NEIGHBOURS_OUT)
        store_heads(yk_row, yk, yk_head, first_k, k_heads, D, HALF, K_HEADS, BLOCK_HALF, BLOCK_REST, NEIGHBOURS_OUT)


def empty_with_strides_of(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """With the strides of a dense x, and always with contiguous last dim."""
    y = torch.empty_like(x, dtype=dtype)
    return y if y.stride(-1) == 1 else torch.empty(x.shape, dtype=dtype, device=x.device)


class Tiling(NamedTuple):
    """What one program of the kernel works on."""

    tokens: int
    q_heads: int
    k_heads: int
    blocks: int  # of heads, so many of q and so many of k
    warps: int


def split_heads(q_heads: int, k_heads: int, most: int) -> tuple[int, int, int]:
    """(heads of q, heads of k, blocks): blocks of at most so many heads, each with its share of q and of k."""
    blocks = max(1, ceil_div(max(q_heads, k_heads), most))
    q, k = (triton.next_power_of_2(max(1, ceil_div(n, blocks))) for n in (q_heads, k_heads))
    return q, k, max(ceil_div(q_heads, q), ceil_div(k_heads, k))


@functools.cache
def blocks_of(width: int, rotated: int) -> tuple[int, int, int]:
    """(half of what rotates, the block that holds it, the block that holds the rest of a head)."""
    half = rotated // 2
    return half, max(16, triton.next_power_of_2(half)), triton.next_power_of_2(max(1, width - rotated))


def strides_of(*tensors: torch.Tensor) -> tuple[tuple[int, ...], ...]:
    return tuple([tensor.stride() for tensor in tensors])


@functools.lru_cache(maxsize=1024)
def numbers_of(
    head_dim: int,
    heads: tuple[int, int],
    shape: tuple[int, ...],
    table_shape: tuple[int, ...],
    strides: tuple[tuple[int, ...], ...],
) -> tuple[int, ...]:
    """What the kernels are told of q's and the tables' shapes, and of the strides of all tensors, the tables last: the
    tokens of a sequence and of all, the heads of q and of k, strides of the batch, the tokens and the heads of each
    tensor, and of the batch and the tokens of each table, which are 0 where all share one."""
    batch, n_tokens = shape[0], shape[3 - head_dim]
    numbers = [n_tokens, batch * n_tokens, *heads]
    for of_batch, *middle, _ in strides[:-2]:
        numbers += of_batch, middle[2 - head_dim], middle[head_dim - 1]
    for stride in strides[-2:]:
        numbers += [stride[dim] if table_shape[dim] > 1 else 0 for dim in (0, 3 - head_dim)]
    return tuple(numbers)


def with_contiguous_rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def with_four_dims(table: torch.Tensor) -> torch.Tensor:
    return table if table.dim() == 4 else table.reshape((1,) * (4 - table.dim()) + table.shape)


@functools.cache
def tiling(q_heads: int, k_heads: int, block_half: int) -> Tiling:
    q, k, blocks = split_heads(q_heads, k_heads, max(1, 2048 // block_half))
    # At most 2048 elements of each half: 8 a thread, a 16-byte load of a 16-bit dtype. A smaller tile gets fewer warps,
    # to keep the loads that wide.
    tile = max(q, k) * block_half
    return Tiling(1, q, k, blocks, min(8, max(1, tile // 256)))


def _rotated(q, k, cos, sin, q_dtype, k_dtype, q_strides, k_strides, backward, head_dim, pairs, half_tables):
    results = []
    for x, dtype, strides in (q, q_dtype, q_strides), (k, k_dtype, k_strides):
        if strides is not None:
            results.append(torch.empty_strided(x.shape, strides, dtype=dtype, device=x.device))
        elif dtype is not None:
            results.append(empty_with_strides_of(x, dtype))
    return results


@operator(
    "rope(Tensor q, Tensor k, Tensor cos, Tensor sin, ScalarType? q_dtype, ScalarType? k_dtype, SymInt[]? q_strides,"
    " SymInt[]? k_strides, bool backward, int head_dim, str pairs, bool half_tables) -> Tensor[]",
    _rotated,
)
def _rotate(q, k, cos, sin, q_dtype, k_dtype, q_strides, k_strides, backward, head_dim, pairs, half_tables):
    """q and k, rotated or rotated back, in the dtypes given; what has none takes part with no heads.

    Without strides of its own, a result has those of what it is made from.
    """
    results = _rotated(q, k, cos, sin, q_dtype, k_dtype, q_strides, k_strides, backward, head_dim, pairs, half_tables)
    found = iter(results)
    yq, yk = (x if dtype is None else next(found) for x, dtype in ((q, q_dtype), (k, k_dtype)))
    q, k, cos, sin = (with_contiguous_rows(x) for x in (q, k, cos, sin))
    tensors = q, k, yq, yk, cos, sin
    heads = tuple([0 if dtype is None else x.shape[head_dim] for x, dtype in ((q, q_dtype), (k, k_dtype))])
    numbers = numbers_of(head_dim, heads, q.shape, cos.shape, strides_of(*tensors))
    half, block_half, block_rest = blocks_of(q.shape[3], cos.shape[-1] * (2 if half_tables else 1))
    orders = [pairs != "halves", pairs == "neighbours"]  # of the forward's input and output: whether by neighbours
    if backward:
        orders.reverse()
    tokens, q_block, k_block, blocks, warps = tiling(*heads, block_half)
    with launch_device(q):
        _rope_kernel[(-(-numbers[1] // tokens), blocks)](
            *tensors, *numbers, q.shape[3], half, backward, block_half, block_rest, tokens, q_block, k_block, *orders,
            half_tables, num_warps=warps,
        )  # fmt: skip
    return results


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, head_dim, pairs, half_tables):
        ctx.set_materialize_grads(False)
        table_dtype = torch.promote_types(cos.dtype, sin.dtype)
        dtypes = [torch.promote_types(x.dtype, table_dtype) for x in (q, k)]
        outputs = _rotate(q, k, cos, sin, *dtypes, None, None, False, head_dim, pairs, half_tables)
        ctx.mark_non_differentiable(*(outputs[i] for i in (0, 1) if not ctx.needs_input_grad[i]))
        ctx.save_for_backward(cos, sin)
        ctx.options = head_dim, pairs, half_tables
        # The gradients take the outputs' strides.
        ctx.layouts = [(x.dtype, y.stride()) for x, y in zip((q, k), outputs, strict=True)]
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, dyq, dyk):
        cos, sin = ctx.saved_tensors
        wanted = [dy is not None and need for dy, need in zip((dyq, dyk), ctx.needs_input_grad[:2], strict=True)]
        if not any(wanted):
            return (None,) * 7
        # What is not wanted takes part with no heads.
        dyq, dyk = dyq if wanted[0] else dyk, dyk if wanted[1] else dyq
        layouts = [layout if want else (None, None) for layout, want in zip(ctx.layouts, wanted, strict=True)]
        dtypes, strides = zip(*layouts, strict=True)
        rotated = iter(_rotate(dyq, dyk, cos, sin, *dtypes, *strides, True, *ctx.options))
        return *(next(rotated) if want else None for want in wanted), None, None, None, None, None


def check_rope(
    op: str,
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    pairs: str = "halves",
    half_tables: bool = False,
) -> int:
    """Check the arguments and return which dim of q and k (1 or 2) counts the heads."""
    if pairs not in PAIRS or (pairs == "neighbours_to_halves" and not half_tables):
        raise ValueError(f"{op}: pairs must be one of {PAIRS}, the last with half_tables, got {pairs!r}")
    if not (q.is_floating_point() and k.is_floating_point() and cos.is_floating_point() and sin.is_floating_point()):
        raise TypeError(f"{op}: expected floating-point inputs, got {[t.dtype for t in (q, k, cos, sin)]}")
    q_shape, k_shape, table = q.shape, k.shape, cos.shape
    if len(q_shape) != 4 or len(k_shape) != 4 or q_shape[0] != k_shape[0] or q_shape[3] != k_shape[3]:
        problem = "q and k must be 4-D with equal batch and head size"
    elif table != sin.shape or not 1 <= len(table) <= 4:
        problem = "cos and sin must have one shape of at most 4 dims"
    else:
        batch, *middle, rotated = table if len(table) == 4 else (1,) * (4 - len(table)) + tuple(table)
        rotated = 2 * rotated if half_tables else rotated
        if rotated % 2 or rotated > q_shape[3]:
            problem = "what rotates, the last dim of cos or twice that, must be even and at most the head size"
        else:
            if batch in (1, q_shape[0]):
                for heads, tokens in ((1, 2), (2, 1)):
                    same_tokens = q_shape[tokens] == k_shape[tokens]
                    if middle[heads - 1] == 1 and same_tokens and middle[tokens - 1] in (1, q_shape[tokens]):
                        return heads
            problem = "cos must be [B or 1, 1, S, R], or [B or 1, S, 1, R] for heads at dim 2"
    shapes = f"got q {tuple(q.shape)}, k {tuple(k.shape)}, cos {tuple(cos.shape)}, sin {tuple(sin.shape)}"
    raise ValueError(f"{op}: {problem}, {shapes}")


def rope(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    pairs: str = "halves",
    half_tables: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate pairs of elements of q and k by position, those in the first R dims; the others are unchanged.

    A pair (a, b) becomes (a cos - b sin, b cos + a sin).

    Args:
        q: [B, N, S, D], or [B, S, N, D]; floating point, any strides.
        k: [B, M, S, D], or [B, S, M, D]; the head counts N and M may differ.
        cos: [B or 1, 1, S, R], or [B or 1, S, 1, R] for heads at dim 2; R even, R <= D. The two elements of a pair
            may have different values.
        sin: as cos. If cos or sin requires a gradient the reference runs.
        pairs: "halves" pairs element i with i + R/2, "neighbours" element 2i with 2i + 1, and
            "neighbours_to_halves" does the latter and puts the first elements of all pairs before the second ones.
        half_tables: cos and sin are [..., R/2], one value for each pair. "neighbours_to_halves" needs that.

    Returns:
        Rotated q and k, each in the promoted dtype of itself, cos and sin, with its own
        strides if it is dense.

    Raises:
        ValueError: for shapes or pairs other than those above.
        TypeError: if an input is not floating point.

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021,
    arXiv:2104.09864.

    Examples:
        >>> import torch
        >>> from ligerfx.kernels import rope
        >>> q, k = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 5, 16)  # 4 and 2 heads, 5 tokens
        >>> angles = torch.arange(5.0)[:, None] / 10000 ** (torch.arange(8) / 8)  # [5, 8]
        >>> tables = torch.cat([angles, angles], -1)[None, None]
        >>> q_rotated, k_rotated = rope(q, k, tables.cos(), tables.sin())
        >>> torch.allclose(q_rotated.norm(dim=-1), q.norm(dim=-1))  # a rotation
        True
        >>> halves = angles[None, None]  # one value for each pair
        >>> torch.allclose(rope(q, k, halves.cos(), halves.sin(), half_tables=True)[0], q_rotated)
        True
    """
    table_grad = torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad)
    if table_grad or not use_triton(q, k, cos, sin):
        return rope_reference(q, k, cos, sin, pairs=pairs, half_tables=half_tables)
    head_dim = check_rope("rope", q, k, cos, sin, pairs, half_tables)
    cos, sin = with_four_dims(cos), with_four_dims(sin)
    return apply(_Rope, q, k, cos, sin, head_dim, pairs, half_tables)
