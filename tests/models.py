"""Small random causal LMs of every family that ligerfx is tested on, batches for them, and what to expect.

model = make("gemma2", dtype=torch.bfloat16)
loss = model(**batch(model, padding="left")).loss
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 256,
    # Large enough that activations, soft-caps and losses leave the linear regime around zero.
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

MIDSIZE: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 4096,
    "max_position_embeddings": 1024,
    "initializer_range": 0.05,
}

# Name: configuration class, model class, and what differs from TINY.
FAMILIES: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel], dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama_tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "llama_bias": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 4}),
    "gemma": (GemmaConfig, GemmaForCausalLM, {}),
    # One sliding and one full layer in every two.
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, {"sliding_window": 4, "query_pre_attn_scalar": 16}),
    "gemma3": (
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        {"sliding_window": 4, "sliding_window_pattern": 2, "query_pre_attn_scalar": 16},
    ),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen2_5": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
    "phi3": (Phi3Config, Phi3ForCausalLM, {"num_key_value_heads": 4, "sliding_window": 4}),
    "phi4": (Phi3Config, Phi3ForCausalLM, {"partial_rotary_factor": 0.75, "tie_word_embeddings": True}),
    # Phi-4-mini as published: the rotary embedding picks its frequencies by the longest position it is given.
    "phi4_longrope": (
        Phi3Config,
        Phi3ForCausalLM,
        {"longrope": True, "original_max_position_embeddings": 128, "tie_word_embeddings": True},
    ),
}


def make(
    name: str,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
    **overrides: Any,
) -> PreTrainedModel:
    """A tiny model of the family `name`, in training mode; `overrides` go to its configuration.

    The weights depend on the seed alone: a bf16 model holds the rounded weights of the fp32 one. Buffers (the
    rotary frequencies) stay fp32, as they do when transformers loads a checkpoint.
    """
    config_class, model_class, family = FAMILIES[name]
    settings = {**TINY, **family, **overrides}
    # Gemma and Qwen3 default to wide heads; every family here has hidden / heads.
    settings.setdefault("head_dim", settings["hidden_size"] // settings["num_attention_heads"])
    if settings.pop("longrope", False):
        settings["rope_parameters"] = _longrope(settings["head_dim"])
    build_device = "meta" if torch.device(device).type == "meta" else "cpu"

    with torch.random.fork_rng(devices=[]), torch.device(build_device), torch.no_grad():
        torch.manual_seed(seed)
        model = model_class(config_class(**settings))
        for param in model.parameters():
            # Norm weights start as all ones or zeros and biases as zeros, which would hide a missing factor.
            if param.dim() == 1:
                param.add_(0.1 * torch.randn_like(param))
    for param in model.parameters():
        param.data = param.data.to(dtype)
    return model.to(device)


def midsize(name: str, **arguments: Any) -> PreTrainedModel:
    """`make` at hidden size 512, 4 layers, vocabulary 4096."""
    return make(name, **{**MIDSIZE, **arguments})


def expected_idioms(model: nn.Module) -> dict[str, int]:
    """How often each idiom occurs, counted by class names in the module tree: knows nothing of ligerfx."""

    def named(suffix: str) -> int:
        return sum(type(module).__name__.endswith(suffix) for module in model.modules())

    return {
        "rms_norm": named("RMSNorm"),
        "rope": named("Attention"),
        "glu": named("MLP"),
        "linear_cross_entropy": 1,
    }


def default_batch(model: PreTrainedModel, **arguments: Any) -> dict[str, Any]:
    """A batch for the kind of call that `optimize` captures if it is given no example: no positions and no cache."""
    inputs = batch(model, **arguments)
    del inputs["position_ids"]
    return {**inputs, "use_cache": False}


def batch(
    model: PreTrainedModel,
    batch: int = 2,
    seq: int = 9,
    padding: Literal["left", "right"] | None = None,
    ignore: float = 0.2,
    packed: bool = False,
    device: str | torch.device | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Random input_ids, attention_mask, position_ids and labels, each (batch, seq).

    padding: rows are padded by different lengths, up to a third of `seq`; padded labels are -100.
    ignore:  about this share of the other labels is -100 too; one label always counts, if seq > 1.
    packed:  each row holds two sequences, told apart by position_ids that start again; there is then no
             attention_mask, since transformers looks at position_ids only without one.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, seq)
    input_ids = torch.randint(3, model.config.vocab_size, shape, generator=generator)
    labels = input_ids.clone()
    labels[torch.rand(shape, generator=generator) < ignore] = -100

    mask = torch.ones(shape, dtype=torch.long)
    for row, pad in enumerate(_pad_lengths(batch, seq) if padding else []):
        mask[row, :pad] = 0
    if padding == "right":
        mask = mask.flip(-1)
    # Positions count the real tokens; those of left padding are never attended to.
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    if packed:
        positions = torch.arange(seq).expand(shape).clone()
        positions[:, seq // 2 :] -= seq // 2

    input_ids[mask == 0] = model.config.pad_token_id
    labels[mask == 0] = -100
    if seq > 1:  # the middle of the first row is never padding
        labels[0, seq // 2] = input_ids[0, seq // 2]

    inputs = {"input_ids": input_ids, "attention_mask": mask, "position_ids": positions, "labels": labels}
    if packed:
        del inputs["attention_mask"]
    device = model.device if device is None else device
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def _longrope(head_dim: int) -> dict[str, Any]:
    frequencies = int(0.75 * head_dim) // 2
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.75,
        "short_factor": [1.0 + 0.1 * i for i in range(frequencies)],
        "long_factor": [1.0 + 2.0 * i for i in range(frequencies)],
    }


def _pad_lengths(batch: int, seq: int) -> Iterator[int]:
    return (seq // 3 * (row + 1) // batch for row in range(batch))
