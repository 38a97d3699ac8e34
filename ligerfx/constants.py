"""Python constants."""

import torch

PLAIN = (
    str, bool, int, float, complex, type(None), type(...),
    torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip
"""Types of Python constants: they may stand in a graph as they are, and compare by value."""
