"""Whatever attention a model is configured with is called, with the arguments that the original gives it."""

import pytest
import torch
from test_equivalence import run
from training.equality import assert_same
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask

import ligerfx
from models import default_batch, expected_idioms, make

pytestmark = pytest.mark.usefixtures("references")

FAMILIES = ["llama", "gemma2", "qwen3"]


@pytest.mark.parametrize(
    "family, implementation", [("llama", "eager"), ("llama", "sdpa"), ("gemma2", "eager"), ("qwen3", "sdpa")]
)
def test_built_in(family, implementation):
    model = make(family)
    model.set_attn_implementation(implementation)
    optimised = ligerfx.optimize(model)
    assert optimised.report.idioms == expected_idioms(model)
    for padding in (None, "left"):
        assert_same(model, optimised, default_batch(model, padding=padding))


def registered(name, calls, mask):
    """Registers an attention function that notes what it is given, and does something of its own."""

    def attention(module, query, key, value, attention_mask, **kwargs):
        noted = dict(kwargs)
        tensors = {"query": query, "key": key, "value": value, "attention_mask": attention_mask}
        for argument, tensor in tensors.items():
            noted[argument] = None if tensor is None else tensor.detach().clone()
        calls.append((type(module).__name__, module.layer_idx, noted))
        causal = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
        kwargs = {"scaling": kwargs["scaling"], "dropout": kwargs.get("dropout", 0.0)}
        out, _ = sdpa_attention_forward(module, query, key, value, causal[None, None], **kwargs)
        return out * 0.5 * (module.layer_idx + 1), None

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)


def plain(value):
    return value.tolist() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["sdpa mask", "flash mask"])
def test_registered_by_the_user(family, kind):
    """With the mask that SDPA gets, or with the one that flash attention 2 and 3 get: None, or the padding."""
    calls = []
    mask = flash_attention_mask if kind == "flash mask" else ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    name = f"noted_{family}_{len(kind)}"  # transformers takes names with "flash" or "sdpa" in them for its own
    registered(name, calls, mask)
    model = make(family)
    before = model(**default_batch(model)).loss
    model.set_attn_implementation(name)
    optimised = ligerfx.optimize(model)
    assert optimised.report.idioms == expected_idioms(model)
    del calls[:]  # what the capture did with it
    for padding in (None, "left"):
        inputs = default_batch(model, padding=padding)
        run(optimised, inputs)  # so that what it captures now has been captured
        del calls[:]
        loss = assert_same(model, optimised, inputs)
        expected, found = calls[:2], calls[2:]
        assert len(found) == 2
        for (class_, layer, arguments), (class_2, layer_2, arguments_2) in zip(expected, found, strict=True):
            assert (class_, layer) == (class_2, layer_2)
            assert arguments.keys() == arguments_2.keys()
            for argument, value in arguments.items():
                assert plain(value) == plain(arguments_2[argument]), argument
        if kind == "flash mask":
            assert (expected[0][2]["attention_mask"] is None) == (padding is None)
    assert loss != before


def test_flex_attention():
    """Torch has no backward of it on the CPU. The mask depends on values, so `LlamaModel` runs its own forward; that
    capturing it fails is no longer the end of the process."""
    pytest.importorskip("torch.nn.attention.flex_attention")
    model = make("llama").eval()
    model.set_attn_implementation("flex_attention")
    optimised = ligerfx.optimize(model).eval()
    assert optimised.report.idioms["linear_cross_entropy"] == 1 and "model" in optimised.report.opaque
    inputs = default_batch(model, padding="left")
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # compiling it takes ten seconds
        expected, found = model(**inputs), optimised(**inputs)
    assert torch.equal(expected.loss, found.loss) and torch.equal(expected.logits, found.logits + 0)
