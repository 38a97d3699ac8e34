"""RMSNorm in every spelling and cast position, and what only looks like it."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ligerfx

H = 8
FIRST, LAST, ONE_PLUS = "rms_norm_rounded_first", "rms_norm_rounded_last", "rms_norm_one_plus_weight"
ROUNDED = "rms_norm_rounded"  # either: in fp32 they are one
FORKED, ADDED = "forked_rms_norm_rounded", "add_rms_norm_rounded"


class Norm(nn.Module):
    """A module whose forward is `function(x, weight, eps)`."""

    def __init__(self, function, *, dtype=torch.float32, shape=(H,), eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape).to(dtype))
        self.eps = eps
        self.function = function

    def forward(self, x):
        return self.function(x, self.weight, self.eps)


def inputs(*shape, dtype=torch.float32):
    return [torch.randn(*shape, H).to(dtype)]


# -- spellings of one formula: all are Llama's norm ----------------------------------------------------------


def llama(x, w, eps):
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return w * h.to(x.dtype)


def power_operator(x, w, eps):
    h = x.float()
    return w * (h * torch.rsqrt((h**2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def times_itself(x, w, eps):
    h = x.float()
    return w * (h * ((h * h).mean(dim=-1, keepdim=True) + eps).rsqrt()).to(x.dtype)


def square_function(x, w, eps):
    h = x.float()
    return w * (h * torch.rsqrt(torch.mean(torch.square(h), -1, True) + eps)).to(x.dtype)


def square_method(x, w, eps):
    h = x.float()
    return w * (h * torch.rsqrt(h.square().mean((-1,), keepdim=True) + eps)).to(x.dtype)


def last_dimension_from_the_front(x, w, eps):
    h = x.float()
    return w * (h * torch.rsqrt(h.pow(2).mean(x.dim() - 1, keepdim=True) + eps)).to(x.dtype)


def type_as(x, w, eps):
    h = x.float()
    return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).type_as(x)


def typed(x, w, eps):
    h = x.type(torch.float32)
    return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).type(x.dtype)


def weight_on_the_right(x, w, eps):
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * w


def eps_on_the_left(x, w, eps):
    h = x.float()
    return torch.mul(w, (torch.rsqrt(eps + h.pow(2).mean(-1, keepdim=True)) * h).to(x.dtype))


def with_keyword_sum(x, w, eps):
    h = x.float()
    return w * (h * torch.rsqrt(torch.add(h.pow(2).mean(-1, keepdim=True), eps))).to(x.dtype)


def casts_by_name(x, w, eps):
    h = x.to(dtype=torch.float32)
    return w * (h * torch.rsqrt(h.pow(2).mean(dim=-1, keepdim=True) + eps)).to(dtype=x.dtype)


def contiguous_in_between(x, w, eps):
    h = x.float().contiguous()
    return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype).contiguous()


def unsqueezed_mean(x, w, eps):
    h = x.float()
    return w * (h * torch.rsqrt(h.pow(2).mean(-1).unsqueeze(-1) + eps)).to(x.dtype)


def unsqueezed_by_index(x, w, eps):
    h = x.float()
    return w * (h * torch.rsqrt(h.pow(2).mean(-1)[..., None] + eps)).to(x.dtype)


def one_over_sqrt(x, w, eps):
    h = x.float()
    return w * (h * (1 / torch.sqrt(h.pow(2).mean(-1, keepdim=True) + eps))).to(x.dtype)


def reciprocal(x, w, eps):
    h = x.float()
    return w * (h * (h.pow(2).mean(-1, keepdim=True) + eps).sqrt().reciprocal()).to(x.dtype)


def over_sqrt(x, w, eps):
    h = x.float()
    return w * (h / torch.sqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def power_of_minus_half(x, w, eps):
    h = x.float()
    return w * (h * (h.pow(2).mean(-1, keepdim=True) + eps).pow(-0.5)).to(x.dtype)


def over_power_of_half(x, w, eps):
    h = x.float()
    return w * (h / (h.pow(2).mean(-1, keepdim=True) + eps) ** 0.5).to(x.dtype)


def sum_over_size(x, w, eps):
    h = x.float()
    return w * (h * torch.rsqrt(h.pow(2).sum(-1, keepdim=True) / x.shape[-1] + eps)).to(x.dtype)


def sum_over_number(x, w, eps):
    h = x.float()
    return w * (h * torch.rsqrt((h * h).sum(-1, keepdim=True) / H + eps)).to(x.dtype)


def sum_times_fraction(x, w, eps):
    h = x.float()
    return w * (h * torch.rsqrt((h * h).sum(-1, keepdim=True) * (1.0 / H) + eps)).to(x.dtype)


SAME_BITS = [
    llama, power_operator, square_function, square_method, last_dimension_from_the_front, type_as,
    typed, weight_on_the_right, eps_on_the_left, with_keyword_sum, casts_by_name, contiguous_in_between,
    unsqueezed_mean, unsqueezed_by_index,
]  # fmt: skip
OTHER_BITS = [
    times_itself, one_over_sqrt, reciprocal, over_sqrt, power_of_minus_half, over_power_of_half,
    sum_over_size, sum_over_number, sum_times_fraction,
]  # fmt: skip


@pytest.mark.parametrize("function", SAME_BITS, ids=lambda f: f.__name__)
def test_spelling(optimise, function):
    optimise(Norm(function), inputs(2, 3), [ROUNDED], others=[inputs(1, 1), inputs(4, 5)])
    optimise(Norm(function, dtype=torch.bfloat16), inputs(2, 3, dtype=torch.bfloat16), [FIRST])


@pytest.mark.parametrize("function", OTHER_BITS, ids=lambda f: f.__name__)
def test_spelling_with_another_order_of_rounding(optimise, function):
    optimise(Norm(function), inputs(2, 3), [ROUNDED], others=[inputs(1, 1), inputs(4, 5)], rtol=1e-6)
    optimise(Norm(function, dtype=torch.bfloat16), inputs(2, 3, dtype=torch.bfloat16), [FIRST], rtol=2**-8)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 3, 4), (2, 3, 4, 5)], ids=lambda s: f"{len(s)}d")
def test_any_number_of_leading_dimensions(optimise, shape):
    optimise(Norm(llama), inputs(*shape), [ROUNDED])


# -- cast positions ------------------------------------------------------------------------------------------


def rounded_last(x, w, eps):
    h = x.float()
    return (w.float() * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps))).to(x.dtype)


def rounded_last_by_promotion(x, w, eps):
    """OLMo 2: the product of the low-precision weight and the fp32 states is in fp32."""
    h = x.float()
    return (w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps))).to(x.dtype)


def gemma(x, w, eps):
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return (h * (1.0 + w.float())).type_as(x)


def gemma_weight_first(x, w, eps):
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return ((w.float() + 1) * h).type_as(x)


def rounded_after_the_root(x, w, eps):
    h = x.float()
    return w * (x * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps).to(x.dtype))


def offset_rounded_in_the_weights_dtype(x, w, eps):
    h = x.float()
    return ((1 + w) * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps))).to(x.dtype)


def never_cast_up(x, w, eps):
    return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def never_cast_down(x, w, eps):
    h = x.float()
    return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps))


CAST_POSITIONS = {
    llama: FIRST,
    rounded_last: LAST,
    rounded_last_by_promotion: LAST,
    gemma: ONE_PLUS,
    gemma_weight_first: ONE_PLUS,
    rounded_after_the_root: None,
    never_cast_up: None,
}
IN_FP32 = {function: ONE_PLUS if "gemma" in function.__name__ else ROUNDED for function in CAST_POSITIONS}


@pytest.mark.parametrize("function", CAST_POSITIONS, ids=lambda f: f.__name__)
def test_cast_position_decides(optimise, function):
    dtype, expected = torch.bfloat16, CAST_POSITIONS[function]
    report = optimise(Norm(function, dtype=dtype), inputs(2, 3, dtype=dtype), [expected] if expected else [])
    if expected is None:
        (miss,) = report.near_misses
        assert miss.idioms == ("rms_norm",) and "rounds at another place" in miss.reason
    else:
        assert not report.near_misses


@pytest.mark.parametrize("function", CAST_POSITIONS, ids=lambda f: f.__name__)
def test_cast_position_does_not_matter_in_fp32(optimise, function):
    optimise(Norm(function), inputs(2, 3), [IN_FP32[function]])


@pytest.mark.parametrize("function", [never_cast_down, offset_rounded_in_the_weights_dtype])
def test_the_fp32_norm_inside_a_formula_that_rounds_elsewhere(optimise, function):
    """No pattern fits the whole; the part in fp32 is a norm of x.float()."""
    optimise(Norm(function, dtype=torch.bfloat16), inputs(2, 3, dtype=torch.bfloat16), [ROUNDED])


@pytest.mark.parametrize("function", [llama, rounded_last], ids=lambda f: f.__name__)
def test_fp32_weight_on_bf16_states(optimise, function):
    """What comes of it differs: Llama's result is in fp32, the other's in bf16."""
    optimise(Norm(function), inputs(2, 3, dtype=torch.bfloat16), [FIRST if function is llama else LAST])


# -- torch's own, inlined, several ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("eps", [1e-5, None])
def test_torch_rms_norm(optimise, dtype, eps):
    """ATen's kernel has an order of operations of its own: equal up to rounding."""
    rtol = {torch.float32: 1e-6, torch.bfloat16: 2**-7}[dtype]
    pattern = {torch.float32: ROUNDED, torch.bfloat16: LAST}[dtype]
    call = inputs(2, 3, dtype=dtype)
    functional = Norm(lambda x, w, eps: F.rms_norm(x, (H,), w, eps), dtype=dtype, eps=eps)
    optimise(functional, call, [pattern], rtol=rtol)
    module = nn.RMSNorm(H, eps=eps, dtype=dtype)
    nn.init.normal_(module.weight)
    optimise(module, call, [pattern], rtol=rtol)


