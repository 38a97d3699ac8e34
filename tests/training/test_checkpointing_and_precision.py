"""Activation checkpointing, autocast and gradient scaling: memory that is saved stays saved, and dtypes stay."""

import contextlib
import copy

import pytest
import torch
from training.equality import assert_same

import ligerfx
from models import batch, make

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


@pytest.fixture(scope="module")
def model():
    return make("llama", num_hidden_layers=1)


@pytest.fixture(scope="module")
def inputs(model):
    return {**batch(model), "use_cache": False}


@pytest.fixture(scope="module")
def learnt(model, inputs):
    return ligerfx.optimize(copy.deepcopy(model), inputs)


def saved_bytes(model, inputs):
    """What a forward keeps for its backward, beside parameters, buffers and inputs: bytes of storages."""
    given = [*model.parameters(), *model.buffers(), *(v for v in inputs.values() if isinstance(v, torch.Tensor))]
    known = {tensor.untyped_storage().data_ptr() for tensor in given}
    kept = []  # alive, so that no address is used twice

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**inputs).loss
    loss.backward()  # without the hooks: what is computed again is saved again, a layer at a time
    model.zero_grad()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    return sum(size for address, size in storages.items() if address not in known)


def test_no_more_is_saved_for_the_backward(model, learnt, inputs, device):
    """Of the kernels themselves, in the interpreter where there is no GPU."""
    pytest.importorskip("triton", reason="needs Triton")
    original, optimised = copy.deepcopy(model).to(device), copy.deepcopy(learnt).to(device)
    inputs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    plain = saved_bytes(original, inputs), saved_bytes(optimised, inputs)
    assert plain[1] < 0.8 * plain[0]
    for reentrant in (False, True):
        for m in (original, optimised):
            m.gradient_checkpointing_enable({"use_reentrant": reentrant})
        checkpointed = saved_bytes(original, inputs), saved_bytes(optimised, inputs)
        assert checkpointed[1] < checkpointed[0] < plain[0]
        assert checkpointed[1] < 0.5 * plain[1]
    for m in (original, optimised):
        m.gradient_checkpointing_disable()
    assert (saved_bytes(original, inputs), saved_bytes(optimised, inputs)) == plain


def test_layers_run_twice_exactly_while_checkpointing_is_on(model, learnt, inputs, references):
    original, optimised = copy.deepcopy(model), copy.deepcopy(learnt)
    runs = {m: [] for m in (original, optimised)}
    for m, seen in runs.items():  # hooks fire within the region that is run again
        m.model.layers[0].self_attn.o_proj.register_forward_hook(lambda *_, seen=seen: seen.append(1))
    for switch, times in (("disable", 1), ("enable", 2), ("disable", 1), ("enable", 2)):
        for m, seen in runs.items():
            getattr(m, f"gradient_checkpointing_{switch}")()
            seen.clear()
        assert_same(original, optimised, inputs)
        assert [len(seen) for seen in runs.values()] == [times, times]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(model, learnt, inputs, dtype, references):
    """fp32 weights: outputs have autocast's dtype, gradients that of the parameters, and both the same bits."""
    original, optimised = model, learnt
    with torch.autocast("cpu", dtype):
        assert_same(original, optimised, inputs)
        expected, found = original(**inputs), optimised(**inputs)
        assert (found.loss.dtype, found.logits.dtype) == (expected.loss.dtype, expected.logits.dtype)
        assert found.logits.dtype == dtype
    found.loss.backward()  # outside, as recommended
    expected.loss.backward()
    for p, q in zip(original.parameters(), optimised.parameters(), strict=True):
        assert q.grad.dtype == torch.float32 and torch.equal(p.grad, q.grad)
    # The logits are those of the region in which they were made, wherever they are computed.
    assert torch.equal(found.logits + 0, expected.logits)
    assert_same(original, optimised, inputs)  # off again


def test_gradient_scaling(model, learnt, inputs, references):
    """Overflow skips the same steps, and the scale goes the same way; the steps that are made are the same bits."""
    original, optimised = copy.deepcopy(model), copy.deepcopy(learnt)
    histories = []
    for m in (original, optimised):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120, growth_interval=2, backoff_factor=2.0**-55)
        optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
        history = []
        for _ in range(6):
            with torch.autocast("cpu", torch.float16):
                loss = m(**inputs).loss
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            history.append((loss.item(), norm.isfinite().item(), scaler.get_scale()))
        histories.append(history)
    assert histories[0] == histories[1]
    assert {finite for _, finite, _ in histories[0]} == {True, False}
    assert histories[0][0][0] != histories[0][-1][0]
    assert all(torch.equal(p, q) for p, q in zip(original.parameters(), optimised.parameters(), strict=True))


def test_regions_with_and_without_autocast(model, learnt, inputs, references):
    """A call never runs the graph that was made for the other kind."""
    original, optimised = model, learnt
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        for enabled in (True, False, True):
            with contextlib.nullcontext() if enabled else torch.autocast("cpu", enabled=False):
                expected, found = original(**inputs), optimised(**inputs)
            assert torch.equal(expected.loss, found.loss)
            assert found.logits.dtype == expected.logits.dtype == (torch.bfloat16 if enabled else torch.float32)
