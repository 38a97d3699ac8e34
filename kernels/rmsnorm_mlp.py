"""RMSNorm and the gated MLP that reads it, with the residual stream handed on: the second half of a Llama layer.

What `rms_norm_linear` does for the norm's result and its gradients, and `glu_mlp` for the gated unit.
"""

import torch

from . import rmsnorm
from ._activations import Activation, key_of
from ._autograd import apply, once_differentiable
from ._linear import no_autocast
from ._runtime import use_triton
from .gated_linear import glu_linear_backward
from .gated_mlp import check_mlp, mlp, mlp_reference, projected_glu
from .rmsnorm_linear import fuses, layers_backward, stream_of


def rms_norm_mlp_reference(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float = 1e-6,
    *,
    residual: torch.Tensor | None = None,
    offset: float = 0.0,
    cast: str = "before_weight",
    activation: str | Activation = "silu",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain PyTorch `rms_norm_mlp`.

    Arguments, results and errors are those of `rms_norm_mlp`.

    Examples:
        >>> import torch
        >>> from ligerfx.kernels import rms_norm_mlp_reference
        >>> x, gate_up_weight, weight = torch.randn(2, 5, 4), torch.randn(16, 4), torch.randn(4, 8)
        >>> y, h = rms_norm_mlp_reference(x, torch.ones(4), gate_up_weight, None, weight, residual=x)
        >>> y.shape, torch.equal(h, x + x)
        (torch.Size([2, 5, 4]), True)
    """
    _check(x, norm_weight, gate_weight, up_weight, weight, residual, cast, activation)
    return _plain(x, residual, norm_weight, gate_weight, up_weight, weight, eps, offset, cast, activation)


def _plain(x, residual, norm_weight, gate_weight, up_weight, weight, eps, offset, cast, activation):
    """`rms_norm_mlp_reference`, for arguments that were checked."""
    y, h = rmsnorm.added_norm(x, residual, norm_weight, eps, offset, cast)
    return mlp_reference(y, gate_weight, up_weight, weight, None, activation), h


class _RMSNormMLP(torch.autograd.Function):
    """gate_weight is the packed one and up_weight None, or neither."""

    @staticmethod
    def forward(ctx, x, residual, norm_weight, gate_weight, up_weight, weight, options):
        eps, offset, cast_after, activation, recompute = options
        y, h, rstd = rmsnorm.forward(x, residual, norm_weight, eps, offset, cast_after)
        gate, *up, z = projected_glu(y.view(-1, y.shape[-1]), gate_weight, up_weight, activation)
        ctx.save_for_backward(
            h, norm_weight, rstd, gate_weight, up_weight, weight,
            gate, up[0] if up else None, z if ctx.needs_input_grad[5] and not recompute else None,
        )  # fmt: skip
        ctx.options = options[:4]
        ctx.set_materialize_grads(False)
        stream = stream_of(ctx, x, residual, h)
        return torch.mm(z, weight.t()).view(*x.shape[:-1], weight.shape[0]), stream

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dh):
        h, norm_weight, rstd, gate_weight, up_weight, weight, gate, up, z = ctx.saved_tensors
        *options, activation = ctx.options
        need_x, need_r, need_norm, need_gate, need_up, need_w, _ = ctx.needs_input_grad
        packed = up_weight is None
        if dout is None:  # the MLP's result went unused
            return dh if need_x else None, dh if need_r else None, *(None,) * 5
        dweight = None
        dout = dout.reshape(-1, dout.shape[-1])
        with no_autocast(h):
            need_dy = need_x or need_r or need_norm
            need_z = need_w and z is None
            wanted = need_dy or need_gate, (need_dy or need_up) and not packed, need_z
            dgate, dup, again = glu_linear_backward(dout, weight, gate, up, activation, *wanted)
            if need_w:
                dweight = torch.mm(dout.t(), again if need_z else z)
                z = again = None
            layers = [(dgate, gate_weight, need_gate)] + ([] if packed else [(dup, up_weight, need_up)])
            norm = (h, norm_weight, rstd, *options)
            dx, dresidual, dnorm, dweights = layers_backward(
                (need_x, need_r, need_norm), norm, dh, None, *zip(*layers, strict=True)
            )
        return dx, dresidual, dnorm, *dweights, *[None] * packed, dweight, None


def _check(x, norm_weight, gate_weight, up_weight, weight, residual, cast, activation):
    rmsnorm.check_rms_norm("rms_norm_mlp", x, norm_weight, cast, residual)
    check_mlp("rms_norm_mlp", x, gate_weight, up_weight, weight, None, activation)


def rms_norm_mlp(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float = 1e-6,
    *,
    residual: torch.Tensor | None = None,
    offset: float = 0.0,
    cast: str = "before_weight",
    activation: str | Activation = "silu",
    recompute: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`glu_mlp` of y = rms_norm(h, norm_weight), with h = x + residual.

    Kept for the backward are h, one number a row, gate, up and their product. The gradient that comes to h from the
    residual stream is added where x's gradient is written, if the stream continues from the h returned here.

    Args:
        x: [..., H], floating point.
        norm_weight: [H], floating point; may have another dtype than x.
        gate_weight, up_weight: [I, H], of y's dtype; or both in one, [2 * I, H] with the gate first, and None.
        weight: [N, I], of y's dtype.
        eps, offset, cast: as for `rms_norm`.
        residual: [..., H], or None for h = x.
        activation: as for `glu`.
        recompute: True does not keep the product of gate and up, either.

    Returns:
        [..., N], then h [..., H]. Without a residual, h shares x's memory, so that neither may be changed in place.

    Raises:
        ValueError: for shapes other than these, an unknown activation, or another `cast`.
        TypeError: if x, norm_weight or residual is not floating point, or a weight is of an integer dtype.

    Under autocast, and where dtypes differ or x or the residual is not contiguous, this is `add_rms_norm` and
    then `glu_mlp`.

    Examples:
        >>> import torch
        >>> from ligerfx.kernels import rms_norm_mlp
        >>> x, residual, norm_weight = torch.randn(2, 5, 8), torch.randn(2, 5, 8), torch.ones(8)
        >>> y, h = rms_norm_mlp(x, norm_weight, torch.randn(48, 8), None, torch.randn(8, 24), residual=residual)
        >>> y.shape, torch.equal(h, x + residual)
        (torch.Size([2, 5, 8]), True)
    """
    _check(x, norm_weight, gate_weight, up_weight, weight, residual, cast, activation)
    if not use_triton(x, residual, norm_weight, gate_weight, up_weight, weight):
        return _plain(x, residual, norm_weight, gate_weight, up_weight, weight, eps, offset, cast, activation)
    cast_after = cast == "after_weight"
    layers = [(w, None) for w in (gate_weight, up_weight, weight) if w is not None]
    if not fuses(x, residual, norm_weight, cast_after, layers):
        y, h = rmsnorm.add_rms_norm(x, residual, norm_weight, eps, offset=offset, cast=cast)
        return mlp(y, gate_weight, up_weight, weight, None, activation, recompute), h
    options = (float(eps), float(offset), cast_after, key_of(activation), recompute)
    return apply(_RMSNormMLP, x, residual, norm_weight, gate_weight, up_weight, weight, options)
