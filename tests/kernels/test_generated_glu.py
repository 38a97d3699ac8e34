"""Kernels that are written from an activation: numbers, gradients, and what no kernel can be written for."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ligerfx
from ligerfx.generate import checked_source, expression_of, source_of
from ligerfx.kernels import glu
from ligerfx.kernels._activations import Activation

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
    "mish": F.mish,
    "softplus": F.softplus,
    "smish": lambda x: x * torch.tanh(torch.log(1 + torch.sigmoid(x))),
    "log": lambda x: x * torch.log1p(x * x),
    "tanh of two exponentials": lambda x: (x.exp() - (-x).exp()) / (x.exp() + (-x).exp()),
}
FORMS = ["packed_mlp", "mlp", "packed_linear", "linear", "packed", "separate"]


def replacement(name, form="separate"):
    return ligerfx.generated_glu(ACTIVATIONS[name], name)[FORMS.index(form)].replace


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_numbers_and_gradients(name, device, assert_matches, poison):
    gate, up = (3 * torch.randn(5, 300, device=device) for _ in range(2))
    assert_matches(replacement(name), lambda gate, up: ACTIVATIONS[name](gate) * up, [gate, up])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", ["snake", "quick_gelu", "relu_squared"])
def test_as_accurate_as_eager(name, dtype, device, assert_as_accurate):
    gate, up = (torch.randn(5, 300, device=device).to(dtype) for _ in range(2))
    assert_as_accurate(replacement(name), lambda gate, up: ACTIVATIONS[name](gate) * up, [gate, up])


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "computed again"])
def test_with_the_down_projection(recompute, device, assert_matches, poison):
    packed_mlp, mlp, packed_linear, linear, packed, separate = (
        p.replace for p in ligerfx.generated_glu(F.mish, "mish", low_memory=recompute)
    )
    gate, up, weight, bias = (torch.randn(*shape, device=device) for shape in ((5, 48), (5, 48), (16, 48), (16,)))
    gate_up = torch.cat([gate, up], -1)

    def reference(gate, up, weight, bias=None):
        return F.linear(F.mish(gate) * up, weight, bias)

    assert_matches(linear, reference, [gate, up, weight, bias])
    assert_matches(packed_linear, lambda x, w: reference(*x.chunk(2, -1), w), [gate_up, weight])
    x, weights = torch.randn(5, 24, device=device), torch.randn(96, 24, device=device)
    halves = weights.chunk(2)
    assert_matches(mlp, lambda x, g, u, w: reference(x @ g.t(), x @ u.t(), w), [x, *halves, weight], atol=1e-4)
    assert_matches(packed_mlp, lambda x, g, w: reference(*(x @ g.t()).chunk(2, -1), w), [x, weights, weight], atol=1e-4)
    assert_matches(packed, lambda x: F.mish(x[..., :48]) * x[..., 48:], [gate_up])


def test_under_a_compiler(device):
    """The operators of the kernels by hand serve what is generated, too."""
    torch.compiler.reset()
    function = replacement("mish", "packed_linear")
    leaves = [torch.randn(*s, device=device, requires_grad=True) for s in ((2, 5, 96), (32, 48))]
    results = []
    for call in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
        out = call(*leaves)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-6)


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


class Packed(Gated):
    def __init__(self, function):
        super().__init__(function)
        self.gate_up = nn.Linear(16, 48)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(self.function(gate) * up)


class Halved(Packed):
    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return 2 * (self.function(gate) * up).tanh()


@pytest.fixture(scope="module")
def quick_gelu():
    """Patterns, which are checked when the first model is optimised with them, and not again."""
    return ligerfx.generated_glu(ACTIVATIONS["quick_gelu"], "quick_gelu")


@pytest.mark.parametrize(
    ("cls", "expected"),
    [(Gated, "quick_gelu_glu_linear"), (Packed, "packed_quick_gelu_glu_linear"), (Halved, "packed_quick_gelu_glu")],
)
def test_a_model_with_it(device, quick_gelu, cls, expected):
    model = cls(lambda x: torch.sigmoid(x * 1.702) * x).to(device)
    x = torch.randn(2, 3, 16, device=device)
    optimised = ligerfx.optimize(model, x, patterns=quick_gelu, verify=True)
    (rewrite,) = optimised.report.rewrites
    assert rewrite.pattern == expected and rewrite.verified.gradient < 1e-6
    assert f"ligerfx_kernels_{expected}(" in optimised.code
    grads = [
        torch.autograd.grad(m(x).square().sum(), list(model.parameters()), materialize_grads=True, allow_unused=True)
        for m in (optimised, model)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_hand_written_kernels_come_first(device):
    patterns = ligerfx.generated_glu(lambda x: F.silu(x), "mine")
    x = torch.randn(2, 3, 16, device=device)
    report = ligerfx.optimize(Gated(F.silu).to(device), x, patterns=patterns).report
    assert [r.pattern for r in report.rewrites] == ["silu_glu_linear"]


def test_the_derivative_is_written_without_overflow():
    source = source_of(expression_of(ACTIVATIONS["quick_gelu"], "quick_gelu"))
    assert source == (
        "def activate(x):\n"
        "    t0 = 1.702*x\n"
        "    t1 = (1.0 / (1.0 + tl.exp(-(t0))))\n"
        "    return t1*x, t0*t1*(1.0 - t1) + t1\n"
    )


GELU_TANH = {
    "a quotient": lambda x, u: 0.5 * x * (1 + ((2 * u).exp() - 1) / ((2 * u).exp() + 1)),
    "two exponentials": lambda x, u: 0.5 * x * (1 + (u.exp() - (-u).exp()) / (u.exp() + (-u).exp())),
    "infinite over infinite": lambda x, u: x * (2 * u).exp() / ((2 * u).exp() + 1),
    "less a fraction": lambda x, u: x * (1 - 1 / ((2 * u).exp() + 1)),
    "a sigmoid": lambda x, u: x / (1 + (-2 * u).exp()),
}


@pytest.mark.parametrize("name", GELU_TANH)
def test_gelu_whose_tanh_is_written_with_exponentials(name, device):
    """Far out they overflow, in the model's spelling; in the kernel they do not."""
    source = checked_source(lambda x: GELU_TANH[name](x, math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)), name)
    x = torch.linspace(-60, 60, 500, device=device)
    found, expected = (x.clone().requires_grad_() for _ in range(2))
    y = glu(found, torch.ones_like(x), Activation(name, torch.relu, source))
    truth = F.gelu(expected, approximate="tanh")
    y.sum().backward()
    truth.sum().backward()
    torch.testing.assert_close(y, truth, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(found.grad, expected.grad, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("activation", "reason"),
    [
        (lambda x: F.softplus(x, beta=2), "mine: no kernel can be written for softplus"),
        (lambda x: x * x.mean(-1, keepdim=True), "no kernel can be written for mean"),
        (lambda x: x.softmax(-1), "no kernel can be written for softmax"),
        (lambda x: x if x.sum() > 0 else -x, "not traceable"),
        (lambda x: (1 + x * x) ** 0.3, "mine: the power 0.3 has no Triton code"),
        (lambda x: x * torch.tanh(torch.exp(x)), "the derivative .* no kernel can be written for this form of it"),
    ],
    ids=["softplus of another slope", "a mean", "softmax", "a branch", "an odd power", "a derivative that overflows"],
)
def test_what_no_kernel_can_be_written_for(activation, reason):
    with pytest.raises(ligerfx.PatternError, match=reason):
        ligerfx.generated_glu(activation, "mine")
