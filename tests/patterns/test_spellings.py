"""Norms and gated units as public model code spells them: each found by the pattern that has its roundings, and what
only looks like one left alone, for the reason that tells them apart.

The functions are ours, in the manner of the code bases that their names tell.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ligerfx
from ligerfx.patterns import glu, norm

H = 8
FIRST, LAST, ONE_PLUS = "rms_norm_rounded_first", "rms_norm_rounded_last", "rms_norm_one_plus_weight"


class Norm(nn.Module):
    def __init__(self, function, dtype, eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(H, generator=torch.Generator().manual_seed(1)).to(dtype))
        self.function, self.eps = function, eps

    def forward(self, x):
        return self.function(x, self.weight, self.eps)


def states(dtype, width=H):
    return torch.randn(2, 3, width, generator=torch.Generator().manual_seed(2)).to(dtype)


def reference_llama(x, w, eps):
    def normed(x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)

    return normed(x.float()).type_as(x) * w


def litgpt(x, w, eps):
    dtype = x.dtype
    x = x.float()
    mean = torch.mean(x * x, dim=-1, keepdim=True)
    return (x * torch.rsqrt(mean + eps)).to(dtype=dtype) * w


def litgpt_weight_first(x, w, eps):
    dtype = x.dtype
    x = x.float()
    return w * (x * torch.rsqrt(torch.mean(x * x, dim=-1, keepdim=True) + eps)).to(dtype=dtype)


def olmo(x, w, eps):
    with torch.autocast(enabled=False, device_type=x.device.type):
        dtype = x.dtype
        x = x.to(torch.float32)
        variance = x.pow(2).mean(-1, keepdim=True)
        x = x * torch.rsqrt(variance + eps)
        return w * x.to(dtype)


def olmo2(x, w, eps):
    dtype = x.dtype
    x = x.to(torch.float32)
    return (w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))).to(dtype)


def mosaic(x, w, eps):
    output = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return output if w is None else output * w


def t5(x, w, eps):
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    x = x * torch.rsqrt(variance + eps)
    if w.dtype in (torch.float16, torch.bfloat16):
        x = x.to(w.dtype)
    return w * x


def gemma(x, w, eps):
    out = x.float()
    out = out * torch.rsqrt(out.pow(2).mean(-1, keepdim=True) + eps)
    return (out * (1.0 + w.float())).type_as(x)


def flax_style(x, w, eps):
    y = x.float()
    mean2 = torch.mean(torch.square(y), dim=(-1,), keepdim=True)
    return (y * torch.reciprocal(torch.sqrt(mean2 + eps)) * (1 + w.float())).to(x.dtype)


def neox_with_eps_inside(x, w, eps):
    y = x.float()
    rms = torch.sqrt(y.norm(2, dim=-1, keepdim=True) ** 2 / y.shape[-1] + eps)
    return w * (y / rms).to(x.dtype)


def xtransformers_with_eps(x, w, eps):
    y = x.float()
    scale = y.shape[-1] ** 0.5
    return (y * scale / torch.sqrt(y.pow(2).sum(-1, keepdim=True) + eps * y.shape[-1])).to(x.dtype) * w


def retnet(x, w, eps):
    def normed(x):
        return x * torch.rsqrt(torch.mean(x.pow(2), -1, keepdim=True) + eps)

    output = normed(x.float()).type_as(x)
    return torch.mul(output, w)


def flash_attention_reference(x, w, eps):
    dtype = x.dtype
    x, w = x.float(), w.float()
    rstd = 1 / torch.sqrt(x.square().mean(dim=-1, keepdim=True) + eps)
    return (x * rstd * w).to(dtype)


def vector_norm(x, w, eps):
    y = x.float()
    length = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
    return (y * torch.rsqrt(length.square() / y.size(-1) + eps)).to(x.dtype) * w


def linalg_norm(x, w, eps):
    y = x.float()
    return (y / (torch.linalg.norm(y, dim=-1, keepdim=True).pow(2).div(H).add(eps)).sqrt()).to(x.dtype) * w


def torch_norm(x, w, eps):
    y = x.float()
    return w * (y * (torch.norm(y, p=2, dim=-1, keepdim=True) ** 2 * (1 / H) + eps) ** -0.5).to(x.dtype)


def chained_methods(x, w, eps):
    y = x.float()
    return y.mul(y.square().sum(-1, keepdim=True).div(y.shape[-1]).add(eps).rsqrt()).to(x.dtype).mul(w)


def eps_inside_the_mean(x, w, eps):
    y = x.float()
    return w * (y * torch.rsqrt((y * y + eps).mean(-1, keepdim=True))).to(x.dtype)


def scaled_inside_the_mean(x, w, eps):
    y = x.float()
    return w * (2 * y / torch.sqrt((2 * y).pow(2).mean(-1, keepdim=True) + 4 * eps)).to(x.dtype)


def torch_functional(x, w, eps):
    return F.rms_norm(x, (x.size(-1),), w, eps)


def nanogpt_functional_without_weight(x, w, eps):
    return F.rms_norm(x, (x.size(-1),), eps=eps) * w


def subtracted_negative(x, w, eps):
    y = x.float()
    return w * torch.subtract(0, -y * torch.rsqrt(torch.add(eps, y.pow(2).mean(-1, keepdim=True)))).to(x.dtype)


def root_on_the_other_side(x, w, eps):
    y = x.float()
    root = torch.sqrt(torch.mean(y**2, -1, keepdim=True) + eps)
    return w * torch.true_divide(y, root).to(x.dtype)


def without_eps(x, w, eps):
    y = x.float()
    return w * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True))).to(x.dtype)


NORMS = {
    reference_llama: FIRST, litgpt: FIRST, litgpt_weight_first: FIRST, olmo: FIRST, olmo2: LAST, mosaic: None,
    t5: FIRST,
    gemma: ONE_PLUS, flax_style: ONE_PLUS, neox_with_eps_inside: FIRST, xtransformers_with_eps: FIRST, retnet: FIRST,
    flash_attention_reference: LAST, vector_norm: FIRST, linalg_norm: FIRST, torch_norm: FIRST, chained_methods: FIRST,
    eps_inside_the_mean: FIRST, scaled_inside_the_mean: FIRST, torch_functional: LAST,
    nanogpt_functional_without_weight: FIRST, subtracted_negative: FIRST, root_on_the_other_side: FIRST,
    without_eps: FIRST,
}  # fmt: skip
"""Each with the pattern that it is in bf16; None where it rounds in bf16 as no kernel does."""


@pytest.mark.parametrize("function", NORMS, ids=lambda f: f.__name__)
def test_norm(function, optimise):
    kinds = ONE_PLUS if NORMS[function] == ONE_PLUS else "rms_norm_rounded"
    optimise(Norm(function, torch.float32), [states(torch.float32)], [kinds], rtol=2e-6)
    module, x = Norm(function, torch.bfloat16), states(torch.bfloat16)
    expected = NORMS[function]
    report = optimise(module, [x], [expected] if expected else [], rtol=2**-6)
    if expected is None:
        assert "rounds at another place" in report.near_misses[0].reason


# -- gated units ---------------------------------------------------------------------------------------------


class Gated(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def llama_swiglu(g, u):
    return F.silu(g) * u


def retnet_glu(g, u):
    return u * F.silu(g.float()).type_as(g)


def sigmoid_in_fp32(g, u):
    return u * F.gelu(g.to(torch.float32)).to(g.dtype)


def expit(g, u):
    return g * torch.special.expit(g) * u


def exponential(g, u):
    return u * (g / (1.0 + (-g).exp()))


def doubled_and_halved(g, u):
    return 2 * g / (2 + 2 * torch.exp(-g)) * u


def growth_over_growth(g, u):
    return g * torch.exp(g) / (1 + torch.exp(g)) * u


def growth_named_once(g, u):
    growth = g.exp()
    return growth / (growth + 1.0) * (g * u)


def one_less_an_inverse(g, u):
    return g * (1 - 1 / (1 + torch.exp(g))) * u


def less_its_part(g, u):
    return (g - g / (1 + torch.exp(g))) * u


def one_less_a_sigmoid(g, u):
    return u * g * (1 - torch.sigmoid(-g))


def growth_of_a_sum(g, u):
    gate = g + 2 * u
    growth = torch.exp(gate)
    return gate * growth / (1 + growth) * u


def growth_in_a_packed_half(x):
    gate, up = x.chunk(2, dim=-1)
    return up * gate * (gate.exp() / (1 + gate.exp()))


def t5_gelu(g, u):
    return 0.5 * g * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (g + 0.044715 * torch.pow(g, 3.0)))) * u


def megatron_gelu(g, u):
    return g * 0.5 * (1.0 + torch.tanh(0.79788456 * g * (1 + 0.044715 * g * g))) * u


def gemma_geglu(g, u):
    return F.gelu(g, approximate="tanh") * u


def erf_with_eight_digits(g, u):
    return u * (g * 0.5 * (1.0 + torch.erf(g * 0.70710678)))


def normal_cdf(g, u):
    return g * torch.special.ndtr(g) * u


def reglu(g, u):
    return torch.relu(g) * u


def palm(x):
    x, gate = x.chunk(2, dim=-1)
    return F.silu(gate) * x


def olmo_swiglu(x):
    x, gate = torch.chunk(x, 2, -1)
    return torch.mul(x, F.silu(gate))


def chatglm(x):
    x = torch.chunk(x, 2, dim=-1)
    return F.silu(x[0]) * x[1]


def phi3(x):
    gate, up = x.chunk(2, dim=-1)
    return up * F.silu(gate)


def viewed_and_unbound(x):
    gate, up = x.view(*x.shape[:-1], 2, x.shape[-1] // 2).unbind(-2)
    return F.silu(gate) * up


def viewed_and_selected(x):
    halves = x.unflatten(-1, (2, -1))
    return F.silu(halves.select(-2, 0)) * halves.select(-2, 1)


def t5_packed(x):
    gate, up = torch.split(x, [H // 2, H // 2], -1)
    return F.gelu(gate) * up


GATED = {
    llama_swiglu: "silu_glu", retnet_glu: "silu_glu", sigmoid_in_fp32: "gelu_glu", expit: "silu_glu",
    exponential: "silu_glu", doubled_and_halved: "silu_glu", growth_over_growth: "silu_glu",
    growth_named_once: "silu_glu", one_less_an_inverse: "silu_glu", less_its_part: "silu_glu",
    one_less_a_sigmoid: "silu_glu", growth_of_a_sum: "silu_glu", growth_in_a_packed_half: "packed_silu_glu",
    t5_gelu: "gelu_tanh_glu", megatron_gelu: "gelu_tanh_glu", gemma_geglu: "gelu_tanh_glu",
    erf_with_eight_digits: "gelu_glu", normal_cdf: "gelu_glu", reglu: "relu_glu",
    palm: "silu_glu", olmo_swiglu: "silu_glu", chatglm: "packed_silu_glu", phi3: "packed_silu_glu",
    viewed_and_unbound: "packed_silu_glu", viewed_and_selected: "packed_silu_glu", t5_packed: "packed_gelu_glu",
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("function", GATED, ids=lambda f: f.__name__)
def test_gated_unit(function, dtype, optimise):
    inputs = [states(dtype), states(dtype).flip(0)][: function.__code__.co_argcount]
    optimise(Gated(function), inputs, [GATED[function]], rtol=2e-6 if dtype == torch.float32 else 2**-5)


@pytest.mark.parametrize("function", [growth_over_growth, one_less_an_inverse], ids=lambda f: f.__name__)
def test_no_exponential_overflows(function):
    """The kernel's sigmoid is right where the exponential of the original is infinite."""
    gate, up = torch.tensor([[-200.0, -88.0, 0.5, 88.0, 89.0, 200.0]]), torch.full((1, 6), 3.0)
    optimised = ligerfx.optimize(Gated(function), (torch.zeros(1, 6), up))
    assert [r.pattern for r in optimised.report.rewrites] == ["silu_glu"]
    torch.testing.assert_close(optimised(gate, up), F.silu(gate) * up)


