"""Gated linear units whose activation is given as source: act(gate) * up, as in `gated`, but written at run time."""

import functools
import itertools
import linecache
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ._runtime import PLAIN, as_rows, jit, launch_device, tanh, tl, triton, use_triton
from .gated import grid_of

_numbers = itertools.count()

_KERNELS = """
def forward_kernel(gate_ptr, up_ptr, y_ptr, gate_stride, up_stride, n_cols, col_blocks, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    row = (pid // col_blocks).to(tl.int64)
    cols = (pid % col_blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < n_cols
    gate = tl.load(gate_ptr + row * gate_stride + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + cols, mask=mask, other=0.0).to(tl.float32)
    value, _ = activate(gate)
    tl.store(y_ptr + row * n_cols + cols, (value * up).to(y_ptr.dtype.element_ty), mask=mask)


def backward_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, dy_stride, gate_stride, up_stride, n_cols, col_blocks,
    NEED_DGATE: tl.constexpr, NEED_DUP: tl.constexpr, BLOCK: tl.constexpr
):
    pid = tl.program_id(0)
    row = (pid // col_blocks).to(tl.int64)
    cols = (pid % col_blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < n_cols
    dy = tl.load(dy_ptr + row * dy_stride + cols, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + cols, mask=mask, other=0.0).to(tl.float32)
    value, slope = activate(gate)
    if NEED_DGATE:
        up = tl.load(up_ptr + row * up_stride + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(dgate_ptr + row * n_cols + cols, (dy * up * slope).to(dgate_ptr.dtype.element_ty), mask=mask)
    if NEED_DUP:
        tl.store(dup_ptr + row * n_cols + cols, (dy * value).to(dup_ptr.dtype.element_ty), mask=mask)
"""


class GeneratedGLU:
    """act(gate) * up, computed in float32 and rounded once; the backward computes the activation again.

    Args:
        source: of a function `activate(x)` that gives (act(x), act'(x)), in the words of Triton.
    """

    def __init__(self, source: str) -> None:
        self.source = source

    @functools.cached_property
    def kernels(self) -> tuple[Any, Any]:
        return _kernels_of(self.source)

    def takes(self, gate: torch.Tensor, up: torch.Tensor) -> bool:
        """Whether the kernel can take these. In what torch.compile traces it does not: it is no operator, and from the
        activation itself Inductor writes such a kernel, too."""
        if torch.compiler.is_compiling() or type(gate) not in PLAIN:
            return False
        return gate.dim() > 0 and gate.shape == up.shape and use_triton(gate, up)

    def __call__(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return _GLU.apply(gate, up, self.kernels)


def _kernels_of(source: str) -> tuple[Any, Any]:
    """The forward and the backward kernel. Triton asks for the source of what it compiles, so it is kept where Python
    looks lines up."""
    source = f"@triton.jit\n{source}\n{_KERNELS}"
    filename = f"<ligerfx generated kernel {next(_numbers)}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    namespace = {"tl": tl, "triton": triton, "tanh": tanh, "__name__": __name__}
    exec(compile(source, filename, "exec"), namespace)
    return jit(namespace["forward_kernel"]), jit(namespace["backward_kernel"])


class _GLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, kernels):
        ctx.save_for_backward(gate, up)
        ctx.kernels = kernels
        y = torch.empty(gate.shape, dtype=torch.promote_types(gate.dtype, up.dtype), device=gate.device)
        gate, up = as_rows(gate), as_rows(up)
        n_rows, n_cols = gate.shape
        programs, col_blocks, block = grid_of(n_rows, n_cols)
        with launch_device(gate):
            kernels[0][(programs,)](
                gate, up, y, gate.stride(0), up.stride(0), n_cols, col_blocks, block, num_warps=4
            )  # fmt: skip
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        made = [
            torch.empty(t.shape, dtype=t.dtype, device=t.device) if needed else None
            for t, needed in zip((gate, up), ctx.needs_input_grad, strict=False)
        ]
        dy, gate, up = as_rows(dy), as_rows(gate), as_rows(up)
        n_rows, n_cols = gate.shape
        programs, col_blocks, block = grid_of(n_rows, n_cols)
        strides = dy.stride(0), gate.stride(0), up.stride(0)
        with launch_device(gate):
            ctx.kernels[1][(programs,)](
                dy, gate, up, *made, *strides, n_cols, col_blocks, made[0] is not None, made[1] is not None, block,
                num_warps=4,
            )  # fmt: skip
        return *made, None
