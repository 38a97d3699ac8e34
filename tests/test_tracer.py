"""Capture: sizes, branches, opaque modules, hooks, twins, numbers, grad modes and threads."""

import copy
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from idioms import RMSNorm
from torch import nn

import ligerfx
from ligerfx import draws
from ligerfx.tracer import Tracer
from models import batch, expected_idioms, make

H = 8


pytestmark = pytest.mark.usefixtures("references")


class Norm(RMSNorm):
    def __init__(self, eps=1e-6, scale=None):
        super().__init__(H, eps)
        self.unread = None
        if scale is not None:
            self.scale = scale

    def forward(self, x):
        x = super().forward(x)
        return x * self.scale if hasattr(self, "scale") else x


class Block(nn.Module):
    """`function(self, x, ...)` between two norms."""

    def __init__(self, function=None):
        super().__init__()
        self.first, self.linear, self.last = Norm(), nn.Linear(H, H), Norm()
        self.function = function or (lambda self, x: self.linear(x))

    def forward(self, x, *args, **kwargs):
        x = self.function(self, self.first(x), *args, **kwargs)
        return x + self.last(x)  # a norm alone would hide a factor


def x(*shape):
    return torch.randn(*shape, H)


def captures(optimised):
    return len(optimised._ligerfx_programs)


def trace(module, *args, **kwargs):
    return Tracer(module).trace(args, kwargs)


def assert_equal(optimised, original, *args, **kwargs):
    found, expected = optimised(*args, **kwargs), original(*args, **kwargs)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


# -- sizes ---------------------------------------------------------------------------------------------------

