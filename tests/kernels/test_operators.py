"""The kernels under torch.compile: one graph, the results of ordinary calls, and operators that say what comes out."""

import importlib
from unittest import mock

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from ligerfx.kernels import (
    _runtime,
    add_rms_norm,
    clamped_glu,
    cross_entropy,
    glu,
    glu_linear,
    glu_mlp,
    linear_cross_entropy,
    norm_rope,
    packed_clamped_glu,
    packed_glu,
    packed_glu_linear,
    rms_norm,
    rms_norm_linear,
    rms_norm_mlp,
    rope,
    rows_that_count,
)
from ligerfx.kernels._ahead import rehearsal


def _leaf(*shape, dtype=torch.float32, device="cpu"):
    return torch.randn(*shape, device=device).to(dtype).requires_grad_()


def _target(device):
    target = torch.arange(10, device=device).view(2, 5)
    target[0, :2] = -100
    return target


def _tables(device):
    return torch.randn(2, 1, 1, 5, 16, device=device).unbind()


def _loss(x, weight, target):
    return linear_cross_entropy(x, weight, target, rows=rows_that_count(target), label_smoothing=0.1, softcap=3.0)


# For each a function, the shapes of what gets a gradient, and what makes the rest.
CASES = {
    "rms_norm": (lambda x, w: rms_norm(x, w, 1e-6), [(2, 5, 32), (32,)], None),
    "rms_norm, permuted": (lambda x, w: rms_norm(x.transpose(0, 1), w, offset=1.0), [(2, 5, 32), (32,)], None),
    "add_rms_norm": (add_rms_norm, [(2, 5, 32), (2, 5, 32), (32,)], None),
    "add_rms_norm, no residual": (lambda x, w: add_rms_norm(x, None, w), [(2, 5, 32), (32,)], None),
    "rms_norm_linear": (
        lambda x, r, w, a, b: rms_norm_linear(x, w, [a, b], residual=r),
        [(2, 5, 32), (2, 5, 32), (32,), (24, 32), (16, 32)],
        None,
    ),
    "rms_norm_linear, y kept": (
        lambda x, w, a, b: rms_norm_linear(x, w, [a, b], recompute=False),
        [(2, 5, 32), (32,), (24, 32), (16, 32)],
        None,
    ),
    "glu": (glu, [(2, 5, 48), (2, 5, 48)], None),
    "packed_glu": (lambda x: packed_glu(x, "gelu_tanh"), [(2, 5, 96)], None),
    "clamped_glu": (lambda g, u: clamped_glu(g, u, 0.7, 1.702, 1.0), [(2, 5, 48), (2, 5, 48)], None),
    "packed_clamped_glu": (lambda x: packed_clamped_glu(x, 0.7, interleaved=True), [(2, 5, 96)], None),
    "glu_linear": (glu_linear, [(2, 5, 48), (2, 5, 48), (32, 48)], None),
    "packed_glu_linear": (packed_glu_linear, [(2, 5, 96), (32, 48)], None),
    "glu_mlp": (glu_mlp, [(2, 5, 32), (48, 32), (48, 32), (32, 48)], None),
    "rms_norm_mlp, packed": (
        lambda x, r, w, a, b: rms_norm_mlp(x, w, a, None, b, residual=r, recompute=True),
        [(2, 5, 32), (2, 5, 32), (32,), (96, 32), (32, 48)],
        None,
    ),
    "rope": (rope, [(2, 4, 5, 16), (2, 2, 5, 16)], _tables),
    "rope, permuted": (
        lambda q, k, cos, sin: rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin),
        [(2, 5, 4, 16), (2, 5, 2, 16)],
        _tables,
    ),
    "norm_rope": (norm_rope, [(2, 4, 5, 16), (2, 2, 5, 16), (16,), (16,)], _tables),
    "cross_entropy": (cross_entropy, [(2, 5, 50)], lambda device: [_target(device)]),
    "linear_cross_entropy": (_loss, [(2, 5, 32), (50, 32)], lambda device: [_target(device)]),
}


def _run(function, leaves, rest):
    out = function(*leaves, *rest)
    outputs = [out] if isinstance(out, torch.Tensor) else list(out)
    sum((o * torch.linspace(-1, 1, o.numel(), device=o.device).view(o.shape)).sum() for o in outputs).backward()
    grads = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    return [o.detach() for o in outputs], grads


STATIC = ["rms_norm", "glu_mlp", "rope", "linear_cross_entropy"]