def test_without_weight(optimise):
    optimise(nn.RMSNorm(H, elementwise_affine=False), inputs(2, 3), ["rms_norm_without_weight"], rtol=1e-6)


def test_torchs_own_of_a_difference(optimise):
    """The square of which is not multiplied out."""

    class Differential(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.RMSNorm(H, elementwise_affine=False)

        def forward(self, x):
            return self.norm(x - 0.5 * x.flip(0))

    optimise(Differential(), inputs(2, 3), ["rms_norm_without_weight"], rtol=1e-6)


class Inlined(nn.Module):
    """No norm module: the norm is written out between linear layers, its weight a parameter of the block."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(H, 2 * H), nn.Linear(2 * H, H)
        self.scale = nn.Parameter(torch.randn(2 * H))

    def forward(self, x):
        h = self.up(x)
        variance = h.square().mean(-1, keepdim=True)
        return self.down(self.scale * (h * torch.rsqrt(variance + 1e-6))) + x


def test_inlined_between_linear_layers(optimise):
    report = optimise(Inlined(), inputs(2, 3), [ROUNDED], others=[inputs(3, 4)])
    (rewrite,) = report.rewrites
    assert rewrite.module == ""
    assert any("rsqrt" in line for _, line in rewrite.source)


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([Norm(llama), Norm(gemma), Norm(over_sqrt)])
        self.own = nn.Parameter(torch.randn(H))

    def forward(self, x):
        for norm in self.norms:
            x = x + norm(x)
        return x + llama(llama(x, self.own, 1e-3), self.own, 1e-6)


def test_several_in_one_model(optimise):
    # Layers in a list are no part of the caller's graph, where x is used again.
    report = optimise(Stack(), inputs(2, 3), [FORKED, ONE_PLUS, *[ROUNDED] * 3], rtol=1e-5)
    assert report.idioms == {"rms_norm": 5}
    assert sorted(r.module for r in report.rewrites) == ["", "", "norms.0", "norms.1", "norms.2"]


def test_constant_is_captured(assert_same):
    """Two norms that differ in nothing but eps, large enough to show."""
    call = [torch.randn(2, 3, H)]
    for eps in (0.5, 1e-6, 2):
        module = Norm(llama, eps=eps)
        optimised = ligerfx.optimize(module, tuple(call))
        assert optimised.report.idioms == {"rms_norm": 1}
        assert_same(module, optimised, call)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled on a machine with a GPU")
def test_in_the_interpreter(optimise, monkeypatch):
    monkeypatch.setattr("ligerfx.kernels._runtime.INTERPRET", True)
    for function, pattern in ((llama, ROUNDED), (gemma, ONE_PLUS)):
        optimise(Norm(function), inputs(2, 3), [pattern], rtol=1e-5)


# -- what must not match -------------------------------------------------------------------------------------


def with_variance(variance, root=torch.rsqrt):
    return lambda x, w, eps: w * (x * root(variance(x) + eps))


def eps_outside_the_root(x, w, eps):
    return w * (x / (x.pow(2).mean(-1, keepdim=True).sqrt() + eps))


def layer_norm(x, w, eps):
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return w * ((x - mean) * torch.rsqrt(variance + eps))


def eps_is_a_tensor(x, w, eps):
    return llama(x, w, torch.full((1,), eps))


# What it is -> (the function, what the reason must say).
NEVER = {
    "eps outside the root": (eps_outside_the_root, "expected mean(x**2, (-1)), found mean(x**2, (-1))**0.5"),
    "mean over dim 1": (with_variance(lambda x: x.pow(2).mean(1, True)), "mean: expected (-1), found (-2)"),
    "mean over dim 0": (with_variance(lambda x: x.pow(2).mean(0, True)), "mean: expected (-1), found (-3)"),
    "mean over two dims": (
        with_variance(lambda x: x.pow(2).mean((1, 2), True)), "mean: expected (-1), found (-2, -1)",
    ),
    "mean over everything": (
        with_variance(lambda x: x.pow(2).mean()), "(-3, -2, -1)",
    ),
    "no square": (with_variance(lambda x: x.abs().mean(-1, True)), "expected x**2, found abs"),
    "a cube": (with_variance(lambda x: x.pow(3).mean(-1, True)), "expected 2, found 3"),
    "sum for mean": (with_variance(lambda x: x.pow(2).sum(-1, True)), "found 0.35355339"),
    "unbiased mean": (with_variance(lambda x: x.pow(2).sum(-1, True) / (H - 1)), "found 0.93541434"),
    "fourth root": (with_variance(lambda x: x.pow(2).mean(-1, True), lambda v: v**-0.25), "found -0.25"),
    "layer norm": (layer_norm, "expected mean(x**2, (-1)), found var"),
    "variance of a half": (
        with_variance(lambda x: x[..., : H // 2].pow(2).mean(-1, True)), "x = slice(x, -1, 1, 0, 4)",
    ),
    "variance of something else": (with_variance(lambda x: x.flip(-1).pow(2).mean(-1, True)), "x = flip"),
    "eps is a tensor": (eps_is_a_tensor, "eps: expected a constant"),
}  # fmt: skip


@pytest.mark.parametrize("name", NEVER)
def test_another_formula_is_not_rewritten(optimise, name):
    function, reason = NEVER[name]
    report = optimise(Norm(function, eps=0.01), [inputs(2, 3)[0] + 2], [])
    (miss,) = report.near_misses
    assert miss.idioms == ("rms_norm",) and miss.source.startswith("test_norm.py:")
    assert reason in miss.reason


@pytest.mark.parametrize("shape", [(1,), (3, 1), (3, H), (2, 3, 1)], ids=str)
def test_weight_of_another_shape_stays_outside(optimise, shape):
    optimise(Norm(llama, shape=shape), inputs(2, 3), ["rms_norm_without_weight"], rtol=1e-6)


def mean_subtracted(x, w, eps):
    return llama(x - x.mean(-1, keepdim=True), w, eps)


def sum_of_two(x, w, eps):
    return llama(x + x.flip(0), w, eps)


def product_of_two(x, w, eps):
    return llama(x * x.flip(0), w, eps)


def scaled(x, w, eps):
    return llama(x * 3.5, w, eps)


def weight_computed(x, w, eps):
    return llama(x, w * 2 + 1, eps)


def result_scaled(x, w, eps):
    return llama(x, w, eps) * 0.25


def result_added(x, w, eps):
    return x + llama(x, w, eps)


POINTWISE = {
    mean_subtracted: "layer_norm",
    sum_of_two: ADDED,
    product_of_two: ROUNDED,
    scaled: ROUNDED,
    weight_computed: ONE_PLUS,  # of 2 w
    result_scaled: ROUNDED,
    result_added: FORKED,
}


@pytest.mark.parametrize("function", POINTWISE, ids=lambda f: f.__name__)
def test_norm_of_and_inside_pointwise_arithmetic(optimise, function):
    """What goes into a norm, and what becomes of it, may be pointwise arithmetic of the same graph."""
    optimise(Norm(function), inputs(2, 3), [POINTWISE[function]], rtol=1e-6)


def used_twice(x, w, eps):
    return llama(x, w, eps) + llama(x, w, 0.5) + x


def returned(x, w, eps):
    return llama(x, w, eps), x


def used_before(x, w, eps):
    return x.sin() * llama(x, w, eps)


def sum_used_again(x, w, eps):
    h = x + x.flip(0)
    return llama(h, w, eps).sin() + h


def sum_broadcast(x, w, eps):
    h = x + x[:1]
    return llama(h, w, eps).sin() + h


FORKS = {
    used_twice: [FORKED, FORKED],
    returned: [FORKED],
    used_before: [ROUNDED],
    sum_used_again: [ADDED],
    sum_broadcast: [FORKED],
}


@pytest.mark.parametrize("function", FORKS, ids=lambda f: f.__name__)
def test_input_used_again(optimise, function):
    """Of two norms, the gradients are added in another order than eager's."""
    report = optimise(Norm(function), inputs(2, 3), FORKS[function], rtol=1e-6 if function is used_twice else 0)
    assert not report.near_misses


def test_every_later_use_takes_the_stream_from_the_kernel():
    optimised = ligerfx.optimize(Norm(used_twice), tuple(inputs(2, 3)))
    (x,) = optimised.graph.find_nodes(op="placeholder")
    kernels = optimised.graph.find_nodes(op="call_function", target=ligerfx.kernels.add_rms_norm)
    first, second = kernels
    (stream,) = (n for n in second.users if n.args[1] == 1)
    assert list(x.users) == [first] and second.args[0].args == (first, 1)
    assert [user.target for user in stream.users] == [operator.add]


def returns_the_root_too(x, w, eps):
    root = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return w * (x * root), root


def returns_the_normalised_too(x, w, eps):
    h = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return w * h, h


def test_intermediate_value_used_elsewhere(optimise):
    report = optimise(Norm(returns_the_root_too), inputs(2, 3), [])
    (miss,) = report.near_misses
    assert "has a second user, `output" in miss.reason


def test_normalised_value_used_elsewhere(optimise):
    optimise(Norm(returns_the_normalised_too), inputs(2, 3), ["rms_norm_without_weight"], rtol=1e-6)


def in_place_inside(x, w, eps):
    h = x * 1.0
    h.mul_(torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps))
    return w * h


def input_changed_in_between(x, w, eps):
    x = x + 0
    root = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    with torch.no_grad():
        x.add_(1)
    return w * (x * root)


def input_changed_afterwards(x, w, eps):
    x = x.clone()
    out = llama(x, w, eps)
    x[..., 0] = 0
    return out, x


def weight_is_a_view_changed_before(x, w, eps):
    w = w.clone()
    w[0] = 2
    return llama(x, w, eps)


@pytest.mark.parametrize(
    "function",
    [in_place_inside, input_changed_in_between, input_changed_afterwards, weight_is_a_view_changed_before],
    ids=lambda f: f.__name__,
)
def test_in_place_ops_change_nothing(assert_same, function):
    """Whether they are rewritten or not, the result is the original's (no gradients: autograd may refuse)."""
    module, (x,) = Norm(function), inputs(2, 3)
    optimised = ligerfx.optimize(module, (x,))
    with torch.no_grad():
        expected, found = module(x), optimised(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_in_place_op_inside_gives_a_reason():
    optimised = ligerfx.optimize(Norm(in_place_inside), tuple(inputs(2, 3)))
    assert not optimised.report.rewrites
