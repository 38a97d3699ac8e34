"""RMSNorm with the linear layers that read it: which kernel gets what, and when not."""

import pytest
import torch
import torch.nn.functional as F
from idioms import KINDS_OF_NORM as KINDS
from idioms import llama
from test_equivalence import run
from torch import nn
from torch.fx import Node

import ligerfx
from models import batch, make

H = 8


class Block(nn.Module):
    """A norm, linear layers a, b, c and d, and a forward that is a plain function of the block and its inputs."""

    def __init__(self, function, *, norm=llama, bias=False, dtype=torch.float32):
        super().__init__()
        self.function, self.norm_function = function, norm
        self.weight = nn.Parameter(torch.randn(H, dtype=dtype))
        for name in "abcd":
            self.add_module(name, nn.Linear(H, H, bias=bias, dtype=dtype))

    def norm(self, x):
        return self.norm_function(x, self.weight, 1e-5)

    def forward(self, *inputs):
        return self.function(self, *inputs)


def inputs(count=1, dtype=torch.float32):
    return [torch.randn(2, 3, H, dtype=dtype) for _ in range(count)]


# -- layers, biases, the addition before ---------------------------------------------------------------------


def into(*names):
    """The norm of x goes into these layers, and what comes of them is added to x."""

    def function(block, x):
        h = block.norm(x)
        return x + torch.stack([getattr(block, name)(h) for name in names]).sin().sum(0)

    return function


def added_into(*names):
    """The same for the norm of x + residual."""
    return lambda block, x, residual: into(*names)(block, x + residual)