@pytest.mark.parametrize(("name", "dynamic"), [*((name, True) for name in CASES), *((name, False) for name in STATIC)])
def test_compiled(device, name, dynamic):
    torch.compiler.reset()
    function, shapes, make = CASES[name]
    leaves, rest = [_leaf(*shape, device=device) for shape in shapes], make(device) if make else []
    outputs, grads = _run(function, leaves, rest)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    found, found_grads = _run(compiled, leaves, rest)
    for a, b in zip([*outputs, *grads], [*found, *found_grads], strict=True):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-6)


@pytest.fixture
def launched(monkeypatch):
    """The kernels that are launched, each with what Triton compiles it for: kinds of arguments, and constants."""
    found = []

    def note(name, args):
        found.append((name, *((a.dtype if isinstance(a, torch.Tensor) else type(a)) for a in args)))

    if _runtime.INTERPRET:
        kind, method = InterpretedFunction, "run"
        noted = lambda self, *args, grid, warmup, **options: note(self.fn.__name__, args)  # noqa: E731
    else:
        kind, method = _runtime._Kernel, "_launch"
        noted = lambda self, grid, *args, **options: note(self.__name__, args)  # noqa: E731
    original = getattr(kind, method)

    def run(self, *args, **options):
        noted(self, *args, **options)
        return original(self, *args, **options)

    monkeypatch.setattr(kind, method, run)
    return found


@pytest.mark.parametrize("name", CASES)
def test_rehearsed(device, name, launched, monkeypatch):
    """A call in a rehearsal launches, and so compiles, what the call and its backward do; nothing gets a gradient."""
    function, shapes, make = CASES[name]
    leaves, rest = [_leaf(*shape, device=device) for shape in shapes], make(device) if make else []
    outputs, _ = _run(function, leaves, rest)
    wanted = set(launched)
    assert wanted
    launched.clear()
    monkeypatch.setattr(rehearsal, "active", True)
    found = function(*leaves, *rest)
    assert wanted <= set(launched)
    found = [found] if isinstance(found, torch.Tensor) else found
    assert [(f.shape, f.dtype, f.stride()) for f in found] == [(o.shape, o.dtype, o.stride()) for o in outputs]
    assert all(leaf.grad is None for leaf in leaves)
    launched.clear()
    with torch.no_grad():
        function(*leaves, *rest)
    assert set(launched) < wanted or len(wanted) == 1


def test_float16_gradients_of_the_loss_stay_above_its_subnormals(device):
    torch.compiler.reset()
    x, weight = _leaf(2, 5, 32, dtype=torch.float16, device=device), _leaf(50, 32, dtype=torch.float16, device=device)
    target = _target(device)
    grads = []
    for function in (_loss, torch.compile(_loss, backend="aot_eager", fullgraph=True)):
        (function(x, weight, target) * 2.0**12).backward()
        grads.append([x.grad.clone(), weight.grad.clone()])
        x.grad = weight.grad = None
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b) and a.isfinite().all() and a.any()


def test_the_compiled_loss_has_the_bits_of_ordinary_gradients_and_computes_them_once(device):
    """Over several chunks. Another backward through the same graph computes them again, as does one whose saved tensors
    are copies."""
    torch.compiler.reset()
    x, weight = (_leaf(*shape, dtype=torch.bfloat16, device=device) for shape in [(2, 5, 32), (700, 32)])
    target = _target(device)

    def loss_of(x, weight):
        return linear_cross_entropy(x, weight, target, logits_budget=4 * 1408)

    def gradients(loss, factor):
        return torch.autograd.grad(loss, (x, weight), torch.tensor(factor, device=device), retain_graph=True)

    expected = {factor: gradients(loss_of(x, weight), factor) for factor in (1.0, 3.0)}
    compiled = torch.compile(loss_of, backend="aot_eager", fullgraph=True)
    module = importlib.import_module("ligerfx.kernels.linear_crossentropy")
    with mock.patch.object(module, "_loss_and_grads", wraps=module._loss_and_grads) as compute:
        loss = compiled(x, weight)
        for factor, times in ((3.0, 1), (1.0, 2), (3.0, 3)):
            for a, b in zip(gradients(loss, factor), expected[factor], strict=True):
                assert a.any() and torch.equal(a, b)
            assert compute.call_count == times
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda saved: saved):
            loss = compiled(x, weight)
        for a, b in zip(gradients(loss, 3.0), expected[3.0], strict=True):
            assert torch.equal(a, b)
        assert compute.call_count == 5


