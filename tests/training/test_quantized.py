"""QLoRA: the linear layers of bitsandbytes stay as they are, and what is around them is fused."""

import copy

import pytest
import torch

import ligerfx
from models import batch, make

bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
peft = pytest.importorskip("peft", reason="needs peft")
from transformers import AutoModelForCausalLM, BitsAndBytesConfig  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing.*:FutureWarning", "ignore:MatMul8bitLt", "ignore:.*use_reentrant"
)

QUANTIZATION = {
    "nf4": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    ),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}  # fmt: skip
LAYERS = {"nf4": bitsandbytes.nn.Linear4bit, "int8": bitsandbytes.nn.Linear8bitLt}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make("llama", num_hidden_layers=1).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", QUANTIZATION)
@pytest.mark.parametrize("order", ["optimize, adapter", "adapter, optimize"])
def test_qlora(folder, name, device, order, calls):
    def load():
        return AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=copy.deepcopy(QUANTIZATION[name]), dtype=torch.float32, device_map={"": device}
        )

    def adapted(model):
        torch.manual_seed(1)
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=order == "adapter, optimize")
        targets = ["q_proj", "gate_proj", "down_proj"]
        return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))

    inputs = {n: v.to(device) for n, v in batch(make("llama")).items() if n != "position_ids"}
    original = adapted(load())
    optimised = adapted(ligerfx.optimize(load())) if order[0] == "o" else ligerfx.optimize(adapted(load()), inputs)
    trained = {n for n, p in original.named_parameters() if p.requires_grad}

    losses = []
    for seed in (2, 3):  # the adapter moves, and the loss with it
        results = []
        for m in (original, optimised):
            generator = torch.Generator().manual_seed(seed)
            m.train().zero_grad()
            for n, p in m.named_parameters():
                if n in trained:
                    p.data += 0.1 * torch.randn(p.shape, generator=generator).to(device)
            output = m(**inputs)
            output.loss.backward()
            gradients = {n: p.grad for n, p in m.named_parameters() if p.grad is not None}
            results.append((output.loss.detach(), output.logits + 0, gradients))
        (loss, logits, gradients), (loss_, logits_, gradients_) = results
        assert gradients.keys() == gradients_.keys() == trained
        if device == "cpu":
            assert torch.equal(loss, loss_) and torch.equal(logits, logits_)
            assert all(torch.equal(gradients[n], gradients_[n]) for n in trained)
        else:  # kernels add in another order, and the inputs of a quantised layer are rounded to fewer bits
            torch.testing.assert_close(loss_, loss, rtol=1e-3, atol=0)
            for n in trained:
                assert (gradients_[n] - gradients[n]).norm() < 0.02 * gradients[n].norm(), n
        losses.append(loss.item())
    assert losses[0] != losses[1]

    quantized = [m for m in optimised.modules() if isinstance(m, LAYERS[name])]
    assert len(quantized) == 7 and all(m.weight.dtype in (torch.uint8, torch.int8) for m in quantized)
    for kernel in ("rmsnorm", "rotary", "gated", "linear_crossentropy"):
        assert calls[kernel], kernel
