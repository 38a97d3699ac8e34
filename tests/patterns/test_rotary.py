"""Rotary position embedding: layouts and spellings of rotate-half, and what only looks like it."""

import pytest
import torch
from torch import nn

import ligerfx

B, S, D = 6, 5, 8  # the batch is no head count: equal sizes of the captured call are taken to be one
PATTERN, PARTIAL = "rotary", "partial_rotary"


class Rotary(nn.Module):
    """Rotates q and k by `function(x, cos, sin)`, cos and sin unsqueezed at `dim`."""

    def __init__(self, function, dim=1):
        super().__init__()
        self.function = function
        self.dim = dim

    def forward(self, q, k, cos, sin):
        cos, sin = cos.unsqueeze(self.dim), sin.unsqueeze(self.dim)
        return self.function(q, cos, sin), self.function(k, cos, sin)


def call(batch=B, seq=S, heads=(4, 2), rotated=D, head_dim=D, dim=1, angles=None, dtype=torch.float32):
    """q and k (heads at `dim`), and cos and sin as transformers makes them; the angles need no gradient."""
    states = [torch.randn(batch, n, seq, head_dim, dtype=dtype) for n in heads]
    if dim == 2:
        states = [x.transpose(1, 2).contiguous() for x in states]
    half = torch.randn(angles or batch, seq, rotated // 2)
    full = torch.cat([half, half], -1)
    return [*states, full.cos().to(dtype), full.sin().to(dtype)]


def by_slices(x):
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def by_chunk(x):
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([-x2, x1], dim=-1)


def by_split(x):
    x1, x2 = torch.split(x, x.shape[-1] // 2, dim=-1)
    return torch.concat((x2.neg(), x1), -1)


def by_constant_slices(x):
    return torch.cat((torch.neg(x[:, :, :, D // 2 :]), x[:, :, :, : D // 2]), 3)


def by_narrow_and_times_minus_one(x):
    half = x.shape[-1] // 2
    return torch.cat((-1 * x.narrow(-1, half, half), x.narrow(-1, 0, half)), dim=-1)


HALVES = [by_slices, by_chunk, by_split, by_constant_slices, by_narrow_and_times_minus_one]


@pytest.mark.parametrize("rotate_half", HALVES, ids=lambda f: f.__name__)
def test_spelling_of_rotate_half(optimise, rotate_half):
    module = Rotary(lambda x, cos, sin: (x * cos) + (rotate_half(x) * sin))
    others = [call(1, 1), call(3, 9)]
    report = optimise(module, call(), [PATTERN], others=others)
    assert report.idioms == {"rope": 1} and not report.near_misses


SUMS = {
    "operands swapped": lambda x, cos, sin: cos * x + sin * by_slices(x),
    "sine first": lambda x, cos, sin: by_slices(x) * sin + x * cos,
    "functions": lambda x, cos, sin: torch.add(torch.mul(x, cos), torch.mul(by_slices(x), sin)),
    "methods": lambda x, cos, sin: x.mul(cos).add(by_slices(x).mul(sin)),
    "minus the negative": lambda x, cos, sin: x * cos - (-by_slices(x)) * sin,
}


@pytest.mark.parametrize("name", SUMS)
def test_spelling_of_the_sum(optimise, name):
    optimise(Rotary(SUMS[name]), call(), [PATTERN], others=[call(1, 1)])


def standard(x, cos, sin):
    return x * cos + by_slices(x) * sin


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1), (1, 1), (1, 4)], ids=str)
def test_head_counts(optimise, heads):
    optimise(Rotary(standard), call(heads=heads), [PATTERN], others=[call(3, 7, heads=heads)])


@pytest.mark.parametrize("angles", [1, B])
@pytest.mark.parametrize("dim", [1, 2])
def test_layout_and_batch_of_the_angles(optimise, dim, angles):
    optimise(Rotary(standard, dim), call(dim=dim, angles=angles), [PATTERN])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_low_precision(optimise, dtype):
    optimise(Rotary(standard), call(dtype=dtype), [PATTERN])


def test_angles_in_fp32_and_states_in_bf16(optimise):
    """The result is in fp32, as it is in the original."""
    q, k, _, _ = call(dtype=torch.bfloat16)
    optimise(Rotary(standard), [q, k, *call()[2:]], [PATTERN])


def test_rotated_in_fp32_and_rounded(optimise):
    """Qwen2-VL and others: the states are cast up, rotated and cast back."""

    def function(q, k, cos, sin):
        dtype = q.dtype
        q, k, cos, sin = q.float(), k.float(), cos.unsqueeze(1).float(), sin.unsqueeze(1).float()
        return standard(q, cos, sin).to(dtype), standard(k, cos, sin).to(dtype)

    # Only the gradients of cos and sin differ: where theirs from q and k are added.
    report = optimise(QAndK(function), call(dtype=torch.bfloat16), [PATTERN], rtol=2**-7)
    assert report.summary == "1/1 RoPE"


def tables(rows, rotated=D):
    half = torch.randn(rows, rotated // 2)
    return [torch.cat([half, half], -1).cos(), torch.cat([half, half], -1).sin()]


@pytest.mark.parametrize("dim", [0, 1])
def test_tables_without_a_batch(optimise, dim):
    """Pixtral: angles of the patches of an image, [S, D], with heads before or after the patches."""

    def inputs(batch, seq, heads=(4, 2)):
        return [*call(batch, seq, heads, dim=dim + 1)[:2], *tables(seq)]

    for heads in ((4, 4), (4, 2)):
        others = [inputs(1, 1, heads), inputs(3, 9, heads)]
        report = optimise(Rotary(standard, dim), inputs(B, S, heads), ["rotary_of_tables"], others=others)
        assert report.idioms == {"rope": 1} and not report.near_misses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("dim", [0, 1])
def test_rows_of_a_batch_after_each_other(optimise, dim, dtype):
    """Qwen2-VL's images: states [S, N, D] (or [N, S, D]), rotated in fp32."""

    def function(q, k, cos, sin):
        cos, sin = cos.unsqueeze(dim).float(), sin.unsqueeze(dim).float()
        return standard(q.float(), cos, sin).to(q.dtype), standard(k.float(), cos, sin).to(k.dtype)

    def inputs(seq, heads=(4, 2)):
        states = [torch.randn(seq, n, D, dtype=dtype) for n in heads]
        states = [x.transpose(0, 1).contiguous() for x in states] if dim == 0 else states
        return [*states, *tables(seq)]

    rtol = 2**-7 if dtype == torch.bfloat16 else 1e-5
    optimise(QAndK(function), inputs(7), ["packed_rotary"], others=[inputs(1), inputs(11)], rtol=rtol)


def test_tables_of_another_rank_that_are_not_the_same_for_all_heads(optimise):
    """[N, S, D] for states [B, N, S, D] and [S, N, D] for states [S, N, D]: an angle for each head."""
    q, _, cos, sin = call(heads=(4, 2))
    per_head = [torch.randn(4, S, D) for _ in range(2)]
    optimise(QAndK(lambda q, k, cos, sin: (standard(q, cos, sin), standard(k, cos, sin))), [q, q + 1, *per_head], [])
    packed = [x[0] for x in (q, q + 1)]
    optimise(QAndK(lambda q, k, cos, sin: (standard(q, cos, sin), standard(k, cos, sin))), [*packed, *per_head], [])


def partial_by_slices(x, cos, sin):
    n = cos.shape[-1]
    turned, rest = x[..., :n], x[..., n:]
    return torch.cat([standard(turned, cos, sin), rest], dim=-1)


def partial_by_split(x, cos, sin):
    turned, rest = x.split([4, 4], -1)
    return torch.cat((turned * cos + by_chunk(turned) * sin, rest), -1)


@pytest.mark.parametrize("function", [partial_by_slices, partial_by_split], ids=lambda f: f.__name__)
def test_partial(optimise, function):
    others = [call(1, 1, rotated=4), call(3, 7, rotated=4)]
    report = optimise(Rotary(function), call(rotated=4), [PARTIAL], others=others)
    assert report.idioms == {"rope": 1}


def test_partial_that_rotates_everything(optimise):
    optimise(Rotary(partial_by_slices), call(), [""], others=[call(3, 7)])


class Attention(nn.Module):
    """Projections, rotation and scores in one graph, twice."""

    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(16, 4 * D), nn.Linear(16, 2 * D)

    def forward(self, x, cos, sin):
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        for _ in range(2):
            q = self.q(x).view(x.shape[0], x.shape[1], 4, D).transpose(1, 2)
            k = self.k(x).view(x.shape[0], x.shape[1], 2, D).transpose(1, 2)
            q, k = standard(q, cos, sin), standard(k, cos, sin)
            scores = q.view(x.shape[0], 2, 2, -1, D) @ k.unsqueeze(2).transpose(-1, -2)
            x = x * scores.mean((1, 2, 3)).unsqueeze(-1)
        return x


def test_inlined_between_projections(optimise):
    inputs = [torch.randn(B, S, 16), *call()[2:]]
    others = [[torch.randn(3, 4, 16), *call(3, 4)[2:]]]
    report = optimise(Attention(), inputs, [PATTERN, PATTERN], others=others, rtol=1e-6)
    assert report.idioms == {"rope": 2}


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled on a machine with a GPU")
def test_in_the_interpreter(optimise, assert_same, monkeypatch):
    monkeypatch.setattr("ligerfx.kernels._runtime.INTERPRET", True)
    optimise(Rotary(standard), call(), [PATTERN], rtol=1e-6)
    optimise(Rotary(partial_by_slices), call(rotated=4), [PARTIAL], rtol=1e-6)
    module, inputs = Rotary(standard, 2), call(dim=2)
    without_grad = ligerfx.optimize(module, tuple(inputs))
    for a, b in zip(without_grad(*inputs), module(*inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("transposed", [True, False])
def test_normalised_with_one_plus_the_weight_then_rotated(optimise, transposed):
    """The kind of norm reaches the kernel in both layouts."""

    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_weight, self.k_weight = nn.Parameter(torch.randn(D)), nn.Parameter(torch.randn(D))

        def norm(self, x, weight):
            h = x.float()
            h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
            return (h * (1.0 + weight.float())).type_as(x)

        def forward(self, q, k, cos, sin):
            cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
            q, k = self.norm(q, self.q_weight), self.norm(k, self.k_weight)
            if transposed:
                q, k = q.transpose(1, 2), k.transpose(1, 2)
            return standard(q, cos, sin), standard(k, cos, sin)

    inputs = call(dim=2 if transposed else 1)
    optimise(Normed(), inputs, ["rms_norm_one_plus_weight_rotary"], rtol=1e-6)


# -- what must not match -------------------------------------------------------------------------------------


def interleaved(x):
    x1, x2 = x[..., ::2], x[..., 1::2]
    return torch.stack((-x2, x1), dim=-1).flatten(-2)


def sign_flipped(x):
    x1, x2 = x.chunk(2, -1)
    return torch.cat((x2, -x1), -1)


def both_positive(x):
    x1, x2 = x.chunk(2, -1)
    return torch.cat((x2, x1), -1)


def halves_not_exchanged(x):
    x1, x2 = x.chunk(2, -1)
    return torch.cat((-x1, x2), -1)


def uneven(x):
    return torch.cat((-x[..., 2:], x[..., :2]), -1)


def over_another_dimension(x):
    x1, x2 = x.chunk(2, 1)
    return torch.cat((-x2, x1), 1)


@pytest.mark.parametrize(
    "rotation, pattern", [(interleaved, "rotary_of_neighbours"), (sign_flipped, "backward_rotary")]
)
def test_pairs_of_neighbours_and_the_other_direction(optimise, rotation, pattern):
    module = Rotary(lambda x, cos, sin: x * cos + rotation(x) * sin)
    optimise(module, call(), [pattern], others=[call(batch=3, seq=11)], rtol=1e-6)


def by_pairs(x, cos, sin):
    x1, x2 = x.chunk(2, -1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1)


def neighbours_by_pairs(x, cos, sin):
    x1, x2 = x[..., ::2], x[..., 1::2]
    return torch.stack((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1).flatten(-2)


def neighbours_to_halves(x, cos, sin):
    x1, x2 = x[..., 0::2], x[..., 1::2]
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1)


def repeated(x, cos, sin):
    return x * cos.repeat_interleave(2, -1) + interleaved(x) * sin.repeat_interleave(2, dim=-1)


@pytest.mark.parametrize(
    "function, pattern",
    [
        (by_pairs, "rotary_by_pairs"),
        (neighbours_by_pairs, "rotary_of_neighbours_by_pairs"),
        (neighbours_to_halves, "rotary_of_neighbours_to_halves"),
        (repeated, "rotary_of_neighbours_repeated"),
    ],
)
def test_one_angle_for_each_pair(optimise, function, pattern):
    q, k, cos, sin = call()
    inputs = [q, k, cos[..., : D // 2].contiguous(), sin[..., : D // 2].contiguous()]
    optimise(Rotary(function), inputs, [pattern], rtol=1e-6)


def test_complex_rotation(optimise):
    def turned(x, turn):
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turn[:, None]).flatten(3).type_as(x)

    q, k, cos, sin = call()
    module = QAndK(lambda q, k, turn: (turned(q, turn), turned(k, turn)))
    turn = torch.complex(cos[..., : D // 2].contiguous(), sin[..., : D // 2].contiguous())
    optimised = ligerfx.optimize(module, (q, k, turn))
    assert [r.pattern for r in optimised.report.rewrites] == ["complex_rotary"]
    for found, expected in zip(optimised(q, k, turn), module(q, k, turn), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


OTHER_ROTATIONS = [
    both_positive, halves_not_exchanged, uneven, over_another_dimension,
]  # fmt: skip


@pytest.mark.parametrize("rotation", OTHER_ROTATIONS, ids=lambda f: f.__name__)
def test_another_rotation_is_not_rewritten(optimise, rotation):
    heads = (4, 2)
    optimise(Rotary(lambda x, cos, sin: x * cos + rotation(x) * sin), call(heads=heads), [])


OTHER_SUMS = {
    "difference": lambda x, cos, sin: x * cos - by_slices(x) * sin,
    "rotated half not multiplied": lambda x, cos, sin: x * cos + by_slices(x),
    "scaled": lambda x, cos, sin: x * cos + 2 * by_slices(x) * sin,
    "two tensors": lambda x, cos, sin: x.flip(-1) * cos + by_slices(x) * sin,
}


@pytest.mark.parametrize("name", OTHER_SUMS)
def test_another_sum_is_not_rewritten(optimise, name):
    optimise(Rotary(OTHER_SUMS[name]), call(), [])


def test_something_added(assert_same):
    """The rotation is a part of the sum. Whether it is rewritten or not, the numbers are the original's."""
    module, inputs = Rotary(lambda x, cos, sin: x * cos + by_slices(x) * sin + cos), call()
    assert_same(module, ligerfx.optimize(module, tuple(inputs)), inputs, rtol=1e-6)


def test_one_table_as_cosine_and_sine(optimise):
    optimise(QAndK(lambda q, k, cos: (standard(q, cos, cos), standard(k, cos, cos))), table_call(), [PATTERN])


def table_call():
    q, k, cos, _ = call()
    return [q, k, cos.unsqueeze(1)]


def test_sine_and_cosine_swapped_are_a_rotation_by_other_tables(optimise):
    """cos and sin are names: with them exchanged it is the same formula on exchanged tables."""
    optimise(Rotary(lambda x, cos, sin: standard(x, sin, cos)), call(), [PATTERN])


class QAndK(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def only_q(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return standard(q, cos, sin), k


def k_the_other_way(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return standard(q, cos, sin), standard(k, sin, cos)


def k_backwards(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return standard(q, cos, sin), standard(k, cos, -sin)


def rotate_half_returned_too(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    half = by_slices(q)
    return q * cos + half * sin, standard(k, cos, sin), half


def k_depends_on_rotated_q(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    q = standard(q, cos, sin)
    return q, standard(k * q.mean(), cos, sin)


def k_depends_on_rotated_q_in_an_opaque_way(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    q = standard(q, cos, sin)
    return q, standard(torch.roll(k, 1) * q.max(), cos, sin)


@pytest.mark.parametrize(
    "function, alone",
    [(only_q, 1), (k_the_other_way, 2), (k_backwards, 2), (rotate_half_returned_too, 1), (k_depends_on_rotated_q, 2),
     (k_depends_on_rotated_q_in_an_opaque_way, 2)],
)  # fmt: skip
def test_q_and_k_that_are_not_rotated_together(optimise, function, alone):
    optimise(QAndK(function), call(), ["rotary_alone"] * alone, rtol=1e-6)


def test_three_tensors_rotated(optimise):
    """v is rotated as well: one pair is rewritten, and the third alone."""

    def function(q, k, v, cos, sin):
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return standard(q, cos, sin), standard(k, cos, sin), standard(v, cos, sin)

    q, k, cos, sin = call()
    optimise(QAndK(function), [q, k, torch.randn_like(k), cos, sin], [PATTERN, "rotary_alone"], rtol=1e-6)


def test_neighbours_of_one_tensor(optimise):
    """As DeepSeek V4 does, the last elements of each head: in float32, with tables of one value for each pair."""

    def function(x, cos, sin):
        cos, sin = (t.repeat_interleave(2, dim=-1).unsqueeze(1) for t in (cos, sin))
        still, moved = x[..., : -cos.shape[-1]], x[..., -cos.shape[-1] :]
        exchanged = torch.stack((-moved[..., 1::2], moved[..., 0::2]), dim=-1).flatten(-2)
        turned = ((moved.float() * cos) + (exchanged.float() * sin)).to(x.dtype)
        return torch.cat([still, turned], dim=-1)

    q, _, cos, sin = call()
    tables = [t[..., : D // 4].contiguous() for t in (cos, sin)]
    optimise(QAndK(function), [q, *tables], ["rotary_of_neighbours_alone"], rtol=1e-6)
    tables = [t.bfloat16() for t in tables]
    optimise(QAndK(function), [q.bfloat16(), *tables], ["rotary_of_neighbours_alone"], rtol=2**-8)


def test_one_tensor_as_q_and_k(optimise, assert_same):
    module = QAndK(lambda q, k, cos, sin: Rotary(standard)(q, q, cos, sin))
    inputs = call()
    assert_same(module, ligerfx.optimize(module, tuple(inputs)), inputs, rtol=1e-6)


def test_angles_per_head_are_not_rewritten(optimise):
    q, k, _, _ = call(heads=(4, 4))
    angles = torch.randn(B, 4, S, D)
    module = QAndK(lambda q, k, cos, sin: (standard(q, cos, sin), standard(k, cos, sin)))
    report = optimise(module, [q, k, angles.cos(), angles.sin()], [])
    (miss,) = report.near_misses  # of the pair, once
    assert miss.pattern == PATTERN and "must have one shape and broadcast over the heads" in miss.reason


def test_q_and_k_of_different_dtype_are_not_rewritten_together(optimise):
    q, k, cos, sin = call()
    optimise(Rotary(standard), [q, k.bfloat16(), cos, sin], ["rotary_alone"] * 2, rtol=1e-6)


def test_q_used_again_before_k_is_there(optimise, assert_same):
    """The rotated q is needed to compute k: one kernel for both would come too late, so there are two."""

    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(D, D)

        def forward(self, q, cos, sin):
            cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
            q = standard(q, cos, sin)
            return q, standard(self.linear(q), cos, sin)

    q, _, cos, sin = call()
    optimise(Module(), [q, cos, sin], ["rotary_alone"] * 2, rtol=1e-6)


@pytest.mark.parametrize("transposed", [True, False])
def test_norm_of_one_plus_weight_before_the_rotation(optimise, transposed):
    """Which norm it is goes on to the kernel, whether the heads are transposed before or after it."""

    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Parameter(torch.randn(D)), nn.Parameter(torch.randn(D))

        def forward(self, q, k, cos, sin):
            cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
            heads = []
            for x, w in ((q, self.q), (k, self.k)):
                x = x if transposed else x.transpose(1, 2)
                h = x.float()
                h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + w.float())
                heads.append(standard(h.type_as(x).transpose(1, 2) if transposed else h.type_as(x), cos, sin))
            return tuple(heads)

    q, k, cos, sin = call()
    optimise(Module(), [q.transpose(1, 2), k.transpose(1, 2), cos, sin], ["rms_norm_one_plus_weight_rotary"], rtol=1e-6)
