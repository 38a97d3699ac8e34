"""Modules dissolved into their caller: which ones, that everything which can happen between modules (hooks, adapters,
other classes, other attributes) still does, and to the bit."""

import copy
import dataclasses
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import ligerfx
from ligerfx import OptimizedModule
from ligerfx.module import find_program
from models import expected_idioms, make

H = 8

pytestmark = pytest.mark.usefixtures("references")


class RMSNorm(nn.Module):
    def __init__(self, eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(H))
        self.eps = eps

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(H, H, bias=False) for _ in range(4))
        self.q_norm = RMSNorm()
        self.scaling, self.dropout = 0.7, 0.0

    def forward(self, x):
        scores = self.q_norm(self.q(x)) @ self.k(x).transpose(-1, -2) * self.scaling
        return F.dropout(self.o(scores.softmax(-1) @ self.v(x)), self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, width=12):
        super().__init__()
        self.gate, self.up = (nn.Linear(H, width, bias=False) for _ in range(2))
        self.down, self.act = nn.Linear(width, H), nn.SiLU()

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = RMSNorm(), Attention(), RMSNorm(), MLP()

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    """Two equal layers and a norm."""

    def __init__(self):
        super().__init__()
        self.layers, self.norm = nn.ModuleList([Layer(), Layer()]), RMSNorm()

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class Block(nn.Module):
    """Children, and a forward that is a plain function of the block and its inputs."""

    def __init__(self, function, **children):
        super().__init__()
        self.function, self.norm = function, RMSNorm()
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, *inputs):
        return self.function(self, *inputs)


def states(*shape):
    return torch.randn(*(shape or (2, 3)), H)


@pytest.fixture(scope="module")
def built():
    torch.manual_seed(0)
    model = Model()
    return model, ligerfx.optimize(model, (states(),))


@pytest.fixture
def pair(built):
    """The model and its optimised copy, of which a test may change what it likes."""
    return copy.deepcopy(built)


def run(module, *inputs):
    """The output, and the gradients of the inputs and of every parameter."""
    torch.manual_seed(1)  # of dropout
    inputs = [x.detach().requires_grad_() if torch.is_tensor(x) else x for x in inputs]
    output = module(*inputs)
    leaves = [*(x for x in inputs if torch.is_tensor(x)), *module.parameters()]
    output.cos().sum().backward()
    gradients = [t.grad for t in leaves]
    module.zero_grad(set_to_none=True)
    return output, *gradients


def assert_same(model, optimised, *inputs):
    for found, expected in zip(run(optimised, *inputs), run(model, *inputs), strict=True):
        assert (found is None) == (expected is None)
        assert expected is None or torch.equal(found, expected)


def programs(optimised):
    """How many programs each optimised module holds."""
    modules = [(name, m) for name, m in optimised.named_modules() if isinstance(m, OptimizedModule)]
    return {name: len(m._ligerfx_programs) for name, m in modules}


def is_fused(layer):
    """Whether a call of the layer is served by the program that `optimize` made."""
    return find_program(layer, (states(),), {})[0] is layer._ligerfx_program


# -- which modules -------------------------------------------------------------------------------------------


def test_what_is_dissolved(built):
    """The children of a layer that a match straddles; not the norm inside attention, nor the layers."""
    _, optimised = built
    assert not optimised._ligerfx_program.dissolved
    for layer in optimised.layers:
        assert layer._ligerfx_program.dissolved == {"norm1", "attn", "norm2", "mlp"}
    assert optimised.report.idioms == {"rms_norm": 7, "glu": 2}
    layer_patterns = [
        "rms_norm_rounded_first_linear_x3", "add_rms_norm_rounded_first_linear_x2", "silu_glu_linear"
    ]  # fmt: skip
    found = sorted((r.module, r.pattern) for r in optimised.report.rewrites if "norm" not in r.module)
    assert found == sorted((f"layers.{i}", name) for i in range(2) for name in layer_patterns)


def test_what_is_dissolved_in_transformers():
    model = make("llama")
    optimised = ligerfx.optimize(model)
    assert optimised.report.idioms == expected_idioms(model)
    dissolved = {
        path: m._ligerfx_program.dissolved
        for path, m in optimised.named_modules()
        if isinstance(m, OptimizedModule) and m._ligerfx_program.dissolved
    }
    children = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
    assert dissolved == {f"model.layers.{i}": children for i in range(2)}