def _operator_calls(device):
    ops = torch.ops.ligerfx
    h, w = torch.randn(2, 5, 32, device=device), torch.randn(32, device=device)
    rstd = torch.rand(10, device=device)
    yield ops.rms_norm, (h.transpose(0, 1), w, 1e-6, 0.0, False)
    yield ops.add_rms_norm, (h, h.clone(), w.to(torch.float16), 1e-6, 1.0, True)
    for needs in ((True, True, True), (False, True, False), (True, False, True)):
        yield ops.rms_norm_backward, (h.clone(), h.clone(), h, w, rstd, 0.0, False, *needs)
        yield ops.glu_backward, (h.clone(), h, h.clone(), "silu", *needs)
        yield ops.glu_backward, (h.clone(), h, h.clone(), "silu", *needs, 7.0, 1.0, False)
    a, b = torch.randn(4, 10, 16, device=device), torch.randn(4, 16, 32, device=device)
    yield ops.sum_of_products, (a[0], b[0], list(a[1:]), list(b[1:]))
    for needs in ((True, True, True), (False, True, False)):
        gates = torch.randn(10, 16, device=device), torch.randn(10, 16, device=device)
        yield (
            ops.glu_linear_backward,
            (h[0], torch.randn(32, 16, device=device), gates[0][:5], gates[1][:5], "silu", *needs),
        )
    yield ops.projected_glu, (h[0], b[0], b[1], "silu")
    yield ops.projected_glu, (h[0], b[0], None, "relu")
    packed = torch.randn(2, 5, 64, device=device)
    yield ops.glu, (packed, None, "relu")
    yield ops.glu, (packed, None, "silu", 7.0, 1.0, True)
    yield ops.glu_backward, (h, packed, None, "silu", True, False, False, 7.0, 1.0, True)
    yield ops.glu_backward, (h, packed, None, "relu", True, False, True)
    q, k = (torch.randn(2, 5, n, 16, device=device).transpose(1, 2) for n in (4, 2))
    cos, sin = _tables(device)
    half = torch.float16
    yield ops.rope, (q, k, cos, sin, torch.float32, half, None, None, False, 1, "halves", False)
    yield ops.rope, (q, k, cos, sin, None, half, None, [160, 80, 16, 1], True, 1, "neighbours", False)
    norms = torch.randn(2, 16, device=device).unbind()
    norm_rope_inputs = (q, k, *norms, cos, sin)
    yield ops.norm_rope, (*norm_rope_inputs, 1e-6, 0.0, False, 1)
    yield ops.norm_rope_backward, (*norm_rope_inputs, None, k.clone(), 1e-6, 0.0, False, 1, True)
    logits, target = torch.randn(10, 50, device=device), _target(device).view(-1)
    yield ops.cross_entropy, (logits, target, -100, 1.0, 0.0, None, 0.0)
    yield ops.cross_entropy_backward, (logits, target, rstd, rstd + 1, rstd[0], -100, 1.0, 0.0, 3.0, 0.1)
    yield ops.rows_that_count, (target.view(2, 5), -100)
    options = ([-100, 1.0, 0.0, None, 0.0], True, 4096, torch.float32)
    for dtype, bias in ((torch.float32, torch.randn(50, device=device)), (torch.float16, None)):
        x, weight = h.to(dtype), torch.randn(50, 32, device=device).to(dtype)
        loss_args = (x, weight, bias, target.view(2, 5), *options, True, True, bias is not None)
        yield ops.linear_cross_entropy, (*loss_args, None)
        yield ops.linear_cross_entropy_backward, (torch.empty(0, device=device), rstd[0], *loss_args)


def test_what_operators_say_of_their_results_holds(device):
    for operator, args in _operator_calls(device):
        torch.library.opcheck(operator.default, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("most, sizes, ours", [(320, "fixed", False), (319, "fixed", True), (320, "vary", True)])
@pytest.mark.parametrize(
    "name", ["rms_norm", "add_rms_norm", "rms_norm_linear", "glu_mlp", "norm_rope", "linear_cross_entropy"]
)
def test_a_compiler_gets_the_plain_operations_of_small_tensors(device, monkeypatch, name, most, sizes, ours):
    """Here of 10 x 32 numbers, queries twice as wide, or logits of 10 x 50. A size that varies may be large."""
    torch.compiler.reset()
    small = most * 50 // 32 if name == "linear_cross_entropy" else most
    monkeypatch.setattr("ligerfx.kernels._runtime.SMALL", small)
    function, shapes, make = CASES[name]
    leaves, rest = [_leaf(*shape, device=device) for shape in shapes], make(device) if make else []
    outputs, grads = _run(function, leaves, rest)
    called = set()

    def backend(graph_module, inputs):
        called.update(node.target for node in graph_module.graph.nodes)
        return torch._dynamo.lookup_backend("aot_eager")(graph_module, inputs)

    compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=sizes == "vary")
    found, found_grads = _run(compiled, leaves, rest)
    for a, b in zip([*outputs, *grads], [*found, *found_grads], strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)
    assert (torch.ops.higher_order.autograd_function_apply in called) == ours