@pytest.mark.parametrize("is_added", [False, True], ids=["", "added"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("names", ["a", "ab", "abc"])
def test_number_of_layers(assert_same, calls, names, bias, is_added):
    block, call = Block((added_into if is_added else into)(*names), bias=bias), inputs(1 + is_added)
    optimised = ligerfx.optimize(block, tuple(call))
    (rewrite,) = optimised.report.rewrites
    assert rewrite.pattern == f"{'add_' if is_added else ''}rms_norm_rounded_first_linear_x{len(names)}"
    for tensors in (call, [x[:1, :2] for x in call]):
        assert_same(block, optimised, tensors)
    ((kernel, x, weight, options),) = calls(optimised)
    assert (kernel, weight) == ("rms_norm_linear", "weight")
    assert options.pop("weights") == tuple(f"{n}.weight" for n in names)
    assert options.pop("biases", ()) == (tuple(f"{n}.bias" for n in names) if bias else ())
    assert {x, options.pop("residual", None)} == ({"arg0", "arg1"} if is_added else {"arg0", None})
    assert options == {"eps": 1e-5}


@pytest.mark.parametrize("is_added", [False, True], ids=["", "added"])
@pytest.mark.parametrize("norm", KINDS, ids=lambda f: f.__name__)
def test_cast_position(assert_same, calls, norm, is_added):
    name, expected = KINDS[norm]
    block = Block((added_into if is_added else into)("a", "b"), norm=norm, dtype=torch.bfloat16)
    call = inputs(1 + is_added, torch.bfloat16)
    optimised = ligerfx.optimize(block, tuple(call))
    (rewrite,) = optimised.report.rewrites
    assert rewrite.pattern == f"{'add_' if is_added else ''}{name}_linear_x2"
    assert_same(block, optimised, call)
    ((*_, options),) = calls(optimised)
    assert {key: options[key] for key in ("cast", "offset") if key in options} == expected


def test_the_stream_goes_on_from_the_kernel():
    """The addition at the end takes x from the kernel's last output, and the next kernel from there again."""

    def function(block, x):
        x = x + block.b(block.a(block.norm(x)).sin())
        return x + block.d(block.c(block.norm(x)).sin())

    optimised = ligerfx.optimize(Block(function), tuple(inputs()))
    first, second = (n for n in optimised.graph.nodes if n.target is ligerfx.kernels.rms_norm_linear)
    residual = second.kwargs["residual"]
    assert isinstance(residual, Node) and residual.args == (first, 1)
    (output,) = optimised.graph.find_nodes(op="output")
    assert (second, 1) in [n.args for n in output.args[0].all_input_nodes]


def test_one_weight_for_two_layers(optimise):
    """The layers stay two, each with a gradient of its own for the one weight."""
    block = Block(into("a", "b"))
    block.b.weight = block.a.weight
    optimise(block, inputs(), ["rms_norm_rounded_first_linear_x2"])


def test_functional_layers(optimise):
    def function(block, x):
        h = block.norm(x)
        return x + F.linear(h, block.a.weight) * F.linear(h, block.b.weight)

    optimise(Block(function), inputs(), ["rms_norm_rounded_first_linear_x2"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled on a machine with a GPU")
def test_in_the_interpreter(optimise, monkeypatch):
    monkeypatch.setattr("ligerfx.kernels._runtime.INTERPRET", True)
    optimise(Block(into("a", "b", "c"), bias=True), inputs(), ["rms_norm_rounded_first_linear_x3"], rtol=1e-5)
    optimise(Block(added_into("a", "b")), inputs(2), ["add_rms_norm_rounded_first_linear_x2"], rtol=1e-5)


# -- decoder layers ------------------------------------------------------------------------------------------

QKV = tuple(f"self_attn.{n}_proj.weight" for n in "qkv")
QKV_BIAS = tuple(f"self_attn.{n}_proj.bias" for n in "qkv")
GEMMA = {"offset": 1.0, "cast": "after_weight"}
MLP = ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")
LAYERS = {
    "llama": ({"weights": QKV}, MLP, {}),
    "qwen2": ({"weights": QKV, "biases": QKV_BIAS}, MLP, {}),
    "gemma": ({"weights": QKV, **GEMMA}, MLP, {"activation": "gelu_tanh", **GEMMA}),
    "phi3": (
        {"weights": ("self_attn.qkv_proj.weight",)},
        ("mlp.gate_up_proj.weight",),
        {"up_weight": None, "weight": "mlp.down_proj.weight"},
    ),
}


@pytest.mark.parametrize("family", LAYERS)
def test_decoder_layer(calls, family):
    model = make(family, num_hidden_layers=1)
    optimised = ligerfx.optimize(model)
    first, weights, options = LAYERS[family]
    eps = {"eps": model.config.rms_norm_eps} if model.config.rms_norm_eps != 1e-6 else {}  # the kernel's default
    assert calls(optimised.model.layers[0]) == [
        ("rms_norm_linear", "hidden_states", "input_layernorm.weight", {**first, **eps}),
        ("rope", *[None] * 4, {}),
        (
            "rms_norm_mlp",
            None,
            "post_attention_layernorm.weight",
            *weights,
            {"residual": None, **options, **eps},
        ),
    ]
    inputs = batch(model)
    (loss, logits, gradients), (loss_, logits_, gradients_) = run(model, inputs), run(optimised, inputs)
    assert torch.equal(loss, loss_) and torch.equal(logits, logits_)
    assert [name for name, g in gradients.items() if not torch.equal(g, gradients_[name])] == []


# -- what is rewritten less, or not at all -------------------------------------------------------------------

PLAIN, FORKED = "rms_norm_rounded_first", "forked_rms_norm_rounded_first"


def output_used_elsewhere(block, x):
    h = block.norm(x)
    return x + block.a(h) * block.b(h) + h.sin()


def output_returned(block, x):
    h = block.norm(x)
    return x + block.a(h), h


def in_another_dtype(block, x):
    h = block.norm(x)
    return x + block.a(h) + F.linear(h.double(), block.b.weight.double()).to(x.dtype)


def dropout_between(block, x):
    return x + block.a(F.dropout(block.norm(x), 0.0))


def dropout_after(block, x):
    return x + F.dropout(block.a(block.norm(x)), 0.0)


def no_later_use(block, x):
    return block.a(block.norm(x))


def only_an_earlier_use(block, x):
    y = x.sin()
    return y + block.a(block.norm(x))


LESS = {
    output_used_elsewhere: [FORKED],
    output_returned: [FORKED],
    in_another_dtype: [FORKED],
    into("a", "b", "c", "d"): [FORKED],
    dropout_between: [FORKED],
    dropout_after: [f"{PLAIN}_linear_x1"],
    no_later_use: [PLAIN],
    only_an_earlier_use: [PLAIN],
}


@pytest.mark.parametrize("function", LESS, ids=lambda f: f.__name__)
def test_less_is_rewritten(optimise, function):
    report = optimise(Block(function), inputs(), LESS[function])
    assert not report.near_misses  # the norm is, and the rest is no idiom


@pytest.mark.parametrize("function", LESS, ids=lambda f: f.__name__)
def test_less_is_rewritten_after_an_addition(optimise, function):
    """The sum is an output of the kernel, which does not make the norm of it one: it is not computed twice."""
    pattern = {FORKED: f"add_{PLAIN}", PLAIN: f"add_{PLAIN}"}.get(LESS[function][0], f"add_{LESS[function][0]}")
    if function in (no_later_use, only_an_earlier_use):  # the sum is used, in the norm
        pattern = f"add_{PLAIN}_linear_x1"
    block = Block(lambda self, x, residual: function(self, x + residual))
    report = optimise(block, inputs(2), [pattern], rtol=1e-6)
    assert [r.pattern for r in report.rewrites] == [pattern]
    assert not report.near_misses


@pytest.mark.parametrize("shape", [(3, H), (1, 3, H), (1, H)], ids=str)
def test_residual_of_another_shape(optimise, shape):
    """The sum is left to eager, and goes on from the kernel."""
    report = optimise(Block(added_into("a", "b")), [*inputs(), torch.randn(shape)], [f"{PLAIN}_linear_x2"])
    assert not report.near_misses


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked(block):
    block.b.register_forward_hook(lambda module, args, out: out * 2)


def subclassed(block):
    block.b = Scaled(H, H, bias=False)


def biased(block):
    block.b.bias = nn.Parameter(torch.randn(H))


def forward_replaced(block):
    block.b.forward = lambda x: 2 * F.linear(x, block.b.weight)


def weight_by_hook(block):
    torch.nn.utils.parametrizations.weight_norm(block.b)


@pytest.mark.parametrize("change", [hooked, subclassed, biased, forward_replaced, weight_by_hook])
def test_one_layer_is_not_plain(optimise, change):
    block = Block(into("a", "b"))
    change(block)
    report = optimise(block, inputs(), [FORKED])
    assert not report.near_misses


def in_place(block, x):
    x = x.clone()
    h = block.a(block.norm(x))
    x.mul_(2)
    return x + h


def in_place_before_the_layer(block, x):
    x = x.clone()
    h = block.norm(x)
    x[..., 0] = 0
    return block.a(h) + x


@pytest.mark.parametrize("function", [in_place, in_place_before_the_layer], ids=lambda f: f.__name__)
def test_input_changed_in_place_later(function):
    """Nothing is rewritten, and the result is the original's (no gradients: eager refuses them)."""
    block, (x,) = Block(function), inputs()
    optimised = ligerfx.optimize(block, (x,))
    assert not optimised.report.rewrites
    (miss,) = optimised.report.near_misses
    assert miss.idioms == ("rms_norm",)
    assert "is changed in place at test_norm_linear.py:" in miss.reason
    with torch.no_grad():
        assert torch.equal(optimised(x), block(x))


def added_to_in_place(block, x):
    x = x + x.sin()
    x += block.a(block.norm(x))
    return x


def view_changed(block, x):
    x = x + x.sin()
    h = block.a(block.norm(x))
    x[:, 0].zero_()
    return x + h


def input_view_changed(block, x):
    x = x.mul(1)
    h = block.a(block.norm(x))
    x[:, 0].zero_()
    return x + h


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled on a machine with a GPU")
@pytest.mark.parametrize("function", [added_to_in_place, view_changed, input_view_changed], ids=lambda f: f.__name__)
def test_stream_changed_in_place_in_low_precision(assert_same, monkeypatch, function):
    """Eager keeps an fp32 copy for the backward, so that the stream may change; with the kernels it must, too."""
    monkeypatch.setattr("ligerfx.kernels._runtime.INTERPRET", True)
    block, call = Block(function, dtype=torch.float16), inputs(dtype=torch.float16)
    assert_same(block, ligerfx.optimize(block, tuple(call)), call, rtol=2**-8)
