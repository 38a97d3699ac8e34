"""Starts to compile the kernels of a graph, forward and backward, before the graph runs first.

Each call of a kernel is rehearsed on tensors like those that it will get: the sizes of all that the graph computes are
known as functions of those of its inputs. Nothing depends on it: a kernel that is not compiled yet when it is launched,
or another one than was thought, is compiled then.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import sympy
import torch
from torch import nn
from torch.fx import Node
from torch.fx.node import map_arg

from .capture import Capture, tensor_of
from .errors import CaptureError
from .symbols import expression, first_expression

_KERNELS = (f"{__package__}.kernels", f"{__package__}.patterns")
"""Where replacements are that launch our kernels."""


def prepare(device: torch.device) -> None:
    """Starts what has to be done before any kernel is compiled for this device."""
    if device.type == "cuda":
        from .kernels._ahead import start_triton

        start_triton()


def compile_ahead(capture: Capture, module: nn.Module, leaves: list) -> None:
    """Compiles what the (rewritten) graph of a capture launches, for a call of `module` with these leaves."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    if not any(tensor.is_cuda for tensor in tensors) or not all(map(is_plain, tensors)):
        return
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return  # somebody watches or changes what is called
    from .kernels._ahead import can_rehearse, rehearsing

    if can_rehearse():
        with rehearsing(), contextlib.suppress(Exception):  # whatever is wrong, the calls themselves will show it
            for target, args, kwargs in kernel_calls(capture, module, leaves):
                with contextlib.suppress(Exception):
                    target(*args, **kwargs)


def kernel_calls(capture: Capture, module: nn.Module, leaves: list) -> Iterator[tuple[Callable, tuple, dict]]:
    """The calls of kernels in a graph, in their order, with tensors like those that they will get."""
    stand_ins = _StandIns(capture, module, leaves)
    for node in capture.graph.nodes:
        home = getattr(node.target, "__module__", None) or ""
        if "pattern" in node.meta and home.startswith(_KERNELS):
            with contextlib.suppress(CaptureError, torch.OutOfMemoryError):
                yield node.target, stand_ins.like(node.args), stand_ins.like(node.kwargs)


def is_plain(tensor: torch.Tensor) -> bool:
    return type(tensor) in (torch.Tensor, nn.Parameter)


class _StandIns:
    """The inputs and parameters of a call, and for what is computed of them tensors of the same kind."""

    def __init__(self, capture: Capture, module: nn.Module, leaves: list) -> None:
        self.module = module
        self.sizes = _sizes(capture, leaves)
        inputs = [node for node in capture.graph.nodes if node.op == "placeholder"]
        self.leaves = dict(zip(inputs, (leaves[i] for i in capture.leaves), strict=True))
        self.needs_grad: dict[Node, bool] = {}
        for node in capture.graph.nodes:
            self.needs_grad[node] = torch.is_grad_enabled() and self._requires_grad(node)

    def _requires_grad(self, node: Node) -> bool:
        if node.op == "placeholder":
            return getattr(self.leaves[node], "requires_grad", False)
        if node.op == "get_attr":
            return getattr(tensor_of(self.module, node.target), "requires_grad", False)
        inside = self.module.get_submodule(node.target).parameters() if node.op == "call_module" else ()
        return any(self.needs_grad[n] for n in node.all_input_nodes) or any(p.requires_grad for p in inside)

    def like(self, args: Any) -> Any:
        return map_arg(args, self._value)

    def _value(self, node: Node) -> Any:
        if node.op == "placeholder":
            value = self.leaves[node]
            return value.detach().requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value
        known = node.meta.get("val")
        if node.op == "get_attr":
            value = tensor_of(self.module, node.target)
            # Not a module, whose call may gather its weights, and no weight that is sharded.
            if not is_plain(value) or value.shape != known.shape:
                raise CaptureError(f"{node.target} is no plain tensor")
            return value
        if "val" not in node.meta:  # a function of the inputs that is called early
            return node.target(*self.like(node.args), **self.like(node.kwargs))
        if not isinstance(known, torch.Tensor):
            return known if known is None or type(known) in (bool, int, float) else self._number(known)
        sizes, strides = ([self._number(n) for n in numbers] for numbers in (known.shape, known.stride()))
        made = torch.empty_strided(sizes, strides, dtype=known.dtype, device=known.device)
        if not made.is_floating_point():
            return made.zero_()  # an index, perhaps
        return made.requires_grad_(self.needs_grad[node])

    def _number(self, size: int | torch.SymInt) -> int:
        return int(expression(size).xreplace(self.sizes))


def _sizes(capture: Capture, leaves: list) -> dict[sympy.Expr, sympy.Integer]:
    """The sizes of this call, by their symbols in the graph."""
    sizes = {}
    for fake, leaf in zip(capture.leaf_values, leaves, strict=True):
        if isinstance(fake, torch.Tensor):
            for symbolic, size in zip(fake.shape, leaf.shape, strict=True):
                sizes[expression(symbolic)] = sizes[first_expression(symbolic)] = sympy.Integer(size)
    return sizes
