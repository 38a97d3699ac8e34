"""The Trainer of transformers: what it logs, what it predicts and the weights that it leaves are the same bits."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import DataCollatorForLanguageModeling, LlamaForCausalLM, Trainer, TrainingArguments

import ligerfx
from models import make

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


@pytest.fixture(scope="module")
def model():
    return make("llama", num_hidden_layers=1)


@pytest.fixture(scope="module")
def learnt(model, tokenizer, rows, tmp_path_factory, plain_kernels):
    """An optimised model that has seen the Trainer's calls. Copies of it do not capture them again."""
    optimised = ligerfx.optimize(copy.deepcopy(model))
    run = make_trainer(optimised, tokenizer, rows, tmp_path_factory.mktemp("learnt"), max_steps=1, learning_rate=0.0)
    run.train()
    run.evaluate()
    del optimised._is_accelerate_prepared  # accelerate's mark, with which it would take the copies as they are
    return optimised


@pytest.fixture
def optimised(learnt, calls):
    return copy.deepcopy(learnt)


@pytest.fixture(scope="module")
def rows(tokenizer, text):
    """Sequences of different lengths, so that batches differ in how many labels count."""
    return [dict(tokenizer(text(4 + 3 * i % 8, seed=i))) for i in range(8)]


def make_trainer(model, tokenizer, rows, folder, compute_metrics=None, **arguments):
    arguments = {
        "per_device_train_batch_size": 2, "num_train_epochs": 1, "logging_steps": 1, "learning_rate": 1e-2,
        "save_strategy": "no", "use_cpu": True, "report_to": [], "disable_tqdm": True, **arguments,
    }  # fmt: skip
    return Trainer(
        model,
        TrainingArguments(str(folder), **arguments),
        train_dataset=rows,
        eval_dataset=rows[:3],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        compute_metrics=compute_metrics,
    )


@pytest.fixture
def trainer(tokenizer, rows, tmp_path):
    def of(model, folder="run", **arguments):
        return make_trainer(model, tokenizer, rows, tmp_path / folder, **arguments)

    return of


def logged(trainer):
    """What the Trainer logged, times left out."""
    return [
        {name: value for name, value in entry.items() if "runtime" not in name and "per_second" not in name}
        for entry in trainer.state.log_history
    ]


def assert_equal_parameters(a, b):
    for (name, p), (other, q) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert name == other and torch.equal(p, q), name


def sums(prediction):
    """Metrics that every single logit has a part in, padding of the evaluation loop (-100) aside."""
    logits = prediction.predictions
    accuracy = (logits[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]).mean()
    return {"mean": float(logits[logits != -100].mean()), "accuracy": float(accuracy)}


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"bf16": True},
        {"label_smoothing_factor": 0.2},
        {"gradient_checkpointing": True},
    ],
    ids=lambda arguments: next(iter(arguments), "plain"),
)
def test_training_evaluation_and_prediction(model, optimised, trainer, rows, calls, arguments):
    before = copy.deepcopy(model)
    runs, predictions = [], []
    for m in (before, optimised):
        run = trainer(m, compute_metrics=sums, **arguments)
        run.train()
        run.evaluate()
        predictions.append(run.predict(rows[:3]).predictions)
        runs.append(run)
    assert logged(runs[0]) == logged(runs[1])
    assert len({entry["loss"] for entry in logged(runs[1]) if "loss" in entry}) > 1
    assert np.array_equal(*predictions)
    assert_equal_parameters(before, optimised)
    expected = {"rotary", "rmsnorm", "linear_crossentropy", "rmsnorm_linear", "rmsnorm_mlp"}
    if "label_smoothing_factor" in arguments:  # the Trainer takes the labels away: the smoothed loss is its own
        expected.remove("linear_crossentropy")
    assert expected <= calls.keys()


def test_logits_are_computed_for_metrics_alone(optimised, trainer, rows, materialized):
    run = trainer(optimised)
    run.train()
    run.evaluate()
    assert materialized["logits"] == 0
    trainer(optimised, compute_metrics=sums, per_device_eval_batch_size=1).predict(rows[:3])
    assert materialized["logits"] == 3  # one a batch


