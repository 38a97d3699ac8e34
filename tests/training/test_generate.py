"""`generate` in all its modes: token for token, and logit for logit, what the original gives."""

import pytest
import torch

import ligerfx
from models import batch, make

pytestmark = pytest.mark.usefixtures("references")

MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampled beams": {"do_sample": True, "num_beams": 2, "num_return_sequences": 2},
    "static cache": {"do_sample": False, "cache_implementation": "static", "disable_compile": True},
    "no cache": {"do_sample": False, "use_cache": False},
    "processors": {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
}


@pytest.fixture(scope="module", params=["llama", "gemma2", "qwen3"])
def family(request):
    """A family's original, what was made of it, and the same of a smaller model."""
    pairs = []
    for size in ({}, {"num_hidden_layers": 1, "seed": 3}):
        model = make(request.param, **size).eval()
        pairs.append((model, ligerfx.optimize(model)))
    return pairs


def prompts(model, seq=6):
    inputs = batch(model, 2, seq, padding="left")  # rows of different lengths
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


def generate(model, inputs, **mode):
    torch.manual_seed(0)
    out = model.generate(
        **inputs, max_new_tokens=7, pad_token_id=0, return_dict_in_generate=True, output_logits=True, **mode
    )
    return out.sequences, out.logits or ()


def assert_same_tokens(pair, inputs, **mode):
    (expected, logits), (found, logits_) = (generate(model, inputs, **mode) for model in pair)
    assert torch.equal(expected, found)
    assert len(logits) == len(logits_) and all(map(torch.equal, logits, logits_))
    return expected


@pytest.mark.parametrize("mode", MODES)
def test_modes(family, mode):
    pair = family[0]
    assert_same_tokens(pair, prompts(pair[0]), **MODES[mode])


def test_sizes_of_prompts_and_weights_that_change(family):
    """No state of one call reaches the next."""
    pair = family[0]
    first = assert_same_tokens(pair, prompts(pair[0]), do_sample=False)
    assert_same_tokens(pair, {"input_ids": prompts(pair[0], 11)["input_ids"][:1]}, do_sample=False)
    with torch.no_grad():
        for parameter in pair[0].model.layers[0].parameters():  # which the optimised model shares
            parameter.mul_(-1.5)
    try:
        assert not torch.equal(assert_same_tokens(pair, prompts(pair[0]), do_sample=False), first)
    finally:
        with torch.no_grad():
            for parameter in pair[0].model.layers[0].parameters():
                parameter.div_(-1.5)


def test_assisted_decoding(family):
    """The smaller model proposes tokens and the larger one accepts them or not: several at a time with a cache."""
    pair, assistants = family
    inputs = {name: value[:1, 2:] for name, value in prompts(pair[0]).items()}
    found = [
        model.generate(**inputs, assistant_model=assistant, max_new_tokens=12, do_sample=False, pad_token_id=0)
        for model, assistant in zip(pair, assistants, strict=True)
    ]
    assert torch.equal(*found)
    mixed = pair[1].generate(
        **inputs, assistant_model=assistants[0], max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    assert torch.equal(mixed, found[0])


def test_decoding_is_captured_once_for_all_lengths(family):
    """A token more in the cache is no new kind of call."""
    _, optimised = family[0]
    inputs = prompts(optimised)
    generate(optimised, inputs, do_sample=False)

    def captured():
        modules = [m for m in optimised.modules() if isinstance(m, ligerfx.OptimizedModule)]
        return [len(m._ligerfx_programs) for m in modules]

    before = captured()
    assert max(before) < 16
    optimised.generate(**inputs, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert captured() == before
