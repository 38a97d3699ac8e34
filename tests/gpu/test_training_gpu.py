"""Training with the kernels on a GPU: under Inductor, in CUDA graphs, and the memory of what is sharded or deferred."""

import pytest
import torch

import ligerfx
from ligerfx.deferred import DeferredTensor
from models import make

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def model_and_batches(family, count=3, **changes):
    model = make(family, **changes).to("cuda")
    batches = [torch.randint(3, model.config.vocab_size, (2, 48), device="cuda") for _ in range(count)]
    return model, [{"input_ids": ids, "labels": ids.where(ids % 3 > 0, -100), "use_cache": False} for ids in batches]


def step(model, inputs):
    model.zero_grad(set_to_none=True)
    output = model(**inputs)
    output.loss.backward()
    return output, {name.removeprefix("_orig_mod."): p.grad.clone() for name, p in model.named_parameters()}


def assert_equal(expected, found):
    (output, gradients), (other, other_gradients) = expected, found
    torch.testing.assert_close(other.loss, output.loss, rtol=5e-6, atol=0)
    for name, gradient in gradients.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(other_gradients[name], gradient, rtol=1e-4, atol=2e-5 * scale, msg=name)


@pytest.mark.parametrize("mode, small", [("default", 0), ("reduce-overhead", 0), ("default", 2**22)])
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_inductor(monkeypatch, family, mode, small):
    """With kernels, and with the plain operations that a compiler gets of small tensors."""
    monkeypatch.setattr("ligerfx.kernels._runtime.SMALL", small)
    model, batches = model_and_batches(family)
    compiled = torch.compile(ligerfx.optimize(model), mode=mode, fullgraph=True)
    for inputs in (*batches, *batches):  # a graph is recorded in the second call and replayed from the third on
        torch.compiler.cudagraph_mark_step_begin()
        expected, found = step(model, inputs), step(compiled, inputs)
        assert_equal(expected, found)
        assert type(found[0].logits) is DeferredTensor
        torch.testing.assert_close(found[0].logits, expected[0].logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_cuda_graph_of_a_whole_step(family):
    model, batches = model_and_batches(family)
    optimised = ligerfx.optimize(model)
    static = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in batches[0].items()}
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            optimised(**static).loss.backward()
        optimised.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            loss = optimised(**static).loss
            loss.backward()
    torch.cuda.synchronize()
    gradients = {name: p.grad for name, p in optimised.named_parameters()}
    for inputs in batches:
        for name in ("input_ids", "labels"):
            static[name].copy_(inputs[name])
        for gradient in gradients.values():
            gradient.zero_()
        graph.replay()
        replayed = {name: gradient.clone() for name, gradient in gradients.items()}
        output = type("Output", (), {"loss": loss.clone()})
        for p in model.parameters():
            p.grad = None
        reference = model(**inputs)
        reference.loss.backward()
        assert_equal((reference, {n: p.grad for n, p in model.named_parameters()}), (output, replayed))
        for name, p in optimised.named_parameters():
            p.grad = gradients[name]


def test_a_compiled_model_holds_no_logits():
    model, _ = model_and_batches("llama", vocab_size=65536, num_hidden_layers=1)
    model.to(torch.bfloat16)
    ids = torch.randint(3, 65536, (4, 2048), device="cuda")
    compiled = torch.compile(ligerfx.optimize(model), fullgraph=True)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        output = compiled(input_ids=ids, labels=ids, use_cache=False)
        output.loss.backward()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 8192 * 65536 * 2, f"{peak / 2**20:.0f} MiB: as much as the logits alone"
