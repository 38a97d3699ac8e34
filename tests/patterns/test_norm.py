"""RMSNorm in every spelling and cast position, and what only looks like it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

H = 8
FIRST, LAST, ONE_PLUS = "rms_norm_rounded_first", "rms_norm_rounded_last", "rms_norm_one_plus_weight"


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


# -- spellings of one formula: all are Llama's norm ------------------------------------------------------------


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
    llama, power_operator, times_itself, square_function, square_method, last_dimension_from_the_front, type_as,
    typed, weight_on_the_right, eps_on_the_left, with_keyword_sum, casts_by_name, contiguous_in_between,
    unsqueezed_mean, unsqueezed_by_index,
]  # fmt: skip
OTHER_BITS = [
    one_over_sqrt, reciprocal, over_sqrt, power_of_minus_half, over_power_of_half, sum_over_size, sum_over_number,
    sum_times_fraction,
]  # fmt: skip


@pytest.mark.parametrize("function", SAME_BITS, ids=lambda f: f.__name__)
def test_spelling(optimise, function):
    optimise(Norm(function), inputs(2, 3), [FIRST], others=[inputs(1, 1), inputs(4, 5)])
    optimise(Norm(function, dtype=torch.bfloat16), inputs(2, 3, dtype=torch.bfloat16), [FIRST])


@pytest.mark.parametrize("function", OTHER_BITS, ids=lambda f: f.__name__)
def test_spelling_with_another_order_of_rounding(optimise, function):
    optimise(Norm(function), inputs(2, 3), [FIRST], others=[inputs(1, 1), inputs(4, 5)], rtol=1e-6)
    optimise(Norm(function, dtype=torch.bfloat16), inputs(2, 3, dtype=torch.bfloat16), [FIRST], rtol=2**-8)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 3, 4), (2, 3, 4, 5)], ids=lambda s: f"{len(s)}d")
def test_any_number_of_leading_dimensions(optimise, shape):
    optimise(Norm(llama), inputs(*shape), [FIRST])


# -- cast positions --------------------------------------------------------------------------------------------


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
    llama: [FIRST],
    rounded_last: [LAST],
    rounded_last_by_promotion: [LAST],
    gemma: [ONE_PLUS],
    gemma_weight_first: [ONE_PLUS],
    rounded_after_the_root: [],
    offset_rounded_in_the_weights_dtype: [],
    never_cast_up: [],
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("function", CAST_POSITIONS, ids=lambda f: f.__name__)
def test_cast_position_decides(optimise, function, dtype):
    expected = CAST_POSITIONS[function]
    report = optimise(Norm(function, dtype=dtype), inputs(2, 3, dtype=dtype), expected)
    if not expected:
        (miss,) = report.near_misses
        assert miss.idioms == ("rms_norm",) and "rounds at another place" in miss.reason


@pytest.mark.parametrize("function", CAST_POSITIONS, ids=lambda f: f.__name__)
def test_cast_position_does_not_matter_in_fp32(optimise, function):
    expected = ONE_PLUS if function in (gemma, gemma_weight_first, offset_rounded_in_the_weights_dtype) else FIRST
    optimise(Norm(function), inputs(2, 3), [expected])


def test_result_in_another_dtype_is_not_rewritten(optimise):
    optimise(Norm(never_cast_down, dtype=torch.bfloat16), inputs(2, 3, dtype=torch.bfloat16), [])


@pytest.mark.parametrize("function", [llama, rounded_last], ids=lambda f: f.__name__)
def test_fp32_weight_on_bf16_states(optimise, function):
    """What comes of it differs: Llama's result is in fp32, the other's in bf16."""
    expected = FIRST if function is llama else LAST
    optimise(Norm(function, dtype=torch.float32), inputs(2, 3, dtype=torch.bfloat16), [expected])


# -- torch's own, inlined, several -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("eps", [1e-5, None])
def test_torch_rms_norm(optimise, dtype, eps):
    """ATen's kernel has an order of operations of its own: equal up to rounding."""
    rtol = {torch.float32: 1e-6, torch.bfloat16: 2**-7}[dtype]
    pattern = {torch.float32: FIRST, torch.bfloat16: LAST}[dtype]
    call = inputs(2, 3, dtype=dtype)
    optimise(Norm(lambda x, w, eps: F.rms_norm(x, (H,), w, eps), dtype=dtype, eps=eps), call, [pattern], rtol=rtol)
    module = nn.RMSNorm(H, eps=eps, dtype=dtype)
    nn.init.normal_(module.weight)
    optimise(module, call, [pattern], rtol=rtol)


