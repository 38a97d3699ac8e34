"""LayerNorm written out, with and without a bias; what only looks like it."""

import pytest
import torch
from torch import nn

import ligerfx

H = 8


class Norm(nn.Module):
    def __init__(self, function, *, dtype=torch.float32, shape=(H,)):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape).to(dtype))
        self.bias = nn.Parameter(torch.randn(shape).to(dtype))
        self.function = function

    def forward(self, x):
        return self.function(x, self.weight, self.bias)


def cohere(x, w, b):
    h = x.to(torch.float32)
    mean = h.mean(-1, keepdim=True)
    variance = (h - mean).pow(2).mean(-1, keepdim=True)
    h = (h - mean) * torch.rsqrt(variance + 1e-5)
    return (w.to(torch.float32) * h).to(x.dtype)


def centred_first(x, w, b):
    h = x.float()
    h = h - h.mean(dim=-1, keepdim=True)
    return (h / torch.sqrt((h * h).mean(-1, True) + 1e-5) * w.float()).type_as(x)


def biased(x, w, b):
    h = x.float() - x.float().mean(-1, keepdim=True)
    return (b.float() + w.float() * h * (h.square().mean(-1, keepdim=True) + 1e-5) ** -0.5).to(x.dtype)


@pytest.mark.parametrize("function", [cohere, centred_first, biased])
def test_spelling(optimise, function):
    # The gradient of x cancels: what is left has the rounding errors of what went in.
    report = optimise(
        Norm(function), [torch.randn(2, 3, H)], ["layer_norm"], others=[[torch.randn(1, 1, H)]], rtol=2e-6
    )
    assert report.rewrites[0].constants["eps"] == pytest.approx(1e-5)
    assert report.summary == "1/1 LayerNorm"


@pytest.mark.parametrize("function", [cohere, biased])
def test_bfloat16(optimise, function):
    """Both compute in float32 and round once."""
    x = torch.randn(4, 3, H).bfloat16()
    optimise(Norm(function, dtype=torch.bfloat16), [x], ["layer_norm"], rtol=2**-7)


def test_after_a_residual_addition(optimise):
    optimise(
        Norm(lambda x, w, b: (h := x + x.flip(0)) + cohere(h, w, b)), [torch.randn(2, 3, H)], ["layer_norm"], rtol=2e-6
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_dtype_of_the_weight(optimise, dtype):
    """Then torch's kernel gets what was cast to float32, as the model itself computes."""
    x = torch.randn(2, 3, H).to(dtype)
    optimise(Norm(cohere, dtype=torch.float32), [x], ["layer_norm"], rtol=2**-7 if dtype == torch.bfloat16 else 2e-6)


def test_rounded_before_the_weight(optimise):
    """What is left is an RMSNorm of the centred states."""

    def function(x, w, b):
        h = x.float() - x.float().mean(-1, keepdim=True)
        return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)

    x = torch.randn(2, 3, H).bfloat16()
    optimise(Norm(function, dtype=torch.bfloat16), [x], ["rms_norm_without_weight"], rtol=2**-7)


def test_autocast_widens_nothing():
    module, x = Norm(cohere, dtype=torch.bfloat16), torch.randn(2, 3, H).bfloat16()
    optimised = ligerfx.optimize(module, (x,))
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = module(x), optimised(x)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)


NEVER = {
    "eps outside the root": (
        lambda x, w, b: w * (x - x.mean(-1, True)) / (((x - x.mean(-1, True)) ** 2).mean(-1, True).sqrt() + 1e-5),
        {}, None,
    ),
    "a mean over another dim": (
        lambda x, w, b: w * (x - x.mean(0, True)) * ((x - x.mean(0, True)).square().mean(-1, True) + 1e-5).rsqrt(),
        {}, None,
    ),
    "a weight for each head": (cohere, {"shape": (3, H)}, "weight: expected shape [H], found [3, 8]"),
}  # fmt: skip


@pytest.mark.parametrize("name", NEVER)
def test_another_formula_is_not_rewritten(optimise, name):
    function, options, reason = NEVER[name]
    report = optimise(Norm(function, **options), [torch.randn(2, 3, H)], [])
    if reason is not None:
        assert [m.pattern for m in report.near_misses] == ["layer_norm"]
        assert reason in report.near_misses[0].reason


def test_torchs_own_is_left_alone(optimise):
    report = optimise(nn.Sequential(nn.LayerNorm(H), nn.Linear(H, H)), [torch.randn(2, 3, H)], [])
    assert not report.near_misses
