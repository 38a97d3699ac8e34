"""Deferred logits: tensors of the right shape and dtype that compute themselves on first use."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from .names import package
from .sharded import is_called_by_zero, is_fully_sharded, is_hook_of_fsdp

_METADATA = {"__get__": {"shape", "dtype", "device", "ndim", "requires_grad", "layout", "is_cuda", "is_cpu",
                         "is_meta", "is_sparse", "is_nested", "is_quantized", "itemsize", "nbytes"}}  # fmt: skip
_METADATA_METHODS = {
    "size",
    "dim",
    "numel",
    "nelement",
    "is_floating_point",
    "is_complex",
    "element_size",
    "__len__",
}
_LAZY_METHODS = {"float", "to", "half", "bfloat16", "double", "detach", "contiguous", "clone"}
_UNKNOWN_YET = {"grad_fn", "_base"}
"""What wrappers of distributed training ask of every output of a model, to decide what to do with it: None until
the values exist."""

_PART_OF_GRADIENT = (
    "A hook or retain_grad of deferred logits sees the gradient of what is computed from them, and the model's own "
    "loss is not: a kernel computes it without them. With a forward hook on the head, the logits are an ordinary "
    "tensor, and the loss is computed from it: model.get_output_embeddings().register_forward_hook(lambda *_: None)."
)


class DeferredTensor(torch.Tensor):
    """A tensor whose values are computed when an operation first needs them.

    Asking for its shape, dtype or device computes nothing; casts and `detach` stay deferred. The result is
    part of the autograd graph as if it had been computed at once.

    Raises:
        RuntimeError: on first use, if a tensor that it is computed from was changed in place in the meantime
            (by an optimiser step, say): its values could no longer be right.
    """

    _compute: Callable[[], torch.Tensor]
    _value: torch.Tensor | None
    _needs: list[Unchanged]
    _hooks: dict[int, Callable]
    _freed: bool
    _late: bool
    _has_graph: bool

    @staticmethod
    def make(
        compute: Callable[[], torch.Tensor],
        needs: list[Unchanged],
        shape: Any,
        dtype: torch.dtype,
        device: torch.device,
        requires_grad: bool,
        late: bool = False,
    ) -> DeferredTensor:
        """`late`: to others it is a tensor without a gradient, but values that are read where gradients are on have a
        graph."""
        self = torch.Tensor._make_wrapper_subclass(
            DeferredTensor, shape, dtype=dtype, device=device, requires_grad=requires_grad
        )
        self._compute, self._needs, self._value, self._hooks = compute, needs, None, OrderedDict()
        self._freed, self._late, self._has_graph = False, late, False
        return self

    def materialize(self) -> torch.Tensor:
        """The ordinary tensor that this one stands for."""
        with torch._C.DisableTorchFunctionSubclass():
            needs_graph = self.requires_grad or (self._late and torch.is_grad_enabled())
            if self._value is None or (needs_graph and not self._has_graph):
                for needed in self._needs:
                    needed.check(self._freed)
                # As if computed at once: with a graph if gradients were on then, whoever looks now.
                apart = needs_graph and not self._late and (self._is_of_another() or self._is_watched())
                with torch.set_grad_enabled(needs_graph and not apart):
                    self._value = self._compute()
                if apart:
                    with torch.enable_grad():
                        self._value = _Read.apply(self, self._value)
                else:
                    for hook in self._hooks.values():
                        self._value.register_hook(hook)
                # Not where an operation is dispatched below autograd, which looks at this tensor's own graph.
                self._has_graph = needs_graph and self._value.requires_grad
            return self._value

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        attribute = getattr(getattr(func, "__self__", None), "__name__", "") if name == "__get__" else ""
        if attribute in _METADATA["__get__"] or (name in _METADATA_METHODS and len(args) <= 2):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        first = args[0] if args else None
        if name == "retain_grad" or (name == "register_hook" and not _is_of_a_library(args[1])):
            warnings.warn(_PART_OF_GRADIENT, stacklevel=2 if name == "retain_grad" else 4)
        if isinstance(first, DeferredTensor) and first._value is None:
            if attribute in _UNKNOWN_YET:
                return None
            if name == "register_hook" and first.requires_grad:
                return first._hook_later(args[1])
        if name in _LAZY_METHODS and isinstance(first, DeferredTensor) and _stays_deferred(name, args, kwargs):
            if name == "detach" and first._late and is_called_by_zero():
                # It makes a function's result of that, which is part of the graph if what it was made from is.
                return first._then(_itself, (), {})
            return first._then(func, args[1:], kwargs)
        args, kwargs = tree_map_only(DeferredTensor, DeferredTensor.materialize, (tuple(args), dict(kwargs)))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.aten.detach.default:  # what making a wrapper subclass itself calls
            return args[0]
        args, kwargs = tree_map_only(DeferredTensor, DeferredTensor._below_autograd, (tuple(args), dict(kwargs or {})))
        return func(*args, **kwargs)

    def _below_autograd(self) -> torch.Tensor:
        return self.materialize() if self._value is None else self._value

    def _then(self, func: Callable, args: tuple, kwargs: dict) -> DeferredTensor:
        """The deferred result of `func` on this tensor."""
        attached = func.__name__ != "detach"
        with torch._C.DisableTorchFunctionSubclass():
            like = func(torch.empty(0, dtype=self.dtype, device=self.device), *args, **kwargs)

        def make(requires_grad: bool) -> DeferredTensor:
            return DeferredTensor.make(
                lambda: func(self.materialize(), *args, **kwargs),
                [],
                self.shape,
                like.dtype,
                like.device,
                requires_grad,
                self._late and attached,
            )

        if attached and torch.is_grad_enabled() and self._is_attached():
            return _Cast.apply(make, self)
        return make(self.requires_grad and attached)

    def _is_attached(self) -> bool:
        """Whether it is part of the graph by itself, without its values."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.grad_fn is not None

    def _is_of_another(self) -> bool:
        """Whether another function than those here returned it: reentrant checkpointing, say, which runs the model
        without gradients, and again with them in the backward."""
        with torch._C.DisableTorchFunctionSubclass():
            ours = (_Attached._backward_cls, _Cast._backward_cls)
            return self.grad_fn is not None and not isinstance(self.grad_fn, ours)

    def _is_watched(self) -> bool:
        """Whether what operations save is for somebody else to keep or make again: for checkpointing of what reads
        these values, which must save as much when it runs again and finds them."""
        return self._is_attached() and torch._C._autograd._top_saved_tensors_default_hooks(True) is not None

    def _hook_later(self, hook: Callable) -> RemovableHandle:
        """Keeps a hook of the gradient for the values."""
        handle = RemovableHandle(self._hooks)
        self._hooks[handle.id] = hook
        if self._is_attached():
            hooks = self._hooks
            with torch._C.DisableTorchFunctionSubclass():
                self.register_hook(lambda grad: hook(grad) if handle.id in hooks else None)
        if is_hook_of_fsdp(hook) and self._needs:
            # The whole weights last until the backward. Their version is no sign: FSDP keeps it when it gathers others.
            me = weakref.ref(self)

            def freed(grad: torch.Tensor) -> None:
                if (deferred := me()) is not None:
                    deferred._freed = True

            with torch._C.DisableTorchFunctionSubclass():
                x = self._needs[0].tensor
                if x.requires_grad:
                    x.register_hook(freed)
        return handle

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return repr(self.materialize())


