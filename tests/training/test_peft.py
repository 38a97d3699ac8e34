"""Adapters of PEFT, attached before and after `optimize`: the same bits as on the original, and never left out."""

import copy
import warnings

import pytest
import torch
from training.equality import assert_same

import ligerfx
from models import batch, make

peft = pytest.importorskip("peft", reason="needs peft")
from peft import LoraConfig, PromptTuningConfig, get_peft_model  # noqa: E402
from peft.helpers import DoraCaching  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("plain_kernels"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings`", "ignore:Already"),
]

CONFIGS = {
    "lora": lambda: LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.3, task_type="CAUSAL_LM"),
    "dora": lambda: LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_dora=True, task_type="CAUSAL_LM"),
    "prompt": lambda: PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "lora of the head": lambda: LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"),
    "saved head": lambda: LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["lm_head", "norm"], task_type="CAUSAL_LM"
    ),
}
FUSED_HEAD = ["lora", "dora", "prompt"]


@pytest.fixture(scope="module")
def model():
    return make("llama", num_hidden_layers=1)


@pytest.fixture(scope="module")
def learnt(model, plain_kernels):
    return ligerfx.optimize(copy.deepcopy(model))


@pytest.fixture(scope="module")
def inputs(model):
    """The call of a training loop: PEFT's prompt tuning has no place for position_ids."""
    return {name: value for name, value in batch(model).items() if name != "position_ids"}


def with_adapter(model, config):
    torch.manual_seed(1)
    return get_peft_model(model, config())


def moved(*models, only="", seed=2):
    """Adds the same noise to the trainable parameters: an adapter at its initial value does nothing."""
    for model in models:
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = 0.1 * torch.randn(parameter.shape, generator=generator)
                parameter.data += noise * (only in name)


def three(model, learnt, config, inputs):
    """The original with an adapter, an optimised model that got it afterwards, and one that had it before."""
    original = with_adapter(copy.deepcopy(model), config)
    after = with_adapter(copy.deepcopy(learnt), config)
    before = ligerfx.optimize(with_adapter(copy.deepcopy(model), config), inputs)
    return original, after, before


def evaluated(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs).logits + 0


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_logits_and_gradients(model, learnt, inputs, name, calls):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        original, after, before = models = three(model, learnt, CONFIGS[name], inputs)
        moved(*models)
        losses = [same_training_step(original, m, inputs) for m in (after, before)]
        assert losses[0] == losses[1]
    # Once for each of the two; of a head without an adapter nothing is said.
    assert sum("lm_head is a" in str(w.message) for w in caught) == (0 if name in FUSED_HEAD else 2)
    for kernel in ("rmsnorm", "rotary", "linear_crossentropy" if name in FUSED_HEAD else "crossentropy"):
        assert calls[kernel], kernel

    moved(*models, only="" if name in FUSED_HEAD else "lm_head", seed=4)  # what is not left out changes the loss
    moved_losses = {same_training_step(original, m, inputs) for m in (after, before)}
    assert len(moved_losses) == 1 and losses[0] not in moved_losses

    if name not in FUSED_HEAD:
        logits = after.merge_and_unload()(**inputs).logits
        assert isinstance(logits, ligerfx.DeferredTensor), "the head is fused with the loss again"


def same_training_step(original, optimised, inputs):
    """Asserts that loss, logits and gradients are the same bits, and that only the adapter has gradients."""
    results = []
    for model in (original, optimised):
        torch.manual_seed(3)  # dropout
        model.zero_grad()
        output = model(**inputs)
        output.loss.backward()
        results.append((output.loss.item(), output.logits + 0, {n: p.grad for n, p in model.named_parameters()}))
    (loss, logits, gradients), (loss_, logits_, gradients_) = results
    assert loss == loss_ and torch.equal(logits, logits_)
    trained = {name for name, p in original.named_parameters() if p.requires_grad}
    assert trained == {name for name, gradient in gradients_.items() if gradient is not None}
    assert all(torch.equal(gradients[name], gradients_[name]) for name in trained)
    return loss


def test_life_of_adapters(model, learnt, inputs, tmp_path):
    """Two adapters, switched, disabled, deleted, merged in place and unmerged, saved, loaded, merged for good."""
    original, _, before = three(model, learnt, CONFIGS["lora"], inputs)
    models = original, before
    moved(*models)

    def logits():
        expected, found = (evaluated(m, inputs) for m in models)
        assert torch.equal(expected, found)
        return expected

    one = logits()
    second = LoraConfig(r=2, target_modules=["up_proj", "o_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    for m in models:
        torch.manual_seed(5)
        m.add_adapter("second", second)
        m.set_adapter("second")
    two = logits()
    assert not torch.equal(one, two)
    for m in models:
        with m.disable_adapter():
            assert torch.equal(evaluated(m, inputs), evaluated(model, inputs))
    assert torch.equal(logits(), two)
    for m in models:
        m.set_adapter("default")
        m.delete_adapter("second")
        m.merge_adapter()
    assert torch.allclose(logits(), one, atol=1e-4)
    for m in models:
        m.unmerge_adapter()

    before.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(learnt), tmp_path)
    assert torch.allclose(evaluated(loaded, inputs), one, atol=1e-4)  # merging and unmerging has rounded the others

    merged = [m.merge_and_unload().requires_grad_(True).train() for m in models]
    assert all(type(m).__name__ == "LlamaForCausalLM" for m in merged)
    assert isinstance(merged[1], ligerfx.OptimizedModule)
    assert_same(*merged, inputs)


def test_cache_of_an_adapter_holds_no_fake(model, inputs):
    """DoRA keeps what it computes in a dict of the module, which the model shares with its capture."""
    with DoraCaching():
        original, adapted = (with_adapter(copy.deepcopy(model), CONFIGS["dora"]).eval() for _ in range(2))
        moved(original, adapted)
        optimised = ligerfx.optimize(adapted, inputs)
        expected = evaluated(original, inputs)
        for m in (optimised, adapted, optimised):
            assert torch.equal(evaluated(m, inputs), expected)


def test_prefix_tuning_goes_on_the_optimised_model(model, learnt, inputs, calls):
    """Its cache holds the prefix when the forward starts, which cannot be captured: the model warns and runs as
    before. Attached afterwards, it is only the backbone's own part that runs as before."""

    def config():
        return peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")

    original = with_adapter(copy.deepcopy(model), config)
    with pytest.warns(UserWarning, match="nothing in PeftModelForCausalLM was rewritten"):
        before = ligerfx.optimize(with_adapter(copy.deepcopy(model), config))
    after = with_adapter(copy.deepcopy(learnt), config)
    moved(original, before, after)
    expected = evaluated(original, inputs)
    assert torch.equal(evaluated(before, inputs), expected)
    calls.clear()
    assert torch.equal(evaluated(after, inputs), expected)
    assert calls["rmsnorm"]
