"""Optimised models in what torch.compile traces.

It cannot stop to capture a kind of call that is new, so a model that is compiled learns what it will need beforehand.

A compiled graph works on memory, so what it reads must be there. But where the logits are nothing but an output of the
compiled model, they can go on being deferred: an operator that looks like the product to the compiler returns them.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
import weakref
from typing import Any
from unittest import mock

import torch
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

from .clone import clone_tree, detach_state
from .deferred import compute_logits, deferred
from .kernels._operators import operator


def logits_under_compile(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    scale: float,
    autocast: torch.dtype | None,
    requires_grad: bool,
) -> torch.Tensor:
    """What `deferred_logits` returns there."""
    if not _only_returned():
        return compute_logits(x, weight, bias, softcap, scale)  # which the compiler drops if nobody reads it
    x, weight, bias = (None if t is None else t.detach() for t in (x, weight, bias))
    return _deferred_after_compiled(x, weight, bias, softcap, scale, autocast, requires_grad)


def _compiled_model() -> tuple[InstructionTranslator | None, Any]:
    """What is being compiled, and the optimised model whose forward that is; None where it is something else."""
    compiled = None
    with contextlib.suppress(AttributeError):  # where nothing has been compiled yet
        compiled = InstructionTranslator.current_tx()
    if compiled is None:  # torch.export without the compiler's front end
        return None, None
    model = compiled.f_locals.get("self")
    forward = getattr(type(model), "forward", None)
    return compiled, model if getattr(forward, "__code__", None) is compiled.f_code else None


_learnt: weakref.WeakSet[InstructionTranslator] = weakref.WeakSet()


@torch.compiler.assume_constant_result
def learn() -> None:
    """Lets an optimised model that is about to be compiled learn what its modules are called with.

    It runs on tensors without memory, before the compiler looks at what its modules know.
    """
    compiled, model = _compiled_model()
    if model is None or compiled in _learnt:
        return
    _learnt.add(compiled)
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    # The flag says to everybody in the process that a compiler is at work, whatever Python code asks.
    eager = mock.patch.object(torch.compiler, "_is_compiling_flag", False)
    with contextlib.suppress(Exception), eager, torch.compiler.set_stance("force_eager"):
        with FakeCopyMode(fakes):  # a cache, say, which the call writes to
            args, kwargs = copy.deepcopy((compiled.f_locals["args"], compiled.f_locals["kwargs"]))
        rehearsal = _without_state(model, fakes)
        with fakes:
            type(model).forward(rehearsal, *args, **kwargs)


def _without_state(model: Any, fakes: FakeTensorMode) -> Any:
    """A shallow copy that a forward may change, tensors and all. What its modules learn, those of the model know."""
    copies: dict[int, Any] = {}
    rehearsal = clone_tree(model, type, copies)
    for module in copies.values():
        detach_state(module, fakes.from_tensor)
        buffers = module._buffers
        buffers.update({name: fakes.from_tensor(value) for name, value in buffers.items() if value is not None})
    return rehearsal


@torch.compiler.assume_constant_result
def warn_of_unknown_call(name: str) -> None:
    warnings.warn(
        f"torch.compile meets a call of {name} of a kind that ligerfx has not seen: its original forward is compiled, "
        "without what was rewritten. Run the function once before it is compiled, with the same kind of inputs, or "
        "compile the model itself",
        stacklevel=2,
    )


@torch.compiler.assume_constant_result
def _only_returned() -> bool:
    """Whether the function that is being compiled is the forward of an optimised model, which returns its deferred
    logits and does nothing else with them."""
    _, model = _compiled_model()
    return model is not None and model.only_returns_deferred_logits()


class _NoGradient(torch.autograd.Function):
    """Logits that a compiled graph returned: it has no gradient for them, unlike the logits themselves."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        raise RuntimeError(
            "backward through the logits of a model that is compiled with torch.compile and was given labels: its "
            "logits are computed after the compiled graph, and have no gradient. Call it without labels and compute "
            "the loss from the logits, or compile the function that computes the loss with the model in it."
        )


def _empty_logits(x: torch.Tensor, weight: torch.Tensor, bias: Any, softcap: Any, scale: Any, autocast: Any, _: Any):
    return torch.empty((*x.shape[:-1], weight.shape[0]), dtype=autocast or x.dtype, device=x.device)


# What a compiled graph hands to a Python object must be a tensor for the compiler. A CUDA graph could not make one anew
# in each replay.
@operator(
    "deferred_logits(Tensor x, Tensor weight, Tensor? bias, float? softcap, float scale, ScalarType? autocast,"
    " bool has_gradient) -> Tensor",
    _empty_logits,
    tags=(torch.Tag.cudagraph_unsafe,),
)
def _deferred_after_compiled(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    scale: float,
    autocast: torch.dtype | None,
    has_gradient: bool,
) -> torch.Tensor:
    def convert(logits: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            return _NoGradient.apply(logits.detach().requires_grad_()) if has_gradient else logits

    # The compiler takes x's memory for something else when nothing in its graph needs x any more.
    return deferred(x.clone(), weight, bias, softcap, scale, autocast, False, convert)
