"""What the kernels can show only on a GPU: real sizes, 64-bit offsets, memory, synchronisation, graphs."""

import gc

import pytest
import torch

from ligerfx import kernels

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _free_memory():
    yield
    gc.collect()
    torch.cuda.empty_cache()


def _randn(*shape, dtype=torch.float32, std=1.0):
    return (std * torch.randn(shape, device="cuda")).to(dtype)


def _outputs_and_grads(function, inputs, upstream=None):
    leaves = [t.detach().requires_grad_() for t in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if upstream is None:
        upstream = [torch.randn_like(o) if o.dim() else torch.ones_like(o) for o in outputs]
    grads = torch.autograd.grad(outputs, leaves, [u.to(o.dtype) for u, o in zip(upstream, outputs, strict=True)])
    return [o.detach() for o in outputs] + list(grads), upstream


def _assert_as_accurate(function, reference, inputs):
    """Against the reference run in float32, our error is at most 1.1 times that of the eager reference."""
    ours, upstream = _outputs_and_grads(function, inputs)
    eager, _ = _outputs_and_grads(reference, inputs, upstream)
    truth, _ = _outputs_and_grads(reference, [t.float() for t in inputs], upstream)
    eps = torch.finfo(inputs[0].dtype).eps
    slack = 32 * eps if inputs[0].dtype == torch.float32 else eps / 50
    for a, b, t in zip(ours, eager, truth, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and a.isfinite().all()
        size = t.norm().clamp(min=1e-30)
        our_error, eager_error = ((v.float() - t).norm() / size for v in (a, b))
        assert our_error <= 1.1 * eager_error + slack, (our_error, eager_error)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"cast": "after_weight", "offset": 1.0}], ids=str)