def hooked(mlp):
    mlp.register_forward_hook(lambda *_: None)


def forward_replaced(mlp):
    mlp.forward = mlp.forward


def checkpointed_by_instance(mlp):
    mlp.gradient_checkpointing = False


def with_a_list_of_modules(mlp):
    mlp.experts = nn.ModuleList()


def checkpointed_by_class(mlp):
    """As transformers' layers are: off, until gradient_checkpointing_enable sets it on the instance."""
    mlp.__class__ = type("MLP", (MLP,), {"gradient_checkpointing": False})


@pytest.mark.parametrize(
    "mark", [hooked, forward_replaced, checkpointed_by_instance, checkpointed_by_class, with_a_list_of_modules]
)
def test_what_is_not_dissolved(mark):
    model, x = Layer(), states()
    mark(model.mlp)
    optimised = ligerfx.optimize(model, (x,))
    assert optimised._ligerfx_program.dissolved == {"norm1", "attn", "norm2"}
    fused_inside = {} if mark is forward_replaced else {"glu": 1}
    assert optimised.report.idioms == {"rms_norm": 3, **fused_inside}
    assert_same(model, optimised, x)


def test_report_counts_a_child_once_that_has_a_program_of_its_own(built):
    """The children are optimised too, for direct calls; what is not dissolved counts where it runs."""
    _, optimised = built
    layer = optimised.layers[0]
    children = ["norm1", "attn.q_norm", "norm2", "mlp"]
    assert [len(layer.get_submodule(c)._ligerfx_program.matches) for c in children] == [1, 1, 1, 1]
    modules = {r.module for r in optimised.report.rewrites}
    assert modules == {"norm", *(f"layers.{i}{inner}" for i in range(2) for inner in ("", ".attn.q_norm"))}


# -- calls ---------------------------------------------------------------------------------------------------


def test_same_bits_in_every_size_without_a_new_capture(pair):
    model, optimised = pair
    before = programs(optimised)
    for shape in [(2, 3), (1, 3), (4, 1), (1, 1), (3, 17)]:
        assert_same(model, optimised, states(*shape))
    assert programs(optimised) == before


