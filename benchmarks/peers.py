"""Who computes an op: ligerfx and its peers, ready to be called on a case, and how their results are checked."""

import importlib
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.cases import Case
from ligerfx import kernels

EPS = 1e-6
# Relative error allowed against float32. Peers may round more: some sum weight gradients in bf16.
TOLERANCE, PEER_TOLERANCE = 0.02, 0.1


def liger(name: str) -> Callable:
    return getattr(importlib.import_module("liger_kernel.transformers.functional"), f"liger_{name}")


def liger_packed_glu() -> Callable:
    return importlib.import_module("liger_kernel.ops").LigerFusedGateUpSiLUMulFunction.apply


def liger_glu_mlp() -> Callable:
    glu = liger("swiglu")

    def run(x: Tensor, gate_weight: Tensor, up_weight: Tensor, weight: Tensor) -> Tensor:
        return F.linear(glu(F.linear(x, gate_weight), F.linear(x, up_weight)), weight)

    return run


def cut_cross_entropy() -> Callable:
    return importlib.import_module("cut_cross_entropy").linear_cross_entropy


def liger_norm_rope() -> Callable:
    norm, rope = partial(liger("rms_norm"), eps=EPS), liger("rope")

    def run(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        # As in the model that Liger patches: norms before the heads are transposed.
        q, k = norm(q.transpose(1, 2), q_weight), norm(k.transpose(1, 2), k_weight)
        return rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin)

    return run


# What is not made from our own references; loaded when asked for, since any may be missing.
OTHERS: dict[str, dict[str, Callable[[], Callable]]] = {
    "rms_norm": {
        "liger": lambda: partial(liger("rms_norm"), eps=EPS),
        "aten": lambda: lambda x, weight: F.rms_norm(x, weight.shape, weight, EPS),
    },
    "add_rms_norm": {"liger": lambda: partial(liger("fused_add_rms_norm"), eps=EPS)},
    "glu": {"liger": lambda: liger("swiglu")},
    "packed_glu": {"liger": liger_packed_glu},
    "glu_mlp": {"liger": liger_glu_mlp},
    "rope": {"liger": lambda: liger("rope")},
    "norm_rope": {"liger": liger_norm_rope},
    "cross_entropy": {"liger": lambda: liger("cross_entropy"), "aten": lambda: F.cross_entropy},
    "linear_cross_entropy": {
        "ligerfx-bf16": lambda: partial(kernels.linear_cross_entropy, accumulate_in=None),
        "liger": lambda: liger("fused_linear_cross_entropy"),
        "cce": cut_cross_entropy,
    },
}
# In the order in which they are measured: first what a run that is cut short should have.
PEERS = ("ligerfx", "ligerfx-bf16", "floor", "copy", "eager", "liger", "inductor", "aten", "cce")
IN_PLACE = {"liger"}  # writes over its inputs, or over the gradient that comes in


def peers_of(op: str, peers: list[str]) -> list[str]:
    """Those of the peers that have this op; the floor and the copy are none, and are measured apart."""
    everywhere = ("ligerfx", "eager", "inductor")
    return [peer for peer in PEERS if peer in peers and (peer in everywhere or peer in OTHERS[op])]


def load(op: str, peer: str) -> Callable:
    if peer == "ligerfx":
        return getattr(kernels, op)
    reference = getattr(kernels, f"{op}_reference")
    if peer == "eager":
        return reference
    return torch.compile(reference, dynamic=False) if peer == "inductor" else OTHERS[op][peer]()


class Calls(NamedTuple):
    """A peer, ready to be called on a case."""

    forward: Callable[[], tuple[Tensor, ...]]
    both: Callable[[], list[Tensor]]  # outputs and gradients
    leaves: list[Tensor]
    upstream: list[Tensor]
    restore: Callable[[], None]  # undoes what the peer writes over


