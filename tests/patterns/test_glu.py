"""Gated linear units: activations and halvings in every spelling, and what only looks like one."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ReLUSquaredActivation

import ligerfx

I = 6  # noqa: E741


class Function(nn.Module):
    """A module that owns nothing but the function it applies."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


class MLP(nn.Module):
    def __init__(self, activation, dtype=torch.float32, packed=False):
        super().__init__()
        self.packed = packed
        self.gate = nn.Linear(I, 2 * I if packed else I, bias=False, dtype=dtype)
        if not packed:
            self.up = nn.Linear(I, I, bias=False, dtype=dtype)
        self.down = nn.Linear(I, I, bias=False, dtype=dtype)
        self.act_fn = activation

    def forward(self, x):
        if self.packed:
            gate, up = self.gate(x).chunk(2, dim=-1)
        else:
            gate, up = self.gate(x), self.up(x)
        return self.down(self.act_fn(gate) * up)


def pair(*shape, dtype=torch.float32):
    return [2 * torch.randn(*shape, I).to(dtype) for _ in range(2)]


def packed(*shape, dtype=torch.float32):
    return [2 * torch.randn(*shape, 2 * I).to(dtype)]


SILU = {
    "functional": (F.silu, 0),
    "module": (nn.SiLU(), 0),
    "x * x.sigmoid()": (lambda x: x * x.sigmoid(), 1e-6),
    "torch.sigmoid(x) * x": (lambda x: torch.sigmoid(x) * x, 1e-6),
    "x * F.sigmoid(x)": (lambda x: x * F.sigmoid(x), 1e-6),
    "x / (1 + exp(-x))": (lambda x: x / (1 + torch.exp(-x)), 1e-6),
}
GELU = {
    "functional": (F.gelu, 0),
    "module": (nn.GELU(), 0),
    "erf": (lambda x: 0.5 * x * (1.0 + torch.erf(x / math.sqrt(2.0))), 1e-6),
    "halved": (lambda x: (x / 2) * (1 + torch.erf(x / math.sqrt(2))), 1e-6),
    "erf times": (lambda x: x * 0.5 * (1.0 + (x * math.sqrt(0.5)).erf()), 1e-6),
}
GELU_TANH = {
    "functional": (lambda x: F.gelu(x, approximate="tanh"), 0),
    "module": (nn.GELU(approximate="tanh"), 0),
    "NewGELU": (
        lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0)))), 1e-6
    ),
    "FastGELU": (
        lambda x: 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608028654 * (1.0 + 0.044715 * x * x))), 1e-6
    ),
}  # fmt: skip
RELU = {
    "functional": (F.relu, 0),
    "module": (nn.ReLU(), 0),
    "torch": (torch.relu, 0),
    "method": (lambda x: x.relu(), 0),
}
RELU2 = {
    "functional": (lambda x: F.relu(x).square(), 0),
    "module": (ReLUSquaredActivation(), 0),
    "pow": (lambda x: torch.pow(F.relu(x), 2), 1e-6),
    "product": (lambda x: x.relu() * x.relu(), 1e-6),
}
ACTIVATIONS = {"silu": SILU, "gelu": GELU, "gelu_tanh": GELU_TANH, "relu": RELU, "relu2": RELU2}
SPELLINGS = [(kind, name, *entry) for kind, table in ACTIVATIONS.items() for name, entry in table.items()]
spellings = pytest.mark.parametrize(
    ("kind", "activation", "rtol"), [pytest.param(k, a, r, id=f"{k}-{n}") for k, n, a, r in SPELLINGS]
)


@spellings
def test_spelling(optimise, kind, activation, rtol):
    others = [pair(1, 1), pair(4, 5)]
    optimise(Function(lambda g, u: activation(g) * u), pair(2, 3), [f"{kind}_glu"], others=others, rtol=rtol)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_order_swapped(optimise, kind):
    activation, _ = ACTIVATIONS[kind]["functional"]
    optimise(Function(lambda g, u: torch.mul(u, activation(g))), pair(2, 3), [f"{kind}_glu"])