def test_rms_norm_without_weight_is_not_rewritten(optimise):
    optimise(nn.RMSNorm(H, elementwise_affine=False), inputs(2, 3), [])


class Inlined(nn.Module):
    """No norm module: the norm is written out between two linear layers, its weight a parameter of the block."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(H, 2 * H), nn.Linear(2 * H, H)
        self.scale = nn.Parameter(torch.randn(2 * H))

    def forward(self, x):
        h = self.up(x)
        variance = h.square().mean(-1, keepdim=True)
        return self.down(self.scale * (h * torch.rsqrt(variance + 1e-6))) + x


def test_inlined_between_linear_layers(optimise):
    report = optimise(Inlined(), inputs(2, 3), [FIRST], others=[inputs(3, 4)])
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
    report = optimise(Stack(), inputs(2, 3), [FIRST, FIRST, FIRST, FIRST, ONE_PLUS], rtol=1e-5)
    assert report.idioms == {"rms_norm": 5}
    assert sorted(r.module for r in report.rewrites) == ["", "", "norms.0", "norms.1", "norms.2"]


def test_constant_is_captured(assert_same):
    """Two norms that differ in nothing but eps, large enough to show."""
    import ligerfx

    call = [torch.randn(2, 3, H)]
    for eps in (0.5, 1e-6, 2, 0.0):
        module = Norm(llama, eps=eps)
        optimised = ligerfx.optimize(module, tuple(call))
        assert optimised.report.idioms == {"rms_norm": 1}
        assert_same(module, optimised, call)


def test_in_the_interpreter(optimise, monkeypatch):
    monkeypatch.setattr("ligerfx.kernels._runtime.INTERPRET", True)
    for function, pattern in ((llama, FIRST), (gemma, ONE_PLUS)):
        optimise(Norm(function), inputs(2, 3), [pattern], rtol=1e-5)


# -- what must not match ---------------------------------------------------------------------------------------


def eps_outside(x, w, eps):
    return w * (x / (x.pow(2).mean(-1, keepdim=True).sqrt() + eps))


def mean_over(dim):
    def function(x, w, eps):
        return w * (x * torch.rsqrt(x.pow(2).mean(dim, keepdim=True) + eps))

    function.__name__ = f"mean_over_{dim}"
    return function


def absolute_value(x, w, eps):
    return w * (x * torch.rsqrt(x.abs().mean(-1, keepdim=True) + eps))


def cube(x, w, eps):
    return w * (x * torch.rsqrt(x.abs().pow(3).mean(-1, keepdim=True) + eps))


def summed(x, w, eps):
    return w * (x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + eps))


def root_of_root(x, w, eps):
    return w * (x * (x.pow(2).mean(-1, keepdim=True) + eps) ** -0.25)


def mean_subtracted(x, w, eps):
    x = x - x.mean(-1, keepdim=True)
    return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def layer_norm(x, w, eps):
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return w * ((x - mean) * torch.rsqrt(variance + eps))


def variance_of_half(x, w, eps):
    return w * (x * torch.rsqrt(x[..., : H // 2].pow(2).mean(-1, keepdim=True) + eps))


def variance_of_other(x, w, eps):
    return w * (x * torch.rsqrt(x.flip(-1).pow(2).mean(-1, keepdim=True) + eps))


def two_plus_weight(x, w, eps):
    return (2 + w) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def negative_eps_side(x, w, eps):
    return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True).neg().abs() + eps))


NEVER = {
    eps_outside: None,
    mean_over(1): "mean: expected ((-1)), found ((-2))",
    mean_over(0): "mean: expected ((-1)), found ((-3))",
    mean_over((1, 2)): "mean: expected ((-1)), found ((-2, -1))",
    absolute_value: None,
    cube: None,
    summed: None,
    root_of_root: None,
    layer_norm: None,
    variance_of_half: None,
    variance_of_other: None,
    negative_eps_side: None,
}


@pytest.mark.parametrize("function", NEVER, ids=lambda f: f.__name__)
def test_near_spelling_is_not_rewritten(optimise, function):
    report = optimise(Norm(function), inputs(2, 3), [])
    print(report.near_misses)


@pytest.mark.parametrize("function", [mean_subtracted, two_plus_weight], ids=lambda f: f.__name__)
def test_the_norm_inside_a_larger_formula_is_rewritten(optimise, function):
    optimise(Norm(function), inputs(2, 3), [FIRST], rtol=1e-6)