@pytest.mark.parametrize("shape", [(4096, 4096), (1000, 2304), (333, 8192), (4, 32, 1000, 128), (20, 65536)])
def test_rms_norm(shape, options, dtype):
    _assert_as_accurate(
        lambda x, w: kernels.rms_norm(x, w, **options),
        lambda x, w: kernels.rms_norm_reference(x, w, **options),
        [_randn(*shape, dtype=dtype), _randn(shape[-1], dtype=dtype)],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu", "relu2"])
def test_glu(activation, dtype):
    gate, up = _randn(1000, 11008, dtype=dtype), _randn(1000, 11008, dtype=dtype)
    _assert_as_accurate(
        lambda g, u: kernels.glu(g, u, activation),
        lambda g, u: kernels.glu_reference(g, u, activation),
        [gate, up],
    )
    _assert_as_accurate(
        lambda x: kernels.packed_glu(x, activation),
        lambda x: kernels.packed_glu_reference(x, activation),
        [torch.cat([gate, up], -1)],
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_clamped_glu(dtype):
    gate, up = _randn(1000, 2880, dtype=dtype), _randn(1000, 2880, dtype=dtype)
    options = {"limit": 1.0, "alpha": 1.702, "offset": 1.0}
    _assert_as_accurate(
        lambda g, u: kernels.clamped_glu(g, u, **options),
        lambda g, u: kernels.clamped_glu_reference(g, u, **options),
        [gate, up],
    )
    for interleaved in (False, True):
        _assert_as_accurate(
            lambda x, i=interleaved: kernels.packed_clamped_glu(x, **options, interleaved=i),
            lambda x, i=interleaved: kernels.packed_clamped_glu_reference(x, **options, interleaved=i),
            [torch.cat([gate, up], -1)],
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, kv_heads, width, rotated", [(32, 8, 128, 128), (32, 32, 80, 32), (9, 3, 64, 64)])
def test_rope(heads, kv_heads, width, rotated, dtype):
    angle = _randn(1, 1, 500, rotated // 2).repeat(1, 1, 1, 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)

    def bind(function):
        return lambda q, k: function(q, k, cos.to(q.dtype), sin.to(q.dtype))

    q, k = (_randn(2, 500, n, width, dtype=dtype).transpose(1, 2) for n in (heads, kv_heads))
    _assert_as_accurate(bind(kernels.rope), bind(kernels.rope_reference), [q, k])


LOSS_OPTIONS = [{}, {"label_smoothing": 0.1, "softcap": 30.0, "scale": 0.5, "reduction": "sum"}]


def _target(rows, vocab):
    target = torch.randint(0, vocab, (rows,), device="cuda")
    target[::5] = -100
    return target


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", LOSS_OPTIONS, ids=str)
@pytest.mark.parametrize("vocab", [32000, 50257, 128256])
def test_cross_entropy(vocab, options, dtype):
    target = _target(300, vocab)
    _assert_as_accurate(
        lambda z: kernels.cross_entropy(z, target, **options),
        lambda z: kernels.cross_entropy_reference(z, target, **options),
        [_randn(300, vocab, dtype=dtype, std=3)],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", LOSS_OPTIONS, ids=str)
@pytest.mark.parametrize("budget", [2**30, 2**24])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_cross_entropy(with_bias, budget, options, dtype):
    target = _target(1000, 32000)
    inputs = [_randn(1000, 512, dtype=dtype), _randn(32000, 512, dtype=dtype, std=0.05)]
    if with_bias:
        inputs.append(_randn(32000, dtype=dtype))

    def bind(function):
        return lambda x, w, b=None: function(x, w, target, b, logits_budget=budget, **options)

    _assert_as_accurate(bind(kernels.linear_cross_entropy), bind(kernels.linear_cross_entropy_reference), inputs)


def _peak(function):
    """Bytes allocated at the peak of function(), above what was allocated before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def test_linear_cross_entropy_memory():
    rows, hidden, vocab, budget = 8192, 1024, 64000, 64 * 2**20
    x = _randn(rows, hidden, dtype=torch.bfloat16).requires_grad_()
    weight = _randn(vocab, hidden, dtype=torch.bfloat16, std=0.03).requires_grad_()
    target = torch.randint(0, vocab, (rows,), device="cuda")
    kernels.linear_cross_entropy(x[:64], weight, target[:64]).backward()

    def step(function, **options):
        x.grad = weight.grad = None
        function(x, weight, target, **options).backward()

    x.grad = weight.grad = None
    peak = _peak(lambda: step(kernels.linear_cross_entropy, logits_budget=budget))
    # The sum of the weight's gradient, in 24 bits on H100 and H200, the gradient of x, the chunk, and small change.
    number = 3 if torch.cuda.get_device_capability() == (9, 0) else 4.3
    assert peak <= weight.numel() * number + 2 * x.nbytes + budget + 32 * 2**20

    x.grad = weight.grad = None
    with torch.no_grad():
        assert (
            _peak(lambda: kernels.linear_cross_entropy(x, weight, target, logits_budget=budget)) <= budget + 8 * 2**20
        )
    assert peak < _peak(lambda: step(kernels.linear_cross_entropy_reference)) / 2


def test_no_synchronisation():
    x = _randn(64, 256, dtype=torch.bfloat16).requires_grad_()
    weight = _randn(256).requires_grad_()
    q = _randn(1, 4, 64, 64).requires_grad_()
    cos = _randn(1, 1, 64, 64)
    target = torch.randint(0, 256, (64,), device="cuda")

    def step():
        kernels.rms_norm(x, weight).sum().backward()
        kernels.glu(x, x).sum().backward()
        kernels.packed_glu(x).sum().backward()
        sum(y.sum() for y in kernels.rope(q, q, cos, cos)).backward()
        kernels.cross_entropy(x, target).backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_linear_cross_entropy_in_a_cuda_graph():
    x = _randn(256, 64).requires_grad_()
    weight = _randn(1000, 64, std=0.1).requires_grad_()
    target = torch.randint(0, 1000, (256,), device="cuda")

    def step(function):
        loss = function(x, weight, target)
        return loss, *torch.autograd.grad(loss, (x, weight))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(kernels.linear_cross_entropy)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(kernels.linear_cross_entropy)
    target[::3] = -100
    graph.replay()
    for a, b in zip(captured, step(kernels.linear_cross_entropy_reference), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_offsets_beyond_32_bits():
    width = 65536
    rows = 2**31 // width + 3
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GiB of GPU memory")
    x = torch.zeros(rows, width, dtype=torch.bfloat16, device="cuda")
    x[-2:] = _randn(2, width, dtype=torch.bfloat16)
    tail = x[-2:].clone()
    weight = _randn(width // 64, dtype=torch.bfloat16)
    target = torch.full((rows,), 7, device="cuda")
    cases = [
        (
            lambda t: kernels.rms_norm(t.view(-1, width // 64), weight),
            lambda t: kernels.rms_norm_reference(t.view(-1, width // 64), weight),
        ),
        (kernels.packed_glu, kernels.packed_glu_reference),
        (lambda t: kernels.glu(t, t), lambda t: kernels.glu_reference(t, t)),
    ]
    for function, reference in cases:
        (y, grad), _ = _outputs_and_grads(lambda t, f=function: f(t).view(t.shape[0], -1), [x], None)
        expected = reference(tail).view(2, -1)
        torch.testing.assert_close(y[-2:], expected, rtol=2e-2, atol=2e-2)
        assert grad[-2:].isfinite().all() and grad[-2:].any()
        del y, grad
        torch.cuda.empty_cache()
    leaf = x.requires_grad_()
    kernels.cross_entropy(leaf, target, reduction="sum").backward()
    small = tail.requires_grad_()
    kernels.cross_entropy_reference(small, target[-2:], reduction="sum").backward()
    torch.testing.assert_close(leaf.grad[-2:], small.grad, rtol=2e-2, atol=1e-6)
