"""Example inputs: what the model is captured with."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .errors import OptimizeError

BATCH, SEQUENCE = 2, 7  # different from each other, so that their symbols are


def normalized_inputs(
    model: nn.Module, example_inputs: dict[str, Any] | Sequence[Any] | torch.Tensor | None
) -> tuple[tuple, dict[str, Any]]:
    """Example inputs as (args, kwargs) of one call. Raises OptimizeError where they cannot be a call."""
    if example_inputs is None:
        return (), example_call(model)
    if isinstance(example_inputs, torch.Tensor):
        args, kwargs = (example_inputs,), {}
    elif isinstance(example_inputs, (tuple, list)):
        args, kwargs = tuple(example_inputs), {}
    elif hasattr(example_inputs, "keys"):  # a dict, or a tokenizer's BatchEncoding
        args, kwargs = (), dict(example_inputs.items())
    else:
        raise OptimizeError(
            "example_inputs must be a dict of keyword arguments, a sequence of positional ones or a tensor, "
            f"not {type(example_inputs).__name__}"
        )
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise OptimizeError(f"example_inputs do not fit {type(model).__name__}.forward: {error}") from error
    return args, kwargs


def example_call(model: nn.Module) -> dict[str, torch.Tensor]:
    """Keyword arguments for a language model, made from its config: token ids, attention mask, labels."""
    config = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocab = getattr(text_config, "vocab_size", None)
    parameters = inspect.signature(model.forward).parameters
    if vocab is None or "input_ids" not in parameters:
        raise OptimizeError(
            f"{type(model).__name__} has no config.vocab_size and input_ids to make example inputs from: "
            "pass example_inputs, one call of the model as a dict or a tuple"
        )
    devices = [tensor.device for tensor in (*model.parameters(), *model.buffers())]
    # Offloaded parameters are on the meta device until a hook brings them to the others.
    device = next((d for d in devices if d.type != "meta"), devices[0] if devices else torch.device("cpu"))
    call: dict[str, Any] = {"input_ids": torch.zeros(BATCH, SEQUENCE, dtype=torch.long, device=device)}
    for name in ("attention_mask", "labels"):
        if name in parameters:
            call[name] = torch.ones(BATCH, SEQUENCE, dtype=torch.long, device=device)
    if "use_cache" in parameters:
        call["use_cache"] = False
    return call