# -- look-alikes ---------------------------------------------------------------------------------------------


def norm_by(root):
    return lambda x, w, eps: w * (x * root(x, eps))


def mean(x):
    return x.pow(2).mean(-1, keepdim=True)


def layer_norm(x, w, eps):
    centred = x - x.mean(-1, True)
    return w * ((x - x.mean(-1, True)) * torch.rsqrt(centred.pow(2).mean(-1, True) + eps))


NOT_NORMS = {
    "GPT-NeoX's, eps outside the root": (
        lambda x, w, eps: w * (x / (x.norm(2, dim=-1, keepdim=True) * H**-0.5 + eps)), "expected -0.5, found 0.5",
    ),
    "x-transformers' normalize": (
        lambda x, w, eps: F.normalize(x, dim=-1) * H**0.5 * w,
        "found at_least(2.8284271*mean(x**2, (-1))**0.5, 1e-12)",
    ),
    "clamped length": (
        lambda x, w, eps: x / (x.norm(dim=-1, keepdim=True) * H**-0.5).clamp(min=eps) * w, "expected -0.5, found 0.5",
    ),
    "eps multiplied": (norm_by(lambda x, eps: torch.rsqrt(mean(x) * (1 + eps))), "found 0.9950371"),
    "length in L1": (norm_by(lambda x, eps: torch.rsqrt(x.norm(1, -1, True) / H + eps)), "found norm(x, "),
    "length of everything": (norm_by(lambda x, eps: torch.rsqrt(x.norm() ** 2 / H + eps)), "(-3, -2, -1)"),
    "sum of squares": (norm_by(lambda x, eps: torch.rsqrt(x.square().sum(-1, True) + eps)), "found 0.35355339"),
    "unbiased": (norm_by(lambda x, eps: torch.rsqrt(x.square().sum(-1, True) / (H - 1) + eps)), "found 0.93541434"),
    "variance": (norm_by(lambda x, eps: torch.rsqrt(x.var(-1, keepdim=True, unbiased=False) + eps)), "found var(x, "),
    "layer norm": (layer_norm, "expected x**2, found mean(x, (-1))**2 - 2*mean(x, (-1))*x + x**2"),
    "no root": (norm_by(lambda x, eps: 1 / (mean(x) + eps)), "expected -0.5, found -1"),
    "root of the root": (norm_by(lambda x, eps: (mean(x) + eps) ** -0.25), "expected -0.5, found -0.25"),
    "cube": (norm_by(lambda x, eps: torch.rsqrt(x.pow(3).mean(-1, True) + eps)), "expected 2, found 3"),
    "no square": (norm_by(lambda x, eps: torch.rsqrt(x.mean(-1, True) + eps)), "expected x**2, found x"),
    "square of the mean": (norm_by(lambda x, eps: torch.rsqrt(x.mean(-1, True) ** 2 + eps)), "found mean(x, (-1))**2"),
    "mean over the tokens": (
        norm_by(lambda x, eps: torch.rsqrt(x.pow(2).mean(-2, True) + eps)), "mean: expected (-1), found (-2)",
    ),
    "maximum": (norm_by(lambda x, eps: torch.rsqrt(x.pow(2).amax(-1, True) + eps)), "found amax(x**2, "),
    "eps times x": (norm_by(lambda x, eps: torch.rsqrt(mean(x) + eps * x)), "eps: expected a constant, found none in"),
    "normalised by another": (norm_by(lambda x, eps: torch.rsqrt(mean(x.roll(1, 0)) + eps)), "expected x = roll(x, "),
    "weight added": (lambda x, w, eps: w + x * torch.rsqrt(mean(x) + eps), "expected weight as well"),
}  # fmt: skip


