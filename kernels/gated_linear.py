"""A gated linear unit and the linear layer after it (the second half of a Llama MLP).

The unit's result z is not kept for the backward: the kernel that writes the gradients of gate and up reads all
that z is made of, and writes it again over its own gradient, for the weight's gradient to be computed from.
"""

import torch
import torch.nn.functional as F

from . import _hopper, _hopper_glu
from ._activations import Activation, key_of
from ._autograd import apply, once_differentiable
from ._linear import check_linear, is_plain_linear, no_autocast
from ._operators import operator
from ._runtime import as_rows, autocast_dtype, use_triton
from .gated import (
    check_glu,
    check_packed_glu,
    gated,
    glu,
    glu_backward,
    glu_forward,
    halves,
    packed_glu,
)


def glu_linear_reference(
    gate: torch.Tensor,
    up: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | Activation = "silu",
) -> torch.Tensor:
    """Plain PyTorch `glu_linear`.

    Arguments, results and errors are those of `glu_linear`.

    Examples:
        >>> import torch
        >>> from ligerfx.kernels import glu_linear_reference
        >>> gate, up, weight = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 3.0]]), torch.ones(1, 2)
        >>> glu_linear_reference(gate, up, weight, activation="relu")
        tensor([[9.]])
    """
    _check(gate, up, weight, bias, activation)
    return F.linear(gated(gate, up, activation), weight, bias)


def packed_glu_linear_reference(
    gate_up: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | Activation = "silu",
) -> torch.Tensor:
    """Plain PyTorch `packed_glu_linear`.

    Arguments, results and errors are those of `packed_glu_linear`.

    Examples:
        >>> import torch
        >>> from ligerfx.kernels import packed_glu_linear_reference
        >>> packed_glu_linear_reference(torch.tensor([[1.0, 2.0, 3.0, 3.0]]), torch.ones(1, 2), activation="relu")
        tensor([[9.]])
    """
    _check_packed(gate_up, weight, bias, activation)
    return F.linear(gated(*gate_up.chunk(2, dim=-1), activation), weight, bias)


def _unfused(gate, up, weight, bias, activation):
    """What autocast and promotion are left to: the kernel, then the eager layer."""
    z = packed_glu(gate, activation) if up is None else glu(gate, up, activation)
    return F.linear(z, weight, bias)


def _gradients_results(dy, weight, gate, up, activation, need_gate, need_up, need_z):
    grads = [(gate, need_gate), (up, need_up)]
    results = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x, need in grads if need]
    return results + [torch.empty(dy.shape[0], weight.shape[1], dtype=dy.dtype, device=dy.device)] * need_z


@operator(
    "glu_linear_backward(Tensor dy, Tensor weight, Tensor gate, Tensor? up, str activation, bool need_gate,"
    " bool need_up, bool need_z) -> Tensor[]",
    _gradients_results,
)
def _gradients(dy, weight, gate, up, activation, need_gate, need_up, need_z):
    if need_gate and need_up == (up is not None):
        parts = [as_rows(part) for part in halves(gate, up)]
        if _hopper.takes(dy, parts[0].shape[1], [weight], parts):
            results = _gradients_results(dy, weight, gate, up, activation, need_gate, need_up, False)
            written = [as_rows(part) for part in halves(results[0], results[1] if need_up else None)]
            if _hopper_glu.product_gradients(dy, weight, *parts, *written, activation):
                if need_z:
                    results.append(glu_forward(gate, up, activation).view(dy.shape[0], -1))
                return results
    dz = torch.mm(dy, weight)
    # z, if it has to be computed again, takes the place of its gradient.
    found = glu_backward(dz, gate, up, activation, need_gate, need_up, need_z)
    return [result for result in found if result is not None]


