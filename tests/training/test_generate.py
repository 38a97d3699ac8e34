"""`generate` in all its modes: token for token, and logit for logit, what the original gives."""

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

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


@pytest.mark.parametrize("mode", ["greedy", "sampling", "beams", "no cache"])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_encoder_and_decoder(name, mode):
    """The decoder is called with the output of the encoder, an object of a class of its own."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "d_model": 32, "decoder_start_token_id": 1}
    if name == "t5":
        config = T5Config(**sizes, num_layers=2, num_heads=2, d_kv=16, d_ff=64, feed_forward_proj="gated-gelu")
        model = T5ForConditionalGeneration(config).eval()
    else:
        layers = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
        config = BartConfig(**sizes, **layers, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64)
        model = BartForConditionalGeneration(config).eval()
    ids = torch.randint(3, 128, (2, 9))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    (expected, logits), (found, logits_) = (
        generate(m, inputs, **MODES[mode]) for m in (model, ligerfx.optimize(model))
    )
    assert torch.equal(expected, found)
    for a, b in zip(logits, logits_, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)  # T5 spells GELU out


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
