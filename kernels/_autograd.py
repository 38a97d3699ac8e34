"""How the kernels' `torch.autograd.Function`s are called."""

from typing import Any

import torch
from torch.autograd import forward_ad

from ._ahead import rehearsal, rehearse

# Inner parts of torch: where a later one lacks them, every call is left to `apply`.
_is_transforming = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)


class _WithoutGradient:
    """What a forward is given for a context where no backward will come: it keeps nothing."""

    def __init__(self, count: int) -> None:
        self.needs_input_grad = (False,) * count

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None: ...

    def set_materialize_grads(self, value: bool) -> None: ...

    def mark_non_differentiable(self, *outputs: torch.Tensor) -> None: ...


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """`function.apply(*args)`; without gradients its forward alone, which takes the host less time.

    Whatever else may follow a call (forward-mode derivatives, `torch.func`, compilers) is left to `apply` itself.
    """
    if rehearsal.active:
        return rehearse(function, *args)
    if (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or _is_transforming()
        or getattr(forward_ad, "_current_level", 0) >= 0
    ):
        return function.apply(*args)
    return function.forward(_WithoutGradient(len(args)), *args)
