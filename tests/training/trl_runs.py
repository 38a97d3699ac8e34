"""What the tests of TRL's trainers share, on the CPU and on a GPU: rows to train on, and what a run logged."""

from typing import Any

from datasets import Dataset

SFT_ARGUMENTS = [
    {"completion_only_loss": True},
    {"packing": True},
    {"padding_free": True, "max_length": None},
    {"gradient_checkpointing": True, "peft": True},
]


def sft_rows(text, arguments: dict[str, Any]) -> list[dict[str, str]]:
    """Eight short texts, for `completion_only_loss` as prompts and completions."""
    words = [text(6 + i % 4, seed=i).split() for i in range(8)]
    rows = [{"prompt": " ".join(w[:3]), "completion": " " + " ".join(w[3:])} for w in words]
    if "completion_only_loss" in arguments:
        return rows
    return [{"text": row["prompt"] + row["completion"]} for row in rows]


def dpo_rows(text) -> Dataset:
    return Dataset.from_list(
        [{"prompt": text(4, i), "chosen": " " + text(3 + i % 3, i + 10), "rejected": " " + text(4, i + 20)}
         for i in range(4)]
    )  # fmt: skip


def logged(trainer) -> list[dict[str, Any]]:
    """The log of a run, times left out."""
    return [
        {key: value for key, value in entry.items() if "time" not in key and "per_second" not in key}
        for entry in trainer.state.log_history
    ]