def glu_linear_backward(
    dy: torch.Tensor,
    weight: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor | None,
    activation: str,
    need_gate: bool,
    need_up: bool,
    need_z: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The gradients of gate and of up (packed if up is None), and z = act(gate) * up; None for what is not needed.

    dy, weight and z are [rows, N], [N, I] and [rows, I].
    """
    found = iter(_gradients(dy, weight, gate, up, activation, need_gate, need_up, need_z))
    dgate, dup, z = (next(found) if need else None for need in (need_gate, need_up, need_z))
    return dgate, dup, z


class _GLULinear(torch.autograd.Function):
    """gate is the packed gate and up if up is None."""

    @staticmethod
    def forward(ctx, gate, up, weight, bias, activation, recompute):
        need_gate, need_up, need_w = ctx.needs_input_grad[:3]
        need_z = need_gate or need_up
        z = glu_forward(gate, up, activation)
        kept = z if need_w and not recompute else None
        inputs = (gate, up) if need_z or (need_w and recompute) else (None, None)
        ctx.save_for_backward(*inputs, weight if need_z else None, kept)
        ctx.activation = activation
        return F.linear(z, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        gate, up, weight, z = ctx.saved_tensors
        need_gate, need_up, need_w, need_b = ctx.needs_input_grad[:4]
        rows = dy.reshape(-1, dy.shape[-1])
        dgate = dup = dw = None
        with no_autocast(dy):
            if need_gate or need_up:
                need_z = need_w and z is None
                dgate, dup, again = glu_linear_backward(
                    rows, weight, gate, up, ctx.activation, need_gate, need_up, need_z
                )
                z = again if need_z else z
            elif need_w and z is None:
                z = glu_forward(gate, up, ctx.activation)
            if need_w:
                dw = torch.mm(rows.t(), z.view(-1, z.shape[-1]))
            db = rows.sum(0) if need_b else None
        return dgate, dup, dw, db, None, None


def _check(gate, up, weight, bias, activation):
    check_glu("glu_linear", gate, up, activation)
    check_linear("glu_linear", gate.shape[-1], weight, bias)


def _check_packed(gate_up, weight, bias, activation):
    check_packed_glu("packed_glu_linear", gate_up, activation)
    check_linear("packed_glu_linear", gate_up.shape[-1] // 2, weight, bias)


def glu_linear(
    gate: torch.Tensor,
    up: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | Activation = "silu",
    *,
    recompute: bool = True,
) -> torch.Tensor:
    """F.linear(act(gate) * up, weight, bias), keeping only gate and up for the backward.

    Args:
        gate: [..., I], floating point. Rows one stride apart (halves of a packed tensor) are not copied.
        up: [..., I], floating point.
        weight: [N, I], of the promoted dtype of gate and up. If it needs no gradient (LoRA), the backward
            does not compute act(gate) * up again.
        bias: [N] or None.
        activation: as for `glu`.
        recompute: False keeps act(gate) * up for the backward, which then has one write of it less to do.

    Returns:
        [..., N].

    Raises:
        ValueError: for an unknown activation, gate and up of different shapes, or a weight or bias that does
            not fit them.
        TypeError: if gate or up is not floating point, or weight or bias is of an integer dtype.

    Under autocast, and where dtypes differ, this is `glu` and then the eager layer.

    Examples:
        >>> import torch
        >>> from ligerfx.kernels import glu_linear
        >>> gate, up, weight = torch.randn(2, 5, 8), torch.randn(2, 5, 8), torch.randn(4, 8)
        >>> y = glu_linear(gate, up, weight)
        >>> torch.allclose(y, (torch.nn.functional.silu(gate) * up) @ weight.T, atol=1e-5)
        True
    """
    if not use_triton(gate, up, weight, bias):
        return glu_linear_reference(gate, up, weight, bias, activation)
    _check(gate, up, weight, bias, activation)
    dtype = gate.dtype if gate.dtype == up.dtype else torch.promote_types(gate.dtype, up.dtype)
    if autocast_dtype(gate.device.type) is not None or not is_plain_linear(dtype, weight, bias):
        return _unfused(gate, up, weight, bias, activation)
    return apply(_GLULinear, gate, up, weight, bias, key_of(activation), recompute)


def packed_glu_linear(
    gate_up: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | Activation = "silu",
    *,
    recompute: bool = True,
) -> torch.Tensor:
    """`glu_linear` of the two halves of the last dim of gate_up.

    Args:
        gate_up: [..., 2 * I], floating point, the gate first.
        weight, bias, activation, recompute: as for `glu_linear`.

    Returns:
        [..., N]. The gradient of gate_up is one [..., 2 * I] tensor.

    Raises:
        ValueError: for an unknown activation, a last dim of odd size, or a weight or bias that does not fit.
        TypeError: if gate_up is not floating point, or weight or bias is of an integer dtype.

    Examples:
        >>> import torch
        >>> from ligerfx.kernels import packed_glu_linear
        >>> gate_up, weight, bias = torch.randn(2, 5, 16), torch.randn(4, 8), torch.zeros(4)
        >>> packed_glu_linear(gate_up, weight, bias, "gelu_tanh").shape
        torch.Size([2, 5, 4])
    """
    if not use_triton(gate_up, weight, bias):
        return packed_glu_linear_reference(gate_up, weight, bias, activation)
    _check_packed(gate_up, weight, bias, activation)
    if autocast_dtype(gate_up.device.type) is not None or not is_plain_linear(gate_up.dtype, weight, bias):
        return _unfused(gate_up, None, weight, bias, activation)
    return apply(_GLULinear, gate_up, None, weight, bias, key_of(activation), recompute)
