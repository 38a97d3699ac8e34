"""A sample of the zoo: one model for each kind of norm, rotation, gated unit, expert layer and recurrent layer.

The whole zoo is `python -m benchmarks.zoo`.
"""

import pytest
import zoo_check

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
    assert all(ratio <= 1.1 for ratio in result["bf16"].get("ratio", {}).values()), result["bf16"]
    expected = result["sites"] | SAMPLE[name]
    assert {site: min(done, result["sites"][site]) for site, done in result["rewritten"].items()} == expected
    assert not result["unexplained"]
    assert not result["recaptured"], "another shape needed another capture"
