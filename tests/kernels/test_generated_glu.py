"""Kernels that are written from an activation: numbers, gradients, and what no kernel can be written for."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ligerfx
from ligerfx.generate import expression_of, source_of

ACTIVATIONS = {
    "snake": lambda x: x + torch.sin(x) ** 2,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu_squared": lambda x: F.relu(x).square(),
    "laplace": lambda x: 0.5 * (1 + torch.erf((x - 0.707107) / 0.4)),
    "squareplus": lambda x: 0.5 * (x + (x * x + 4).sqrt()),
    "rooted": lambda x: x / (1 + x * x).sqrt(),
    "tanh": lambda x: x.tanh(),
    "gaussian": lambda x: torch.exp(-x * x),
    "silu_squared": lambda x: F.silu(x) ** 2,
    "gelu": lambda x: F.gelu(x),
}


def replacement(name):
    return ligerfx.generated_glu(ACTIVATIONS[name], name).replace


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_numbers_and_gradients(name, device, assert_matches, poison):
    gate, up = (3 * torch.randn(5, 300, device=device) for _ in range(2))
    assert_matches(replacement(name), lambda gate, up: ACTIVATIONS[name](gate) * up, [gate, up])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", ["snake", "quick_gelu", "relu_squared"])
def test_as_accurate_as_eager(name, dtype, device, assert_as_accurate):
    gate, up = (torch.randn(5, 300, device=device).to(dtype) for _ in range(2))
    assert_as_accurate(replacement(name), lambda gate, up: ACTIVATIONS[name](gate) * up, [gate, up])


def test_layouts(device, assert_matches):
    function = replacement("quick_gelu")
    packed = torch.randn(4, 7, 2 * 130, device=device)

    def reference(gate, up):
        return ACTIVATIONS["quick_gelu"](gate) * up

    assert_matches(function, reference, [*packed.chunk(2, -1)])
    assert_matches(function, reference, [packed.transpose(0, 1)[..., :130], packed.transpose(0, 1)[..., 130:]])
    assert_matches(function, reference, [torch.randn(0, 8, device=device), torch.randn(0, 8, device=device)])
    assert_matches(function, reference, [torch.randn(3, device=device), torch.randn(3, device=device)])


def test_far_out_and_at_the_kink(device):
    """No overflow becomes NaN, and the derivative at zero is torch's."""
    x = torch.tensor([-1e4, -200.0, -90.0, -0.0, 0.0, 90.0, 200.0, 1e4], device=device)
    for name in ("quick_gelu", "relu_squared", "gelu", "tanh"):
        gate = x.clone().requires_grad_()
        expected = x.clone().requires_grad_()
        out = replacement(name)(gate, torch.ones_like(gate))
        out.sum().backward()
        truth = ACTIVATIONS[name](expected)
        truth.sum().backward()
        torch.testing.assert_close(out, truth, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(gate.grad, expected.grad, rtol=1e-6, atol=1e-6)


def test_under_torch_compile_the_activation_itself_is_traced(device):
    """A kernel that is no operator would end the graph."""
    gate, up = (torch.randn(5, 30, device=device, requires_grad=True) for _ in range(2))
    compiled = torch.compile(replacement("snake"), backend="aot_eager", fullgraph=True)
    expected = ACTIVATIONS["snake"](gate) * up
    torch.testing.assert_close(compiled(gate, up), expected, rtol=1e-6, atol=1e-6)
    found = torch.autograd.grad(compiled(gate, up).sum(), (gate, up))
    torch.testing.assert_close(found, torch.autograd.grad(expected.sum(), (gate, up)), rtol=1e-6, atol=1e-6)


def test_nan_passes(device):
    gate = torch.tensor([float("nan"), 1.0], device=device)
    for name in ACTIVATIONS:
        assert replacement(name)(gate, torch.ones_like(gate)).isnan().tolist() == [True, False]


class Gated(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)
        self.function = function

    def forward(self, x):
        return self.down(self.function(self.gate(x)) * self.up(x))


def test_a_model_with_it(device):
    pattern = ligerfx.generated_glu(ACTIVATIONS["quick_gelu"], "quick_gelu")
    model = Gated(lambda x: torch.sigmoid(x * 1.702) * x).to(device)
    x = torch.randn(2, 3, 16, device=device)
    optimised = ligerfx.optimize(model, x, patterns=[pattern], verify=True)
    (rewrite,) = optimised.report.rewrites
    assert rewrite.pattern == "quick_gelu_glu" and rewrite.verified.gradient < 1e-6
    assert "quick_gelu_glu" in optimised.code
    grads = [torch.autograd.grad(m(x).square().sum(), list(model.parameters())) for m in (optimised, model)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_hand_written_kernels_come_first(device):
    pattern = ligerfx.generated_glu(lambda x: F.silu(x), "mine")
    x = torch.randn(2, 3, 16, device=device)
    report = ligerfx.optimize(Gated(F.silu).to(device), x, patterns=[pattern]).report
    assert [r.pattern for r in report.rewrites] == ["silu_glu_linear"]


def test_the_derivative_is_written_without_overflow():
    source = source_of(expression_of(ACTIVATIONS["quick_gelu"], "quick_gelu"))
    assert source == (
        "def activate(x):\n"
        "    t0 = 1.702*x\n"
        "    t1 = (1.0 / (1.0 + tl.exp(-(t0))))\n"
        "    return t1*x, t0*t1*(1.0 - t1) + t1\n"
    )


@pytest.mark.parametrize(
    ("activation", "reason"),
    [
        (F.softplus, "no kernel can be written for softplus"),
        (lambda x: x * x.mean(-1, keepdim=True), "no kernel can be written for mean"),
        (lambda x: x.softmax(-1), "no kernel can be written for softmax"),
        (lambda x: x if x.sum() > 0 else -x, "not traceable"),
        (lambda x: (1 + x * x) ** 0.3, "the power 0.3 has no Triton code"),
        (lambda x: x / (2 + torch.exp(-x)), "no kernel can be written for this form of it"),
    ],
    ids=["softplus", "a mean", "softmax", "a branch", "an odd power", "a derivative that overflows"],
)
def test_what_no_kernel_can_be_written_for(activation, reason):
    with pytest.raises(ligerfx.PatternError, match=reason):
        ligerfx.generated_glu(activation, "mine")