def test_smoothed_loss_of_the_models_own(model, trainer, materialized):
    """What the Trainer does with `label_smoothing_factor`, without the logits: the labels reach the model."""

    def smoothed(logits, labels, vocab_size, num_items_in_batch=None, **_):
        labels = F.pad(labels, (0, 1), value=-100)[..., 1:].reshape(-1)
        reduction = "mean" if num_items_in_batch is None else "sum"
        logits = logits.float().view(-1, vocab_size)
        loss = F.cross_entropy(logits, labels, reduction=reduction, label_smoothing=0.2)
        return loss if num_items_in_batch is None else loss / num_items_in_batch

    original, own = copy.deepcopy(model), copy.deepcopy(model)
    own.loss_function = smoothed
    optimised = ligerfx.optimize(own)
    settings = {"optim": "sgd", "learning_rate": 1.0, "gradient_accumulation_steps": 2}
    runs = [trainer(original, label_smoothing_factor=0.2, **settings), trainer(optimised, **settings)]
    for run in runs:
        run.train()
        run.evaluate()
    logs = [{f"{n} {key}": v for n, entry in enumerate(logged(run)) for key, v in entry.items()} for run in runs]
    assert logs[1] == pytest.approx(logs[0], rel=1e-5)
    for start, a, b in zip(model.parameters(), original.parameters(), optimised.parameters(), strict=True):
        assert not torch.equal(a, start)
        torch.testing.assert_close(b, a, rtol=0, atol=1e-5 * (a - start).abs().max().item())
    assert materialized["logits"] == 0


def test_accumulated_batches_are_one_big_batch(model, learnt, trainer):
    """The loss of each part is divided by the labels of the whole: means of means would differ."""
    settings = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    results = {}
    for size, steps in ((8, 1), (2, 4)):
        optimised = copy.deepcopy(learnt)
        run = trainer(optimised, per_device_train_batch_size=size, gradient_accumulation_steps=steps, **settings)
        run.train()
        results[size] = run.state.log_history[0]["loss"], [p.detach() for p in optimised.parameters()]
    assert results[2][0] == pytest.approx(results[8][0], rel=1e-6)
    for start, whole, parts in zip(model.parameters(), results[8][1], results[2][1], strict=True):
        step = (whole - start).abs().max().item()
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5 * step)


def test_resumed_is_uninterrupted(learnt, optimised, trainer, tmp_path):
    run = trainer(optimised, save_strategy="steps", save_steps=2)
    run.train()
    resumed = copy.deepcopy(learnt)
    trainer(resumed, "again").train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    assert_equal_parameters(optimised, resumed)

    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "run/checkpoint-4")
    assert_equal_parameters(optimised, loaded)
    assert json.loads((tmp_path / "run/checkpoint-4/config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    # `from_pretrained` of the result and of its class gives the plain model.
    loaded = type(optimised).from_pretrained(tmp_path / "run/checkpoint-4")
    assert type(loaded) is LlamaForCausalLM
    assert_equal_parameters(optimised, loaded)


def test_best_model_is_loaded_at_the_end(optimised, trainer, tmp_path):
    run = trainer(
        optimised, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, learning_rate=0.5,
        lr_scheduler_type="constant", load_best_model_at_end=True, max_steps=3,
    )  # fmt: skip
    run.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry}
    best = min(losses, key=losses.get)
    assert best != max(losses), "the learning rate is meant to make it worse in the end"
    saved = load_file(tmp_path / f"run/checkpoint-{best}/model.safetensors")
    assert all(torch.equal(p, saved[name]) for name, p in optimised.named_parameters())
    assert run.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-6)


def test_columns_that_forward_takes_are_kept(model, optimised, trainer, rows):
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    rows = [{**row, "position_ids": list(range(len(row["input_ids"]))), "junk": "x"} for row in rows[:1] * 2]
    columns = []
    for m in (model, optimised):
        run = trainer(m)
        run.train_dataset = datasets.Dataset.from_list(rows)
        columns.append(next(iter(run.get_train_dataloader())).keys())
    assert columns[0] == columns[1] == {"input_ids", "attention_mask", "position_ids", "labels"}


def test_torch_compile(model, optimised, trainer, monkeypatch):
    """With Dynamo alone; a backend that generates code rounds otherwise, as it does for the original."""
    for name in ("BACKEND", "MODE"):  # which the Trainer sets, for accelerate to read, and leaves
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", "no")
    before = copy.deepcopy(model)
    runs = [trainer(before, max_steps=2)]
    runs[0].train()
    torch._dynamo.utils.counters.clear()
    runs.append(trainer(optimised, torch_compile=True, torch_compile_backend="eager", max_steps=2))
    runs[1].train()
    assert torch._dynamo.utils.counters["stats"]["calls_captured"] > 0
    AcceleratorState._reset_state(True)
    assert logged(runs[0]) == logged(runs[1])
    assert_equal_parameters(before, optimised)
