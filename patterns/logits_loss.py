"""The language-model head and its loss: logits = x @ weight.T (+ bias), then cross entropy in fp32.

The fused kernel computes the loss and the gradients in chunks and never holds all logits; the method is that of
"Cut Your Losses" (Wijmans et al. 2024, https://arxiv.org/abs/2411.09009). The logits that the model returns
become deferred ones, computed when somebody looks at them.
"""

from __future__ import annotations

import functools
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from ligerfx.deferred import deferred_logits
from ligerfx.kernels import cross_entropy, linear_cross_entropy, rows_that_count
from ligerfx.kernels.linear_crossentropy import LOGITS_BUDGET
from ligerfx.pattern import Pattern, pattern
from ligerfx.sharded import call_with, is_gathered_by_zero


def _loss(logits: torch.Tensor, target: torch.Tensor, **options) -> torch.Tensor:
    return F.cross_entropy(logits.float().view(-1, logits.shape[-1]), target.reshape(-1), **options)


def _applies(
    *, target: torch.Tensor, reduction: str, x: torch.Tensor = None, logits: torch.Tensor = None, **_
) -> str | None:
    rows = (x if logits is None else logits).shape[:-1]
    if target.shape != rows:  # labels that were flattened before a cast, say
        return f"target: expected shape {list(rows)}, found {list(target.shape)}"
    return None if reduction in ("mean", "sum") else f"reduction {reduction!r}: the kernel sums or averages"


def linear_cross_entropy_inside(
    head: nn.Linear, x: torch.Tensor, target: torch.Tensor,
    *, softcap: float | None = None, scale: float = 1.0, ignore_index: int = -100, reduction: str = "mean",
    label_smoothing: float = 0.0, rows: object = None, logits_budget: int = LOGITS_BUDGET,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The loss and the deferred logits, computed in a call of `head`, whose hooks gather its weights."""

    def loss_of(x: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(
            x, head.weight, target, head.bias, softcap=softcap, scale=scale, ignore_index=ignore_index,
            reduction=reduction, label_smoothing=label_smoothing, rows=rows, logits_budget=logits_budget,
        )  # fmt: skip

    if not is_gathered_by_zero(head):
        logits_of = partial(deferred_logits, softcap=softcap, scale=scale)
        return call_with(head, lambda x: (loss_of(x), logits_of(x, head.weight, head.bias)), x)
    logits = []

    def forward(x: torch.Tensor) -> torch.Tensor:
        # ZeRO-3 frees the weights after the call, but not the memory of views. And it makes each result of a module one
        # of a function of its own: not what the call does not return, and what seems to have no gradient.
        weight, bias = (p if p is None else p.view_as(p) for p in (head.weight, head.bias))
        logits.append(deferred_logits(x, weight, bias, softcap=softcap, scale=scale, late=with_loss))
        return loss_of(x)

    def with_loss(logits: torch.Tensor) -> torch.Tensor:
        return _WithLoss.apply(logits, loss)

    loss = call_with(head, forward, x)
    return loss, logits[0]


class _WithLoss(torch.autograd.Function):
    """The logits. Their backward passes by the loss, before which ZeRO-3 gathers the weights."""

    @staticmethod
    def forward(ctx, logits, loss):
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx, dlogits):
        return dlogits, dlogits.new_zeros(())


def _logits_loss(fixed: dict) -> Pattern:
    def logits_loss(
        x: "... H", weight: "V H", target: "int ...", bias: "V" = None,
        *, softcap: float | None = None, scale: float, ignore_index: int, reduction: str, label_smoothing: float,
    ):  # fmt: skip
        logits = F.linear(x, weight, bias) * scale
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        loss = _loss(logits, target, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing)
        return loss, logits

    replace = (partial(linear_cross_entropy, **fixed), deferred_logits)
    inside = partial(linear_cross_entropy_inside, **fixed)
    idioms = ["linear_cross_entropy"]
    return pattern(replace=replace, idioms=idioms, when=_applies, early=EARLY, inside=inside)(logits_loss)


@pattern(replace=cross_entropy, idioms=["cross_entropy"], when=_applies)
def loss_of_logits(logits: "... V", target: "int ...", *, ignore_index: int, reduction: str, label_smoothing: float):
    return _loss(logits, target, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing)


EARLY = {"rows": rows_that_count}
"""Which labels count is looked up at the start of the forward: the loss then waits for no more than that."""

SMALL_CHUNKS = 376 * 2**20
"""Bytes of logits at a time with low memory: 1536 rows of a vocabulary of 128256. Fewer rows take notably more time:
each chunk reads and writes the sum of the weight's gradient."""


@functools.cache
def patterns(low_memory: bool) -> list[Pattern]:
    return [_logits_loss({"logits_budget": SMALL_CHUNKS} if low_memory else {}), loss_of_logits]
