"""Train a language model with the Trainer of transformers: one line is added, after the model is built.

python docs/examples/trainer.py

A tiny Llama with random weights learns sequences that count upwards. It runs in seconds, on a CPU too.
"""

import tempfile

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import ligerfx

VOCAB, LENGTH = 64, 16


class Counting(Dataset):
    """Row i counts upwards from i."""

    def __len__(self) -> int:
        return 4 * VOCAB

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = (index + torch.arange(LENGTH)) % VOCAB
        return {"input_ids": ids, "labels": ids}


def accuracy(prediction) -> dict[str, float]:
    """`predictions` are token ids, see `preprocess_logits_for_metrics`: the logits are not kept."""
    return {"accuracy": float((prediction.predictions[:, :-1] == prediction.label_ids[:, 1:]).mean())}


def main() -> dict[str, float]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)

    model = ligerfx.optimize(model)  # the one line
    print(model.report.summary)

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            TrainingArguments(
                folder,
                per_device_train_batch_size=16,
                learning_rate=3e-3,
                num_train_epochs=4,
                logging_steps=16,
                save_strategy="no",
                report_to=[],
            ),
            train_dataset=Counting(),
            eval_dataset=Counting(),
            compute_metrics=accuracy,
            preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        )
        trainer.train()
        metrics = trainer.evaluate()

        trainer.save_model(folder)
        loaded = LlamaForCausalLM.from_pretrained(folder)  # a checkpoint like any other
        assert all(torch.equal(p.cpu(), q) for p, q in zip(model.parameters(), loaded.parameters(), strict=True))
    print(f"loss {metrics['eval_loss']:.3f}, accuracy {metrics['eval_accuracy']:.3f}")
    return metrics


if __name__ == "__main__":
    main()
