"""How the kernels' `torch.autograd.Function`s are called."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch._C import _functions
from torch.autograd import forward_ad

from ._ahead import rehearsal

# An inner part of torch, which a later one may lack.
_has_transforms = getattr(
    torch._C, "_are_functorch_transforms_active", lambda: torch._C._functorch.peek_interpreter_stack() is not None
)


def is_transforming() -> bool:
    """Whether `torch.func` or forward-mode derivatives are at work, which need more than a forward and a backward."""
    return _has_transforms() or getattr(forward_ad, "_current_level", 0) >= 0


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
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or is_transforming():
        return function.apply(*args)
    return function.forward(_WithoutGradient(len(args)), *args)


def once_differentiable(backward: Callable) -> Callable:
    """For a `torch.autograd.Function` whose backward has no derivative: to ask for one is an error.

    torch's own decorator sees to that only where an incoming gradient has a graph. That of a loss has none, and what
    its gradients owe to the inputs and weights would silently be missing from a penalty on them.
    """

    @functools.wraps(backward)
    def without_graph(ctx: Any, *dys: torch.Tensor | None) -> Any:
        with torch.no_grad():
            grads = backward(ctx, *dys)
        # A compiler that traces this raises by itself.
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return grads
        grads = grads if isinstance(grads, tuple) else (grads,)
        return _functions.DelayedError(_NO_SECOND_DERIVATIVE, len(grads))(
            *(None if grad is None else grad.detach().requires_grad_() for grad in grads)
        )

    return without_graph


_NO_SECOND_DERIVATIVE = (
    b"the fused kernels have no second derivative, which create_graph=True and a backward through the gradient ask for:"
    b" take the original model for that"
)
