"""Which operation a node of a graph is, and of what kind: by its common name, however it is called."""

from __future__ import annotations

import torch
from torch.fx import Node

from .capture import works_in_place

CASTS = ("to", "float", "half", "bfloat16", "double", "type", "type_as")
"""Operations whose result is what they are given, in another dtype or on another device."""

VIEWS = {
    "view", "reshape", "flatten", "unflatten", "view_as", "reshape_as", "transpose", "permute", "t", "swapaxes",
    "expand", "expand_as", "broadcast_to", "unsqueeze", "squeeze", "getitem", "select", "narrow", "chunk", "split",
    "unbind", "detach", "contiguous", *CASTS,
}  # fmt: skip
"""Operations whose result may share memory with what they are given."""

IMPURE = {
    "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "rrelu",
    "gumbel_softmax", "scaled_dot_product_attention", "multi_head_attention_forward", "bernoulli", "multinomial",
    "normal", "poisson", "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "empty",
    "empty_like", "setitem",
}  # fmt: skip
"""Operations that may give another result for the same arguments, or whose effect is elsewhere."""


def op_name(node: Node) -> str | None:
    """The operation of a node by its common name, None for what has none."""
    if node.op == "call_method":
        return node.target
    if node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        module = getattr(node.target, "__module__", "") or ""
        from_torch = module.split(".")[0] in ("torch", "_operator") or vars(torch).get(name) is node.target
        return name if from_torch else None
    if node.op == "call_module" and "parameters" in node.meta:
        return "linear_module"
    return None


def is_pure(node: Node) -> bool:
    """Whether the node is an operation of torch that gives the same wherever in the graph it stands."""
    name = op_name(node)
    return name is not None and node.op != "call_module" and name not in IMPURE


def is_cast(node: Node) -> bool:
    return op_name(node) in CASTS


def mutates(node: Node) -> bool:
    """Whether the node changes a tensor in place."""
    return works_in_place(op_name(node) or "", node.kwargs)
