"""torch.compile around an optimised model: one graph, and the original's numbers."""

import pytest
import torch

import ligerfx
from models import batch, default_batch, make


@pytest.fixture(autouse=True)
def fresh_compiler(references):
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def losses_and_gradients(model, inputs):
    loss = model(**inputs).loss
    model.zero_grad(set_to_none=True)
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_no_graph_breaks(family):
    model = make(family)
    optimised = ligerfx.optimize(model)
    inputs = default_batch(model)
    expected, gradients = losses_and_gradients(model, inputs)
    losses_and_gradients(optimised, inputs)  # learns what this kind of call needs
    compiled = torch.compile(optimised, backend="aot_eager", fullgraph=True)
    loss, gradients_ = losses_and_gradients(compiled, inputs)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for name, gradient in gradients.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(gradients_[f"_orig_mod.{name}"], gradient, rtol=1e-5, atol=1e-5 * scale, msg=name)


def test_a_call_that_was_never_seen_runs_the_original_code():
    model = make("llama")
    optimised = ligerfx.optimize(model)
    compiled = torch.compile(optimised, backend="aot_eager")
    inputs = batch(model, 3, 11, padding="left")
    for labels in (inputs["labels"], inputs["labels"].where(inputs["labels"] % 2 == 0, -100)):
        found, expected = compiled(**inputs | {"labels": labels}), model(**inputs | {"labels": labels})
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
