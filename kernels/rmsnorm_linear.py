"""RMSNorm and the linear layers that read it (q, k and v; gate and up), with the residual stream handed on.

The normalised y is not kept for the backward: the kernel that turns y's gradient into x's reads all that y is
made of, and writes it again over that gradient, for the weights' gradients to be computed from. What would
be separate additions are addends: each layer's share of y's gradient of the next matrix product, and the
residual stream's gradient of the norm's kernel. That is why x is among the outputs.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from . import rmsnorm
from ._autograd import apply, once_differentiable
from ._linear import check_linear, is_plain_linear, no_autocast, sum_of_products
from ._runtime import autocast_dtype, use_triton


def rms_norm_linear_reference(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None] | None = None,
    eps: float = 1e-6,
    *,
    residual: torch.Tensor | None = None,
    offset: float = 0.0,
    cast: str = "before_weight",
) -> tuple[torch.Tensor, ...]:
    """Plain PyTorch `rms_norm_linear`.

    Arguments, results and errors are those of `rms_norm_linear`.

    Examples:
        >>> import torch
        >>> from ligerfx.kernels import rms_norm_linear_reference
        >>> x, norm_weight, weights = torch.randn(2, 5, 8), torch.ones(8), [torch.randn(16, 8), torch.randn(4, 8)]
        >>> q, k, h = rms_norm_linear_reference(x, norm_weight, weights)
        >>> q.shape, k.shape, h.shape
        (torch.Size([2, 5, 16]), torch.Size([2, 5, 4]), torch.Size([2, 5, 8]))
    """
    biases = _check(x, norm_weight, weights, biases, residual, cast)
    y, h = rmsnorm.added_norm(x, residual, norm_weight, eps, offset, cast)
    return *map(F.linear, itertools.repeat(y), weights, biases), h


def _unfused(x, norm_weight, weights, biases, eps, residual, offset, cast):
    """What autocast, promotion and other layouts are left to: the norm's kernel, then the eager layers."""
    y, h = rmsnorm.add_rms_norm(x, residual, norm_weight, eps, offset=offset, cast=cast)
    return *(F.linear(y, weight, bias) for weight, bias in zip(weights, biases, strict=True)), h


def fuses(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    norm_weight: torch.Tensor,
    cast_after: bool,
    layers: Iterable[tuple[torch.Tensor, torch.Tensor | None]],
) -> bool:
    """Whether a norm of x + residual and linear layers (weight, bias) after it can be one function: the layouts are the
    kernel's, and the layers take the norm's dtype as it is."""
    dtype = x.dtype
    if not cast_after and norm_weight.dtype != dtype:
        dtype = torch.promote_types(dtype, norm_weight.dtype)
    return (
        autocast_dtype(x.device.type) is None
        and x.is_contiguous()
        and (residual is None or (residual.dtype == x.dtype and residual.is_contiguous()))
        and all(is_plain_linear(dtype, weight, bias) for weight, bias in layers)
    )


def stream_of(ctx: Any, x: torch.Tensor, residual: torch.Tensor | None, h: torch.Tensor) -> torch.Tensor:
    """The residual stream h as an output of a function whose first inputs are x and the residual."""
    # An input cannot be returned as it is: in-place operations on it would go unnoticed.
    stream = x.view_as(x) if residual is None else h
    if not any(ctx.needs_input_grad[:2]):
        ctx.mark_non_differentiable(stream)
    return stream


def layers_backward(
    needs: Sequence[bool],
    norm: tuple,
    dh: torch.Tensor | None,
    y: torch.Tensor | None,
    douts: Sequence[torch.Tensor | None],
    weights: Sequence[torch.Tensor],
    need_weights: Sequence[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, list[torch.Tensor | None]]:
    """The gradients of x, the residual, the norm's weight and the layers' weights.

    Args:
        needs: whether those of x, the residual and the norm's weight are needed.
        norm: (h, norm_weight, rstd, eps, offset, cast_after).
        dh: the gradient of the residual stream h.
        y: the norm's result, or None if it was not kept.
        douts: the gradients of the layers' results, [rows, N_i]; None for one that went unused.
    """
    h, norm_weight, rstd, eps, offset, cast_after = norm
    need_x, need_residual, need_norm = needs
    need_dx = need_x or need_residual
    need_weights = [need and d is not None for need, d in zip(need_weights, douts, strict=True)]
    factors = [(d, weight) for d, weight in zip(douts, weights, strict=True) if d is not None]
    dx, dnorm = dh if need_dx else None, None
    if factors and (need_dx or need_norm):
        more = [list(parts) for parts in zip(*factors[1:], strict=True)] or [[], []]
        dy = sum_of_products(*factors[0], *more).view(h.shape)
        need_y = y is None and need_dx and any(need_weights)  # it takes the place of its gradient
        dx, dnorm, again = rmsnorm.backward(
            dy, dh, h, norm_weight, rstd, offset, cast_after, need_dx, need_norm, need_y
        )
        y = again if need_y else y
    if y is None and any(need_weights):
        y, _, _ = rmsnorm.forward(h, None, norm_weight, eps, offset, cast_after)
    if y is not None:
        y = y.view(-1, y.shape[-1])
    dweights = [torch.mm(d.t(), y) if need else None for d, need in zip(douts, need_weights, strict=True)]
    return dx if need_x else None, dx if need_residual else None, dnorm, dweights


class _RMSNormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, norm_weight, options, *layers):
        eps, offset, cast_after, recompute = options
        n = len(layers) // 2
        weights, biases = layers[:n], layers[n:]
        y, h, rstd = rmsnorm.forward(x, residual, norm_weight, eps, offset, cast_after)
        kept = None if recompute or not any(ctx.needs_input_grad[4 : 4 + n]) else y
        ctx.save_for_backward(h, norm_weight, rstd, kept, *weights)
        ctx.options = options[:3]
        ctx.set_materialize_grads(False)
        stream = stream_of(ctx, x, residual, h)
        return *(F.linear(y, weight, bias) for weight, bias in zip(weights, biases, strict=True)), stream

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        *douts, dh = grads
        h, norm_weight, rstd, y, *weights = ctx.saved_tensors
        needs, layers = ctx.needs_input_grad[:3], ctx.needs_input_grad[4:]
        need_w, need_b = layers[: len(weights)], layers[len(weights) :]
        # A layer whose output went unused has no gradient.
        douts = [d if d is None else d.reshape(-1, d.shape[-1]) for d in douts]
        norm = (h, norm_weight, rstd, *ctx.options)
        with no_autocast(h):
            dx, dresidual, dnorm, dweights = layers_backward(needs, norm, dh, y, douts, weights, need_w)
            dbiases = [d.sum(0) if need and d is not None else None for d, need in zip(douts, need_b, strict=True)]
        return dx, dresidual, dnorm, None, *dweights, *dbiases


