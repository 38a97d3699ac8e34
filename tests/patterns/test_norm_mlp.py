"""A norm and the gated MLP that reads it, as one call; and what of it is left where something is in the way."""

import pytest
import torch
import torch.nn.functional as F
from idioms import KINDS_OF_NORM as KINDS
from idioms import llama
from torch import nn

import ligerfx

H, I = 16, 24  # noqa: E741


def inputs(count=1, dtype=torch.float32):
    return [torch.randn(2, 3, H, dtype=dtype) for _ in range(count)]


class Block(nn.Module):
    def __init__(self, norm, activation=F.silu, packed=False, bias=False, dtype=torch.float32):
        super().__init__()
        self.norm_function, self.activation = norm, activation
        self.weight = nn.Parameter(torch.randn(H, dtype=dtype))
        widths = {"gate_up": 2 * I} if packed else {"gate": I, "up": I}
        for name, width in widths.items():
            self.add_module(name, nn.Linear(H, width, bias=bias, dtype=dtype))
        self.down = nn.Linear(I, H, bias=bias, dtype=dtype)

    def mlp(self, h):
        gate, up = self.gate_up(h).chunk(2, dim=-1) if hasattr(self, "gate_up") else (self.gate(h), self.up(h))
        return self.down(self.activation(gate) * up)

    def forward(self, x, residual=None):
        x = x if residual is None else x + residual
        return x + self.mlp(self.norm_function(x, self.weight, 1e-5))


def gelu_tanh(x):
    return F.gelu(x, approximate="tanh")


ACTIVATIONS = {"silu": F.silu, "gelu_tanh": gelu_tanh}


@pytest.mark.parametrize("is_added", [False, True], ids=["", "added"])
@pytest.mark.parametrize("is_packed", [False, True], ids=["", "packed"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", KINDS, ids=lambda f: f.__name__)
def test_one_call(assert_same, calls, norm, activation, is_packed, is_added):
    name, kind = KINDS[norm]
    """In bfloat16, where the kinds of norm differ in their bits."""
    block = Block(norm, ACTIVATIONS[activation], is_packed, dtype=torch.bfloat16)
    call = inputs(1 + is_added, torch.bfloat16)
    optimised = ligerfx.optimize(block, tuple(call))
    (rewrite,) = optimised.report.rewrites
    assert rewrite.pattern == f"{'add_' * is_added}{name}_{'packed_' * is_packed}{activation}_glu_mlp"
    assert rewrite.idioms == ("rms_norm", "glu")
    for tensors in (call, [x[:1, :2] for x in call]):
        assert_same(block, optimised, tensors)
    ((kernel, *arguments, options),) = calls(optimised)
    weights = ["gate_up.weight"] if is_packed else ["gate.weight", "up.weight", "down.weight"]
    assert (kernel, *arguments[1:]) == ("rms_norm_mlp", "weight", *weights)
    if is_packed:
        assert options.pop("up_weight") is None and options.pop("weight") == "down.weight"
    assert {arguments[0], options.pop("residual", None)} == {"x", "residual" if is_added else None}
    assert options.pop("activation", "silu") == activation
    assert options == {"eps": 1e-5, **kind}


def test_low_memory_keeps_less(calls):
    block, (x,) = Block(llama), inputs()
    for low_memory in (False, True):
        ((*_, options),) = calls(ligerfx.optimize(block, (x,), low_memory=low_memory))
        assert options.pop("recompute", False) == low_memory


def used_elsewhere(block, x):
    h = block.norm_function(x, block.weight, 1e-5)
    return x + block.mlp(h) + h.sin()


def scaled_between(block, x):
    return x + block.mlp(2 * block.norm_function(x, block.weight, 1e-5))


def gate_used_elsewhere(block, x):
    h = block.norm_function(x, block.weight, 1e-5)
    gate = block.gate(h)
    return x + block.down(F.silu(gate) * block.up(h)) + gate.sum()


def up_of_another(block, x):
    h = block.norm_function(x, block.weight, 1e-5)
    return x + block.down(F.silu(block.gate(h)) * block.up(x))


FORKED, PLAIN = "forked_rms_norm_rounded_first", "rms_norm_rounded_first"
LESS = {
    used_elsewhere: [FORKED, "silu_glu_mlp"],
    scaled_between: [FORKED, "silu_glu_mlp"],
    gate_used_elsewhere: [f"{PLAIN}_linear_x2", "silu_glu_linear"],
    up_of_another: [f"{PLAIN}_linear_x1", "silu_glu_linear"],
}


@pytest.mark.parametrize("function", LESS, ids=lambda f: f.__name__)
def test_less_is_rewritten(assert_same, function):
    block, (x,) = type("Other", (Block,), {"forward": function})(llama), inputs()
    optimised = ligerfx.optimize(block, (x,))
    assert sorted(r.pattern for r in optimised.report.rewrites) == sorted(LESS[function])
    assert_same(block, optimised, [x], rtol=1e-6)


def biased(block):
    return Block(block.norm_function, bias=True)


def hooked(block):
    block.up.register_forward_hook(lambda module, args, out: out * 2)
    return block


def adapted(block):
    block.up = nn.Sequential(block.up, nn.Dropout(0.0))
    return block


def another_activation(block):
    block.activation = F.relu
    return block


CHANGES = {
    biased: [f"{PLAIN}_linear_x2", "silu_glu_linear"],
    hooked: [FORKED, "silu_glu_linear"],
    adapted: [FORKED, "silu_glu_linear"],
    another_activation: [f"{PLAIN}_linear_x2", "relu_glu_linear"],
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_projections_that_do_not_fit(assert_same, change):
    block, (x,) = change(Block(llama)), inputs()
    optimised = ligerfx.optimize(block, (x,))
    assert sorted(r.pattern for r in optimised.report.rewrites) == sorted(CHANGES[change])
    assert_same(block, optimised, [x], rtol=1e-6)


def test_a_projection_replaced_later_is_called(assert_same):
    block, (x,) = Block(llama), inputs()
    optimised = ligerfx.optimize(block, (x,))
    for module in (block, optimised):
        module.up = nn.Sequential(nn.Linear(H, 2), nn.Linear(2, I))
    optimised.up.load_state_dict(block.up.state_dict())
    assert torch.equal(optimised(x), block(x))
