"""torch.compile(model, backend="ligerfx"): the original's numbers, and what is rewritten in Dynamo's graphs."""

from types import SimpleNamespace

import pytest
import torch

import ligerfx
from ligerfx.backend import compiled_reports
from ligerfx.backend import ligerfx as backend
from models import batch, default_batch, make

pytestmark = pytest.mark.usefixtures("references", "fresh_compiler")


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(function, **options):
    return torch.compile(function, backend=backend, options={"backend": "aot_eager", **options})


def loss_and_gradients(model, loss_of, inputs):
    model.zero_grad(set_to_none=True)
    loss = loss_of(**inputs)
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same_step(model, loss_of, inputs):
    expected = loss_and_gradients(model, lambda **x: model(**x).loss, inputs)
    found = loss_and_gradients(model, loss_of, inputs)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0)
    for name, gradient in expected[1].items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize("family, norms", [("gemma", 3), ("gemma2", 5), ("qwen3", 5)])
def test_a_step_whose_loss_alone_is_returned(family, norms):
    model = make(family, num_hidden_layers=1)
    assert_same_step(model, compiled(lambda **inputs: model(**inputs).loss), default_batch(model))
    assert compiled_reports()[-1].idioms == {"rms_norm": norms, "rope": 1, "glu": 1, "linear_cross_entropy": 1}


def test_logits_that_are_returned_are_there_and_have_their_gradient():
    model = make("llama", num_hidden_layers=1)
    inputs = default_batch(model)
    function = compiled(model)

    def loss_of(model):
        output = model(**inputs)
        return output.loss + output.logits.float().logsumexp(-1).mean()

    expected = loss_and_gradients(model, lambda: loss_of(model), {})
    found = loss_and_gradients(model, lambda: loss_of(function), {})
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    report = compiled_reports()[-1]
    assert report.idioms["cross_entropy"] == 1 and "linear_cross_entropy" not in report.idioms
    assert any("uses the logits, or returns them" in miss.reason for miss in report.near_misses)


def test_sizes_that_vary_and_calls_without_gradients():
    model = make("llama", num_hidden_layers=1)
    function = compiled(lambda **inputs: model(**inputs).loss)
    for size in ((2, 9), (3, 11), (4, 13)):
        inputs = batch(model, *size, padding="left")
        assert_same_step(model, function, inputs)
    for size in ((3, 11), (4, 13)):
        with torch.no_grad():
            inputs = batch(model, *size, padding="left")
            torch.testing.assert_close(function(**inputs), model(**inputs).loss, rtol=1e-6, atol=0)


class Broken(torch.nn.Module):
    """A norm before a graph break, and one after it; the second is read where no gradient is wanted."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Parameter(torch.randn(8)), torch.nn.Parameter(torch.randn(8))

    def norm(self, x, weight):
        return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    def forward(self, x, split=True):
        x = self.norm(x, self.first)
        if split:
            torch._dynamo.graph_break()
        y = self.norm(x, self.second)
        with torch.no_grad():
            scale = y.sum()
        return (y * scale).sum()


@pytest.mark.parametrize("split", [True, False])
def test_graph_breaks_and_regions_without_gradients(split):
    model, x = Broken(), torch.randn(2, 3, 8)
    count = len(compiled_reports())
    expected = loss_and_gradients(model, model, {"x": x})
    found = loss_and_gradients(model, compiled(lambda x: model(x, split)), {"x": x})
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    reports = compiled_reports()[count:]
    # Of the second norm, the part before the weight: its result is read in one mode, that of the whole in two.
    assert [report.idioms["rms_norm"] for report in reports] == ([1, 1] if split else [2])
    assert "the grad or autocast mode changes in between" in [m.reason for m in reports[-1].near_misses]


def test_a_graph_that_cannot_be_searched_is_compiled_as_it_is(monkeypatch):
    monkeypatch.setattr("ligerfx.backend.rewrite", lambda graph, matches: 1 / 0)
    with pytest.warns(UserWarning, match="compiled as it is, without ligerfx: ZeroDivisionError"):
        result = compiled(lambda x: x * torch.sigmoid(x))(torch.ones(3))
    torch.testing.assert_close(result, torch.nn.functional.silu(torch.ones(3)))


class Small(torch.nn.Module):
    """A norm, a head and a loss: each part more is C++ to be compiled, for seconds."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = torch.nn.Embedding(32, 16), torch.nn.RMSNorm(16)
        self.head = torch.nn.Linear(16, 32, bias=False)

    def forward(self, ids):
        logits = self.head(self.norm(self.embed(ids)))
        return SimpleNamespace(loss=torch.nn.functional.cross_entropy(logits.float().view(-1, 32), ids.view(-1)))


@pytest.mark.slow
def test_inductor_by_name():
    model = Small()
    count = len(compiled_reports())
    function = torch.compile(lambda ids: model(ids).loss, backend="ligerfx")
    # Without the compiler's trials of what this CPU knows, and without a header that pays with many kernels.
    with torch._inductor.config.patch({"cpp.vec_isa_ok": True, "cpp_cache_precompile_headers": False}):
        assert_same_step(model, function, {"ids": torch.randint(0, 32, (2, 9))})
    assert ligerfx.compiled_reports()[count:][-1].idioms == {"rms_norm": 1, "linear_cross_entropy": 1}