def reasons_against(module, inputs, patterns):
    """Why the patterns do not match, none of which may."""
    report = ligerfx.optimize(module, tuple(inputs), patterns=patterns, defaults=False).report
    assert report.rewrites == []
    return [miss.reason for miss in report.near_misses]


@pytest.mark.parametrize("name", NOT_NORMS)
def test_not_a_norm(name):
    function, reason = NOT_NORMS[name]
    patterns = [p for p in norm.PATTERNS if p.name in (FIRST, LAST, ONE_PLUS)]
    assert len(patterns) == 3 and reason
    reasons = reasons_against(Norm(function, torch.float32, eps=0.01), [states(torch.float32) + 2], patterns)
    assert any(reason in found for found in reasons), reasons


NOT_GATED = {
    "quick gelu": (lambda g, u: g * torch.sigmoid(1.702 * g) * u, "expected gate = 1.702*arg0, found "),
    "other gate": (lambda g, u: g.flip(0) * torch.sigmoid(g) * u, "expected gate = arg0, found arg1*flip(arg0, "),
    "activation of minus": (lambda g, u: g * torch.sigmoid(-g) * u, "expected gate = -arg0, found "),
    "growth of the other": (lambda g, u: g * u.exp() / (1 + g.exp()) * u, "gate: -arg0 is no value"),
    "one less the sigmoid": (lambda g, u: g * (1 - torch.sigmoid(g)) * u, "gate: -arg0 is no value"),
    "one less two inverses, a tanh": (lambda g, u: g * (1 - 2 / (1 + g.exp())) * u, "gate: -arg0 is no value"),
    "growth and two": (lambda g, u: g * g.exp() / (2 + g.exp()) * u, "gate: -arg0 is no value"),
    "growth of another rate": (lambda g, u: g * g.exp() / (1 + (2 * g).exp()) * u, "gate: -2*arg0 is no value"),
    "another constant in the gelu": (
        lambda g, u: 0.5 * g * (1 + torch.tanh(math.sqrt(2 / math.pi) * (g + 0.0447 * g**3))) * u, "found 0.9996645",
    ),
    "gelu of erf without the root of two": (lambda g, u: 0.5 * g * (1 + torch.erf(g)) * u, "1.41421356"),
    "six digits of the gelu's constant": (
        lambda g, u: 0.5 * g * (1 + torch.tanh(0.797884 * (g + 0.044715 * g**3))) * u, "gate: 0.9999992",
    ),
}  # fmt: skip


