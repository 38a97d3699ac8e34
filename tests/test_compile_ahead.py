"""Kernels compiled before a graph runs first: the tensors that their calls are rehearsed on are like the real ones."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

import ligerfx
import ligerfx.module
from ligerfx.compile_ahead import compile_ahead, kernel_calls
from ligerfx.kernels import _ahead, rms_norm_reference
from ligerfx.kernels.counted_rows import CountedRows
from models import batch, make


class Calls(torch.fx.Interpreter):
    """Runs a graph and notes the calls of kernels."""

    def call_function(self, target, args, kwargs):
        module = getattr(target, "__module__", "")
        if module.startswith(("ligerfx.kernels", "ligerfx.patterns")) and target.__name__ != "rows_that_count":
            self.module_calls.append((target, args, kwargs))
        return super().call_function(target, args, kwargs)


def kind(value):
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    return type(value) if isinstance(value, CountedRows) else value


def needs_grad(value):
    return isinstance(value, torch.Tensor) and value.requires_grad


@pytest.fixture
def compared(monkeypatch):
    """Compares each first run of a graph; the kernels that were called."""
    names = []

    def compare(capture, module, leaves):
        calls = Calls(module, graph=capture.graph)
        calls.module_calls = []
        calls.run(*(leaves[i] for i in capture.leaves))
        rehearsed = list(kernel_calls(capture, module, leaves))
        assert [target for target, _, _ in rehearsed] == [target for target, _, _ in calls.module_calls]
        for (target, *real), (_, *mine) in zip(calls.module_calls, rehearsed, strict=True):
            mine, real = tree_leaves(mine), tree_leaves(real)
            assert list(map(kind, mine)) == list(map(kind, real)), target
            # One of several results may need none where the others do: then more is compiled than is needed.
            assert [needs_grad(m) or not needs_grad(r) for m, r in zip(mine, real, strict=True)] == [True] * len(real)
            assert any(map(needs_grad, mine)) == any(map(needs_grad, real))
            names.append(target.__name__)

    monkeypatch.setattr(ligerfx.module, "compile_ahead", compare)
    return names


@pytest.mark.parametrize("family", ["llama", "llama_bias", "gemma2", "qwen3", "phi4"])
def test_calls_are_rehearsed_as_they_will_be(family, compared):
    model = make(family)
    ligerfx.optimize(model)(**batch(model, 3, 11), use_cache=False)
    assert {"linear_cross_entropy", "rms_norm", "rms_norm_linear"} < set(compared)
    assert {"rope", "norm_rope_of_tokens"} & set(compared)


@pytest.mark.parametrize("trained", ["norm", "lm_head", "q_proj"])
def test_what_needs_a_gradient(trained, compared):
    model = make("llama")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    ligerfx.optimize(model)(**batch(model, 2, 9), use_cache=False)
    assert compared


def test_without_gradients(compared):
    model = make("llama")
    with torch.no_grad():
        ligerfx.optimize(model)(**batch(model, 2, 9), use_cache=False)
    assert compared


def test_a_graph_is_rehearsed_once_and_again_where_other_inputs_need_a_gradient(monkeypatch):
    rehearsed = []
    monkeypatch.setattr(ligerfx.module, "compile_ahead", lambda _, module, __: rehearsed.append(type(module).__name__))
    model = make("llama", num_hidden_layers=3)
    optimised = ligerfx.optimize(model)
    optimised(**batch(model, 2, 9), use_cache=False)
    assert rehearsed.count("LlamaDecoderLayer") == 1
    count = len(rehearsed)
    optimised(**batch(model, 3, 5), use_cache=False)  # other sizes
    assert len(rehearsed) == count
    model.model.embed_tokens.weight.requires_grad_(False)
    optimised = ligerfx.optimize(model)
    optimised(**batch(model, 2, 9), use_cache=False)
    assert rehearsed[count:].count("LlamaDecoderLayer") == 2  # the first layer, and the others


class Norms(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(16))

    def forward(self, x):
        return rms_norm_reference(rms_norm_reference(x, self.weight).tanh(), self.weight)


def test_a_weight_that_is_no_plain_tensor_is_left_out(monkeypatch):
    """A sharded one, whose kernel is not called or gets another."""
    found = []
    monkeypatch.setattr(ligerfx.module, "compile_ahead", lambda *args: found.append([len(list(kernel_calls(*args)))]))
    model = Norms()
    ligerfx.optimize(model, torch.randn(2, 16))(torch.randn(3, 16))
    model = Norms()
    optimised = ligerfx.optimize(model, torch.randn(2, 16))
    optimised.weight = torch.nn.Parameter(torch.Tensor._make_subclass(type("Shard", (torch.Tensor,), {}), model.weight))
    optimised(torch.randn(3, 16))
    assert found == [[2], [0]]


def test_on_a_cpu_nothing_is_rehearsed(monkeypatch):
    monkeypatch.setattr(_ahead, "rehearsing", lambda: pytest.fail("rehearsed"))
    model = Norms()
    optimised = ligerfx.optimize(model, torch.randn(2, 16))
    compile_ahead(optimised._ligerfx_program.capture, optimised, [torch.randn(3, 16)])
