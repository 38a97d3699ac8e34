"""A tiny random model for every causal language model of the installed transformers.

    for name in NAMES:
        if name not in UNBUILDABLE:
            model = build(name)
            loss = model(**example(model, 2, 9)).loss

Configurations are those of the library, made small by the names of their attributes: `SMALL` serves most, `VALUES`
holds what single models need besides. A model keeps one layer of each kind that its published form has.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

NAMES: list[str] = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

WIDTH, HEADS, KV_HEADS, HEAD, VOCABULARY = 64, 4, 2, 16, 256

SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size", "emb_dim", "embed_dim"), WIDTH),
    **dict.fromkeys(("word_embed_proj_dim", "embedding_dim", "lru_width", "attention_hidden_size"), WIDTH),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "d_inner", "dff", "ffn_hidden_size", "dim_ff"), 128),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "intermediate_size_mlp", "feed_forward_size"), 128),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(("expert_ffn_hidden_size", "dense_intermediate_size", "shared_experts_intermediate_size"), 32),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "adapter_rank"), 32),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), HEADS),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "swa_num_attention_heads"), HEADS),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "kv_n_heads", "swa_num_key_value_heads"), KV_HEADS),
    **dict.fromkeys(("head_dim", "d_kv", "d_head", "dim_head", "kv_channels", "attention_head_size"), HEAD),
    **dict.fromkeys(("swa_head_dim", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "rotary_dim"), HEAD),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "index_head_dim"), HEAD),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads", "index_n_heads"), HEADS),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 32),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "n_groups", "o_groups"), 1),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("decoder_vocab_size", "unpadded_vocab_size"), VOCABULARY),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions"), 256),
    **dict.fromkeys(("sliding_window", "attention_window_size", "attention_chunk_size", "index_topk"), 4),
    **dict.fromkeys(("hidden_size_per_layer_input", "query_pre_attn_scalar", "laurel_rank"), 16),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size"), 16),
    **dict.fromkeys(("num_global_layers", "num_kv_shared_layers"), 0),
    # Large enough that activations, soft caps and losses leave the linear regime around zero.
    **dict.fromkeys(("initializer_range", "init_std"), 0.1),
    "first_k_dense_replace": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
}  # fmt: skip
"""Values of attributes by their names, where a configuration has the attribute and it is not None."""

LAYERS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "depth",
    "num_encoder_layers", "num_decoder_layers",
)  # fmt: skip

_SPARSE = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": HEAD, "indexer_budget": 4,
    "indexer_compress_ratio": 2,
}  # fmt: skip

VALUES: dict[str, dict[str, Any]] = {
    "blt": {
        "encoder_hash_byte_group_vocab": VOCABULARY,
        "encoder_config": {"hidden_size_global": WIDTH},
        "decoder_config": {"hidden_size_global": WIDTH},
    },
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {"attn_config": {"kv_n_heads": KV_HEADS, "rope_theta": 10000.0, "clip_qkv": 8.0}, "max_seq_len": 256},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "dots3_note": {
        "text_config": {"num_key_value_heads": HEADS},
        "vision_config": {"adapter_in_dim": WIDTH, "adapter_out_dim": WIDTH},
        "audio_config": {"adapter_input_size": WIDTH, "adapter_out_dim": WIDTH},
    },
    "dots3_note_text": {"num_key_value_heads": HEADS},
    "gemma3n_text": {"intermediate_size": [128] * 4},
    "hunyuan_v1_dense": {"head_dim": HEAD},
    "hunyuan_v1_moe": {"head_dim": HEAD},
    "lfm2_moe": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama4": {"text_config": {"moe_layers": [1]}},
    "llama4_text": {"moe_layers": [1]},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "ministral": {"head_dim": HEAD},
    "nemotron": {"head_dim": HEAD, "num_key_value_heads": KV_HEADS},
    "qwen4_exp": {"text_config": _SPARSE},
    "qwen4_exp_text": _SPARSE,
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "mamba_dt_rank": 4,
        "num_key_value_heads": HEADS,
    },
    "zamba2": {
        "num_key_value_heads": HEADS,
        "mamba_headdim": 16,
        "n_mamba_heads": 8,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zaya": {"num_experts_per_tok": 1},
}
"""What single models need besides; a dict is for a configuration inside."""

UNBUILDABLE: dict[str, str] = {
    "gemma3n": "its vision tower needs the timm library",
    "gemma4_assistant": "a draft model: reads the keys and values of another model, and has no loss",
    "gemma4_unified_assistant": "a draft model: reads the keys and values of another model, and has no loss",
}
"""Models that have no tiny form, and why."""


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """A tiny model of the type `name`, in training mode and without dropout.

    The weights depend on the seed alone: a bf16 model holds the rounded weights of the fp32 one.
    """
    return built(getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]), small_config(name), dtype, seed)


def built(model_class: type, config: PreTrainedConfig, dtype: torch.dtype, seed: int) -> nn.Module:
    """A model of the class, in training mode, with random weights. Of a configuration with others inside, the class
    gets the one that it takes."""
    config = _for_class(model_class, config)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = model_class(config)
        for param in model.parameters():
            # Norm weights start as all ones or zeros and biases as zeros, which would hide a missing factor.
            if param.dim() == 1:
                param.add_(0.1 * torch.randn_like(param))
    for param in model.parameters():
        param.data = param.data.to(dtype)
    return model.train()


def small_config(name: str) -> PreTrainedConfig:
    """The published kind of configuration, with small numbers."""
    return shrunk(CONFIG_MAPPING[name], VALUES.get(name, {}))


def shrunk(
    config_class: type[PreTrainedConfig], values: dict[str, Any], small: dict[str, Any] = SMALL
) -> PreTrainedConfig:
    """A configuration of the class with the `small` numbers, and so those inside it; `values` come first."""
    try:
        default = config_class()
    except Exception:  # one without defaults: what is given must do
        return config_class(**values)
    settings = {key: value for key, value in small.items() if _wanted(default, key)}
    settings |= {key: 0.0 for key, value in vars(default).items() if _is_dropout(key, value)}
    for key in LAYERS:
        if _wanted(default, key):
            settings |= _layers(default, key)
    if sections := (vars(default).get("rope_parameters") or {}).get("mrope_section"):
        settings["rope_parameters"] = default.rope_parameters | {"mrope_section": _sections(default, sections)}
    for key in config_class.sub_configs:
        inner = getattr(default, key, None)
        if isinstance(inner, PreTrainedConfig):
            settings[key] = shrunk(type(inner), values.get(key, {}), small)
        elif key in values:
            settings[key] = shrunk(config_class.sub_configs[key], values[key], small)
    if "kv_lora_rank" in settings:  # latent attention: each head has keys of its own
        settings["num_key_value_heads"] = HEADS
    settings |= {key: value for key, value in values.items() if key not in config_class.sub_configs}
    return config_class(**settings)


def _sections(config: PreTrainedConfig, sections: Sequence[int]) -> list[int]:
    """The parts of a small head's rotated half, in the proportions of the sections."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotated = sum(sections) * HEAD // width
    parts = [max(1, section * rotated // sum(sections)) for section in sections[:-1]]
    return [*parts, rotated - sum(parts)]


def _for_class(model_class: type, config: PreTrainedConfig) -> PreTrainedConfig:
    """Of a configuration with others inside the one that the model class takes."""
    wanted = model_class.config_class
    inner = (getattr(config, key, None) for key in type(config).sub_configs)
    return config if isinstance(config, wanted) else next((c for c in inner if isinstance(c, wanted)), config)


def _wanted(config: PreTrainedConfig, key: str) -> bool:
    return vars(config).get(key) is not None


def _is_dropout(key: str, value: Any) -> bool:
    return isinstance(value, float) and ("drop" in key or key.endswith("pdrop"))


def _layers(config: PreTrainedConfig, key: str) -> dict[str, Any]:
    """One layer of each kind, two at least: attributes with a value for each layer tell the kinds apart."""
    count = getattr(config, key)
    per_layer = {
        name: list(value)
        for name, value in vars(config).items()
        if isinstance(value, (list, tuple)) and len(value) == count > 2 and list(value) != list(range(count))
    }
    kinds = list(zip(*per_layer.values(), strict=True)) or [()] * count
    kinds = [str(kind) for kind in kinds]
    kept = sorted({kinds.index(kind) for kind in kinds})
    if len(kept) < 2:
        kept = list(range(min(2, count)))
    return {key: len(kept), **{name: [value[i] for i in kept] for name, value in per_layer.items()}}


def example(model: nn.Module, batch: int = 2, seq: int = 9, seed: int = 0) -> dict[str, Tensor | bool]:
    """A call of the model: random token ids, an attention mask with left padding, labels of which some are -100."""
    generator = torch.Generator().manual_seed(seed)
    parameters = inspect.signature(model.forward).parameters
    input_ids = torch.randint(3, 200, (batch, seq), generator=generator)
    labels = input_ids.clone()
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = -100
    labels[0, seq // 2] = input_ids[0, seq // 2]
    mask = torch.ones_like(input_ids)
    mask[-1, : seq // 4] = 0
    call = {"input_ids": input_ids, "attention_mask": mask, "labels": labels, "use_cache": False}
    call = {key: value for key, value in call.items() if key in parameters}
    if (codebooks := getattr(model, "num_codebooks", None)) is not None:  # audio: a row of tokens for each codebook
        call["input_ids"] = torch.randint(3, 200, (batch * codebooks, seq), generator=generator)
        call["labels"] = call["input_ids"].reshape(batch, codebooks, seq).transpose(1, 2).contiguous()
    if "pixel_values" in parameters and model.config.model_type == "git":  # drops the logits of the image
        size = model.config.vision_config.image_size
        call["pixel_values"] = torch.randn(batch, 3, size, size, generator=generator)
    return call


def buildable(names: Sequence[str] = NAMES) -> list[str]:
    return [name for name in names if name not in UNBUILDABLE]
