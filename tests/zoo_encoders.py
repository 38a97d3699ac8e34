"""A tiny random model for every masked-language model and every encoder-decoder of text of the installed transformers,
as `zoo` has them for causal language models."""

from __future__ import annotations

from typing import Any

import torch
import transformers
import zoo
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

CLASSES: dict[str, str] = {**MODEL_FOR_MASKED_LM_MAPPING_NAMES, **MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES}
NAMES: list[str] = list(CLASSES)

SMALL: dict[str, Any] = {
    **zoo.SMALL,
    **dict.fromkeys(("dim", "emb_dim"), zoo.WIDTH),
    **dict.fromkeys(("hidden_dim", "feed_forward_size"), 128),
}

_START = {"decoder_start_token_id": 0}

VALUES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("t5", "longt5", "switch_transformers"), _START),
    "encoder-decoder": _START | {"pad_token_id": 0},
    "esm": {"vocab_size": zoo.VOCABULARY, "mask_token_id": 3, "pad_token_id": 0},
    "esmc": {"num_key_value_heads": zoo.HEADS},
    "marian": {"decoder_start_token_id": 0},
    "reformer": {"is_decoder": False, "axial_pos_embds": False},
    "xmod": zoo.VALUES["xmod"],
}

UNBUILDABLE: dict[str, str] = {
    "nemo_speechlm": "a model of speech, of four configurations with numbers that must fit each other",
    "perceiver": "its decoder writes as many tokens as it was made for, whatever the text",
    "voxtral_realtime": "a model of speech: has no loss without sound",
}


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """A tiny model of the type `name`, in training mode and without dropout."""
    config = zoo.shrunk(CONFIG_MAPPING[name], VALUES.get(name, {}), SMALL)
    return zoo.built(getattr(transformers, CLASSES[name]), config, dtype, seed)


def example(model: nn.Module, batch: int = 2, seq: int = 9, seed: int = 0) -> dict[str, Any]:
    """As of the causal models; some labels are -100, as of the tokens that were not masked."""
    return zoo.example(model, batch, seq, seed)