SIZES = {
    "view": lambda self, x: self.linear(x.view(-1, H)).view(x.shape[0], x.shape[1], H),
    "view by size()": lambda self, x: x.view(x.size(0) * x.size(1), -1).view(*x.size()),
    "reshape of heads": lambda self, x: x.reshape(*x.shape[:-1], 2, -1).mT.flatten(2).view(x.shape),
    "unpacked": lambda self, x: (lambda b, s, h: x.transpose(0, 1).reshape(s * b, h).view(s, b, h))(*x.shape),
    "flatten": lambda self, x: x.flatten(0, 1).unflatten(0, x.shape[:2]),
    "new tensor": lambda self, x: x + torch.zeros(x.shape[0], x.shape[1], 1),
    "arange": lambda self, x: x + torch.arange(x.shape[1])[None, :, None],
    "number of elements": lambda self, x: x + x.sum() / x.numel(),
    "size as a factor": lambda self, x: x * x.shape[1],
    "root of a size": lambda self, x: x * x.shape[1] ** -0.5,
    "expand": lambda self, x: x[:, :1].expand(x.shape[0], x.shape[1], H) + x,
    "slice to half of a size": lambda self, x: x + x[:, : (x.shape[1] + 1) // 2].mean(1, keepdim=True),
    "slice to a size less one": lambda self, x: F.pad(x[:, : x.shape[1] - 1], (0, 0, 1, 0)),
    "slice from the end by a size": lambda self, x: x + x[:, -x.shape[1] :],
    "slice from a size": lambda self, x: x + x[:, x.shape[1] - 1 :],
    "narrow": lambda self, x: x.narrow(1, 0, x.shape[1]),
    "split by a size": lambda self, x: torch.cat(x.split((x.shape[1] + 1) // 2, 1), 1),
    "index": lambda self, x: x + x[:, -1:],
    "advanced index": lambda self, x: x + x[torch.arange(x.shape[0]), -1].unsqueeze(1),
}


@pytest.mark.parametrize("name", SIZES)
def test_symbolic_sizes(name):
    module = Block(SIZES[name])
    optimised = ligerfx.optimize(module, (x(2, 6),))
    assert optimised.report.idioms == {"rms_norm": 2}
    for shape in [(2, 6), (3, 4), (1, 5), (1, 1), (5, 5)]:
        assert_equal(optimised, module, x(*shape))


def test_sizes_become_nodes():
    module = Block(lambda self, x: x.view(x.shape[0] * x.shape[1], H).view(x.shape[0], x.shape[1], H))
    capture = trace(module, x(2, 6))
    assert capture.error is None
    sizes = [n for n in capture.graph.nodes if n.target == "size"]
    assert sorted(n.args[1] for n in sizes) == [0, 1]
    assert not [a for n in capture.graph.nodes if n.target == "view" for a in n.args if a in (2, 6, 12)]


def test_slice_by_the_size_of_another_input():
    module = Block(lambda self, x, y: x[:, : y.shape[1]] + y)
    optimised = ligerfx.optimize(module, (x(2, 6), x(2, 3)))
    for shape, other in [((2, 6), (2, 3)), ((3, 9), (3, 4)), ((1, 2), (1, 1))]:
        assert_equal(optimised, module, x(*shape), x(*other))


def test_branch_on_a_size_becomes_a_guard():
    module = Block(lambda self, x: self.linear(x) if x.shape[1] > 4 else x * 2)
    optimised = ligerfx.optimize(module, (x(2, 6),))
    for seq in (6, 5, 9):
        assert_equal(optimised, module, x(2, seq))
    before = captures(optimised)
    for seq in (4, 1, 3):
        assert_equal(optimised, module, x(2, seq))
    assert captures(optimised) == before + 1
    assert_equal(optimised, module, x(2, 7))
    assert captures(optimised) == before + 1


def test_loop_over_a_size():
    def function(self, x):
        for _ in range(x.shape[1]):
            x = torch.tanh(x)
        return x

    module = Block(function)
    optimised = ligerfx.optimize(module, (x(2, 3),))
    for seq in (3, 2, 5, 3):
        assert_equal(optimised, module, x(2, seq))


def test_assertion_about_sizes_still_raises():
    def function(self, x, y):
        if x.shape != y.shape:
            raise ValueError("shapes differ")
        return x + y

    module = Block(function)
    optimised = ligerfx.optimize(module, (x(2, 6), x(2, 6)))
    assert_equal(optimised, module, x(3, 4), x(3, 4))
    with pytest.raises(ValueError, match="shapes differ"):
        optimised(x(3, 4), x(3, 1))


PIECES = {
    "split": lambda self, x: torch.cat([t.cumsum(1) for t in x.split(2, 1)], 1),
    "chunk": lambda self, x: torch.cat([t.cumsum(1) for t in x.chunk(4, 1)], 1),
    "unbind": lambda self, x: torch.stack([t.cumsum(0) for t in x.unbind(1)], 1),
    "iteration": lambda self, x: torch.stack([t.cumsum(0) for t in x]),
    "sum of pieces": lambda self, x: x + sum(x.unbind(1)).unsqueeze(1),
    "rank after squeeze": lambda self, x: x * 2 if x.squeeze(1).ndim == 3 else x,
}


@pytest.mark.parametrize("name", PIECES)
def test_number_of_pieces_depends_on_a_size(name):
    """How many tensors an op returns, and of what rank, decides what the graph is: a guard, or opaque."""
    module = Block(PIECES[name])
    optimised = ligerfx.optimize(module, (x(2, 6),))
    for shape in [(2, 6), (3, 8), (3, 1), (1, 3), (4, 6)]:
        assert_equal(optimised, module, x(*shape))


def test_comparison_of_the_sizes_of_two_inputs():
    """Also where the inputs themselves go to other modules only."""
    module = Block(lambda self, x, y: x * 2 if x.shape == y.shape else x * 3)
    optimised = ligerfx.optimize(module, (x(2, 6), x(2, 6)))
    for first, second in [((2, 6), (2, 6)), ((3, 4), (3, 4)), ((2, 6), (2, 5)), ((2, 5), (2, 6))]:
        assert_equal(optimised, module, x(*first), x(*second))


def test_equal_example_sizes_may_differ_later():
    module = Block(lambda self, x, y: torch.cat((x, y), 1))
    optimised = ligerfx.optimize(module, (x(2, 2), x(2, 2)))
    for first, second in [((2, 2), (2, 2)), ((3, 4), (3, 6)), ((1, 4), (1, 1))]:
        assert_equal(optimised, module, x(*first), x(*second))


# -- opaque modules ------------------------------------------------------------------------------------------


class Opaque(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.linear = nn.Linear(H, H)
        self.function = function

    def forward(self, x):
        return self.function(self.linear(x))


OPAQUE = {
    "item": (lambda x: x * x.sum().item(), "SymFloat"),
    "branch on data": (lambda x: x if x.sum() > 0 else -x, "branches on the values of a tensor"),
    "tolist": (lambda x: x + x.flatten().tolist()[0], ""),
    "nonzero": (lambda x: x + x.nonzero().shape[0], ""),
    "autocast": (lambda x: autocast(x), "autocast mode changes"),
}


def autocast(x):
    with torch.autocast("cpu", torch.bfloat16):
        return (x @ x.transpose(-1, -2) @ x).float()


@pytest.mark.parametrize("name", OPAQUE)
def test_opaque_module_runs_as_it_is_and_the_rest_is_optimised(name):
    function, reason = OPAQUE[name]
    module = Block()
    module.linear = Opaque(function)
    optimised = ligerfx.optimize(module, (x(2, 6),))
    assert optimised.report.idioms == {"rms_norm": 2}
    assert list(optimised.report.opaque) == ["linear"]
    assert optimised.report.opaque["linear"] and reason in optimised.report.opaque["linear"]
    for shape in [(2, 6), (3, 4)]:
        assert_equal(optimised, module, x(*shape))


def test_module_that_cannot_run_on_fakes():
    """Nothing is known of what it returns, so what follows is not captured either; it runs as it is."""
    module = Block()
    module.linear = Opaque(lambda x: x + torch.from_numpy(x.detach().numpy() * 2))
    optimised = ligerfx.optimize(module, (x(2, 6),))
    assert optimised.report.opaque and optimised.report.idioms == {"rms_norm": 1}
    assert_equal(optimised, module, x(2, 6))


def test_opaque_root_keeps_its_children_optimised():
    module = Block(lambda self, x: self.linear(x) * x.sum().item())
    optimised = ligerfx.optimize(module, (x(2, 6),))
    assert list(optimised.report.opaque) == [""] and len(optimised.report.rewrites) >= 1
    assert_equal(optimised, module, x(2, 6))


def test_failing_forward_is_one_clear_error():
    module = Block(lambda self, x: x @ x)
    with pytest.raises(ligerfx.OptimizeError):
        ligerfx.optimize(module, (x(2, 6),))


# -- modules -------------------------------------------------------------------------------------------------


def test_modules_that_own_nothing_are_inlined():
    module = nn.Sequential(nn.Linear(H, H), nn.SiLU(), nn.Linear(H, H))
    capture = trace(module, x(2, 6))
    assert [n.target for n in capture.graph.nodes if n.op == "call_module"] == ["0", "2"]
    assert capture.absorbed["1"] == (nn.SiLU, ())


def test_nothing_runs_hooks_during_capture():
    module, fired = Block(), []
    for m in module.modules():
        m.register_forward_hook(lambda *args: fired.append("forward"))
        m.register_forward_pre_hook(lambda *args: fired.append("pre"))
    optimised = ligerfx.optimize(module, (x(2, 6),))
    assert not fired
    optimised(x(2, 6))
    assert fired.count("forward") == fired.count("pre") == 4


def test_hooks_of_the_copy_are_its_own():
    module, fired = Block(), []
    optimised = ligerfx.optimize(module, (x(2, 6),))
    optimised.first.register_forward_hook(lambda *args: fired.append("copy"))
    module(x(2, 6))
    assert not fired and not module.first._forward_hooks
    optimised(x(2, 6))
    assert fired == ["copy"]


def tables_of(module):
    """The parameter, module and hook tables of a module, copied."""
    return {k: dict(v) for k, v in vars(module).items() if isinstance(v, dict)}


@pytest.mark.parametrize("make_model", [Block, lambda: make("llama")], ids=["block", "llama"])
def test_the_original_is_untouched(make_model):
    model = make_model()
    call = batch(model) if hasattr(model, "config") else {"x": x(2, 6)}
    modules = dict(model.named_modules())
    before = {name: (type(m), type(m).forward, dict(vars(m))) for name, m in modules.items()}
    tables = {name: tables_of(m) for name, m in modules.items()}
    values = copy.deepcopy(model.state_dict())
    versions = {n: p._version for n, p in model.named_parameters()}
    ligerfx.optimize(model, call)(**call)

    assert dict(model.named_modules()) == modules
    for name, module in modules.items():
        cls, forward, state = before[name]
        assert type(module) is cls and cls.forward is forward
        assert vars(module).keys() == state.keys()
        assert all(vars(module)[k] is v for k, v in state.items())
        assert tables_of(module) == tables[name]
    assert model.state_dict().keys() == values.keys()
    assert all(torch.equal(v, values[k]) for k, v in model.state_dict().items())
    assert {n: p._version for n, p in model.named_parameters()} == versions


def test_capture_draws_no_random_numbers():
    module = Block(lambda self, x: F.dropout(x, 0.5))
    state = torch.get_rng_state()
    optimised = ligerfx.optimize(module, (x(2, 6),))
    del optimised
    torch.set_rng_state(state)
    expected = torch.rand(1)
    torch.set_rng_state(state)
    call = torch.ones(2, 6, H)
    ligerfx.optimize(module, (call,))
    assert torch.equal(torch.rand(1), expected)


class Layers(nn.Module):
    """Leaves layers out, as layerdrop does."""

    def __init__(self, draw):
        super().__init__()
        self.layers, self.draw = nn.ModuleList(Scaled() for _ in range(4)), draw

    def forward(self, x):
        for layer in self.layers:
            if self.draw() < 0.5:
                x = layer(x)
        return x


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = RMSNorm(H)

    def forward(self, x):
        return 2 * self.norm(x)


@pytest.mark.parametrize("draw", [random.random, np.random.rand], ids=["python", "numpy"])
def test_numbers_of_other_generators_are_drawn_at_every_call(draw):
    model, call = Layers(draw), torch.randn(2, 3, H)

    def results(m):
        random.seed(1)
        np.random.seed(1)
        return torch.stack([m(call) for _ in range(8)])

    random.seed(2)
    np.random.seed(2)
    before = draws.state()
    optimised = ligerfx.optimize(model, (call,))
    assert draws.state() == before
    assert list(optimised.report.opaque) == [""]
    assert "draws random numbers" in optimised.report.opaque[""]
    torch.testing.assert_close(results(optimised), results(model))


def test_dropout_is_drawn_anew_at_every_call():
    module = Block(lambda self, x: F.dropout(x, 0.5, self.training))
    optimised = ligerfx.optimize(module, (x(2, 6),))
    call = x(2, 6)
    assert not torch.equal(optimised(call), optimised(call))
    torch.manual_seed(3)
    found = optimised(call)
    torch.manual_seed(3)
    assert torch.equal(found, module(call))


def test_buffer_updated_in_forward():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = Norm()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return self.norm(x) * self.calls

    module = Counter()
    optimised = ligerfx.optimize(module, (x(2, 6),))
    reference = copy.deepcopy(module)
    assert module.calls == 0
    for _ in range(3):
        assert_equal(optimised, reference, x(2, 6))
    assert optimised.calls == 3


@pytest.mark.parametrize("start", [0, None], ids=["set before", "missing before"])
def test_plain_attribute_updated_in_forward(start):
    """A side effect that a graph does not have: such a forward must run as it is."""

    def function(self, x):
        self.count = getattr(self, "count", 0) + 1
        return x * self.count

    module = Block(function)
    if start is not None:
        module.count = start
    optimised = ligerfx.optimize(module, (x(2, 6),))
    reference = copy.deepcopy(module)
    for _ in range(3):
        assert_equal(optimised, reference, x(2, 6))


# -- twins ---------------------------------------------------------------------------------------------------


def stack(*norms):
    return nn.Sequential(*norms)


def children(module, *shape):
    capture = trace(module, x(*shape))
    assert capture.error is None
    return [child for _, child in capture.children]


def test_identical_layers_are_captured_once():
    first, *rest = children(stack(*(Norm() for _ in range(5))), 2, 6)
    assert all(child is first for child in rest)


@pytest.mark.parametrize("change", [{"eps": 1e-3}, {"scale": 2.0}], ids=str)
def test_layers_that_differ_in_what_is_read_are_captured_apart(change):
    module = stack(Norm(), Norm(**change), Norm())
    first, second, third = children(module, 2, 6)
    assert first is third and second is not first
    optimised = ligerfx.optimize(module, (x(2, 6),))
    call = x(2, 6)
    torch.testing.assert_close(optimised(call), module(call), rtol=1e-6, atol=1e-6)


def test_attribute_that_is_not_read_does_not_matter():
    module = stack(Norm(), Norm())
    module[1].unread = "something else"
    first, second = children(module, 2, 6)
    assert first is second


def test_layers_of_another_width_are_captured_apart():
    module = nn.Sequential(Block(), Block())
    module[1].linear = nn.Linear(H, H, bias=False)
    first, second = children(module, 2, 6)
    assert first is not second


# -- numbers -------------------------------------------------------------------------------------------------


def test_number_handed_on_is_an_input():
    module = Block(lambda self, x, n: torch.mul(x, n))
    optimised = ligerfx.optimize(module, {"x": x(2, 6), "n": 3})
    for n in (3, 4, 7):
        assert_equal(optimised, module, x=x(2, 6), n=n)
    assert captures(optimised) == 1


def test_number_compared_is_a_guard():
    module = Block(lambda self, x, n: x * 2 if n > 5 else x)
    optimised = ligerfx.optimize(module, {"x": x(2, 6), "n": 3})
    for n in (3, 7, 3, 4, 7, 6):
        assert_equal(optimised, module, x(2, 6), n=n)
    assert captures(optimised) > 1


@pytest.mark.parametrize(
    "values", [(2, 3, 1), (0.5, 2.0, -1.0), (2, 2.0, True), ("a", "bb", "a"), (None, 1, None)], ids=str
)
def test_number_of_any_kind_is_never_stale(values):
    module = Block(lambda self, x, n: x if n is None else x * len(n) if isinstance(n, str) else x / (n + 1.5))
    optimised = ligerfx.optimize(module, {"x": x(2, 6), "n": values[0]})
    for n in values:
        assert_equal(optimised, module, x(2, 6), n=n)


def test_number_of_numpy():
    """A constant of the graph, whose code does not know numpy."""
    module = Block(lambda self, x: x / np.sqrt(16.0) + np.int64(2))
    assert_equal(ligerfx.optimize(module, (x(2, 6),)), module, x(3, 5))


def test_tensor_in_place_of_a_number():
    module = Block(lambda self, x, n: x / n)
    optimised = ligerfx.optimize(module, {"x": x(2, 6), "n": 3})
    for n in (3, torch.tensor(4), torch.tensor(2.5), 2.5):
        assert_equal(optimised, module, x(2, 6), n=n)


def test_one_tensor_passed_twice():
    module = Block(lambda self, x, y, z: y * 2 + z)
    call = x(2, 6)
    optimised = ligerfx.optimize(module, {"x": call, "y": call, "z": call})
    assert_equal(optimised, module, call, y=call, z=call)
    assert_equal(optimised, module, x(2, 6), y=x(2, 6), z=x(2, 6))


# -- grad modes ----------------------------------------------------------------------------------------------


def no_grad_everywhere(self, x):
    with torch.no_grad():
        return self.linear(x)


def no_grad_in_part(self, x):
    with torch.no_grad():
        gate = self.linear(x).sigmoid()
    return x * gate


def enable_grad(self, x):
    with torch.enable_grad():
        return self.linear(x)


def detached(self, x):
    return self.linear(x).detach() * x


@pytest.mark.parametrize(
    "function", [no_grad_everywhere, no_grad_in_part, enable_grad, detached], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("outer", [True, False], ids=["grad", "no grad"])
def test_grad_mode_inside_forward(function, outer):
    module = Block(function)
    optimised = ligerfx.optimize(module, (x(2, 6),))
    call = x(2, 6).requires_grad_()
    with torch.set_grad_enabled(outer):
        expected, found = module(call), optimised(call)
    assert found.requires_grad == expected.requires_grad
    assert torch.equal(found, expected)
    if expected.requires_grad:
        leaves = [(call, call), *zip(module.parameters(), optimised.parameters(), strict=True)]
        wanted = torch.autograd.grad(expected.sum(), [a for a, _ in leaves], allow_unused=True)
        got = torch.autograd.grad(found.sum(), [b for _, b in leaves], allow_unused=True)
        for a, b in zip(got, wanted, strict=True):
            assert (a is None) == (b is None) and (a is None or torch.equal(a, b))


def test_no_grad_decorator_on_forward():
    class Frozen(Norm):
        forward = torch.no_grad()(Norm.forward)

    module = nn.Sequential(nn.Linear(H, H), Frozen())
    optimised = ligerfx.optimize(module, (x(2, 6),))
    assert not optimised(x(2, 6)).requires_grad and not module(x(2, 6)).requires_grad


def test_capture_under_no_grad_serves_training():
    module = Block()
    with torch.no_grad():
        optimised = ligerfx.optimize(module, (x(2, 6),))
    assert optimised(x(2, 6)).requires_grad
    optimised(x(2, 6)).sum().backward()
    assert module.first.weight.grad is not None


# -- threads -------------------------------------------------------------------------------------------------


def test_two_threads_optimise_and_run_at_once():
    models = [make("llama"), make("qwen3")]
    barrier = threading.Barrier(2)

    def work(model):
        barrier.wait()
        inputs = batch(model)
        optimised = ligerfx.optimize(model, inputs)
        return optimised.report.idioms, optimised(**inputs).loss, model(**inputs).loss

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(work, models))
    for model, (idioms, loss, expected) in zip(models, results, strict=True):
        assert idioms == expected_idioms(model)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    # What capture changes for the whole process, for a moment, is as it was.
    assert torch._dynamo.eval_frame._stance.stance == "default"
    assert torch.nn.functional.linear is torch._C._nn.linear


def test_another_thread_runs_a_model_while_one_is_captured():
    """The functions that capture replaces for its own thread stay the original ones for the others."""
    other, model = make("llama"), make("llama", seed=1, num_hidden_layers=4)
    inputs = batch(other)
    expected = other(**inputs).loss
    losses, stop = [], threading.Event()

    def run():
        while not stop.is_set():
            losses.append(other(**inputs).loss.detach())

    thread = threading.Thread(target=run)
    thread.start()
    try:
        for _ in range(3):
            ligerfx.optimize(model)
    finally:
        stop.set()
        thread.join()
    assert losses and all(torch.equal(loss, expected) for loss in losses)


class Positions(nn.Module):
    """An int that is handed in, computed with, and equal to a literal of the same forward."""

    def __init__(self):
        super().__init__()
        self.table, self.weight = nn.Parameter(torch.randn(30, H)), nn.Parameter(torch.randn(H))

    def forward(self, x, past):
        h = x + self.table[torch.arange(past, past + x.shape[1])].unsqueeze(0)
        return self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6))


def test_number_that_a_module_hands_on():
    """A graph captured with 0 does not serve 5, and 0 in it is not that number."""

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Positions()

        def forward(self, x, cache=None):
            return self.inner(x, 0 if cache is None else 5)

    module = Outer()
    optimised = ligerfx.optimize(module, (x(2, 3),))
    assert optimised.report.idioms == {"rms_norm": 1}
    assert_equal(optimised, module, x(2, 3))
    assert_equal(optimised, module, x(2, 3), 1)
    for past in (0, 3, 5):
        assert_equal(optimised.inner, module.inner, x(2, 4), past)


def test_modules_inside_one_that_branches_on_data_are_captured():
    def function(self, x):
        if x.sum() > 0:
            return self.linear(x)
        return self.linear(x) + len([row for row in x.abs().flatten(0, 1) if row.any()])

    module = Block(function)
    optimised = ligerfx.optimize(module, (x(2, 3),))
    assert "" in optimised.report.opaque and optimised.report.idioms == {"rms_norm": 2}
    assert_equal(optimised, module, x(2, 3))
