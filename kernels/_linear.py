"""What the ops that take in linear layers share."""

import contextlib

import torch

from ._operators import operator
from ._runtime import autocast_dtype


def is_plain_linear(dtype: torch.dtype, weight: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    """Whether the linear layer takes inputs of that dtype as they are."""
    return weight.dtype == dtype and (bias is None or bias.dtype == dtype)


def no_autocast(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Autocast off on the tensor's device: a backward runs in the dtypes of its forward, wherever it is called.

    torch.autocast costs some microseconds even to disable, so it is entered only if it is on.
    """
    kind = tensor.device.type
    return contextlib.nullcontext() if autocast_dtype(kind) is None else torch.autocast(kind, enabled=False)


def check_linear(op: str, features: int, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Raise unless weight is [N, features], bias is [N], and neither is integer."""
    shape = weight.shape
    if bias is None and weight.is_floating_point() and len(shape) == 2 and shape[1] == features:
        return  # as nearly always, and asked by every call
    for tensor in (weight,) if bias is None else (weight, bias):
        if not (tensor.is_floating_point() or tensor.is_complex()):
            raise TypeError(f"{op}: expected floating-point inputs, got {tensor.dtype}")
    if len(shape) != 2 or shape[1] != features or (bias is not None and bias.shape != shape[:1]):
        raise ValueError(
            f"{op}: expected weight [N, K] and bias [N] or None for an input [..., K]; got "
            f"{tuple(weight.shape)} and {None if bias is None else tuple(bias.shape)} for K = {features}"
        )


def _sum_result(a, b, more_a, more_b):
    return a.new_empty(a.shape[0], b.shape[1])


@operator("sum_of_products(Tensor a, Tensor b, Tensor[] more_a, Tensor[] more_b) -> Tensor", _sum_result)
def sum_of_products(
    a: torch.Tensor, b: torch.Tensor, more_a: list[torch.Tensor], more_b: list[torch.Tensor]
) -> torch.Tensor:
    """a @ b plus each of more_a @ more_b, added by the matrix products themselves.

    An operator, since torch.compile would copy the sum before each addition.
    """
    total = torch.mm(a, b)
    for x, y in zip(more_a, more_b, strict=True):
        total.addmm_(x, y)
    return total
