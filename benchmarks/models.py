"""What is trained, and the variants that train it: ligerfx and its peers."""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

LOW_MEMORY: dict[str, Any] = {"low_memory": True}


class Workload(NamedTuple):
    """A model's shape and how it is trained."""

    model_type: str
    batch: int
    seq: int
    config: dict[str, Any]
    steps: int = 8  # timed, a round
    attention: str = "sdpa"


SMALL = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 8192,
}

WORKLOADS = {
    "llama-1b": Workload(  # Llama-3.2-1B
        "llama",
        batch=8,
        seq=2048,
        config={
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "vocab_size": 128256,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        },
    ),
    "llama-8b-8l": Workload(  # Llama-3-8B, the first 8 of its 32 layers
        "llama",
        batch=4,
        seq=2048,
        config={
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 8,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 128256,
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        },
    ),
    "qwen3-0.6b": Workload(
        "qwen3",
        batch=8,
        seq=2048,
        config={
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
    ),
    "gemma2-2b-13l": Workload(  # Gemma-2-2B, half of its 26 layers: soft-capped logits, four norms a layer
        "gemma2",
        batch=4,
        seq=2048,
        config={
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 13,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "vocab_size": 256000,
            "query_pre_attn_scalar": 256,
        },
        attention="eager",  # there is no other in transformers for scores with a soft cap
    ),
    # So little work that the host is the limit.
    "small-host": Workload("llama", batch=1, seq=128, config=SMALL, steps=50),
    "small-host-qwen3": Workload("qwen3", batch=1, seq=128, config={**SMALL, "head_dim": 64}, steps=50),
    "tiny": Workload(  # to try this script out, also without a GPU
        "llama",
        batch=2,
        seq=64,
        config={
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": 512,
        },
    ),
}


def build(model_type: str, config: dict[str, Any], device: str, attention: str = "sdpa") -> nn.Module:
    """A model in bf16 with random weights, for training."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(model_type, **config), dtype=torch.bfloat16, attn_implementation=attention
        )
    return model.train()


def eager(model: nn.Module) -> nn.Module:
    return model


def liger(model: nn.Module) -> nn.Module:
    from liger_kernel.transformers import _apply_liger_kernel_to_instance  # what transformers' Trainer calls

    _apply_liger_kernel_to_instance(model=model)
    return model


def ligerfx(model: nn.Module) -> nn.Module:
    import ligerfx

    return ligerfx.optimize(model)


def ligerfx_low(model: nn.Module) -> nn.Module:
    import ligerfx

    return ligerfx.optimize(model, **LOW_MEMORY)


def compile(model: nn.Module) -> nn.Module:
    return torch.compile(model)


def ligerfx_compile(model: nn.Module) -> nn.Module:
    return torch.compile(ligerfx(model))


VARIANTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "eager": eager,
    "liger": liger,
    "ligerfx": ligerfx,
    "ligerfx-low": ligerfx_low,
    "compile": compile,
    "ligerfx-compile": ligerfx_compile,
}
PACKAGES = {
    "liger": "liger_kernel.transformers",
    "ligerfx": "ligerfx",
    "ligerfx-low": "ligerfx",
    "ligerfx-compile": "ligerfx",
}


def load(variant: str) -> None:
    """Import what the variant needs: imports are not part of a measurement."""
    if variant in PACKAGES:
        importlib.import_module(PACKAGES[variant])
