"""How people train, with the kernels on a GPU: what tests/training asserts to the bit on the CPU, here within
rounding, which only a GPU adds."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu.closeness import assert_close_parameters, pair

import ligerfx
from models import batch, make, midsize

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning", "ignore:.*use_reentrant"),
]


@pytest.mark.parametrize(
    "arguments",
    [{}, {"bf16": True}, {"gradient_checkpointing": True}, {"label_smoothing_factor": 0.2}],
    ids=lambda arguments: next(iter(arguments), "plain"),
)
def test_trainer(arguments, tmp_path):
    from transformers import Trainer, TrainingArguments, default_data_collator

    model, optimised = pair(make("llama"))
    rows = batch(model, 16, 32, ignore=0.0, device="cpu")
    rows = [{"input_ids": row, "labels": row} for row in rows["input_ids"]]
    start = [p.detach().to("cuda", copy=True) for p in model.parameters()]
    logged, predictions = [], []
    for m in (model, optimised):
        settings = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=4, logging_steps=1,
            optim="sgd", learning_rate=0.1, save_strategy="no", report_to=[], disable_tqdm=True, **arguments,
        )  # fmt: skip
        settings._n_gpu = 1  # several GPUs in one process would be nn.DataParallel, for which the original runs
        run = Trainer(m, settings, train_dataset=rows, data_collator=default_data_collator)
        run.train()
        assert m.device.type == "cuda"
        logged.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
        prediction = run.predict(rows[:3])
        logged[-1].append(prediction.metrics["test_loss"])
        predictions.append(torch.tensor(prediction.predictions))
    assert len(set(logged[0])) > 1
    assert logged[1] == pytest.approx(logged[0], rel=2e-3 if "bf16" in arguments else 1e-4)
    if "bf16" not in arguments:
        assert_close_parameters(model, optimised, start)
        scale = predictions[0].abs().max().item()
        torch.testing.assert_close(predictions[1], predictions[0], rtol=0, atol=1e-4 * scale)


ADAPTERS = {
    "lora": ("LoraConfig", {"r": 4, "target_modules": ["q_proj", "gate_proj", "down_proj"]}),
    "dora": ("LoraConfig", {"r": 4, "target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "head": ("LoraConfig", {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "prompt": ("PromptTuningConfig", {"num_virtual_tokens": 3}),
}


@pytest.mark.filterwarnings("ignore:.*lm_head is a")
@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("order", ["optimize, adapter", "adapter, optimize"])
def test_adapters(name, order):
    peft = pytest.importorskip("peft", reason="needs peft")
    inputs = {**batch(make("llama"), 2, 33, device="cuda"), "use_cache": False}
    del inputs["position_ids"]  # for which prompt tuning has no place

    def adapted(model):
        torch.manual_seed(1)
        config, arguments = ADAPTERS[name]
        return peft.get_peft_model(model, getattr(peft, config)(**arguments, task_type="CAUSAL_LM"))

    original = adapted(make("llama", device="cuda"))
    model = make("llama", device="cuda")
    optimised = adapted(ligerfx.optimize(model)) if order[0] == "o" else ligerfx.optimize(adapted(model), inputs)
    losses = []
    for m in (original, optimised):
        optimizer = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=1.0)
        losses.append([])
        for _ in range(4):
            loss = m(**inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0][-1] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_autocast_with_gradient_scaler():
    """fp16 autocast on fp32 weights: a first scale that overflows, so the same steps are skipped."""
    model, optimised = pair(make("llama", device="cuda"))
    inputs = {**batch(model, 2, 33), "use_cache": False}
    runs = []
    for m in (model, optimised):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.01)
        scaler = torch.amp.GradScaler(init_scale=2.0**30)
        runs.append([])
        for _ in range(24):
            with torch.autocast("cuda", torch.float16):
                loss = m(**inputs).loss
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            assert all(p.grad is None or p.grad.dtype == torch.float32 for p in m.parameters())
            optimizer.zero_grad()
            runs[-1].append((loss.item(), scaler.get_scale()))
    (expected, scales), (found, scales_) = (zip(*run, strict=True) for run in runs)
    assert scales == scales_ and scales[-1] < 2.0**30
    assert expected[-1] < expected[0]
    assert found == pytest.approx(expected, rel=2e-3)


def peak(model, inputs):
    """Bytes above what was allocated before, of a second forward and backward, gradients aside."""
    for _ in range(2):
        model.zero_grad(set_to_none=False)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        model(**inputs).loss.backward()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("checkpointing", ["none", "reentrant", "not reentrant"])
def test_memory_below_the_original(checkpointing):
    model, optimised = pair(midsize("llama", dtype=torch.bfloat16, device="cuda", vocab_size=32000))
    inputs = {"input_ids": torch.randint(3, 32000, (4, 512), device="cuda"), "use_cache": False}
    inputs["labels"] = inputs["input_ids"]
    if checkpointing != "none":
        for m in (model, optimised):
            m.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    original, found = peak(model, inputs), peak(optimised, inputs)
    assert found < 0.5 * original, f"{found / 2**20:.0f} MiB of {original / 2**20:.0f}"


@pytest.mark.parametrize(
    "mode",
    [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 20}, {"cache_implementation": "static"}],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_generate(family, mode):
    torch.compiler.reset()  # a static cache makes `generate` compile
    tokens = []
    for m in pair(make(family, device="cuda").eval()):
        inputs = batch(m, 2, 7, padding="left")
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        torch.manual_seed(0)
        tokens.append(m.generate(**inputs, max_new_tokens=8, pad_token_id=0, **({"do_sample": False} | mode)))
    assert tokens[0].shape[1] > 7 and torch.equal(*tokens)


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
def test_attention(implementation):
    torch.compiler.reset()
    model = make("llama", device="cuda", head_dim=32)
    model.set_attn_implementation(implementation)
    model, optimised = pair(model)
    inputs = {**batch(model, 2, 64, padding="right"), "use_cache": False}
    losses, gradients = [], []
    for m in (model, optimised):
        output = m(**inputs)
        output.loss.backward()
        losses.append(output.loss.item())
        gradients.append([p.grad for p in m.parameters()])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=2e-5 * a.abs().max().item())


def run_processes(script, count):
    """A script of this folder, which asserts, in a process a GPU."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    command = [*launcher, str(Path(__file__).parent / script)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-4000:]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_two_gpus():
    """DDP and FSDP2 over NCCL."""
    run_processes("_two_gpus.py", 2)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_deepspeed():
    run_processes("_deepspeed.py", min(2, torch.cuda.device_count()))