def _check(x, norm_weight, weights, biases, residual, cast):
    """The biases, one a weight, after raising for what does not fit."""
    rmsnorm.check_rms_norm("rms_norm_linear", x, norm_weight, cast, residual)
    if not 1 <= len(weights) <= 4:
        raise ValueError(f"rms_norm_linear: expected 1 to 4 weights, got {len(weights)}")
    if biases is None:
        biases = (None,) * len(weights)
    elif len(biases) != len(weights):
        raise ValueError(f"rms_norm_linear: expected a bias or None a weight, got {len(biases)} for {len(weights)}")
    features = norm_weight.shape[0]
    for weight, bias in zip(weights, biases, strict=True):
        check_linear("rms_norm_linear", features, weight, bias)
    return biases


def rms_norm_linear(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None] | None = None,
    eps: float = 1e-6,
    *,
    residual: torch.Tensor | None = None,
    offset: float = 0.0,
    cast: str = "before_weight",
    recompute: bool = True,
) -> tuple[torch.Tensor, ...]:
    """F.linear(y, weight, bias) for each weight, with y = rms_norm(h, norm_weight), and h = x + residual.

    Kept for the backward are h and one number a row. The gradient that comes to h from the residual stream is
    added where x's gradient is written, if the stream continues from the h returned here.

    Args:
        x: [..., H], floating point.
        norm_weight: [H], floating point; may have another dtype than x.
        weights: one to four of [N_i, H], of y's dtype. If none needs a gradient (LoRA), the backward does not
            compute y again.
        biases: for each weight [N_i] or None; None: no biases.
        eps, offset, cast: as for `rms_norm`.
        residual: [..., H], or None for h = x.
        recompute: False keeps y for the backward, which then has one write of it less to do.

    Returns:
        A tensor [..., N_i] for each weight, then h [..., H]. Without a residual, h shares x's memory, so that
        neither may be changed in place.

    Raises:
        ValueError: for shapes or numbers of weights other than these, or another `cast`.
        TypeError: if x, norm_weight or residual is not floating point, or a weight or bias is of an integer dtype.

    Under autocast, and where dtypes differ or x or the residual is not contiguous, this is `add_rms_norm` and
    then the eager operations.

    Examples:
        >>> import torch
        >>> from ligerfx.kernels import rms_norm_linear
        >>> x, residual, norm_weight = torch.randn(2, 5, 8), torch.randn(2, 5, 8), torch.ones(8)
        >>> gate, up = torch.randn(24, 8), torch.randn(24, 8)
        >>> g, u, h = rms_norm_linear(x, norm_weight, [gate, up], residual=residual)
        >>> g.shape, u.shape, torch.equal(h, x + residual)
        (torch.Size([2, 5, 24]), torch.Size([2, 5, 24]), True)
    """
    if not use_triton(x, residual, norm_weight, *weights, *(biases or ())):
        return rms_norm_linear_reference(
            x, norm_weight, weights, biases, eps, residual=residual, offset=offset, cast=cast
        )
    biases = _check(x, norm_weight, weights, biases, residual, cast)
    cast_after = cast == "after_weight"
    if not fuses(x, residual, norm_weight, cast_after, zip(weights, biases, strict=True)):
        return _unfused(x, norm_weight, weights, biases, eps, residual, offset, cast)
    options = (float(eps), float(offset), cast_after, recompute)
    return apply(_RMSNormLinear, x, residual, norm_weight, options, *weights, *biases)
