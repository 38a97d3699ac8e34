"""Kernels compiled before they are needed, on a GPU: in threads, all that the first step launches."""

import contextlib
import gc
import threading
from unittest import mock

import pytest
import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode

import ligerfx
from ligerfx.kernels._runtime import _Kernel
from models import batch, make

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

CONFIG = {"hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 16, "head_dim": 64}


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Lets all kernels be compiled anew; which are, and by what thread."""
    found = []
    original = triton.compiler.compile

    def compile(source, *args, **kwargs):
        found.append((source.fn.__name__, threading.current_thread().name))
        return original(source, *args, **kwargs)

    monkeypatch.setattr(triton.compiler, "compile", compile)
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    for kernel in [o for o in gc.get_objects() if type(o) is _Kernel]:
        kernel.launchers.clear()
        kernel.kernel.device_caches.clear()
    return found


def step(model, inputs):
    model.zero_grad()
    loss = model(**inputs, use_cache=False).loss
    loss.backward()
    return loss.item(), [p.grad.clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize(("tokens", "vocab"), [(17, 1000), (2048, 1000), (2048, 64000)])  # the last: loss in chunks
def test_first_step(compiled, family, tokens, vocab):
    torch.manual_seed(0)
    settings = CONFIG | {"max_position_embeddings": tokens, "vocab_size": vocab}
    model = make(family, device="cuda", dtype=torch.bfloat16, **settings)
    inputs = batch(model, 4, tokens, ignore=0.0)
    optimised = ligerfx.optimize(model)
    loss, grads = step(optimised, inputs)
    assert len(compiled) > 7
    late = [name for name, thread in compiled if not thread.startswith("ligerfx")]
    assert not late
    again, same = step(optimised, inputs)  # nothing is left to compile
    assert again == loss
    for a, b in zip(grads, same, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2 * a.abs().max().item())
    expected, _ = step(model, inputs)
    assert loss == pytest.approx(expected, rel=2e-3)


def test_memory_and_state_are_left_as_they_were(compiled):
    model = make("llama", device="cuda", dtype=torch.bfloat16, **CONFIG)
    optimised = ligerfx.optimize(model)
    inputs = batch(model, 2, 64)
    torch.cuda.manual_seed(3)
    state = torch.cuda.get_rng_state()
    before = [p.clone() for p in model.parameters()]
    with torch.no_grad():
        optimised(**inputs)
    assert compiled and torch.equal(torch.cuda.get_rng_state(), state)
    assert all(p.grad is None and torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_an_operation_that_fails_in_the_rehearsal_fails_by_itself_or_not_at_all(compiled, monkeypatch):
    model = make("llama", device="cuda", dtype=torch.bfloat16, **CONFIG)
    inputs = batch(model, 2, 64)
    monkeypatch.setattr("ligerfx.compile_ahead.kernel_calls", mock.Mock(side_effect=RuntimeError("no kernel")))
    loss, _ = step(ligerfx.optimize(model), inputs)
    assert {thread.startswith("ligerfx") for _, thread in compiled} == {False}
    assert loss == pytest.approx(step(model, inputs)[0], rel=2e-3)


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("watched", [False, True])
def test_where_somebody_watches_each_operation_nothing_is_rehearsed(compiled, watched):
    model = make("llama", device="cuda", dtype=torch.bfloat16, **CONFIG)
    optimised, inputs = ligerfx.optimize(model), batch(model, 2, 64)
    with Watching() if watched else contextlib.nullcontext(), torch.no_grad():
        optimised(**inputs)
    assert compiled and {thread.startswith("ligerfx") for _, thread in compiled} == {not watched}
