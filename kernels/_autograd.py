"""How the kernels' `torch.autograd.Function`s are called."""

from typing import Any

import torch
from torch.autograd import forward_ad

from ._ahead import rehearsal

# Inner parts of torch: where a later one lacks them, every call is left to `apply`.
_is_transforming = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)


class _WithoutGradient:
    """What a forward is given for a context where no backward will come: it keeps nothing."""

    def __init__(self, count: int) -> None:
        self.needs_input_grad = (False,) * count

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None: ...

    def set_materialize_grads(self, value: bool) -> None: ...

    def mark_non_differentiable(self, *outputs: torch.Tensor) -> None: ...


class _Rehearsed(_WithoutGradient):
    """What both the forward and the backward are given in a rehearsal."""

    def __init__(self, args: tuple) -> None:
        enabled = torch.is_grad_enabled()
        self.needs_input_grad = tuple(enabled and isinstance(a, torch.Tensor) and a.requires_grad for a in args)
        self.saved_tensors: tuple = ()
        self.without_gradient: tuple = ()

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *outputs: torch.Tensor) -> None:
        self.without_gradient = outputs


def _rehearse(function: type[torch.autograd.Function], *args: Any) -> Any:
    """The forward, and the backward if an argument requires a gradient."""
    context = _Rehearsed(args)
    with torch.no_grad():
        results = function.forward(context, *args)
        outputs = results if isinstance(results, tuple) else (results,)
        if any(context.needs_input_grad):
            marked = {id(output) for output in context.without_gradient}
            function.backward(context, *(None if id(o) in marked else torch.empty_like(o) for o in outputs))
    return results


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """`function.apply(*args)`; without gradients its forward alone, which takes the host less time.

    Whatever else may follow a call (forward-mode derivatives, `torch.func`, compilers) is left to `apply` itself.
    """
    if rehearsal.active:
        return _rehearse(function, *args)
    if (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or _is_transforming()
        or getattr(forward_ad, "_current_level", 0) >= 0
    ):
        return function.apply(*args)
    return function.forward(_WithoutGradient(len(args)), *args)
