"""The whole of a gated MLP: gate and up projection, gated unit, down projection.

The unit is the end of the first two products, and its gradient that of the last one's, where there are kernels for
that (see _hopper_glu.py). What x's gradient gets from gate and from up is added by the second product.
"""

import torch
import torch.nn.functional as F

from . import _hopper, _hopper_glu
from ._activations import Activation, key_of
from ._autograd import apply, once_differentiable
from ._linear import check_linear, is_plain_linear, no_autocast, sum_of_products
from ._operators import operator
from ._runtime import as_rows, autocast_dtype, use_triton
from .gated import check_activation, gated, glu_forward, halves
from .gated_linear import glu_linear, glu_linear_backward, packed_glu_linear


def glu_mlp_reference(
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | Activation = "silu",
) -> torch.Tensor:
    """Plain PyTorch `glu_mlp`.

    Arguments, results and errors are those of `glu_mlp`.

    Examples:
        >>> import torch
        >>> from ligerfx.kernels import glu_mlp_reference
        >>> x, gate_weight, up_weight = torch.tensor([[1.0, 2.0]]), torch.eye(2), 3 * torch.eye(2)
        >>> glu_mlp_reference(x, gate_weight, up_weight, torch.ones(1, 2), activation="relu")
        tensor([[15.]])
    """
    check_mlp("glu_mlp", x, gate_weight, up_weight, weight, bias, activation)
    return mlp_reference(x, gate_weight, up_weight, weight, bias, activation)


def packed_glu_mlp_reference(
    x: torch.Tensor,
    gate_up_weight: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | Activation = "silu",
) -> torch.Tensor:
    """Plain PyTorch `packed_glu_mlp`.

    Arguments, results and errors are those of `packed_glu_mlp`.

    Examples:
        >>> import torch
        >>> from ligerfx.kernels import packed_glu_mlp_reference
        >>> x, gate_up_weight = torch.tensor([[1.0, 2.0]]), torch.cat([torch.eye(2), 3 * torch.eye(2)])
        >>> packed_glu_mlp_reference(x, gate_up_weight, torch.ones(1, 2), activation="relu")
        tensor([[15.]])
    """
    check_mlp("packed_glu_mlp", x, gate_up_weight, None, weight, bias, activation)
    return mlp_reference(x, gate_up_weight, None, weight, bias, activation)


def mlp_reference(x, gate_weight, up_weight, weight, bias, activation):
    """Either reference, for arguments that were checked; of packed weights if up_weight is None."""
    gate = F.linear(x, gate_weight)
    gate, up = gate.chunk(2, dim=-1) if up_weight is None else (gate, F.linear(x, up_weight))
    return F.linear(gated(gate, up, activation), weight, bias)


def _unfused(x, gate_weight, up_weight, weight, bias, activation, recompute):
    """What autocast and promotion are left to."""
    gate = F.linear(x, gate_weight)
    if up_weight is None:
        return packed_glu_linear(gate, weight, bias, activation, recompute=recompute)
    return glu_linear(gate, F.linear(x, up_weight), weight, bias, activation, recompute=recompute)


def _projected_results(rows, gate_weight, up_weight, activation):
    widths = [gate_weight.shape[0]] + [w.shape[0] for w in (up_weight,) if w is not None]
    units = widths[0] if up_weight is not None else widths[0] // 2
    return [torch.empty(rows.shape[0], n, dtype=rows.dtype, device=rows.device) for n in (*widths, units)]


@operator(
    "projected_glu(Tensor rows, Tensor gate_weight, Tensor? up_weight, str activation) -> Tensor[]",
    _projected_results,
)
def projected_glu(
    rows: torch.Tensor, gate_weight: torch.Tensor, up_weight: torch.Tensor | None, activation: str
) -> list[torch.Tensor]:
    """[gate, up, z], or [packed gate and up, z] if the weights are packed, of rows [M, H]; not differentiable."""
    weights = list(gate_weight.chunk(2)) if up_weight is None else [gate_weight, up_weight]
    if _hopper.takes(rows, weights[0].shape[0], weights, []):
        results = _projected_results(rows, gate_weight, up_weight, activation)
        written = [as_rows(part) for part in halves(results[0], None if up_weight is None else results[1])]
        if _hopper_glu.gated_product(rows, *weights, *written, results[-1], activation):
            return results
    products = [F.linear(rows, w) for w in (gate_weight, up_weight) if w is not None]
    return [*products, glu_forward(products[0], None if up_weight is None else products[1], activation)]


class _GLUMLP(torch.autograd.Function):
    """gate_weight is the packed one and up_weight None, or neither."""

    @staticmethod
    def forward(ctx, x, gate_weight, up_weight, weight, bias, activation, recompute):
        need_x, need_gate, need_up, need_w = ctx.needs_input_grad[:4]
        rows = as_rows(x)
        *gates, z = projected_glu(rows, gate_weight, up_weight, activation)
        need_gates = need_x or need_gate or need_up or (need_w and recompute)
        ctx.save_for_backward(
            rows if need_gate or need_up else None,
            *((gate_weight, up_weight) if need_x else (None, None)),
            weight if need_x or need_gate or need_up else None,
            *([*gates, None][:2] if need_gates else (None, None)),
            z if need_w and not recompute else None,
        )
        ctx.activation, ctx.shape, ctx.packed = activation, x.shape, up_weight is None
        return F.linear(z, weight, bias).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        rows, gate_weight, up_weight, weight, gate, up, z = ctx.saved_tensors
        need_x, need_gate, need_up, need_w, need_b = ctx.needs_input_grad[:5]
        dy = dy.reshape(-1, dy.shape[-1])
        dx = dgate = dup = dgate_weight = dup_weight = dw = None
        with no_autocast(dy):
            if need_x or need_gate or need_up:
                wanted = need_x or need_gate, (need_x or need_up) and not ctx.packed, need_w and z is None
                dgate, dup, again = glu_linear_backward(dy, weight, gate, up, ctx.activation, *wanted)
                z = again if z is None else z
            elif need_w and z is None:
                z = glu_forward(gate, up, ctx.activation)
            if need_x:
                more = ([], []) if ctx.packed else ([dup], [up_weight])
                dx = sum_of_products(dgate, gate_weight, *more).view(ctx.shape)
            if need_gate:
                dgate_weight = torch.mm(dgate.t(), rows)
            if need_up:
                dup_weight = torch.mm(dup.t(), rows)
            if need_w:
                dw = torch.mm(dy.t(), z)
            db = dy.sum(0) if need_b else None
        return dx, dgate_weight, dup_weight, dw, db, None, None


