"""One optimised model, called in every way in which people call a causal language model: the same bits as the
original on the plain PyTorch references, and no new capture for a new size."""

import copy

import pytest
import torch
from test_equivalence import run

import ligerfx
from models import batch, expected_idioms, make

FAMILIES = ["llama", "gemma2"]


@pytest.fixture(autouse=True)
def references(monkeypatch):
    """The subject here is dispatch; kernels have tests of their own."""
    for module in {"_runtime", *ligerfx.kernels._MODULE_OF.values()}:
        monkeypatch.setattr(f"ligerfx.kernels.{module}.use_triton", lambda *_, **__: False, raising=False)


@pytest.fixture(scope="module", params=FAMILIES)
def captured(request, device):
    model = make(request.param, device=device)
    optimised = ligerfx.optimize(model, batch(model, 2, 9))
    assert optimised.report.idioms == expected_idioms(model)
    return model, optimised


@pytest.fixture
def pair(captured):
    """Copies, which share parameters as the two do and know what was captured then, but nothing of other tests."""
    return copy.deepcopy(captured)


def programs(optimised):
    """How many calls each rewritten module has a graph for."""
    return [
        len(module._ligerfx_programs) for module in optimised.modules() if isinstance(module, ligerfx.OptimizedModule)
    ]


def assert_same(model, optimised, inputs):
    loss, logits, gradients = run(model, inputs)
    loss_, logits_, gradients_ = run(optimised, inputs)
    torch.testing.assert_close(loss_, loss, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(logits, logits_)
    for name, gradient in gradients.items():
        if gradient is None:
            assert gradients_[name] is None
        else:
            torch.testing.assert_close(gradients_[name], gradient, rtol=0, atol=0, equal_nan=True, msg=name)


def test_sizes_need_no_new_capture(pair):
    model, optimised = pair
    first = batch(model, 2, 9)
    assert_same(model, optimised, first)
    before = programs(optimised)
    for size in [(1, 9), (3, 1), (1, 1), (4, 17), (5, 5)]:
        assert_same(model, optimised, batch(model, *size))
    for padding in ("left", "right"):
        assert_same(model, optimised, batch(model, 3, 11, padding=padding))
    after = programs(optimised)
    # A mask of ones is dropped by transformers and a real one is not: attention sees at most these two kinds.
    assert all(b <= a <= b + 1 for a, b in zip(after, before, strict=True))


def test_packed_sequences(pair):
    model, optimised = pair
    assert_same(model, optimised, batch(model, 2, 12, packed=True))


@pytest.mark.parametrize("leave_out", [["attention_mask"], ["position_ids"], ["attention_mask", "position_ids"]])
def test_optional_inputs(pair, leave_out):
    model, optimised = pair
    inputs = batch(model, 2, 9)
    for name in leave_out:
        del inputs[name]
    assert_same(model, optimised, inputs)


def test_inputs_embeds(pair):
    model, optimised = pair
    inputs = batch(model, 2, 9)
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    assert_same(model, optimised, inputs)


def test_num_items_in_batch(pair):
    model, optimised = pair
    inputs = batch(model, 2, 9)
    assert_same(model, optimised, {**inputs, "num_items_in_batch": 7})
    before = programs(optimised)
    assert_same(model, optimised, {**inputs, "num_items_in_batch": 11})
    assert programs(optimised) == before, "another number must not mean another capture"
    assert_same(model, optimised, {**inputs, "num_items_in_batch": torch.tensor(5, device=model.device)})
    assert_same(model, optimised, {**inputs, "num_items_in_batch": 2.5})


def test_without_labels(pair):
    model, optimised = pair
    inputs = batch(model, 2, 9)
    del inputs["labels"]
    output = optimised(**inputs)
    assert output.loss is None
    assert torch.equal(output.logits, model(**inputs).logits)


def test_eval_and_no_grad(pair):
    model, optimised = pair
    model.eval(), optimised.eval()
    inputs = batch(model, 2, 9)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            expected, output = model(**inputs), optimised(**inputs)
            assert torch.equal(expected.loss, output.loss)
            assert torch.equal(expected.logits, output.logits + 0)


def test_hidden_states_and_tuples(pair):
    model, optimised = pair
    inputs = batch(model, 2, 9)
    expected, output = (m(**inputs, output_hidden_states=True) for m in (model, optimised))
    assert len(expected.hidden_states) == len(output.hidden_states)
    assert all(torch.equal(a, b) for a, b in zip(expected.hidden_states, output.hidden_states, strict=True))
    loss, logits = optimised(**inputs, return_dict=False, use_cache=False)[:2]
    assert torch.equal(loss, expected.loss) and torch.equal(logits + 0, expected.logits)


@pytest.mark.parametrize("keep", [1, 3])
def test_logits_to_keep(pair, keep):
    model, optimised = pair
    inputs = batch(model, 2, 9)
    del inputs["labels"]
    expected, output = (m(**inputs, logits_to_keep=keep).logits for m in (model, optimised))
    assert output.shape[1] == keep and torch.equal(expected, output)


def test_generate(pair):
    model, optimised = pair
    model.eval(), optimised.eval()
    prompt = batch(model, 2, 6, padding="left")
    inputs = {name: prompt[name] for name in ("input_ids", "attention_mask")}
    arguments = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**inputs, **arguments), optimised.generate(**inputs, **arguments))


def test_training_with_a_cache_stays_fused(pair):
    """transformers makes a KV cache in training, too, unless told otherwise: attention must not fall back."""
    model, optimised = pair
    assert_same(model, optimised, {**batch(model, 2, 9), "use_cache": True})
    for layer in optimised.model.layers:
        used = layer._ligerfx_programs.values()
        idioms = [{idiom for match in program.matches for idiom in match.pattern.idioms} for program in used]
        assert idioms and all(found == {"rms_norm", "rope", "glu"} for found in idioms)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(pair, reentrant):
    model, optimised = pair
    for m in pair:
        m.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(model, optimised, {**batch(model, 2, 9), "use_cache": False})


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementation_changed_afterwards(pair, implementation):
    model, optimised = pair
    if implementation == "sdpa" and not model._supports_sdpa:
        pytest.skip("the original has no sdpa")
    assert_same(model, optimised, batch(model, 2, 9))
    for m in pair:
        m.set_attn_implementation(implementation)
    assert_same(model, optimised, batch(model, 2, 9, padding="left"))


def test_layers_that_are_alike_learn_together(device):
    """And one that has become another learns by itself, and computes what it has become."""
    model = make("llama", num_hidden_layers=3, device=device)
    optimised = ligerfx.optimize(model)
    changed = torch.nn.Sequential(optimised.model.layers[2].self_attn.q_proj, torch.nn.Tanh())
    for m in (model, optimised):
        m.model.layers[2].self_attn.q_proj = changed
    inputs = batch(model)
    hidden = model.model.embed_tokens(inputs["input_ids"])
    rotary = model.model.rotary_emb(hidden, inputs["position_ids"])

    def learnt():
        return [set(layer._ligerfx_programs) - known for layer in optimised.model.layers]

    known = set(optimised.model.layers[0]._ligerfx_programs)
    for number in range(3):  # without a mask, as `optimize` did not see them
        layer, original = optimised.model.layers[number], model.model.layers[number]
        assert torch.equal(layer(hidden, position_embeddings=rotary), original(hidden, position_embeddings=rotary))
        first, second, third = learnt()
        assert first == second and len(first) == 1
        assert len(third) == (number == 2) and not third & first