def settled_if_sharded(module: torch.nn.Module, out: Any) -> Any:
    """The output of a module, whose deferred logits are computed now where FSDP2 may free the whole weights now."""
    if not torch.is_grad_enabled() and is_fully_sharded(module):
        return tree_map_only(DeferredTensor, DeferredTensor.materialize, out)
    return out


class Unchanged:
    """A tensor that values are computed from, which must be as it was."""

    def __init__(self, tensor: torch.Tensor, sampled: bool) -> None:
        self.tensor, self.version = tensor, tensor._version
        sampled = sampled and type(tensor) in (torch.Tensor, torch.nn.Parameter)
        self.sample = self._sample().clone() if sampled else None

    def _sample(self) -> torch.Tensor:
        """Some of the numbers of a matrix. The fused steps of torch's optimizers, and those that write to `data`, leave
        the version of a weight as it is."""
        tensor = self.tensor.detach()
        return tensor[tuple(slice(None, None, max(1, size // 64)) for size in tensor.shape)]

    def check(self, freed: bool) -> None:
        """Raises RuntimeError if the tensor has changed since, or if FSDP has freed it."""
        changed = self.tensor._version != self.version
        if not changed and (freed or self.tensor.untyped_storage().nbytes() == 0 < self.tensor.numel()):
            raise RuntimeError(
                "the logits of this output were deferred, and FSDP has freed the whole weights of the "
                "head since. Read outputs.logits before the backward, and do not reshard the module that "
                "holds the head after forward (FSDP2: reshard_after_forward=False, the root's default)."
            )
        from .kernels.counted_rows import capturing  # imports Triton, which `import ligerfx` must not

        if not changed and self.sample is not None and not capturing(self.tensor):
            now = self._sample()
            changed = now.dtype != self.sample.dtype or now.shape != self.sample.shape
            changed = changed or not torch.allclose(now.to(self.sample.device), self.sample, 0.0, 0.0, equal_nan=True)
        if changed:
            raise RuntimeError(
                "the logits of this output were deferred, and the model's weights have changed since "
                "(an optimiser step?). Read outputs.logits before the weights change."
            )


class _Attached(torch.autograd.Function):
    """Makes a deferred tensor a result of what it is computed from, for those who take its gradient but do not ask it
    for its values: autograd, where it is handed to a `torch.autograd.Function` as it is."""

    @staticmethod
    def forward(ctx: Any, make: Callable, compute: Callable, needs: list[Unchanged], *inputs: torch.Tensor | None):
        # Not saved: a hook on saved tensors would copy the weight, perhaps to another device.
        ctx.compute, ctx.needs, ctx.inputs = compute, needs, inputs
        return make(False)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        for needed in ctx.needs:
            needed.check(False)
        again = torch.is_grad_enabled()  # there may be a second derivative
        with torch.enable_grad():
            inputs = [
                t if again or t is None else t.detach().requires_grad_(need)
                for t, need in zip(ctx.inputs, ctx.needs_input_grad[3:], strict=True)
            ]
            wanted = [t for t, need in zip(inputs, ctx.needs_input_grad[3:], strict=True) if need]
            found = iter(torch.autograd.grad(ctx.compute(*inputs), wanted, grad, create_graph=again))
        return None, None, None, *(next(found) if need else None for need in ctx.needs_input_grad[3:])


class _Cast(torch.autograd.Function):
    """The same for what another deferred tensor is cast to, or a copy of it."""

    @staticmethod
    def forward(ctx: Any, make: Callable, tensor: DeferredTensor) -> DeferredTensor:
        ctx.dtype = tensor.dtype
        return make(False)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return None, grad.to(ctx.dtype)


class _Read(torch.autograd.Function):
    """The values of a deferred tensor, whose gradient is that of the tensor itself."""

    @staticmethod
    def forward(ctx: Any, tensor: DeferredTensor, value: torch.Tensor) -> torch.Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad, None


def _is_of_a_library(hook: Callable) -> bool:
    return package(getattr(hook, "func", hook)) in ("torch", "deepspeed", "accelerate")  # of FSDP1 a partial


def _itself(x: torch.Tensor) -> torch.Tensor:
    return x


def _stays_deferred(name: str, args: tuple, kwargs: dict) -> bool:
    return name != "to" or all(isinstance(a, torch.dtype) for a in (*args[1:], *kwargs.values()))


def compute_logits(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, softcap: float | None, scale: float
) -> torch.Tensor:
    logits = F.linear(x, weight, bias)
    if scale != 1.0:
        logits = logits * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return logits


def deferred_logits(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
    late: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """The logits `x @ weight.T + bias`, scaled and soft-capped, computed when somebody looks at them.

    Args:
        x: hidden states [..., H].
        weight: [V, H].
        bias: [V].
        softcap: logits become softcap * tanh(logits / softcap).
        scale: factor on the logits, before the soft cap.
        late: to others they have no gradient, but values that are read where gradients are on have a graph, and this
            function has the last word on those.

    Returns:
        A `DeferredTensor` [..., V]; in what torch.compile traces an ordinary tensor, unless it is an output of the
        model that is compiled.
    """
    from .kernels._runtime import autocast_dtype  # imports Triton, which `import ligerfx` must not

    autocast = autocast_dtype(x.device.type)
    requires_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, bias) if t is not None)
    if torch.compiler.is_compiling():
        from .compiled import logits_under_compile  # imports the compiler, which `import ligerfx` must not

        return logits_under_compile(x, weight, bias, softcap, scale, autocast, requires_grad)
    return deferred(x, weight, bias, softcap, scale, autocast, requires_grad, late=late)


def deferred(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    scale: float,
    autocast: torch.dtype | None,
    requires_grad: bool,
    convert: Callable[[torch.Tensor], torch.Tensor] = lambda logits: logits,
    late: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> DeferredTensor:
    """What `deferred_logits` returns; `convert` has the last word on the values."""
    from .kernels._autograd import is_transforming

    device, inputs = x.device.type, (x, weight, bias)

    def compute(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        mode: Any = contextlib.nullcontext()
        if torch.amp.is_autocast_available(device):
            mode = torch.autocast(device, dtype=autocast, enabled=autocast is not None)
        with mode:
            logits = convert(compute_logits(x, weight, bias, softcap, scale))
        return late(logits) if late and torch.is_grad_enabled() else logits

    needs = [Unchanged(t, sampled=t is weight) for t in inputs if t is not None and not t.is_inference()]

    def make(requires_grad: bool) -> DeferredTensor:
        return DeferredTensor.make(
            lambda: compute(*inputs),
            needs,
            (*x.shape[:-1], weight.shape[0]),
            autocast or x.dtype,
            x.device,
            requires_grad and late is None,
            requires_grad and late is not None,
        )

    if requires_grad and late is None and torch.is_grad_enabled() and not is_transforming():
        return _Attached.apply(make, compute, needs, *inputs)
    return make(requires_grad)