def check_mlp(
    op: str,
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | Activation,
) -> None:
    """Raise for what does not fit; up_weight is None if gate_weight is packed."""
    check_activation(op, activation)
    if not x.is_floating_point():
        raise TypeError(f"{op}: expected floating-point inputs, got {x.dtype}")
    for w in (gate_weight, up_weight):
        if w is not None:
            check_linear(op, x.shape[-1] if x.dim() else 0, w, None)
    width = gate_weight.shape[0]
    if up_weight is None:
        if width % 2:
            raise ValueError(f"{op}: the weight of gate and up must have an even number of rows, got {width}")
        width //= 2
    elif up_weight.shape[0] != width:
        raise ValueError(
            f"{op}: expected as many rows of gate_weight as of up_weight, got {width} and {up_weight.shape[0]}"
        )
    check_linear(op, width, weight, bias)


def mlp(x, gate_weight, up_weight, weight, bias, activation, recompute):
    """`glu_mlp` by the kernels, for arguments that were checked; of packed weights if up_weight is None."""
    others = [w for w in (up_weight, weight, bias) if w is not None]
    plain = all(is_plain_linear(x.dtype, w) for w in (gate_weight, *others))
    if autocast_dtype(x.device.type) is not None or not plain:
        return _unfused(x, gate_weight, up_weight, weight, bias, activation, recompute)
    return apply(_GLUMLP, x, gate_weight, up_weight, weight, bias, key_of(activation), recompute)


def glu_mlp(
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | Activation = "silu",
    *,
    recompute: bool = False,
) -> torch.Tensor:
    """F.linear(act(x @ gate_weight.T) * (x @ up_weight.T), weight, bias).

    Kept for the backward, as far as gradients need them, are x, gate, up and their product.

    Args:
        x: [..., H], floating point.
        gate_weight, up_weight: [I, H], of x's dtype.
        weight: [N, I], of x's dtype.
        bias: [N] or None.
        activation: as for `glu`.
        recompute: True does not keep the product of gate and up, either.

    Returns:
        [..., N].

    Raises:
        ValueError: for an unknown activation, or weights or a bias that do not fit.
        TypeError: if x is not floating point, or a weight or bias is of an integer dtype.

    On H100 and H200 the gated unit of 16-bit tensors is computed at the end of the first products, and its gradient
    at the end of the last one's, if there are enough rows. Under autocast, and where dtypes differ, this is the eager
    layers and `glu_linear`.

    Source: Shazeer, "GLU Variants Improve Transformer", 2020, arXiv:2002.05202.

    Examples:
        >>> import torch
        >>> from torch.nn.functional import silu
        >>> from ligerfx.kernels import glu_mlp
        >>> x, gate_weight, up_weight, weight = (torch.randn(shape) for shape in [(2, 5, 4), (8, 4), (8, 4), (4, 8)])
        >>> y = glu_mlp(x, gate_weight, up_weight, weight)
        >>> torch.allclose(y, (silu(x @ gate_weight.T) * (x @ up_weight.T)) @ weight.T, atol=1e-5)
        True
    """
    check_mlp("glu_mlp", x, gate_weight, up_weight, weight, bias, activation)
    if not use_triton(x, gate_weight, up_weight, weight, bias):
        return mlp_reference(x, gate_weight, up_weight, weight, bias, activation)
    return mlp(x, gate_weight, up_weight, weight, bias, activation, recompute)


def packed_glu_mlp(
    x: torch.Tensor,
    gate_up_weight: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | Activation = "silu",
    *,
    recompute: bool = False,
) -> torch.Tensor:
    """`glu_mlp` with gate and up projection in one weight.

    Args:
        x: [..., H], floating point.
        gate_up_weight: [2 * I, H], of x's dtype, the gate first.
        weight, bias, activation, recompute: as for `glu_mlp`.

    Returns:
        [..., N].

    Raises:
        ValueError: for an unknown activation, an odd number of rows of gate_up_weight, or a weight or bias that does
            not fit.
        TypeError: if x is not floating point, or a weight or bias is of an integer dtype.

    Examples:
        >>> import torch
        >>> from ligerfx.kernels import packed_glu_mlp
        >>> x, gate_up_weight, weight = torch.randn(2, 5, 4), torch.randn(16, 4), torch.randn(4, 8)
        >>> packed_glu_mlp(x, gate_up_weight, weight, activation="gelu").shape
        torch.Size([2, 5, 4])
    """
    check_mlp("packed_glu_mlp", x, gate_up_weight, None, weight, bias, activation)
    if not use_triton(x, gate_up_weight, weight, bias):
        return mlp_reference(x, gate_up_weight, None, weight, bias, activation)
    return mlp(x, gate_up_weight, None, weight, bias, activation, recompute)
