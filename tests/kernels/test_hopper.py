"""The gradient of a gated unit at the end of a matrix product: run on H100 or H200, compiled everywhere."""

import functools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from ligerfx.kernels import (
    _hopper,
    _hopper_glu,
    gated_linear,
    gated_mlp,
    glu_linear,
    glu_linear_reference,
    glu_mlp,
    glu_mlp_reference,
    packed_glu_linear,
    packed_glu_linear_reference,
    packed_glu_mlp,
    packed_glu_mlp_reference,
    rms_norm_mlp,
    rms_norm_mlp_reference,
)
from ligerfx.kernels.gated import glu_forward

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
on_hopper = pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")

# M, K, N, I. Whole tiles; rests of tiles and of stages, with more tiles than programs in both directions; and so long
# rows that stages are deeper.
WHOLE, RESTS, LONG = (2304, 256, 320, 2048), (2300, 136, 72, 2104), (2304, 2184, 320, 2048)
LINEAR = (glu_linear, glu_linear_reference), (packed_glu_linear, packed_glu_linear_reference)
MLP = (glu_mlp, glu_mlp_reference), (packed_glu_mlp, packed_glu_mlp_reference)


def _inputs(sizes, dtype, packed, first):
    """(gate, up, weight) of `glu_linear`, with `first` (x, gate's weight, up's weight, weight) of `glu_mlp`."""
    m, k, n, i = sizes
    widths = [2 * i] if packed else [i, i]
    shapes = [(m, k), *((w, k) for w in widths), (n, i)] if first else [*((m, w) for w in widths), (n, i)]
    scales = [1.0 if shape[0] == m else shape[1] ** -0.5 for shape in shapes]
    return [(torch.randn(shape, device="cuda") * s).to(dtype) for shape, s in zip(shapes, scales, strict=True)]


def _gradients(function, inputs, dy):
    leaves = [t.detach().requires_grad_() for t in inputs]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@pytest.fixture
def fused(monkeypatch):
    """Which kernels ran."""
    names = []
    launch = _hopper.launch

    def noted(kernel, *args):
        names.append(kernel.__name__)
        return launch(kernel, *args)

    monkeypatch.setattr(_hopper, "launch", noted)
    return names


@on_hopper
@pytest.mark.parametrize("sizes", [WHOLE, RESTS, LONG])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("whole_mlp", [False, True])
def test_as_accurate_as_eager(poison, assert_as_accurate, fused, whole_mlp, dtype, recompute, packed, sizes):
    function, reference = (MLP if whole_mlp else LINEAR)[packed]
    function = functools.partial(function, recompute=recompute)
    assert_as_accurate(function, reference, _inputs(sizes, dtype, packed, whole_mlp))
    assert (
        set(fused) == {"_product_gradients_kernel", "_gated_product_kernel"}
        if whole_mlp
        else {"_product_gradients_kernel"}
    )


@on_hopper
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_with_the_norm_before_it(poison, assert_as_accurate, fused, residual, packed):
    x, *weights = _inputs(WHOLE, torch.bfloat16, packed, True)
    inputs = [x, torch.rand(256, device="cuda").bfloat16(), *([torch.randn_like(x)] if residual else []), *weights]

    def bind(function):
        def bound(x, norm_weight, *rest):
            r, rest = (rest[0], rest[1:]) if residual else (None, rest)
            return function(x, norm_weight, *((rest[0], None, rest[1]) if packed else rest), residual=r)

        return bound

    assert_as_accurate(bind(rms_norm_mlp), bind(rms_norm_mlp_reference), inputs)
    assert set(fused) == {"_product_gradients_kernel", "_gated_product_kernel"}


@on_hopper
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu", "relu2"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("sizes", [WHOLE, RESTS, LONG])
def test_agrees_with_separate_kernels(poison, fused, monkeypatch, sizes, packed, activation):
    """The products and then the unit's kernels: the same sums, rounded at the same places."""
    function = functools.partial(MLP[packed][0], activation=activation)
    inputs = _inputs(sizes, torch.bfloat16, packed, True)
    dy = torch.randn(sizes[0], sizes[2], device="cuda").bfloat16()
    got = _gradients(function, inputs, dy)
    assert fused == ["_gated_product_kernel", "_product_gradients_kernel"]
    monkeypatch.setattr(_hopper, "takes", lambda *_: False)
    for a, b in zip(got, _gradients(function, inputs, dy), strict=True):
        assert (a.float() - b.float()).norm() <= 1e-3 * b.float().norm()


@on_hopper
def test_repeats_its_bits(fused):
    """A race between the groups, or with the copies, would change some."""
    inputs = _inputs((4096, 512, 512, 4096), torch.bfloat16, False, True)
    dy = torch.randn(4096, 512, device="cuda").bfloat16()
    first, *rest = [_gradients(glu_mlp, inputs, dy) for _ in range(30)]
    assert len(fused) == 60
    assert all(torch.equal(a, b) for again in rest for a, b in zip(first, again, strict=True))


@on_hopper
def test_what_is_not_taken():
    x, gate_weight, up_weight, weight = _inputs(WHOLE, torch.bfloat16, False, True)
    weights = [gate_weight, up_weight]
    assert _hopper.takes(x, 2048, weights, [weight])
    assert not _hopper.takes(x.float(), 2048, [w.float() for w in weights], [])
    assert not _hopper.takes(x, 2048, weights, [weight.half()])
    assert not _hopper.takes(x[:64], 2048, weights, [])  # too few tiles
    assert not _hopper.takes(x[:, 4:], 2048, [w[:, 4:] for w in weights], [])  # not aligned
    assert not _hopper.takes(x[:1].expand_as(x), 2048, weights, [])  # one row for all
    assert not _hopper.takes(x.t().contiguous().t(), 2048, weights, [])
    assert not _hopper.takes(x, 2048, [gate_weight.t().contiguous().t(), up_weight], [])
    assert not _hopper.takes(x.repeat(1, 32), 2048, [w.repeat(1, 32) for w in weights], [])  # longer than tried


