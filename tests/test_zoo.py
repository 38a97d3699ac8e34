"""A sample of the zoo: one model for each kind of norm, rotation, gated unit, expert layer and recurrent layer, and
some that take images or encode text.

The whole zoo is `python -m benchmarks.zoo`.
"""

import pytest
import zoo_check
import zoo_encoders
import zoo_vision

SAMPLE = {
    # Which sites of each model are rewritten; those of the others all are.
    "cohere": {},  # neighbours rotate; a norm that is no RMSNorm
    "deepseek_v3": {},  # latent attention: neighbours go to halves; experts, some shared
    "glm4": {},  # half of each head rotates, by neighbours; norms before and after
    "gpt_oss": {},  # tables of half the width; a clamped GLU
    "llama4_text": {},  # complex rotation, norms without weight
    "longcat_flash": {"glu": 4},  # experts in a loop over those that were chosen, which stay
    "mixtral": {},  # experts as grouped matrix products
    "nanochat": {},  # rotates the other way round
    "gemma4_text": {},  # one tensor rotates alone; the model around stays as it is
    "mamba": {},  # a scan
    "gpt2": {},  # nothing but the loss
}


@pytest.mark.parametrize("name", SAMPLE)
def test_model(name, references):
    result = zoo_check.check(name)
    assert result["fp32"] == {} and result["other_shape"] == {}
    assert not result["bf16"].get("wrong"), result["bf16"]
    expected = result["sites"] | SAMPLE[name]
    assert {site: min(done, result["sites"][site]) for site, done in result["rewritten"].items()} == expected
    assert not result["unexplained"]
    assert not result["recaptured"], "another shape needed another capture"


@pytest.mark.parametrize("name", ["qwen2_vl", "mistral3", "smolvlm"])
def test_with_images(name, references, monkeypatch):
    """Grids of images in loops, attention within images of several sizes, padding images."""
    monkeypatch.setattr(zoo_check, "low_precision", lambda *_: {})
    result = zoo_check.check(name, zoo_vision)
    assert result["captured"] and result["fp32"] == result["other_shape"] == result["text_alone"] == {}
    assert result["rewritten"] == result["sites"]


@pytest.mark.parametrize("name", ["modernbert", "t5gemma"])
def test_encoders(name, references, monkeypatch):
    monkeypatch.setattr(zoo_check, "low_precision", lambda *_: {})
    result = zoo_check.check(name, zoo_encoders)
    assert not result["opaque"] and result["fp32"] == result["other_shape"] == {}
    assert result["rewritten"] == result["sites"]
