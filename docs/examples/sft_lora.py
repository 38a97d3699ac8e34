"""Supervised fine-tuning with LoRA, with SFTTrainer of TRL: one line is added, after the model is built.

pip install trl peft
python docs/examples/sft_lora.py

A tiny Llama with random weights, and a tokenizer of its own. It runs in seconds, on a CPU too.
"""

import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import ligerfx

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(str(number) for number in range(60))]


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def counting(start: int) -> dict[str, str]:
    numbers = [str((start + i) % 60) for i in range(12)]
    return {"prompt": " ".join(numbers[:4]), "completion": " " + " ".join(numbers[4:])}


def main() -> tuple[float, float]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)

    model = ligerfx.optimize(model)  # the one line
    print(model.report.summary)

    rows = Dataset.from_list([counting(start) for start in range(60)])
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model,
            SFTConfig(
                folder,
                per_device_train_batch_size=12,
                learning_rate=2e-2,
                num_train_epochs=10,
                logging_steps=10,
                max_length=32,
                save_strategy="no",
                report_to=[],
                bf16=torch.cuda.is_available(),
            ),
            train_dataset=rows,
            processing_class=make_tokenizer(),
            peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        before = trainer.evaluate(trainer.train_dataset)["eval_loss"]
        trainer.train()
        after = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    merged = trainer.model.merge_and_unload()  # the optimised model, with the adapter in its weights
    assert isinstance(merged, ligerfx.OptimizedModule)
    print(f"loss {before:.3f} -> {after:.3f}")
    return before, after


if __name__ == "__main__":
    main()
