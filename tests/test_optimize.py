"""The contract of `optimize`: what it gives back, what it leaves alone, and how it fails."""

import copy
import inspect

import pytest
import torch
from torch import nn

import ligerfx
from models import batch, expected_idioms, make


def snapshot(model):
    """What of a model could be changed: class, attributes and tensors of every module."""
    return {
        path: (
            type(module),
            dict(vars(module)),
            {k: (id(v), v.clone()) for k, v in module._parameters.items() if v is not None},
        )
        for path, module in model.named_modules()
    }


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi4_longrope"])
def test_the_model_passed_in_is_untouched(family):
    model = make(family)
    inputs = batch(model)
    expected = model(**inputs)
    before = snapshot(model)
    optimised = ligerfx.optimize(model)
    optimised(**inputs).loss.backward()
    optimised.eval()
    optimised.model.layers[0].register_forward_hook(lambda *_: None)
    after = snapshot(model)
    assert before.keys() == after.keys()
    for path, (cls, attributes, tensors) in before.items():
        cls_, attributes_, tensors_ = after[path]
        assert cls is cls_, path
        assert attributes.keys() == attributes_.keys(), path
        assert all(attributes[name] is attributes_[name] for name in attributes), path
        assert all(tensors[n][0] == tensors_[n][0] and torch.equal(tensors[n][1], tensors_[n][1]) for n in tensors)
    assert model.training and not model.model.layers[0]._forward_hooks
    again = model(**inputs)
    assert torch.equal(expected.loss, again.loss) and torch.equal(expected.logits, again.logits)


def test_parameters_are_shared_and_ties_stay():
    model = make("llama_tied")
    optimised = ligerfx.optimize(model)
    assert optimised.lm_head.weight is optimised.model.embed_tokens.weight is model.lm_head.weight
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in optimised.named_parameters()]
    assert all(a is b for a, b in zip(model.parameters(), optimised.parameters(), strict=True))
    assert model.state_dict().keys() == optimised.state_dict().keys()


def test_it_is_a_graph_module_and_the_models_class():
    model = make("llama")
    optimised = ligerfx.optimize(model)
    assert isinstance(optimised, torch.fx.GraphModule) and isinstance(optimised, type(model))
    assert type(optimised).__name__ == type(model).__name__
    assert inspect.signature(optimised.forward) == inspect.signature(model.forward)
    mlp = optimised.model.layers[0].mlp
    assert isinstance(mlp, torch.fx.GraphModule) and isinstance(mlp, type(model.model.layers[0].mlp))
    assert "glu_mlp(x, gate_proj_weight, up_proj_weight, down_proj_weight" in mlp.code


# Each pair of values once.
@pytest.mark.parametrize(
    ("dtype", "device", "training"),
    [
        (torch.float32, "cpu", True),
        (torch.float32, "meta", False),
        (torch.bfloat16, "cpu", False),
        (torch.bfloat16, "meta", True),
        (torch.float16, "cpu", True),
        (torch.float16, "meta", False),
    ],
)
def test_any_dtype_device_and_mode(dtype, device, training):
    model = make("qwen3", dtype, device).train(training)
    assert ligerfx.optimize(model).report.idioms == expected_idioms(model)


def test_on_meta_the_optimised_model_runs():
    model = make("llama", device="meta")
    inputs = {name: value.to("meta") for name, value in batch(model, device="cpu").items()}
    inputs.pop("position_ids")
    del inputs["attention_mask"]
    assert ligerfx.optimize(model)(**inputs).loss.device.type == "meta"


def test_save_and_load(tmp_path):
    model = make("llama")
    optimised = ligerfx.optimize(model)
    optimised.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    inputs = batch(model)
    assert torch.equal(loaded(**inputs).loss, model(**inputs).loss)


def test_optimising_twice():
    model = make("llama")
    once = ligerfx.optimize(model)
    twice = ligerfx.optimize(once)
    assert twice.report.idioms == once.report.idioms
    inputs = batch(model)
    assert torch.equal(once(**inputs).loss, twice(**inputs).loss)