def prepare(function: Callable, case: Case, in_place: bool) -> Calls:
    inputs, upstream = case.inputs, case.upstream
    if in_place:
        inputs = [t.detach().clone().requires_grad_(t.requires_grad) for t in inputs]
        upstream = [t.clone() for t in upstream]
    leaves = [t for t in inputs if t.requires_grad]

    def restore() -> None:
        if in_place:
            for mine, original in zip(inputs + upstream, case.inputs + case.upstream, strict=True):
                mine.data.copy_(original.data)  # behind autograd's back, which would refuse a backward

    def forward() -> tuple[Tensor, ...]:
        outputs = function(*inputs)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def both() -> list[Tensor]:
        outputs = forward()
        grads = torch.autograd.grad(outputs, leaves, like(upstream, outputs))
        return [t.detach() for t in outputs] + list(grads)

    return Calls(forward, both, leaves, upstream, restore)


def like(upstream: list[Tensor], outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Incoming gradients in the dtypes of the outputs: a loss may be float32 or bf16."""
    return [u.to(o.dtype) for u, o in zip(upstream, outputs, strict=True)]


FLOOR_ROWS = (1024, 2048, 4096, 8192)


def floors(case: Case) -> dict[int, Callable[[], None]]:
    """The matrix products of a case alone, by the rows that are computed at a time."""
    if case.op == "linear_cross_entropy":
        return {rows: _loss_products(case, rows) for rows in FLOOR_ROWS}
    return {len(case.inputs[0]): partial(_mlp_products, *(t.detach() for t in case.inputs))}


def _mlp_products(x: Tensor, gate_weight: Tensor, up_weight: Tensor, weight: Tensor) -> None:
    """Forward and backward; x is as large as the gradient that comes in."""
    gate, up = x @ gate_weight.t(), x @ up_weight.t()
    gate @ weight.t()
    x @ weight
    x.t() @ gate
    (gate @ gate_weight).addmm_(up, up_weight)
    gate.t() @ x
    up.t() @ x


def _loss_products(case: Case, rows: int) -> Callable[[], None]:
    """The three of a linear layer and its loss, on the rows that count."""
    x, weight, target = case.inputs
    x, weight = x.detach()[target != -100], weight.detach()
    dx, dw = torch.empty_like(x), torch.empty_like(weight)

    def run() -> None:
        logits = torch.empty(rows, weight.shape[0], dtype=x.dtype, device=x.device)
        for start in range(0, len(x), rows):
            part = x[start : start + rows]
            chunk = torch.mm(part, weight.t(), out=logits[: len(part)])
            torch.mm(chunk, weight, out=dx[start : start + rows])
            torch.addmm(dw, chunk.t(), part, beta=min(start, 1), out=dw)

    return run


def truth(case: Case) -> list[Tensor]:
    """Outputs and gradients of the reference in float32."""
    reference = getattr(kernels, f"{case.op}_reference")

    def in_chunks(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        """All logits in float32, with what the loss saves of them, would not fit."""
        loss = partial(reference, reduction="sum")
        parts = zip(x.split(2048), target.split(2048), strict=True)
        losses = [checkpoint(loss, rows, weight, labels, use_reentrant=False) for rows, labels in parts]
        return sum(losses) / (target != -100).sum()

    function = in_chunks if case.op == "linear_cross_entropy" else reference
    exact = case._replace(
        inputs=[
            t.detach().float().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in case.inputs
        ],
        upstream=[t.float() for t in case.upstream],
    )
    return prepare(function, exact, in_place=False).both()


def check(actual: list[Tensor], expected: list[Tensor], peer: str) -> float:
    """The largest relative error of the outputs and gradients; AssertionError if it is too large."""
    tolerance = TOLERANCE if peer.startswith("ligerfx") else PEER_TOLERANCE
    errors = [((a.float() - e).norm() / e.norm()).item() for a, e in zip(actual, expected, strict=True)]
    worst = math.nan if any(map(math.isnan, errors)) else max(errors)
    if not worst <= tolerance:
        raise AssertionError(f"wrong: relative errors {', '.join(f'{error:.1e}' for error in errors)}")
    return worst


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """TimeoutError in whatever Python runs inside for longer: a compiler, an autotuner."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"first call took longer than {seconds:.0f} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 5)  # again, should a destructor have swallowed the first
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