GLUS = [p for p in glu.patterns(False) if p.name in ("silu_glu", "gelu_glu", "gelu_tanh_glu", "relu_glu")]


@pytest.mark.parametrize("name", NOT_GATED)
def test_not_a_gated_unit(name):
    function, reason = NOT_GATED[name]
    reasons = reasons_against(Gated(function), [states(torch.float32), states(torch.float32).flip(0)], GLUS)
    assert any(reason in found for found in reasons) and reason, reasons


FAR_FROM_GATED = {
    "clamped below, whose gradient at zero is one": lambda g, u: g.clamp(min=0) * u,
    "relu squared": lambda g, u: F.relu(g).square() * u,
    "leaky": lambda g, u: F.leaky_relu(g) * u,
    "softplus": lambda g, u: F.softplus(g) * u,
    "sigmoid gate": lambda g, u: torch.sigmoid(g) * u,
    "powers of two": lambda g, u: g / (1 + torch.exp2(-g)) * u,
    "sum": lambda g, u: F.silu(g) + u,
    "one and an inverse": lambda g, u: g * (1 + 1 / (1 + g.exp())) * u,
    "two less an inverse": lambda g, u: g * (2 - 1 / (1 + g.exp())) * u,
    "growth with a minus": lambda g, u: g * g.exp() / (1 - g.exp()) * u,
    "activation of the product": lambda g, u: F.silu(g * u),
}


@pytest.mark.parametrize("name", FAR_FROM_GATED)
def test_so_far_from_a_gated_unit_that_no_reason_is_given(name):
    inputs = [states(torch.float32), states(torch.float32).flip(0)]
    assert reasons_against(Gated(FAR_FROM_GATED[name]), inputs, GLUS) == []


def test_enough_of_them():
    assert len(NORMS) + len(GATED) >= 40 and len(NOT_NORMS) + len(NOT_GATED) >= 25


def test_every_one_of_them_is_another_function():
    """A look-alike that computed the same would be a spelling."""
    x, w = states(torch.float32) + 2, torch.full((H,), 1.5)
    for name, (function, _) in NOT_NORMS.items():
        assert not torch.allclose(function(x, w, 0.01), reference_llama(x, w, 0.01), rtol=1e-5), name