@pytest.mark.parametrize("path", ["norm1", "attn", "attn.q_norm", "norm2", "mlp", "mlp.down"])
def test_child_called_directly(pair, path):
    children = [m.layers[0].get_submodule(path) for m in pair]
    assert_same(*children, torch.randn(2, 3, 12 if path == "mlp.down" else H))
    assert_same(*pair, states())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(pair, reentrant):
    class Checkpointed(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            for layer in self.model.layers:
                x = checkpoint(layer, x, use_reentrant=reentrant)
            return self.model.norm(x)

    model, optimised = pair
    x, before = states(), programs(optimised)
    assert_same(model, Checkpointed(optimised), x)
    assert programs(optimised) == before


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(pair, copied):
    model, optimised = pair
    other = copied(optimised)
    assert_same(model, other, states())
    for layer in other.layers:
        assert [p.dissolved for p in layer._ligerfx_programs.values()] == [{"norm1", "attn", "norm2", "mlp"}]
    with torch.no_grad():
        other.layers[0].mlp.gate.weight.zero_()
    assert_same(model, optimised, states())


# -- hooks ---------------------------------------------------------------------------------------------------

# Each registers a hook that counts its calls and changes what it can.
HOOKS = {
    "forward": lambda m, seen: m.register_forward_hook(lambda m, args, out: seen.append(1) or out * 1.5),
    "forward_pre": lambda m, seen: m.register_forward_pre_hook(lambda m, args: seen.append(1) or (args[0] * 0.5,)),
    "backward": lambda m, seen: m.register_full_backward_hook(
        lambda m, grads, out: seen.append(1) or tuple(g * 0.5 for g in grads)
    ),
    "backward_pre": lambda m, seen: m.register_full_backward_pre_hook(
        lambda m, out: seen.append(1) or tuple(g * 0.5 for g in out)
    ),
}
SITES = [
    *(("mlp", kind) for kind in HOOKS), *(("attn.q", kind) for kind in HOOKS),
    *((path, "forward") for path in ("norm1", "norm2", "attn", "attn.q_norm", "attn.o", "mlp.act", "mlp.down")),
]  # fmt: skip


@pytest.mark.parametrize("path, kind", SITES)
def test_hook_added_after_optimize_and_removed(pair, path, kind):
    """It fires on the one layer that has it; the twin stays fused, and so is this one when the hook is gone."""
    model, optimised = pair
    x, seen = states(), []
    before = programs(optimised)
    handles = [HOOKS[kind](m.layers[1].get_submodule(path), seen) for m in pair]
    assert_same(model, optimised, x)
    assert len(seen) == 2  # once in each model
    is_inside = path in ("attn.q_norm", "attn.o")  # called as a module by the fused program, too
    assert is_fused(optimised.layers[0]) and is_fused(optimised.layers[1]) is is_inside
    for handle in handles:
        handle.remove()
    assert_same(model, optimised, x)
    assert len(seen) == 2 and is_fused(optimised.layers[1])
    after = programs(optimised)
    assert [name for name in before if "layers.0" in name and after[name] != before[name]] == []


def test_global_hook_fires(pair):
    """Profilers and flop counters see every module; here they change what it returns."""
    model, optimised = pair
    called = []

    def hook(module, args, output):
        called.append(type(module).__name__)
        return output * 1.5 if called[-1] in ("MLP", "RMSNorm") else None

    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        assert_same(model, optimised, states())
    finally:
        handle.remove()
    print(called)
    assert called[: len(called) // 2] == called[len(called) // 2 :]


def test_method_replaced_on_a_dissolved_child():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(H, H)

        def scale(self, x):
            return x * 0.5

        def forward(self, x):
            return self.scale(self.linear(x))

    model = Block(lambda self, x: x + self.child(self.norm(x)), child=Scaled())
    optimised = ligerfx.optimize(model, (states(),))
    assert optimised._ligerfx_program.dissolved == {"norm", "child"}
    for m in (model, optimised):
        m.child.scale = lambda x: x * 3
    assert_same(model, optimised, states())
    for m in (model, optimised):
        del m.child.scale
    assert_same(model, optimised, states())


def test_hook_on_an_activation_before_optimize():
    model, x, seen = Layer(), states(), []
    model.mlp.act.register_forward_hook(lambda m, args, out: seen.append(1) or out * 1.5)
    optimised = ligerfx.optimize(model, (x,))
    assert optimised._ligerfx_program.dissolved == {"norm1", "attn", "norm2", "mlp"}
    assert optimised.report.idioms == {"rms_norm": 3}
    seen.clear()
    assert_same(model, optimised, x)
    assert len(seen) == 2


# -- other modules, other attributes -------------------------------------------------------------------------


class LoRA(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base, self.a, self.b = base, nn.Linear(H, 2, bias=False), nn.Linear(2, H, bias=False)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


REPLACEMENTS = {
    "LoRA around q": ("attn.q", LoRA),
    "LoRA around the MLP": ("mlp", LoRA),
    "q with a bias": ("attn.q", lambda old: nn.Linear(H, H)),
    "a wider MLP": ("mlp", lambda old: MLP(20)),
    "another MLP": ("mlp", lambda old: nn.Linear(H, H)),
    "another attention": ("attn", lambda old: nn.Identity()),
    "another norm": ("norm2", lambda old: nn.LayerNorm(H)),
    "a norm of another eps": ("norm1", lambda old: RMSNorm(0.5)),
    "another activation": ("mlp.act", lambda old: nn.ReLU()),
}


@pytest.mark.parametrize("name", REPLACEMENTS)
def test_child_replaced_after_optimize(pair, name):
    path, make_new = REPLACEMENTS[name]
    model, optimised = pair
    x, old = states(), [m.layers[0].get_submodule(path) for m in pair]
    for m, child in zip(pair, old, strict=True):
        torch.manual_seed(3)
        m.layers[0].set_submodule(path, make_new(child))
    assert_same(model, optimised, x)
    assert is_fused(optimised.layers[1])
    for m, child in zip(pair, old, strict=True):
        m.layers[0].set_submodule(path, child)
    assert is_fused(optimised.layers[0])
    assert_same(model, optimised, x)


@pytest.mark.parametrize(
    "path, name, value",
    [("attn", "scaling", 3.0), ("attn", "dropout", 0.5), ("norm1", "eps", 0.5), ("attn.q_norm", "eps", 0.5)],
)
def test_attribute_of_a_child_changed(pair, path, name, value):
    model, optimised = pair
    x, old = states(), getattr(model.layers[0].get_submodule(path), name)
    for m in pair:
        setattr(m.layers[0].get_submodule(path), name, value)
    assert_same(model, optimised, x)
    assert is_fused(optimised.layers[0]) is (path == "attn.q_norm") and is_fused(optimised.layers[1])
    before = programs(optimised)
    for v in (old, value):
        for m in pair:
            setattr(m.layers[0].get_submodule(path), name, v)
        assert_same(model, optimised, x)
    assert programs(optimised) == before


def test_train_and_eval(pair):
    model, optimised = pair
    x = states()
    for m in pair:
        for layer in m.layers:
            layer.attn.dropout = 0.5
    outputs = []
    for training in (True, False, True):
        for m in pair:
            m.train(training)
        assert_same(model, optimised, x)
        outputs.append(run(optimised, x)[0])
    assert torch.equal(outputs[0], outputs[2]) and not torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize(
    "frozen",
    [["attn.q.weight"], ["mlp.down.weight", "mlp.down.bias"], ["norm1", "norm2"], ["attn", "mlp"]],
    ids=str,
)
def test_frozen_weights(pair, frozen):
    model, optimised = pair
    before = programs(optimised)
    for m in pair:
        for name, parameter in m.layers[0].named_parameters():
            parameter.requires_grad_(not any(name.startswith(f) for f in frozen))
    assert_same(model, optimised, states())
    assert programs(optimised) == before


# -- twins ---------------------------------------------------------------------------------------------------


def test_twins_share_their_programs(built):
    _, optimised = built
    first, second = optimised.layers
    assert first._ligerfx_program is second._ligerfx_program
    assert first.mlp._ligerfx_program is second.mlp._ligerfx_program


@pytest.mark.parametrize(
    "path, name, value", [("norm2", "eps", 0.5), ("attn", "scaling", 3.0), ("attn.q_norm", "eps", 0.5)]
)
def test_twins_that_differ_in_an_attribute_of_a_child(built, path, name, value):
    model = copy.deepcopy(built[0])
    setattr(model.layers[1].get_submodule(path), name, value)
    optimised = ligerfx.optimize(model, (states(),))
    first, second = (layer._ligerfx_program for layer in optimised.layers)
    assert first is not second and first.dissolved == second.dissolved == {"norm1", "attn", "norm2", "mlp"}
    assert_same(model, optimised, states())


# -- how children are called ---------------------------------------------------------------------------------


class QK(nn.Module):
    """Two projections; what it returns is up to `wrap`."""

    def __init__(self, wrap=lambda q, k: q * k):
        super().__init__()
        self.q, self.k, self.wrap = nn.Linear(H, H), nn.Linear(H, H), wrap

    def forward(self, x):
        return self.wrap(self.q(x), self.k(x))


@dataclasses.dataclass
class Output:
    q: torch.Tensor
    k: torch.Tensor


RETURNS = {
    "tuple": (lambda q, k: (q, k), lambda out: out[0] * out[1], True),
    "list": (lambda q, k: [q, k], lambda out: out[0] * out[1], True),
    "tuple with None": (lambda q, k: (q, None, k), lambda out: out[0] * out[2], True),
    "tuple in a tuple": (lambda q, k: ((q, k), k), lambda out: out[0][0] * out[0][1], True),
    "dataclass": (Output, lambda out: out.q * out.k, True),
    "dict": (lambda q, k: {"q": q, "k": k}, lambda out: out["q"] * out["k"], False),
}


@pytest.mark.parametrize("kind", RETURNS)
def test_what_a_child_returns(kind):
    wrap, unwrap, is_dissolved = RETURNS[kind]
    model = Block(lambda self, x: x + unwrap(self.qk(self.norm(x))), qk=QK(wrap))
    optimised = ligerfx.optimize(model, (states(),))
    assert optimised._ligerfx_program.dissolved == {"norm", *(["qk"] if is_dissolved else [])}
    assert optimised.report.idioms == {"rms_norm": 1}
    assert_same(model, optimised, states(4, 5))


class Stopping(nn.Module):
    """One linear layer: with gradients or without, as a dict or not."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(H, H)

    def forward(self, x, mode=""):
        with torch.set_grad_enabled(mode != "no_grad"):
            y = self.linear(x)
        return {"y": y} if mode == "dict" else y


TWICE = {
    "the same way": (lambda self, x: x + self.child(self.norm(x)) + self.child(x), 1),
    "of two ranks": (lambda self, x: x + self.child(self.norm(x)) + self.child(x[0]), 1),
    "both after the norm": (lambda self, x: x + self.child(self.child(self.norm(x))), 1),
    "once without gradients": (lambda self, x: x + self.child(self.norm(x)) + self.child(x, mode="no_grad"), 1),
    "once for a dict": (lambda self, x: x + self.child(self.norm(x)) + self.child(x, mode="dict")["y"], 1),
    "the norm": (lambda self, x: x + self.child(self.norm(x + self.child(self.norm(x)))), 2),
}


@pytest.mark.parametrize("name", TWICE)
def test_child_called_twice(name):
    function, norms = TWICE[name]
    model = Block(function, child=Stopping())
    optimised = ligerfx.optimize(model, (states(),))
    assert optimised.report.idioms == {"rms_norm": norms} and not optimised.report.opaque
    assert_same(model, optimised, states())


class Powers(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(H, H)

    def forward(self, x, power):
        return self.linear(x) if power > 1 else self.linear(x) * (power - 2)


@pytest.mark.parametrize("numbers", [(2, 1, 5), (1, 2, 0), (1.5, 0.5, 2.5)], ids=str)
def test_number_that_a_child_branches_on(numbers):
    model = Block(lambda self, x, power: x + self.child(self.norm(x), power), child=Powers())
    x = states()
    optimised = ligerfx.optimize(model, (x, numbers[0]))
    assert "child" in optimised._ligerfx_program.dissolved
    for _ in range(2):
        for number in numbers:
            assert_same(model, optimised, x, number)
    assert programs(optimised)[""] == len(numbers)


class Mix(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(H, H), nn.Linear(H, H)

    def forward(self, x, y):
        return self.a(x) * self.b(y)


def test_child_given_one_tensor_twice():
    def function(self, x):
        y = self.norm(x)
        return x + self.mix(y, y)

    model = Block(function, mix=Mix())
    optimised = ligerfx.optimize(model, (states(),))
    assert optimised._ligerfx_program.dissolved == {"norm", "mix"}
    assert [r.pattern for r in optimised.report.rewrites] == ["rms_norm_rounded_first_linear_x2"]
    assert_same(model, optimised, states(4, 5))


@pytest.mark.parametrize("is_one", [True, False])
def test_child_given_the_callers_inputs(is_one):
    """Captured with one tensor for both or with two, then called with either."""
    model = Block(lambda self, x, y: x + self.mix(self.norm(x), y), mix=Mix())
    x, y = states(), states()
    optimised = ligerfx.optimize(model, (x, x if is_one else y))
    assert "mix" in optimised._ligerfx_program.dissolved
    for second in (x, y, x):
        with torch.no_grad():
            assert torch.equal(optimised(x, second), model(x, second))
    assert_same(model, optimised, x, y)


class Heads(nn.Module):
    """Attention-like: a view by the sizes of the input, into heads and back."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(H, H)

    def forward(self, x):
        batch, seq, _ = x.shape
        return self.linear(x).view(batch, seq, 2, H // 2).transpose(1, 2).cumsum(2).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("captured", [(1, 3), (3, 1), (1, 1), (2, 2)], ids=str)
def test_captured_with_a_size_of_one(captured):
    """Such a size is no constant of the graph."""
    model = Block(lambda self, x: x + self.heads(self.norm(x)), heads=Heads())
    optimised = ligerfx.optimize(model, (states(*captured),))
    assert optimised._ligerfx_program.dissolved == {"norm", "heads"}
    for size in [(1, 3), (3, 1), (1, 1), (2, 5)]:
        assert_same(model, optimised, states(*size))


@pytest.mark.parametrize("shape", [lambda x: tuple(x.shape), lambda x: (x.shape[0], -1, H)], ids=["sizes", "ints"])
def test_child_given_sizes(shape):
    class View(Powers):
        def forward(self, x, shape):
            return self.linear(x.view(shape))

    model = Block(lambda self, x: x + self.child(self.norm(x), shape(x)), child=View())
    optimised = ligerfx.optimize(model, (states(),))
    assert optimised._ligerfx_program.dissolved == {"norm", "child"}
    before = programs(optimised)
    for size in [(2, 3), (4, 5), (1, 1)]:
        assert_same(model, optimised, states(*size))
    assert programs(optimised) == before