def test_capture_does_not_grow_with_depth():
    """Identical layers are captured once: the number of distinct programs is that of one layer."""

    def distinct(layers):
        optimised = ligerfx.optimize(make("llama", num_hidden_layers=layers, device="meta"))
        assert optimised.report.idioms["rms_norm"] == 2 * layers + 1
        modules = [m for m in optimised.modules() if isinstance(m, ligerfx.OptimizedModule)]
        assert len(modules) == 5 * layers + 3
        return len({id(m._ligerfx_program) for m in modules})

    assert distinct(2) == distinct(12) == 6


class Plain(nn.Module):
    """A transformer-like block that owes nothing to transformers."""

    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(16, eps=1e-5)
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x, factor=1.0):
        h = self.norm(x)
        return x + factor * self.down(nn.functional.silu(self.gate(h)) * self.up(h))


@pytest.mark.parametrize(
    "inputs", [torch.randn(2, 3, 16), (torch.randn(2, 3, 16),), {"x": torch.randn(2, 3, 16), "factor": 2.0}]
)
def test_plain_modules(inputs):
    model = Plain()
    optimised = ligerfx.optimize(model, inputs)
    assert optimised.report.idioms == {"rms_norm": 1, "glu": 1}
    x = torch.randn(5, 16, requires_grad=True)
    expected, output = model(x, factor=3.0), optimised(x, factor=3.0)
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)


class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x)


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        ("llama", None, "expects a torch.nn.Module, not str"),
        (lambda x: x, None, "expects a torch.nn.Module, not function"),
        (Broken(), None, "pass example_inputs"),
        (Broken(), 3, "example_inputs must be a dict"),
        (Broken(), {"y": torch.ones(2, 4)}, "example_inputs do not fit Broken.forward"),
        (Broken(), (torch.ones(2, 4), 1, 2), "example_inputs do not fit Broken.forward"),
        (Broken(), torch.ones(2, 5), "Broken fails on example_inputs"),
    ],
)
def test_bad_input_raises_one_clear_error(model, inputs, message):
    before = copy.deepcopy(model.state_dict()) if isinstance(model, nn.Module) else None
    with pytest.raises(ligerfx.OptimizeError, match=message):
        ligerfx.optimize(model, inputs)
    if before is not None:
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert type(model) is Broken


def test_patterns_must_be_patterns():
    with pytest.raises(ligerfx.OptimizeError, match="decorate with @ligerfx.pattern"):
        ligerfx.optimize(Plain(), torch.ones(2, 16), patterns=[lambda x: x])

    @ligerfx.pattern(replace=lambda x: x * x)
    def square(x):
        return x**2

    with pytest.raises(ligerfx.OptimizeError, match=r"must be a list: patterns=\[square\]"):
        ligerfx.optimize(Plain(), torch.ones(2, 16), patterns=square)


def test_no_patterns_no_rewrites():
    model = Plain()
    optimised = ligerfx.optimize(model, torch.ones(2, 16), defaults=False)
    assert optimised.report.idioms == {}
    x = torch.randn(2, 16)
    assert torch.equal(model(x), optimised(x))


class DataDependent(nn.Module):
    """A part that cannot be captured, between parts that can."""

    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, x):
            return x * self.scale if x.sum() > 0 else x / self.scale

    def __init__(self):
        super().__init__()
        self.first, self.branch, self.last = nn.RMSNorm(16), self.Branch(), nn.RMSNorm(16)

    def forward(self, x):
        return self.last(self.branch(self.first(x)))


def test_what_cannot_be_captured_stays_and_is_reported():
    model = DataDependent()
    optimised = ligerfx.optimize(model, torch.ones(2, 16))
    assert optimised.report.idioms == {"rms_norm": 2}
    assert optimised.report.opaque == {
        "branch": f"its Python code branches on the values of a tensor (test_optimize.py:{_line()})"
    }
    for x in (torch.rand(3, 16), -torch.rand(3, 16)):
        torch.testing.assert_close(optimised(x), model(x), rtol=1e-6, atol=1e-6)


def _line():
    lines, start = inspect.getsourcelines(DataDependent.Branch.forward)
    return start + 1