@on_hopper
def test_a_failure_goes_the_ordinary_way(monkeypatch):
    monkeypatch.setattr(_hopper, "_refused", [])
    inputs = _inputs(WHOLE, torch.bfloat16, False, True)
    dy = torch.randn(WHOLE[0], WHOLE[2], device="cuda").bfloat16()
    expected = _gradients(glu_mlp, inputs, dy)
    monkeypatch.setattr(_hopper_glu, "_gated_product_kernel", {})  # a KeyError at its launch
    with pytest.warns(UserWarning, match="nothing is fused into matrix products"):
        got = _gradients(glu_mlp, inputs, dy)
    again = _gradients(glu_mlp, inputs, dy)  # without a further warning
    for a, b, c in zip(got, again, expected, strict=True):
        assert torch.equal(a, b) and (a.float() - c.float()).norm() <= 1e-3 * c.float().norm()


def _gated_product(x, gate_weight, up_weight, gate, up, z, activation):
    gate.copy_(x @ gate_weight.t())
    up.copy_(x @ up_weight.t())
    z.copy_(F.silu(gate) * up)
    return True


def _product_gradients(dy, weight, gate, up, dgate, dup, activation):
    gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
    with torch.enable_grad():
        found = torch.autograd.grad(F.silu(gate) * up, [gate, up], dy @ weight)
    dgate.copy_(found[0])
    dup.copy_(found[1])
    return True


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("whole_mlp", [False, True])
def test_what_is_computed_around_the_kernels(device, assert_matches, monkeypatch, whole_mlp, recompute, packed):
    """With plain PyTorch in the place of both: everything has its memory, and nothing is computed in vain."""
    monkeypatch.setattr(_hopper, "takes", lambda *_: True)
    monkeypatch.setattr(_hopper_glu, "gated_product", _gated_product)
    monkeypatch.setattr(_hopper_glu, "product_gradients", _product_gradients)
    again = []
    for module in (gated_linear, gated_mlp):
        monkeypatch.setattr(module, "glu_forward", lambda *args: again.append(1) or glu_forward(*args))
    function, reference = (MLP if whole_mlp else LINEAR)[packed]
    first = (
        [(48, 8) if packed else (24, 8)] * (2 - packed) if whole_mlp else [(2, 3, 48 if packed else 24)] * (2 - packed)
    )
    shapes = [(2, 3, 8)] * whole_mlp + first + [(8, 24)]
    inputs = [torch.randn(shape, device=device) for shape in shapes]
    assert_matches(functools.partial(function, recompute=recompute), reference, inputs)
    leaves = [t.detach().requires_grad_() for t in inputs]
    y = function(*leaves, recompute=recompute)
    again.clear()
    y.sum().backward()
    assert len(again) == recompute


COMPILE = """
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from ligerfx.kernels import _hopper, _hopper_glu, _hopper_loss, _hopper_sum

TYPES = {
    torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.int16: "i16", torch.uint8: "u8",
    int: "i32", float: "fp32",
}

def kind(argument):
    if isinstance(argument, tuple):
        return tuple(map(kind, argument))
    return "*" + TYPES[argument.dtype] if torch.is_tensor(argument) else TYPES[type(argument)]

def compile(kernel, factors, n_rows, n_cols, width, *args):
    kernel = kernel.kernel
    types = [f"tensordesc<bf16{block},{_hopper.stage_layout(block[1])!r}>" for _, block in factors]
    constants = {}
    for parameter, argument in zip(kernel.params[len(factors) :], args, strict=True):
        types.append("constexpr" if parameter.is_constexpr else kind(argument))
        if parameter.is_constexpr:
            constants[parameter.name] = argument
    source = GluonASTSource(kernel, dict(zip(kernel.arg_names, types, strict=True)), constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    ptx = compiled.asm["ptx"]
    print(ptx.count("wgmma.mma_async"), ptx.count("cp.async.bulk.tensor"), compiled.metadata.shared)
    return True

_hopper.launch = compile
x, weight, y, *more = (torch.empty(48, 48, dtype=torch.bfloat16) for _ in range(6))
rows, count = torch.empty(48), torch.empty(48, dtype=torch.int32)
_hopper_glu.product_gradients(x, weight, y, *more, "silu")
_hopper_glu.gated_product(x, weight, y, *more, "silu")
_hopper_glu.gated_product(*(torch.empty(48, 4096, dtype=torch.bfloat16) for _ in range(3)), *more, "silu")
_hopper_loss.exponentials(x, weight, 1.0, 30.0, rows, count, count, [y, y], rows, rows, rows)
for first, last in ((True, False), (False, False), (False, True)):
    _hopper_sum.add_product(y.view(torch.int16), y.byte(), x, weight, first, last)
"""


@pytest.mark.skipif(not _hopper.TRIED, reason="Gluon is used with Triton 3.6 to 3.9 alone")
def test_compile_without_a_gpu():
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-P", "-c", COMPILE]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    kernels = [list(map(int, line.split())) for line in result.stdout.splitlines()[-7:]]
    # Two groups multiply 128 x 128 x 32 or 64 each, in 4 or 8 steps; copies of up to 64 columns, panels of one factor.
    assert [found for *found, _ in kernels] == [[8, 5], [8, 5], [16, 5], [16, 2], *[[8, 6]] * 3]
    assert all(shared <= 227 * 1024 for *_, shared in kernels)
