"""Trainers of TRL with the kernels on a GPU: what they log and the way that the weights go, within rounding."""

import copy

import pytest
import torch
from gpu.closeness import assert_close_parameters, pair

import ligerfx
from models import make

pytest.importorskip("trl", reason="needs trl")
from datasets import Dataset  # noqa: E402
from training.trl_runs import SFT_ARGUMENTS, dpo_rows, logged, sft_rows  # noqa: E402
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer  # noqa: E402

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.filterwarnings("ignore"),  # of TRL's own: deprecations, attention that may mix packed rows
]

COMMON = {
    "per_device_train_batch_size": 2, "max_steps": 2, "logging_steps": 1, "optim": "sgd", "learning_rate": 0.1,
    "bf16": False, "gradient_checkpointing": False, "save_strategy": "no", "report_to": [], "disable_tqdm": True,
}  # fmt: skip


def settings(config, folder, **arguments):
    made = config(str(folder), **{**COMMON, **arguments})
    made._n_gpu = 1  # several GPUs in one process would be nn.DataParallel, for which the original runs
    return made


@pytest.fixture
def both():
    return pair(make("llama", device="cuda"))


def assert_close_runs(runs, rel=1e-3):
    """Logs, times left out, and what was learnt; gives the log of the optimised model."""
    logs = [
        {f"{number} {key}": value for number, entry in enumerate(logged(run)) for key, value in entry.items()}
        for run in runs
    ]
    assert runs[1].model.device.type == "cuda"
    assert logs[1] == pytest.approx(logs[0], rel=rel, abs=1e-4)
    return logs[1]


@pytest.mark.parametrize("arguments", [*SFT_ARGUMENTS, {"bf16": True}], ids=lambda arguments: next(iter(arguments)))
def test_sft(both, tokenizer, text, tmp_path, arguments):
    arguments = dict(arguments)
    adapter = None
    if arguments.pop("peft", False):
        peft = pytest.importorskip("peft", reason="needs peft")
        adapter = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights="gaussian")
    rows = sft_rows(text, arguments)
    runs, start = [], [p.detach().clone() for p in both[0].parameters()]
    for m in both:
        torch.manual_seed(0)
        trainer = SFTTrainer(
            m,
            settings(SFTConfig, tmp_path, **{"max_length": 16, **arguments}),
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(rows[:2]),
            processing_class=tokenizer,
            peft_config=adapter,
        )
        trainer.train()
        trainer.evaluate()
        runs.append(trainer)
    log = assert_close_runs(runs, rel=2e-2 if "bf16" in arguments else 1e-3)
    assert log["0 entropy"] > 0 and log["0 loss"] != log["1 loss"]
    if adapter is None and "bf16" not in arguments:
        assert_close_parameters(*both, start)


def test_dpo(both, tokenizer, text, tmp_path):
    rows = dpo_rows(text)
    runs, start = [], [p.detach().clone() for p in both[0].parameters()]
    reference = copy.deepcopy(both[0])
    with torch.no_grad():
        reference.lm_head.weight.mul_(1.5)
    for m, ref_model in zip(both, (reference, ligerfx.optimize(reference)), strict=True):
        torch.manual_seed(0)
        trainer = DPOTrainer(
            m,
            ref_model=ref_model,
            args=settings(DPOConfig, tmp_path, max_length=24),
            train_dataset=rows,
            eval_dataset=rows,
            processing_class=tokenizer,
        )
        trainer.train()
        trainer.evaluate()
        runs.append(trainer)
    log = assert_close_runs(runs)
    assert log["0 rewards/chosen"] != log["1 rewards/chosen"]
    assert_close_parameters(*both, start)


def test_grpo(both, tokenizer, text, tmp_path):
    """Generates, scores and learns; generated tokens are the same."""
    runs, completions = [], [[], []]
    for number, m in enumerate(both):
        torch.manual_seed(0)

        def reward(completions, seen=completions[number], **_):
            seen.extend(completions)
            return [float(sum("1" in word for word in text.split())) for text in completions]

        trainer = GRPOTrainer(
            m,
            reward_funcs=reward,
            args=settings(GRPOConfig, tmp_path, num_generations=2, max_completion_length=6, epsilon=0.2),
            train_dataset=Dataset.from_list([{"prompt": text(4, i)} for i in range(4)]),
            processing_class=tokenizer,
        )
        trainer.train()
        runs.append(trainer)
    assert completions[0] == completions[1] and len(completions[0]) == 4
    log = assert_close_runs(runs)
    assert any(value for key, value in log.items() if key.endswith("grad_norm"))
