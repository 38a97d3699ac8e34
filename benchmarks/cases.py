"""What is measured: ops and their shapes, and for each the bytes that must move and the products to compute."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Case(NamedTuple):
    """One op at one shape, with what it works on."""

    op: str
    shape: str
    inputs: list[Tensor]
    upstream: list[Tensor]  # gradients of the outputs
    forward_bytes: int = 0  # that must move; 0 where matrix products are the limit
    backward_bytes: int = 0
    flops: int = 0  # of the matrix products, forward and backward


def leaf(*shape: int, std: float = 1.0) -> Tensor:
    return (std * torch.randn(shape)).bfloat16().requires_grad_()


def size(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def rms_norm(rows: int, hidden: int) -> Case:
    x, weight = leaf(rows, hidden), leaf(hidden)
    return Case(
        "rms_norm",
        f"{rows} x {hidden}",
        inputs=[x, weight],
        upstream=[torch.randn_like(x)],
        forward_bytes=size(x, weight, x),
        backward_bytes=size(x, x, weight, x, weight),
    )


def add_rms_norm(rows: int, hidden: int) -> Case:
    x, residual, weight = leaf(rows, hidden), leaf(rows, hidden), leaf(hidden)
    return Case(
        "add_rms_norm",
        f"{rows} x {hidden}",
        inputs=[x, residual, weight],
        upstream=[torch.randn_like(x), torch.randn_like(x)],
        forward_bytes=size(x, residual, weight, x, x),
        # The gradients of both outputs and the sum come in; both inputs have the same gradient.
        backward_bytes=size(x, x, x, weight, x, weight),
    )


def glu(rows: int, width: int) -> Case:
    gate, up = leaf(rows, width), leaf(rows, width)
    return Case(
        "glu",
        f"{rows} x {width}",
        inputs=[gate, up],
        upstream=[torch.randn_like(gate)],
        forward_bytes=3 * size(gate),
        backward_bytes=5 * size(gate),
    )


def packed_glu(rows: int, width: int) -> Case:
    gate_up, dy = leaf(rows, 2 * width), leaf(rows, width).detach()
    return Case(
        "packed_glu",
        f"{rows} x 2x{width}",
        inputs=[gate_up],
        upstream=[dy],
        forward_bytes=size(gate_up, dy),
        backward_bytes=size(dy, gate_up, gate_up),
    )


def glu_mlp(rows: int, hidden: int, width: int) -> Case:
    return Case(
        "glu_mlp",
        f"{rows} x {hidden} x {width}",
        inputs=[leaf(rows, hidden), *(leaf(width, hidden, std=hidden**-0.5) for _ in range(2)),
                leaf(hidden, width, std=width**-0.5)],
        upstream=[torch.randn(rows, hidden).bfloat16()],
        flops=18 * rows * hidden * width,
    )  # fmt: skip


def heads(batch: int, seq: int, count: int, width: int) -> Tensor:
    """As in the models: a transposed view of the projection's output, [batch, seq, count, width]."""
    return leaf(batch, seq, count, width).detach().transpose(1, 2).requires_grad_()


def angles(seq: int, width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotation, [1, 1, seq, width]."""
    both = torch.arange(seq).outer(10000.0 ** -torch.linspace(0, 1, width // 2)).repeat(1, 2)
    return both.cos().bfloat16()[None, None], both.sin().bfloat16()[None, None]


def rope(batch: int, seq: int, q_heads: int, k_heads: int, width: int) -> Case:
    q, k = heads(batch, seq, q_heads, width), heads(batch, seq, k_heads, width)
    cos, sin = angles(seq, width)
    moved = 2 * size(q, k) + size(cos, sin)
    return Case(
        "rope",
        f"B{batch} S{seq} {q_heads}+{k_heads} x {width}",
        inputs=[q, k, cos, sin],
        upstream=[torch.randn_like(q), torch.randn_like(k)],
        forward_bytes=moved,
        backward_bytes=moved,
    )


def norm_rope(batch: int, seq: int, q_heads: int, k_heads: int, width: int) -> Case:
    q, k = heads(batch, seq, q_heads, width), heads(batch, seq, k_heads, width)
    q_weight, k_weight = leaf(width), leaf(width)
    cos, sin = angles(seq, width)
    return Case(
        "norm_rope",
        f"B{batch} S{seq} {q_heads}+{k_heads} x {width}",
        inputs=[q, k, q_weight, k_weight, cos, sin],
        upstream=[torch.randn_like(q), torch.randn_like(k)],
        forward_bytes=2 * size(q, k) + size(q_weight, k_weight, cos, sin),
        backward_bytes=3 * size(q, k) + 2 * size(q_weight, k_weight) + size(cos, sin),
    )


def cross_entropy(rows: int, vocab: int) -> Case:
    logits, target = leaf(rows, vocab), torch.randint(vocab, (rows,))
    return Case(
        "cross_entropy",
        f"{rows} x {vocab}",
        inputs=[logits, target],
        upstream=[torch.ones(())],
        forward_bytes=size(logits, target),
        backward_bytes=size(logits, logits, target),
    )


def linear_cross_entropy(rows: int, hidden: int, vocab: int, ignored: float = 0.0) -> Case:
    target = torch.randint(vocab, (rows,))
    target[torch.randperm(rows)[: round(rows * ignored)]] = -100
    return Case(
        "linear_cross_entropy",
        f"{rows} x {hidden} x {vocab}" + (f", {ignored:.0%} ignored" if ignored else ""),
        inputs=[leaf(rows, hidden), leaf(vocab, hidden, std=0.02), target],
        upstream=[torch.ones(())],
        flops=6 * (rows - round(rows * ignored)) * hidden * vocab,
    )


class Op(NamedTuple):
    case: Callable[..., Case]
    shapes: list[tuple]
    small: tuple  # where the host is the limit


OPS = {
    op.case.__name__: op
    for op in (
        Op(
            linear_cross_entropy,
            [(8192, 2048, 128256), (8192, 4096, 128256), (16384, 2048, 151936), (8192, 2048, 128256, 0.6)],
            small=(64, 256, 1024),
        ),
        Op(add_rms_norm, [(16384, 2048), (8192, 4096), (16384, 1024)], small=(64, 256)),
        Op(norm_rope, [(8, 2048, 16, 8, 128), (4, 2048, 32, 8, 128)], small=(1, 64, 4, 2, 64)),
        Op(cross_entropy, [(4096, 128256)], small=(64, 1024)),
        Op(glu, [(8192, 14336), (16384, 8192)], small=(64, 256)),
        Op(packed_glu, [(8192, 8192)], small=(64, 256)),
        Op(glu_mlp, [(16384, 2048, 8192), (8192, 4096, 14336), (16384, 1024, 3072)], small=(64, 128, 256)),
        Op(rope, [(4, 2048, 32, 8, 128), (8, 2048, 32, 8, 64), (8, 2048, 16, 8, 128)], small=(1, 64, 4, 2, 64)),
        Op(
            rms_norm,
            [
                (8192, 2048), (8192, 4096), (16384, 4096), (4096, 8192), (2048, 16384), (8192, 1024),
                (8192, 3072), (131072, 128), (524288, 64), (262144, 256), (16384, 5120), (1024, 4096),
            ],
            small=(64, 256),
        ),
    )
}  # fmt: skip
