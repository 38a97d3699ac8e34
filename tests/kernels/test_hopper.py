"""The gradient of a gated unit at the end of a matrix product: run on H100 or H200, compiled everywhere."""

import functools
import os
import subprocess
import sys

import pytest
import torch

from ligerfx.kernels import _hopper, glu_linear, glu_linear_reference, packed_glu_linear, packed_glu_linear_reference

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
on_hopper = pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")

# M, K, N: whole tiles; and rests of tiles in all three, in 12 x 12 tiles, so that every program has a rest of turns.
WHOLE, RESTS = (1536, 256, 1536), (1500, 136, 1464)


def _inputs(sizes, dtype, packed):
    m, k, n = sizes
    gates = [(m, 2 * n)] if packed else [(m, n), (m, n)]
    return [torch.randn(shape, device="cuda").to(dtype) for shape in gates] + [
        (torch.randn(k, n, device="cuda") * n**-0.5).to(dtype)
    ]


def _gradients(function, inputs, dy):
    leaves = [t.detach().requires_grad_() for t in inputs]
    return torch.autograd.grad(function(*leaves), leaves, dy)


@pytest.fixture
def fused(monkeypatch):
    """How often the kernel ran."""
    calls = []

    def counted(*args, original=_hopper.glu_gradients):
        calls.append(original(*args))
        return calls[-1]

    monkeypatch.setattr(_hopper, "glu_gradients", counted)
    return calls


@on_hopper
@pytest.mark.parametrize("sizes", [WHOLE, RESTS])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_as_accurate_as_eager(poison, assert_as_accurate, fused, dtype, recompute, packed, sizes):
    function = functools.partial(packed_glu_linear if packed else glu_linear, recompute=recompute)
    reference = packed_glu_linear_reference if packed else glu_linear_reference
    assert_as_accurate(function, reference, _inputs(sizes, dtype, packed))
    assert fused and all(fused)


@on_hopper
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu", "relu2"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("sizes", [WHOLE, RESTS])
def test_agrees_with_the_two_kernels(poison, fused, monkeypatch, sizes, packed, activation):
    """The product and then the gradient's kernel: the same sums, rounded at the same places."""
    function = functools.partial(packed_glu_linear if packed else glu_linear, activation=activation)
    inputs = _inputs(sizes, torch.bfloat16, packed)
    dy = torch.randn(sizes[0], sizes[1], device="cuda").bfloat16()
    got = _gradients(function, inputs, dy)
    assert fused == [True]
    monkeypatch.setattr(_hopper, "takes", lambda *_: False)
    for a, b in zip(got, _gradients(function, inputs, dy), strict=True):
        assert (a.float() - b.float()).norm() <= 1e-4 * b.float().norm()


@on_hopper
def test_repeats_its_bits(fused):
    """A race between the groups, or with the copies, would change some."""
    inputs = _inputs((4096, 512, 2048), torch.bfloat16, False)
    dy = torch.randn(4096, 512, device="cuda").bfloat16()
    first, *rest = [_gradients(glu_linear, inputs, dy) for _ in range(30)]
    assert len(fused) == 30
    assert all(torch.equal(a, b) for again in rest for a, b in zip(first, again, strict=True))


@on_hopper
def test_what_is_not_taken():
    gate, up, weight = _inputs(WHOLE, torch.bfloat16, False)
    dy = torch.randn(WHOLE[0], WHOLE[1], device="cuda").bfloat16()
    assert _hopper.takes(dy, weight, gate, up)
    assert not _hopper.takes(dy.float(), weight.float(), gate.float(), up.float())
    assert not _hopper.takes(dy, weight, gate.half(), up)
    assert not _hopper.takes(dy[:64], weight, gate[:64], up[:64])  # too few tiles
    assert not _hopper.takes(dy[:, 4:], weight[4:], gate, up)  # not aligned
    assert not _hopper.takes(dy.t().contiguous().t(), weight, gate, up)
    wide = torch.empty(8192, WHOLE[2], dtype=torch.bfloat16, device="cuda")
    assert not _hopper.takes(dy.new_empty(WHOLE[0], 8192), wide, gate, up)


@on_hopper
def test_a_failure_goes_the_ordinary_way(monkeypatch):
    monkeypatch.setattr(_hopper, "_refused", [])
    inputs = _inputs(WHOLE, torch.bfloat16, False)
    dy = torch.randn(WHOLE[0], WHOLE[1], device="cuda").bfloat16()
    expected = _gradients(glu_linear, inputs, dy)
    monkeypatch.setattr(_hopper, "_kernel", {})  # a KeyError at its launch
    with pytest.warns(UserWarning, match="not fused into matrix products"):
        got = _gradients(glu_linear, inputs, dy)
    again = _gradients(glu_linear, inputs, dy)  # without a further warning
    for a, b, c in zip(got, again, expected, strict=True):
        assert torch.equal(a, b) and (a.float() - c.float()).norm() <= 1e-4 * c.float().norm()


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from ligerfx.kernels import _hopper
from ligerfx.kernels._activations import in_triton

def descriptor(rows, columns):
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return f"tensordesc<bf16[{rows}, {columns}],{layout!r}>"

with_z = sys.argv[1] == "z"
pointers = ("*bf16",) * 4 + (("*bf16",) if with_z else ("constexpr",))
signature = {
    "dy_d": descriptor(128, 64), "weight_d": descriptor(64, 128), "pointers": pointers, "strides": ("i32",) * 5,
    "sizes": ("i32",) * 3, "ACTIVATE": "constexpr",
}
constants = {"ACTIVATE": in_triton("silu")} | ({} if with_z else {(2, 4): None})
source = GluonASTSource(_hopper._kernel, signature, constants)
kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
print(kernel.asm["ptx"].count("wgmma.mma_async"), kernel.asm["ptx"].count("cp.async.bulk.tensor"), kernel.metadata.shared)
"""


@pytest.mark.parametrize("z", ["z", "no z"])
def test_compiles_without_a_gpu(z):
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    result = subprocess.run([sys.executable, "-P", "-c", COMPILE, z], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    products, copies, shared = map(int, result.stdout.split()[-3:])
    assert (products, copies) == (16, 3)  # two groups of 128 x 128 x 64; dy in one copy, the weight in two
    assert shared <= 227 * 1024
