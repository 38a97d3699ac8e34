import pytest
import torch

from ligerfx.kernels import linear_cross_entropy, linear_cross_entropy_reference, linear_crossentropy, rows_that_count
from ligerfx.kernels._weight_grad import WeightGrad
from ligerfx.kernels.linear_crossentropy import _chunk_rows, _tuning

VARIANTS = [
    {},
    {"reduction": "sum"},
    {"label_smoothing": 0.1},
    {"softcap": 3.0, "scale": 0.5},
    {"z_loss": 0.1},
    {"label_smoothing": 0.2, "softcap": 2.0, "scale": 1.7, "reduction": "sum", "ignore_index": 2, "z_loss": 0.01},
]
# One chunk; chunks of 4 rows of 50 float32 logits (padded to 64), the last one smaller; one row at a time.
BUDGETS = [2**20, 1024, 1]


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


@pytest.mark.parametrize("budget", [2**20, 2**9])
@pytest.mark.parametrize("hidden", [1, 5, 33])
@pytest.mark.parametrize("vocab", [1, 7, 130])
def test_sizes(device, poison, assert_matches, hidden, vocab, budget):
    target = torch.randint(0, vocab, (6,), device=device)
    inputs = _inputs(device, (6, hidden), vocab, bias=False)
    assert_matches(*_pair(target, logits_budget=budget), inputs, atol=1e-6)


