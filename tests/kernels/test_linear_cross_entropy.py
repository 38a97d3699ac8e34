import pytest
import torch

from ligerfx.kernels import linear_cross_entropy, linear_cross_entropy_reference
from ligerfx.kernels.linear_crossentropy import _chunk_rows

VARIANTS = [
    {},
    {"reduction": "sum"},
    {"label_smoothing": 0.1},
    {"softcap": 3.0, "scale": 0.5},
    {"label_smoothing": 0.2, "softcap": 2.0, "scale": 1.7, "reduction": "sum", "ignore_index": 2},
]
# One chunk; chunks of 4 rows of 50 float32 logits, the last one smaller; one row at a time.
BUDGETS = [2**20, 800, 1]


def _pair(target, **options):
    def bind(function):
        return lambda x, weight, bias=None: function(x, weight, target, bias, **options)

    return bind(linear_cross_entropy), bind(linear_cross_entropy_reference)


def _inputs(device, shape=(10, 16), vocab=50, bias=True, dtype=torch.float32):
    hidden = shape[-1]
    inputs = [torch.randn(shape, device=device), torch.randn(vocab, hidden, device=device) / 2]
    if bias:
        inputs.append(torch.randn(vocab, device=device))
    return [t.to(dtype) for t in inputs]


def _target(shape, vocab, device, ignore=-100):
    target = torch.randint(0, vocab, shape, device=device)
    target.view(-1)[1::3] = ignore
    return target


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_matches_reference(device, poison, assert_matches, options, budget):
    target = _target((2, 5), 50, device, options.get("ignore_index", -100))
    functions = _pair(target, logits_budget=budget, **options)
    assert_matches(*functions, _inputs(device, (2, 5, 16)), atol=1e-6)


@pytest.mark.parametrize("hidden", [1, 5, 33])
@pytest.mark.parametrize("vocab", [1, 7, 130])
def test_sizes(device, poison, assert_matches, hidden, vocab):
    target = torch.randint(0, vocab, (6,), device=device)
    assert_matches(*_pair(target), _inputs(device, (6, hidden), vocab, bias=False), atol=1e-6)


def test_one_row_without_leading_dims(device, assert_matches):
    assert_matches(*_pair(torch.tensor(3, device=device)), _inputs(device, (16,)), atol=1e-6)


@pytest.mark.parametrize("budget", [2**20, 400])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit(device, poison, assert_as_accurate, dtype, options, budget):
    target = _target((10,), 50, device, options.get("ignore_index", -100))
    functions = _pair(target, logits_budget=budget, **options)
    # A power of two: with another factor the backward rounds the stored gradient of x a second time.
    upstream = [torch.tensor(0.5, device=device)]
    assert_as_accurate(*functions, _inputs(device, dtype=dtype), upstream=upstream)


def test_float16_gradients_do_not_underflow(device, assert_as_accurate):
    # With 1/n folded into them, gradients of the logits would be near 1e-8, below float16's smallest.
    vocab, rows = 400, 300
    target = torch.randint(0, vocab, (rows,), device=device)
    x, weight = (torch.randn(n, 8, device=device).half() for n in (rows, vocab))
    upstream = torch.tensor(2.0**10, device=device)

    def gradient(function, *inputs):
        leaf = inputs[1].detach().requires_grad_()
        function(inputs[0], leaf, target).backward(upstream)
        return leaf.grad.double()

    truth = gradient(linear_cross_entropy_reference, x.float(), weight.float())
    assert (gradient(linear_cross_entropy, x, weight) - truth).norm() < 2e-3 * truth.norm()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_all_ignored(device, poison, reduction, dtype):
    target = torch.full((10,), -100, device=device)
    inputs = [t.requires_grad_() for t in _inputs(device, dtype=dtype)]
    loss = _pair(target, reduction=reduction)[0](*inputs)
    loss.backward()
    assert loss.isnan() if reduction == "mean" else loss == 0
    for t in inputs:
        assert torch.equal(t.grad, torch.zeros_like(t))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_empty(device, reduction):
    target = torch.empty(0, dtype=torch.int64, device=device)
    inputs = [t.requires_grad_() for t in _inputs(device, (0, 16))]
    loss = _pair(target, reduction=reduction)[0](*inputs)
    loss.backward()
    assert loss.isnan() if reduction == "mean" else loss == 0
    for t in inputs:
        assert torch.equal(t.grad, torch.zeros_like(t))


def test_non_contiguous(device, poison, assert_matches):
    x = torch.randn(2, 6, 32, device=device)[:, :-1, ::2]
    weight = torch.randn(16, 50, device=device).t()
    bias = torch.randn(100, device=device)[::2]
    target = _target((2, 6), 50, device)[:, 1:]
    assert_matches(*_pair(target), [x, weight, bias], atol=1e-6)


