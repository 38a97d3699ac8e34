"""Trainers of TRL. They compute the loss themselves, from the hidden states and the weights of the head, and all else
runs as kernels. What they log (losses, entropies, accuracies) and the weights they leave are the same bits."""

import copy

import numpy as np
import pytest
import torch

import ligerfx
from models import make

pytest.importorskip("trl", reason="needs trl")
from datasets import Dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402
from training.trl_runs import SFT_ARGUMENTS, dpo_rows, logged, sft_rows  # noqa: E402
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore")]  # of TRL's own: deprecations, attention that may mix packed rows

COMMON = {
    "per_device_train_batch_size": 2, "max_steps": 2, "logging_steps": 1, "learning_rate": 1e-2, "bf16": False,
    "gradient_checkpointing": False, "save_strategy": "no", "use_cpu": True, "report_to": [], "disable_tqdm": True,
}  # fmt: skip
LAYERS = {"rmsnorm", "rotary", "rmsnorm_linear", "rmsnorm_mlp"}


@pytest.fixture(scope="module")
def model():
    return make("llama", num_hidden_layers=1)


@pytest.fixture(scope="module")
def learnt(model, plain_kernels):
    """An optimised model that has seen TRL's call of the backbone. Copies of it do not capture it again."""
    optimised = ligerfx.optimize(copy.deepcopy(model))
    ids = torch.ones(2, 5, dtype=torch.long)
    for training in (False, True):
        optimised.train(training).model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return optimised


@pytest.fixture
def both(model, learnt, calls):
    """The original, and an optimised model with other parameters of the same values."""
    return copy.deepcopy(model), copy.deepcopy(learnt)


def assert_equal_runs(first, second):
    logs = [logged(trainer) for trainer in (first, second)]
    assert logs[0] == logs[1]
    pairs = zip(first.model.named_parameters(), second.model.named_parameters(), strict=True)
    for (name, p), (other, q) in pairs:
        assert name == other and torch.equal(p, q), name
    return logs[0]


@pytest.mark.parametrize("arguments", SFT_ARGUMENTS, ids=lambda arguments: next(iter(arguments)))
def test_sft(both, tokenizer, text, tmp_path, calls, arguments):
    arguments = dict(arguments)
    adapter = arguments.pop("peft", False)
    rows = sft_rows(text, arguments)
    runs = []
    for m in both:
        calls.clear()
        torch.manual_seed(0)
        trainer = SFTTrainer(
            m,
            SFTConfig(str(tmp_path), **{**COMMON, "max_length": 16, **arguments}),
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(rows[:2]),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM") if adapter else None,
        )
        trainer.train()
        if "completion_only_loss" in arguments:
            trainer.evaluate()
        runs.append(trainer)
    logs = assert_equal_runs(*runs)
    assert logs[0]["entropy"] > 0
    assert adapter or any(entry.get("mean_token_accuracy", 0) > 0 for entry in logs)
    assert calls.keys() >= LAYERS - ({"rmsnorm_linear"} if adapter else set())


def test_masked_labels_count_for_nothing(both, tokenizer, text, tmp_path):
    """A mask that was lost on the way would show in the loss."""
    losses = {}
    for completion_only in (True, False):
        for name, m in zip(("original", "optimised"), both, strict=True):
            trainer = SFTTrainer(
                copy.deepcopy(m),
                SFTConfig(str(tmp_path), **COMMON, max_length=16, completion_only_loss=completion_only),
                train_dataset=Dataset.from_list([{"prompt": text(4, 1), "completion": " " + text(4, 2)}] * 2),
                processing_class=tokenizer,
            )
            losses[name, completion_only] = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    assert losses["original", True] == losses["optimised", True]
    assert losses["original", False] == losses["optimised", False]
    assert losses["original", True] != losses["original", False]


def test_logits_for_metrics(both, tokenizer, text, tmp_path):
    rows = Dataset.from_list([{"text": text(5, seed)} for seed in range(3)])
    logits = []
    for m in both:
        trainer = SFTTrainer(
            m,
            SFTConfig(str(tmp_path), **COMMON, max_length=16),
            train_dataset=rows,
            eval_dataset=rows,
            processing_class=tokenizer,
            compute_metrics=lambda prediction: logits.append(prediction.predictions) or {},
        )
        trainer.evaluate()
    assert np.array_equal(*logits)


def test_dpo(both, tokenizer, text, tmp_path, calls):
    """Here the reference model is optimised, too."""
    rows = dpo_rows(text)
    runs = []
    for m in both:
        calls.clear()
        torch.manual_seed(0)
        reference = copy.deepcopy(m)
        with torch.no_grad():
            reference.lm_head.weight.mul_(1.5)
        trainer = DPOTrainer(
            m,
            ref_model=reference,
            args=DPOConfig(str(tmp_path), **COMMON, max_length=24),
            train_dataset=rows,
            eval_dataset=rows,
            processing_class=tokenizer,
        )
        trainer.train()
        trainer.evaluate()
        runs.append(trainer)
    logs = assert_equal_runs(*runs)
    assert logs[0]["rewards/chosen"] != logs[1]["rewards/chosen"]
    assert calls.keys() >= LAYERS


@pytest.mark.parametrize("reference", ["none", "another model", "without the adapter"])
def test_grpo(both, tokenizer, text, tmp_path, calls, reference):
    """Generates, scores and learns, near a reference model perhaps; generated tokens are the same."""
    arguments, adapter = {"beta": 0.0 if reference == "none" else 0.5}, None
    if reference == "another model":  # TRL loads it from where the policy came from
        other = copy.deepcopy(both[0])
        with torch.no_grad():
            other.lm_head.weight.mul_(1.5)
        other.save_pretrained(tmp_path / "reference")
        for m in both:
            m.config._name_or_path = str(tmp_path / "reference")
    elif reference == "without the adapter":
        adapter = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    runs, completions = [], [[], []]
    for number, m in enumerate(both):
        calls.clear()
        torch.manual_seed(0)

        def reward(completions, seen=completions[number], **_):
            seen.extend(completions)
            return [float(sum("1" in word for word in text.split())) for text in completions]

        trainer = GRPOTrainer(
            m,
            reward_funcs=reward,
            args=GRPOConfig(
                str(tmp_path), **COMMON, **arguments, num_generations=2, max_completion_length=6, epsilon=0.2
            ),
            train_dataset=Dataset.from_list([{"prompt": text(4, i)} for i in range(4)]),
            processing_class=tokenizer,
            peft_config=adapter,
        )
        trainer.train()
        runs.append(trainer)
    logs = assert_equal_runs(*runs)
    assert completions[0] == completions[1] and len(completions[0]) == 4
    assert any(entry.get("grad_norm") for entry in logs) and logs[0]["entropy"] > 0
    divergences = [entry["kl"] for entry in logs if "kl" in entry]
    assert bool(divergences) == (reference != "none") and all(divergences[1 if adapter else 0 :])
    assert calls.keys() >= (LAYERS - {"rmsnorm_linear", "rmsnorm_mlp"} if adapter else LAYERS)