@pytest.mark.parametrize("vocab", [100, 128, 255, 256, 300, 641])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_walks_over_a_row(device, poison, monkeypatch, assert_matches, assert_as_accurate, dtype, vocab):
    """With and without a part of a block at the end."""
    monkeypatch.setattr(linear_crossentropy, "_tuning", lambda vocab: (128, 4))
    target = torch.tensor([0, vocab - 1, vocab // 2, -100], device=device)
    functions = _pair(target, label_smoothing=0.1, z_loss=0.1)
    inputs = _inputs(device, (4, 8), vocab, bias=False, dtype=dtype)
    if dtype == torch.float32:
        assert_matches(*functions, inputs, atol=1e-6)
    else:
        assert_as_accurate(*functions, inputs, upstream=[torch.ones((), device=device)])


def test_ignored_rows_among_others(device, poison, monkeypatch):
    """What happens while a CUDA graph is captured: nothing is gathered, and the kernel meets the ignored rows."""
    monkeypatch.setattr(linear_crossentropy.CountedRows, "kept", lambda self: None)
    monkeypatch.setattr(linear_crossentropy, "_tuning", lambda vocab: (128, 4))
    target = _target((10,), 300, device)
    x, weight = (t.requires_grad_() for t in _inputs(device, vocab=300, bias=False))
    ours, reference = (f(x, weight) for f in _pair(target))
    torch.testing.assert_close(ours, reference)
    grads, expected = (torch.autograd.grad(loss, (x, weight)) for loss in (ours, reference))
    torch.testing.assert_close(grads, expected, rtol=1e-5, atol=1e-6)
    assert not grads[0][1::3].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_rows(device, poison, assert_as_accurate, assert_matches, dtype):
    vocab = 40001
    assert vocab > 2 * _tuning(vocab)[0]
    target = torch.tensor([40000, 3, 20000], device=device)
    inputs = _inputs(device, (3, 8), vocab, bias=False, dtype=dtype)
    if dtype == torch.float32:
        assert_matches(*_pair(target), inputs, atol=1e-6)
    else:
        assert_as_accurate(*_pair(target), inputs, upstream=[torch.ones((), device=device)])


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


@pytest.mark.parametrize("upstream", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_large_vocabulary(device, poison, assert_as_accurate, dtype, upstream):
    """Large enough that a part of the float32 sum lies in the memory of the result."""
    functions = _pair(_target((10,), 700, device), logits_budget=4 * 1408)
    # The gradient of x is stored in 16 bits, so that 3 rounds it twice.
    slack = torch.finfo(dtype).eps / 4 if upstream == 3 else None
    inputs = _inputs(device, vocab=700, bias=False, dtype=dtype)
    assert_as_accurate(*functions, inputs, upstream=[torch.tensor(upstream, device=device)], slack=slack)


@pytest.mark.parametrize("options", [{}, {"z_loss": 0.1, "label_smoothing": 0.1}], ids=str)
def test_sum_in_the_weights_dtype(device, poison, options):
    """Every chunk rounds its product and the sum so far, each by at most half an ulp; nothing else differs."""
    rows, chunk, vocab = 12, 3, 50
    target = _target((rows,), vocab, device)
    target[1::3] = 7
    x, weight = _inputs(device, (rows, 16), vocab, bias=False, dtype=torch.bfloat16)

    def gradient(function, x, weight, target, **more):
        weight = weight.detach().requires_grad_()
        function(x, weight, target, reduction="sum", **options, **more).backward()
        assert weight.grad.dtype == weight.dtype
        return weight.grad.double()

    narrow, wide = (
        gradient(linear_cross_entropy, x, weight, target, logits_budget=chunk * 128, accumulate_in=dtype)
        for dtype in (None, torch.float32)
    )
    products = [
        gradient(linear_cross_entropy_reference, x.float()[i : i + chunk], weight.float(), target[i : i + chunk])
        for i in range(0, rows, chunk)
    ]
    half_ulp = torch.finfo(torch.bfloat16).eps / 2
    bound = sum((p.abs() + s.abs()) * half_ulp for p, s in zip(products, torch.stack(products).cumsum(0), strict=True))
    # Both modes see the same 16-bit gradients of the logits, whose error is not at issue; the wide one rounds once.
    assert ((narrow - wide).abs() <= 1.2 * bound + 2 * half_ulp * wide.abs() + 1e-2 * wide.abs().mean()).all()
    assert not torch.equal(narrow, wide)


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_wide_sum_is_rounded_once(device, factor):
    a, b = torch.randn(700, 5, device=device).half(), torch.randn(5, 16, device=device).half()
    total = WeightGrad(torch.empty(700, 16, dtype=torch.float16, device=device), 32)
    assert total.add([a.t()], b, last=True)
    expected = (torch.cat(total.parts) * factor).half()
    assert total.parts[1].numel() and torch.equal(total.scaled(torch.tensor(factor, device=device)), expected)


@pytest.mark.parametrize(
    ("budget", "mode", "bits"),
    # The sum would take 2 x 50 x 16 bytes more than its result, and a row of logits takes 128.
    [(2**20, torch.float32, None), (1300, torch.float32, None), (900, torch.float32, 32), (900, None, None)],
)
def test_one_chunk_needs_no_sum(device, monkeypatch, budget, mode, bits):
    x, weight = (t.requires_grad_() for t in _inputs(device, (20, 16), bias=False, dtype=torch.bfloat16))
    made, chunks, add = [], [], WeightGrad.add
    monkeypatch.setattr(WeightGrad, "add", lambda self, a, b, last: chunks.append(len(b)) or add(self, a, b, last))
    monkeypatch.setattr(linear_crossentropy, "WeightGrad", lambda w, bits: made.append(bits) or WeightGrad(w, bits))
    target = torch.randint(50, (20,), device=device)
    linear_cross_entropy(x, weight, target, logits_budget=budget, accumulate_in=mode).backward()
    assert made == [bits]
    assert (chunks == [20]) == (budget > 900)


@pytest.mark.parametrize("hidden", [1, 3, 8])
@pytest.mark.parametrize("vocab", [1, 2, 255, 257, 511, 513, 700, 1024, 3001])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wide_sum_in_the_memory_of_its_result(device, poison, dtype, vocab, hidden):
    a = torch.randint(-4, 5, (2, 3, vocab), device=device).to(dtype)
    b = torch.randint(-4, 5, (2, 3, hidden), device=device).to(dtype)
    total = WeightGrad(torch.empty(vocab, hidden, dtype=dtype, device=device), 32)
    for i in range(2):
        total.add([a[i]], b[i], last=i == 1)
    result = total.scaled(torch.tensor(0.5, device=device))
    # Small integers, halved: exact in every dtype.
    expected = 0.5 * sum(a[i].float().t() @ b[i].float() for i in range(2))
    assert result.dtype == dtype and torch.equal(result.float(), expected)
    size = sum(t.untyped_storage().nbytes() for t in (total.parts[0], total.result))
    assert size <= (4 + 1 / 16) * vocab * hidden + 4 * 512 * hidden


@pytest.mark.parametrize("hidden", [8, 16, 24, 64])
@pytest.mark.parametrize("n_rows", [1, 8, 16, 17, 40, 300])
@pytest.mark.parametrize("vocab", [4095, 4096, 5001, 20000])
def test_factor_in_the_memory_of_the_product(device, poison, vocab, n_rows, hidden):
    a = torch.randint(-2, 3, (n_rows, vocab), device=device).bfloat16()
    b = torch.randint(-2, 3, (n_rows, hidden), device=device).bfloat16()
    total = WeightGrad(torch.empty(vocab, hidden, dtype=torch.bfloat16, device=device))
    room = total.room(n_rows)
    assert len(room) <= 6 and all(part.stride(0) % 16 == 0 and part.data_ptr() % 16 == 0 for part in room)
    assert all(part.shape[1] % 256 == 0 for part in room[:-1])
    for part, columns in zip(room, a.split([part.shape[1] for part in room], dim=1), strict=True):
        part.copy_(columns)
    total.add(room, b, last=True)
    # Small integers: float32 has their sums, and both round alike.
    assert torch.equal(total.scaled(torch.ones((), device=device)), (a.float().t() @ b.float()).bfloat16())
    taken = sum({part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in room}.values())
    if vocab >= 4096:
        inside = total.result.untyped_storage().data_ptr()
        assert any(part.untyped_storage().data_ptr() == inside for part in room[:-1]) or n_rows > 8 * hidden
        most, least = max(n_rows, hidden), min(n_rows, hidden)
        assert taken <= 2 * (vocab * (most + least / 4) + (257 + 16) * n_rows)


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


@pytest.mark.parametrize("mode", [torch.float32, None])
@pytest.mark.parametrize("ignored", [True, False])
def test_every_backward_gives_the_same_bits(device, poison, mode, ignored):
    """The first takes what the forward computed, the others compute it again."""
    target = _target((10,), 700, device) if ignored else torch.arange(10, device=device)
    x, weight = (t.requires_grad_() for t in _inputs(device, vocab=700, bias=False, dtype=torch.bfloat16))
    loss = linear_cross_entropy(x, weight, target, logits_budget=4 * 1408, accumulate_in=mode)
    first, second = (torch.autograd.grad(loss, (x, weight), retain_graph=True) for _ in range(2))
    scaled = torch.autograd.grad(loss, (x, weight), torch.tensor(2.0, device=device))
    for a, b, c in zip(first, second, scaled, strict=True):
        assert torch.equal(a, b) and torch.equal(2 * a, c)


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


IGNORED = {
    "none": [],
    "first": [0],
    "last": [-1],
    "some": [1, 2, 5],
    "all but one": [i for i in range(10) if i != 6],
    "all": list(range(10)),
}


@pytest.mark.parametrize("ignore_index", [-100, 3])
@pytest.mark.parametrize("ignored", IGNORED.values(), ids=IGNORED)
def test_rows_that_count(device, ignored, ignore_index):
    target = torch.arange(10, 20, device=device)
    target[ignored] = ignore_index
    rows = rows_that_count(target.view(2, 5), ignore_index)
    expected = (target != ignore_index).nonzero().squeeze(1)
    assert rows.size == 10 and rows.n_valid.device == target.device and rows.n_valid == len(expected)
    for _ in range(2):
        kept = rows.kept()
        assert kept is None if not ignored else kept.dtype == torch.int64 and torch.equal(kept, expected)


@pytest.mark.parametrize("budget", [2**20, 1024])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("ignored", IGNORED.values(), ids=IGNORED)
def test_rows_found_before(device, poison, assert_matches, ignored, reduction, budget):
    target = torch.arange(10, 20, device=device).view(2, 5)
    target.view(-1)[ignored] = -100
    rows = rows_that_count(target)
    inputs = _inputs(device, (2, 5, 16))
    options = {"logits_budget": budget, "reduction": reduction}
    if len(ignored) < 10:
        assert_matches(_pair(target, rows=rows, **options)[0], _pair(target, **options)[1], inputs, atol=1e-6)
    leaves = [t.requires_grad_() for t in inputs]
    given, found = (_pair(target, rows=r, **options)[0](*leaves) for r in (rows, None))
    assert torch.equal(given, found) or (given.isnan() and found.isnan())
    for a, b in zip(torch.autograd.grad(given, leaves), torch.autograd.grad(found, leaves), strict=True):
        assert torch.equal(a, b)


def test_nothing_is_gathered_when_every_row_counts(device, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("gathered")

    monkeypatch.setattr(torch.Tensor, "index_select", fail)
    monkeypatch.setattr(torch.Tensor, "index_copy_", fail)
    x, weight = (t.requires_grad_() for t in _inputs(device, bias=False))
    linear_cross_entropy(x, weight, torch.arange(10, device=device)).backward()
    with pytest.raises(AssertionError, match="gathered"):
        linear_cross_entropy(x, weight, _target((10,), 50, device))


def test_rows_of_another_target_raise(device):
    x, weight = _inputs(device, bias=False)
    target = _target((10,), 50, device)
    for function in (linear_cross_entropy, linear_cross_entropy_reference):
        function(x, weight, target, rows=rows_that_count(target))
        with pytest.raises(ValueError, match="9 elements"):
            function(x, weight, target, rows=rows_that_count(target[:9]))
        with pytest.raises(ValueError, match="ignore_index 0"):
            function(x, weight, target, rows=rows_that_count(target, 0))
        with pytest.raises(ValueError, match="on meta"):
            function(x, weight, target, rows=rows_that_count(target.to("meta")))
    with pytest.raises(TypeError, match="int32"):
        rows_that_count(target.int())


def test_chunk_rows():
    assert _chunk_rows(1000, row_bytes=200, budget=200 * 300) == 256  # 256, 256, 256, 232
    assert _chunk_rows(1000, row_bytes=200, budget=200 * 700) == 512  # not 640 and 360
    assert _chunk_rows(1000, row_bytes=200, budget=200 * 100) == 100
    assert _chunk_rows(101, row_bytes=200, budget=200 * 100) == 51
    assert _chunk_rows(1000, row_bytes=200, budget=1) == 1
    assert _chunk_rows(10, row_bytes=200, budget=2**30) == 10
    assert _chunk_rows(1000, row_bytes=200, budget=200 * 700, spared=200 * 300) == 1000
    assert _chunk_rows(1000, row_bytes=200, budget=200 * 700, spared=200 * 299) == 512
    for vocab in (128256, 151936, 152064):
        assert _chunk_rows(8192, vocab * 2, linear_crossentropy.LOGITS_BUDGET) == 2048
    assert _chunk_rows(2400, 2 * 128256, linear_crossentropy.LOGITS_BUDGET) == 2400


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
    linear_cross_entropy(x, weight, target, logits_budget=8 * 2048).backward()
    # 8 rows of 512 logits, padded; then the gradients of the weight and of x, and the losses.
    assert sorted(sizes)[-4:] == [256, 1024, 8000, 8 * 2048]


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
        with pytest.raises(ValueError, match="accumulate_in"):
            function(x, weight, target, accumulate_in=torch.bfloat16)
        with pytest.raises(ValueError, match="softcap"):
            function(x, weight, target, softcap=-1.0)
        with pytest.raises(ValueError, match="label_smoothing"):
            function(x, weight, target, label_smoothing=-0.1)