@pytest.mark.parametrize("budget", [2**20, 800])
def test_scaled_backwards_are_independent(device, budget):
    """The gradients stored by the forward are scaled in place: every backward must start from fresh ones."""
    target = _target((10,), 50, device)
    x, weight, bias = (t.requires_grad_() for t in _inputs(device))
    loss = linear_cross_entropy(x, weight, target, bias, logits_budget=budget)
    scales = [torch.tensor(s, device=device) for s in (3.0, 1.0, -0.5)]
    grads = [torch.autograd.grad(loss, (x, weight, bias), s, retain_graph=True) for s in scales]
    expected = torch.autograd.grad(
        linear_cross_entropy_reference(x, weight, target, bias), (x, weight, bias), scales[1]
    )
    for got, scale in zip(grads, scales, strict=True):
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b * scale, rtol=1e-5, atol=1e-6)


def test_backward_twice_without_retain_graph_raises(device):
    x, weight = (t.requires_grad_() for t in _inputs(device, bias=False))
    loss = linear_cross_entropy(x, weight, _target((10,), 50, device))
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_no_gradient_stores_nothing(device):
    x, weight = (t.requires_grad_() for t in _inputs(device, bias=False))
    with torch.no_grad():
        assert not linear_cross_entropy(x, weight, _target((10,), 50, device)).requires_grad


def test_autocast(device):
    target = _target((10,), 50, device)
    x, weight, bias = (t.requires_grad_() for t in _inputs(device))
    losses, grads = [], []
    for function in (linear_cross_entropy, linear_cross_entropy_reference):
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = function(x, weight, target, bias, logits_budget=400)
        losses.append(loss.detach())
        grads.append(torch.autograd.grad(loss, (x, weight, bias)))
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-3)
    for a, b in zip(*grads, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-3)


def test_autocast_joins_mixed_dtypes(device):
    x, weight = _inputs(device, bias=False)
    target = _target((10,), 50, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        a = linear_cross_entropy(x.bfloat16(), weight, target)
        b = linear_cross_entropy(x, weight.bfloat16(), target)
    assert torch.equal(a, b)


@pytest.mark.parametrize("bad", [-1, 50, 2**40])
def test_target_out_of_range_gives_nan(device, bad):
    x, weight = (t.requires_grad_() for t in _inputs(device, (3, 16), bias=False))
    loss = linear_cross_entropy(x, weight, torch.tensor([1, bad, 2], device=device))
    loss.backward()
    assert loss.isnan() and x.grad[1].isnan().all() and x.grad[[0, 2]].isfinite().all()


def test_chunk_rows():
    assert _chunk_rows(1000, vocab=100, itemsize=2, budget=200 * 300) == 256
    assert _chunk_rows(1000, vocab=100, itemsize=2, budget=200 * 100) == 100
    assert _chunk_rows(1000, vocab=100, itemsize=2, budget=1) == 1
    assert _chunk_rows(10, vocab=100, itemsize=2, budget=2**30) == 10


def test_logits_stay_within_the_budget(device, monkeypatch):
    sizes = []
    make = torch.empty

    def spy(*args, **kwargs):
        tensor = make(*args, **kwargs)
        sizes.append(tensor.nbytes)
        return tensor

    x, weight = (t.requires_grad_() for t in _inputs(device, (64, 4), vocab=500, bias=False))
    target = torch.randint(0, 500, (64,), device=device)
    monkeypatch.setattr(torch, "empty", spy)
    linear_cross_entropy(x, weight, target, logits_budget=8 * 2000).backward()
    assert max(sizes) == 8 * 2000


def test_errors():
    x, weight, bias = _inputs("cpu")
    target = torch.zeros(10, dtype=torch.int64)
    for function in (linear_cross_entropy, linear_cross_entropy_reference):
        for args in (
            (x[:, :8], weight, target),
            (x, weight[0], target),
            (x, weight, target[:9]),
            (x, weight, target, bias[:9]),
        ):
            with pytest.raises(ValueError, match="expected x"):
                function(*args)
        with pytest.raises(TypeError, match="one dtype"):
            function(x, weight.bfloat16(), target)
        with pytest.raises(TypeError, match="floating"):
            function(x.long(), weight, target)
        with pytest.raises(TypeError, match="int64"):
            function(x, weight, target.int())
        with pytest.raises(ValueError, match="none"):
            function(x, weight, target, reduction="none")
        with pytest.raises(ValueError, match="logits_budget"):
            function(x, weight, target, logits_budget=0)
        with pytest.raises(ValueError, match="softcap"):
            function(x, weight, target, softcap=-1.0)
        with pytest.raises(ValueError, match="label_smoothing"):
            function(x, weight, target, label_smoothing=-0.1)
