"""Attention masks that torch.compile need not build.

For causal attention over the whole sequence transformers hands the attention function no mask, which then may run its
causal kernel, in half the time. While torch.compile traces, it always builds one: whether labels of padding are there
cannot be known then. Where the call has no padding mask, there is nothing that would have to be known.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


@functools.cache
def skippable(create: Callable) -> Callable:
    """A mask function of transformers that gives None in torch.compile, too, where it does outside."""

    def mask(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() and not args and _is_only_causal(create.__name__, **kwargs):
            return None
        return create(*args, **kwargs)

    mask.__name__ = mask.__qualname__ = create.__name__
    return mask


def _is_only_causal(
    name: str,
    config: Any,
    inputs_embeds: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    past_key_values: Any = None,
    **others: Any,
) -> bool:
    if inputs_embeds is None or attention_mask is not None or any(value is not None for value in others.values()):
        return False
    if config._attn_implementation != "sdpa" or not getattr(config, "is_causal", True):
        return False
    if past_key_values is not None and (past_key_values.is_compileable or past_key_values.get_seq_length() > 0):
        return False
    if name == "create_sliding_window_causal_mask":
        return inputs_embeds.shape[1] < config.sliding_window
    return name == "create_causal_mask"