@spellings
def test_packed(optimise, kind, activation, rtol):
    def function(gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return up * activation(gate)

    optimise(Function(function), packed(2, 3), [f"packed_{kind}_glu"], others=[packed(1, 1)], rtol=rtol)


def chunk(x):
    return torch.chunk(x, 2, -1)


def split_in_size(x):
    return x.split(I, dim=-1)


def split_in_sizes(x):
    return torch.split(x, [I, I], dim=-1)


def split_by_half_of_shape(x):
    return torch.split(x, x.shape[-1] // 2, -1)


def slices(x):
    return x[..., :I], x[..., I:]


def slices_with_negative_bound(x):
    return x[..., :-I], x[..., -I:]


def slices_of_half_of_shape(x):
    half = x.size(-1) // 2
    return x[:, :, :half], x[:, :, half:]


def narrow(x):
    return x.narrow(-1, 0, I), torch.narrow(x, -1, I, I)


HALVINGS = [
    chunk, split_in_size, split_in_sizes, split_by_half_of_shape, slices, slices_with_negative_bound,
    slices_of_half_of_shape, narrow,
]  # fmt: skip


@pytest.mark.parametrize("halve", HALVINGS, ids=lambda f: f.__name__)
def test_halving(optimise, halve):
    def function(x):
        gate, up = halve(x)
        return F.silu(gate) * up

    optimise(Function(function), packed(2, 3), ["packed_silu_glu"], others=[packed(1, 1), packed(4, 5)])


@pytest.mark.parametrize("halve", HALVINGS, ids=lambda f: f.__name__)
def test_gate_in_the_second_half_is_not_packed(optimise, halve):
    def function(x):
        up, gate = halve(x)
        return F.silu(gate) * up

    optimise(Function(function), packed(2, 3), ["silu_glu"], others=[packed(1, 1), packed(4, 5)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_low_precision(optimise, dtype, kind):
    """Eager rounds after the activation, and so does the pattern: equal to the bit where it is one op."""
    activation, _ = ACTIVATIONS[kind]["functional"]
    optimise(Function(lambda g, u: activation(g) * u), pair(2, 3, dtype=dtype), [f"{kind}_glu"])
    x = torch.randn(2, 3, I, dtype=dtype)
    optimise(MLP(activation, dtype, packed=True), [x], [f"packed_{kind}_glu_mlp"])


@pytest.mark.parametrize("name", ["x * x.sigmoid()", "torch.sigmoid(x) * x"])
def test_written_out_in_low_precision(optimise, name):
    """Roundings between ops of one dtype are left to the kernel: equal up to two of them."""
    activation, _ = SILU[name]
    call = pair(2, 3, dtype=torch.bfloat16)
    optimise(Function(lambda g, u: activation(g) * u), call, ["silu_glu"], rtol=2**-7)


def test_activation_in_fp32_of_bf16_gate(optimise):
    """The product is in fp32 and rounded once: not what F.silu(gate) * up gives."""
    optimise(
        Function(lambda g, u: (F.silu(g.float()) * u).to(g.dtype)),
        pair(2, 3, dtype=torch.bfloat16),
        ["silu_glu"],
    )


@pytest.mark.parametrize("is_packed", [False, True], ids=["separate", "packed"])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_in_an_mlp_with_an_activation_module(optimise, kind, is_packed):
    activation, _ = ACTIVATIONS[kind]["module"]
    name = f"packed_{kind}_glu_mlp" if is_packed else f"{kind}_glu_mlp"
    x = [torch.randn(2, 3, I)]
    report = optimise(MLP(activation, packed=is_packed), x, [name], others=[[torch.randn(5, 1, I)]])
    assert report.idioms == {"glu": 1}
    assert report.summary == "1/1 GLU"


@pytest.mark.parametrize("is_packed", [False, True], ids=["separate", "packed"])
@pytest.mark.parametrize("low_memory", [False, True])
def test_low_memory(assert_same, calls, low_memory, is_packed):
    """The product is kept for the backward, unless memory is to be saved."""
    module, x = MLP(F.relu, packed=is_packed), torch.randn(2, 3, I)
    optimised = ligerfx.optimize(module, (x,), low_memory=low_memory)
    ((kernel, *tensors, options),) = calls(optimised)
    assert kernel == ("packed_glu_mlp" if is_packed else "glu_mlp")
    assert tensors[1:] == [*(["gate.weight"] if is_packed else ["gate.weight", "up.weight"]), "down.weight"]
    assert options == {"activation": "relu", **({"recompute": True} if low_memory else {})}
    assert_same(module, optimised, [x])


@pytest.mark.parametrize("is_packed", [False, True], ids=["separate", "packed"])
def test_down_projection_with_a_bias(assert_same, calls, is_packed):
    module, x = MLP(F.silu, packed=is_packed), torch.randn(2, 3, I)
    module.down = nn.Linear(I, 2 * I)
    optimised = ligerfx.optimize(module, (x,))
    ((_, *tensors, _),) = calls(optimised)
    assert tensors[-2:] == ["down.weight", "down.bias"]
    assert_same(module, optimised, [x])


def hooked(mlp):
    mlp.down.register_forward_hook(lambda module, args, out: out * 2)


def subclassed(mlp):
    mlp.down = type("Scaled", (nn.Linear,), {"forward": lambda self, x: 2 * F.linear(x, self.weight)})(I, I)


@pytest.mark.parametrize("is_packed", [False, True], ids=["separate", "packed"])
@pytest.mark.parametrize("change", [hooked, subclassed], ids=lambda f: f.__name__)
def test_down_projection_that_is_not_plain(optimise, change, is_packed):
    """The unit alone is rewritten."""
    mlp = MLP(F.silu, packed=is_packed)
    change(mlp)
    report = optimise(mlp, [torch.randn(2, 3, I)], ["packed_silu_glu" if is_packed else "silu_glu"])
    assert [r.pattern for r in report.rewrites] == ["packed_silu_glu" if is_packed else "silu_glu"]
    assert not report.near_misses


AROUND_THE_PROJECTION = {
    "product used elsewhere": (lambda p, w: F.linear(p, w) + p, "silu_glu"),
    "product returned": (lambda p, w: (F.linear(p, w), p), "silu_glu"),
    "two projections": (lambda p, w: F.linear(p, w) + F.linear(p, w.sin()), "silu_glu"),
    "dropout between": (lambda p, w: F.linear(F.dropout(p, 0.0), w), "silu_glu"),
    "scaled between": (lambda p, w: F.linear(2 * p, w), "silu_glu"),
    "in another dtype": (lambda p, w: F.linear(p.double(), w.double()), "silu_glu"),
    "scaled after": (lambda p, w: 2 * F.linear(p, w), "silu_glu_linear"),
    "dropout after": (lambda p, w: F.dropout(F.linear(p, w), 0.0), "silu_glu_linear"),
}


@pytest.mark.parametrize("name", AROUND_THE_PROJECTION)
def test_around_the_projection(optimise, name):
    function, pattern = AROUND_THE_PROJECTION[name]
    call = [*pair(2, 3), torch.randn(I, I)]
    report = optimise(Function(lambda g, u, w: function(F.silu(g) * u, w)), call, [pattern])
    assert [r.pattern for r in report.rewrites] == [pattern]
    assert not report.near_misses


POINTWISE = {
    "up a sum": lambda g, u: F.silu(g) * (u + u.flip(0)),
    "up a sum with the gate": lambda g, u: F.silu(g) * (u + g),
    "up scaled": lambda g, u: F.silu(g) * (u * 0.5),
    "gate scaled": lambda g, u: F.silu(2 * g) * u,
    "gate a sum": lambda g, u: F.silu(g + g.flip(0)) * u,
    "gate a sum with up": lambda g, u: F.silu(g + u) * u,
    "product scaled": lambda g, u: (F.silu(g) * u) * 3,
    "product added": lambda g, u: (F.silu(g) * u) + g,
    "gate is up": lambda g, u: F.silu(g) * g,
}


@pytest.mark.parametrize("name", POINTWISE)
def test_of_and_inside_pointwise_arithmetic(optimise, name):
    """Gate and up may be pointwise arithmetic of the same graph (an adapter's sum, say)."""
    optimise(Function(POINTWISE[name]), pair(2, 3), ["silu_glu"], others=[pair(1, 4)], rtol=1e-6)


def test_three_factors(optimise):
    optimise(Function(lambda g, u: F.silu(g) * u * u.sin()), pair(2, 3), ["silu_glu"], rtol=1e-6)


def test_silu_on_both_sides(optimise):
    """Ambiguous: either factor may be the gate, and the numbers are the same."""
    optimise(Function(lambda g, u: F.silu(g) * F.silu(u)), pair(2, 3), ["silu_glu"], rtol=1e-6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled on a machine with a GPU")
def test_in_the_interpreter(optimise, monkeypatch):
    monkeypatch.setattr("ligerfx.kernels._runtime.INTERPRET", True)
    optimise(Function(lambda g, u: F.silu(g) * u), pair(2, 3), ["silu_glu"], rtol=1e-5)
    optimise(MLP(F.gelu, packed=True), [torch.randn(2, 3, I)], ["packed_gelu_glu_mlp"], rtol=1e-5)


def halved(x):
    return x.chunk(2, dim=-1)


def taking_turns(x):
    return x[..., ::2], x[..., 1::2]


def gpt_oss(gate, up, limit=0.9, low=None):
    gate, up = gate.clamp(min=None, max=limit), up.clamp(min=-limit if low is None else low, max=limit)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


def deepseek(gate, up):
    return F.silu(torch.clamp(gate, max=0.9)) * torch.clip(up, -0.9, 0.9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", [gpt_oss, deepseek])
def test_clamped(optimise, calls, function, dtype):
    """To the bit in float32. Roundings between ops of one dtype are left to the kernel."""
    options = (
        {"limit": 0.9, "alpha": 1.702, "offset": 1.0}
        if function is gpt_oss
        else {"limit": 0.9, "alpha": 1.0, "offset": 0.0}
    )
    for parts, name in ((halved, "packed_clamped_glu"), (taking_turns, "interleaved_clamped_glu")):
        report = optimise(Function(lambda x, p=parts: function(*p(x))), packed(2, 3, dtype=dtype), [name])
        assert {k: pytest.approx(v) for k, v in report.rewrites[0].constants.items()} == options
    optimise(Function(function), pair(2, 3, dtype=dtype), ["clamped_glu"], others=[pair(1, 1, dtype=dtype)])


NOT_CLAMPED_ALIKE = {
    "another lower bound": lambda g, u: gpt_oss(g, u, low=-0.8),
    "no lower bound": lambda g, u: (
        (u.clamp(max=0.9) + 1) * (g.clamp(max=0.9) * torch.sigmoid(g.clamp(max=0.9) * 1.702))
    ),
    "limits that differ": lambda g, u: F.silu(g.clamp(max=0.8)) * u.clamp(-0.9, 0.9),
    "a gate with a lower bound": lambda g, u: F.silu(g.clamp(-0.9, 0.9)) * u.clamp(-0.9, 0.9),
}


@pytest.mark.parametrize("name", NOT_CLAMPED_ALIKE)
def test_clamped_in_another_way(optimise, name):
    """What is clamped may be gate and up of a unit that does not clamp."""
    shifted = "lower" in name and "gate" not in name
    optimise(Function(NOT_CLAMPED_ALIKE[name]), pair(2, 3), [] if shifted else ["silu_glu"])


# -- what must not match -------------------------------------------------------------------------------------

NEVER = {
    "quick gelu": (lambda g, u: g * torch.sigmoid(1.702 * g) * u, "silu_glu", "gate = 1.702*"),
    "swapped sign": (lambda g, u: g * torch.sigmoid(-g) * u, "silu_glu", "gate = -"),
    "sum": (lambda g, u: F.silu(g) + u, None, None),
    "difference": (lambda g, u: F.silu(g) - u, None, None),
    "quotient": (lambda g, u: F.silu(g) / u, None, None),
    "sigmoid gate": (lambda g, u: torch.sigmoid(g) * u, None, None),
    "tanh gate": (lambda g, u: torch.tanh(g) * u, None, None),
    "relu cubed": (lambda g, u: F.relu(g) ** 3 * u, None, None),
    "relu6": (lambda g, u: F.relu6(g) * u, None, None),
    "leaky relu": (lambda g, u: F.leaky_relu(g) * u, None, None),
    "mish": (lambda g, u: F.mish(g) * u, None, None),
    "elu": (lambda g, u: F.elu(g) * u, None, None),
    "clamped above": (lambda g, u: g.clamp(max=0) * u, None, None),
    "no activation": (lambda g, u: g * u, None, None),
    "gelu of another constant": (
        lambda g, u: 0.5 * g * (1 + torch.erf(g / 1.5)) * u, "gelu_glu", None,
    ),
    "tanh gelu of another constant": (
        lambda g, u: 0.5 * g * (1 + torch.tanh(math.sqrt(2 / math.pi) * (g + 0.05 * g**3))) * u,
        "gelu_tanh_glu", None,
    ),
    "another shape": (lambda g, u: F.silu(g) * u[..., :1], "silu_glu", "up: expected size I = 6, found 1"),
    "broadcast over the batch": (lambda g, u: F.silu(g) * u[:1], "silu_glu", "must have one shape"),
    "clamped": (lambda g, u: F.silu(g).clamp(max=1) * u, None, None),
}  # fmt: skip


@pytest.mark.parametrize("name", NEVER)
def test_another_formula_is_not_rewritten(optimise, name):
    function, pattern, reason = NEVER[name]
    report = optimise(Function(function), pair(2, 3), [])
    if pattern is not None:
        assert [m.pattern for m in report.near_misses] == [pattern]
        assert reason is None or reason in report.near_misses[0].reason


def three_parts(x):
    gate, up = x[..., :4], x[..., 4:8]
    return F.silu(gate) * up


def overlapping(x):
    return F.silu(x[..., :I]) * x[..., I - 1 : -1]


def halves_of_another_dimension(x):
    gate, up = x.chunk(2, dim=0)
    return F.silu(gate) * up


def every_second(x):
    return F.silu(x[..., ::2]) * x[..., 1::2]


@pytest.mark.parametrize(
    "function",
    [three_parts, overlapping, halves_of_another_dimension, every_second],
    ids=lambda f: f.__name__,
)
def test_what_is_not_two_halves_is_not_packed(optimise, function):
    optimise(Function(function), packed(2, 3), ["silu_glu"])


def shares(x):
    return x / (x.sum(-1, keepdim=True) + 1e-6)


NO_UNIT = {
    "gelu": lambda x, y, w: F.linear(F.gelu(F.linear(x, w)), w),
    "tanh gelu": lambda x, y, w: F.linear(F.gelu(F.linear(x, w), approximate="tanh"), w),
    "silu": lambda x, y, w: F.linear(F.silu(F.linear(x, w)), w),
    "quick gelu": lambda x, y, w: F.linear(x * torch.sigmoid(1.702 * x), w),
    "relu squared": lambda x, y, w: F.linear(F.relu(F.linear(x, w)).square(), w),
    "a product": lambda x, y, w: F.linear(x * y, w),
    "a sigmoid gate": lambda x, y, w: F.linear(torch.sigmoid(F.linear(x, w)) * y, w),
    "shares of the chosen": lambda x, y, w: shares(x.sigmoid().topk(2, -1)[0]),
}


@pytest.mark.parametrize("name", NO_UNIT)
def test_what_is_no_gated_unit_is_no_near_miss(optimise, name):
    report = optimise(Function(NO_UNIT[name]), [*pair(2, 3), torch.randn(I, I)], [])
    assert not report.near_misses, report.near_misses


@pytest.mark.parametrize("function", [lambda g, u: (F.silu(g) * u, F.silu(g)), lambda g, u: (F.silu(g) * u, u + 1)])
def test_inputs_may_be_used_elsewhere(optimise, function):
    optimise(Function(function), pair(2, 3), ["silu_glu"])


def test_gate_activation_used_elsewhere(optimise):
    def function(g, u):
        act = F.silu(g)
        return act * u, act.mean()

    report = optimise(Function(function), pair(2, 3), [])
    (miss,) = report.near_misses
    assert miss.pattern == "silu_glu"
    assert "`silu` has a second user, `mean` at test_glu.py:" in miss.reason


def test_activation_in_place(assert_same):
    def function(g, u):
        g, u = g + 0, u + 0
        return F.silu(g, inplace=True) * u, g

    call = pair(2, 3)
    optimised = ligerfx.optimize(Function(function), tuple(call))
    assert_same(Function(function), optimised, call)


def test_activation_module_in_place(assert_same):
    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.act = nn.Linear(I, I), nn.ReLU(inplace=True)

        def forward(self, x, u):
            g = self.linear(x)
            y = self.act(g) * u
            return y + g

    module, call = Module(), pair(2, 3)
    optimised = ligerfx.optimize(module, tuple(call))
    assert_same(module, optimised, call)


def test_hooked_activation_module_is_kept():
    """An activation with a hook is called, and its hook fires."""
    seen = []
    module = MLP(nn.SiLU())
    module.act_fn.register_forward_hook(lambda *args: seen.append(args[2].shape))
    optimised = ligerfx.optimize(module, (torch.randn(2, 3, I),))
    optimised(torch.randn(2, 3, I))
    assert seen == [(2, 3, I)]
