"""accelerate: prepared models, and models whose weights are brought to the device by hooks."""

import copy

import pytest
import torch
from accelerate import Accelerator, cpu_offload, dispatch_model
from accelerate.state import AcceleratorState
from torch import nn
from training.equality import assert_same
from transformers import AutoModelForCausalLM

import ligerfx
from models import batch, make

SPLIT = {
    "model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
    "model.rotary_emb": "cpu", "lm_head": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return make("llama")


@pytest.fixture(scope="module")
def learnt(model, plain_kernels):
    return ligerfx.optimize(copy.deepcopy(model), batch(model))


@pytest.fixture
def inputs(model):
    return batch(model)


@pytest.fixture(params=["no", "bf16"])
def accelerator(request):
    AcceleratorState._reset_state(True)
    yield Accelerator(cpu=True, mixed_precision=request.param)
    AcceleratorState._reset_state(True)


def test_prepare(model, learnt, inputs, accelerator, calls, materialized):
    """The usual loop. accelerate converts outputs to fp32, which leaves the logits deferred."""
    prepared = []
    for m in (model, learnt):
        m = copy.deepcopy(m)
        prepared.append(accelerator.prepare(m, torch.optim.AdamW(m.parameters(), lr=1e-2)))
    for _ in range(2):
        losses = []
        for m, optimizer in prepared:
            with accelerator.accumulate(m):
                losses.append(m(**inputs).loss)
                accelerator.backward(losses[-1])
                accelerator.clip_grad_norm_(m.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        assert torch.equal(*losses)
    assert materialized["logits"] == 0 and calls["linear_crossentropy"] == 2
    original, optimised = (m for m, _ in prepared)
    assert all(torch.equal(p, q) for p, q in zip(original.parameters(), optimised.parameters(), strict=True))
    assert_same(original, optimised, inputs)
    unwrapped = accelerator.unwrap_model(optimised, keep_fp32_wrapper=False)
    assert isinstance(unwrapped, ligerfx.OptimizedModule)
    assert_same(accelerator.unwrap_model(original, keep_fp32_wrapper=False), unwrapped, inputs)


def test_optimised_after_prepare(model, inputs, plain_kernels):
    """With autocast, accelerate replaces the forward of the model: what is inside is rewritten, and a warning says
    that the loss is not."""
    AcceleratorState._reset_state(True)
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(copy.deepcopy(model))
    with pytest.warns(UserWarning, match="only modules inside .* if ligerfx.optimize comes first"):
        optimised = ligerfx.optimize(prepared, inputs)
    assert "linear_cross_entropy" not in optimised.report.idioms and optimised.report.idioms["rms_norm"] == 5
    assert "was replaced" in optimised.report.opaque[""]
    assert_same(prepared, optimised, inputs)
    AcceleratorState._reset_state(True)


HOOKS = {
    "offloaded": lambda m, folder: cpu_offload(m, torch.device("cpu")),
    "dispatched": lambda m, folder: dispatch_model(m, SPLIT, "cpu", offload_dir=folder, force_hooks=True),
}


def evaluated(model, inputs):
    with torch.no_grad():
        output = model(**inputs)
    return output.loss, output.logits + 0


def assert_equal_outputs(a, b, inputs):
    assert all(torch.equal(x, y) for x, y in zip(evaluated(a, inputs), evaluated(b, inputs), strict=True))


@pytest.mark.filterwarnings("ignore:.*called as it is")
@pytest.mark.parametrize("hooks", HOOKS)
def test_hooked_after_optimize(model, learnt, inputs, hooks, tmp_path, calls):
    """Weights that are away are never read by a fused operation: it steps aside. What has none of its own stays."""
    optimised = HOOKS[hooks](copy.deepcopy(learnt), tmp_path)
    for _ in range(2):
        assert_equal_outputs(model, optimised, inputs)
    assert calls["rotary"] and not calls["linear_crossentropy"]


@pytest.mark.parametrize("hooks", HOOKS)
def test_hooked_before_optimize(model, inputs, hooks, tmp_path, plain_kernels):
    """A module whose forward is a hook's runs as it is, and the report says so. The copy is bound to itself, and not
    to the model that it was made from: what is changed in it counts."""
    hooked = HOOKS[hooks](copy.deepcopy(model), tmp_path)
    with pytest.warns(UserWarning, match="was replaced on the instance"):
        optimised = ligerfx.optimize(hooked)
    assert "was replaced" in optimised.report.opaque[""]
    assert optimised.report.idioms == ({"rope": 2, "glu": 2} if hooks == "offloaded" else {})
    assert_equal_outputs(model, optimised, inputs)
    assert_equal_outputs(model, hooked, inputs)

    head = nn.Linear(64, 256, bias=False)
    changed = copy.deepcopy(model)
    changed.lm_head = optimised.lm_head = head
    assert_equal_outputs(changed, optimised, inputs)


@pytest.mark.parametrize("device_map", ["auto", SPLIT], ids=["auto", "split"])
def test_device_map(model, inputs, device_map, tmp_path, plain_kernels):
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    if device_map == "auto":  # all on one device: accelerate needs no hooks
        optimised = ligerfx.optimize(loaded, inputs)
        assert optimised.report.idioms["linear_cross_entropy"] == 1
    else:
        with pytest.warns(UserWarning, match="nothing in LlamaForCausalLM was rewritten"):
            optimised = ligerfx.optimize(loaded, inputs)
    assert_equal_outputs(loaded, optimised, inputs)
