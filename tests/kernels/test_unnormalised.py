"""The loss whose product ends in exponentials: that product runs on H100 or H200, and is a stand-in elsewhere."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from ligerfx.kernels import (
    _hopper,
    _hopper_loss,
    _hopper_sum,
    _unnormalised,
    _weight_grad,
    linear_cross_entropy,
    linear_cross_entropy_reference,
)

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
on_hopper = pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")
# M, H, V: on a GPU more tiles than programs, with rests of tiles; for the interpreter small, with a rest of columns.
ROWS, HIDDEN, VOCAB = (1900, 264, 9000) if torch.cuda.is_available() else (64, 16, 300)
STD = HIDDEN**-0.5


def _exponentials(x, weight, scale, softcap, shift, label, needed, result, exponent, sums, tops):
    if needed[0] == 0:
        return True
    z = (x.float() @ weight.float().t()).to(x.dtype).float() * scale
    ratio = torch.zeros(()) if softcap is None else torch.tanh(z / softcap)
    z = (z if softcap is None else softcap * ratio) / math.log(2)
    e = torch.exp2(z - shift[:, None])
    pad = (0, -z.shape[1] % _hopper_loss.COLUMNS)
    parts = len(z), -1, _hopper_loss.COLUMNS
    sums.copy_(F.pad(e, pad).view(parts).sum(-1).t())
    tops.copy_(F.pad(z, pad, value=float("-inf")).view(parts).amax(-1).t())
    rows = ((label >= 0) & (label < z.shape[1])).nonzero()[:, 0]
    exponent[rows] = z[rows, label[rows].long()] - shift[rows]
    e[rows, label[rows].long()] = 0.0
    e *= 1 - ratio * ratio
    for part, values in zip(result, e.split([part.shape[1] for part in result], dim=1), strict=True):
        part.copy_(values)
    return True


@pytest.fixture
def products(monkeypatch):
    """Whether each product that was launched was needed, by the device."""
    needs = []
    function = _hopper_loss.exponentials if HOPPER else _exponentials

    def noted(x, weight, scale, softcap, shift, label, needed, *written):
        needs.append(needed[:1].clone())
        return function(x, weight, scale, softcap, shift, label, needed, *written)

    monkeypatch.setattr(_hopper_loss, "exponentials", noted)
    if not HOPPER:
        monkeypatch.setattr(_hopper, "takes", lambda *_: True)
    return needs


def _inputs(device, std=STD):
    x = torch.randn(ROWS, HIDDEN, device=device).bfloat16()
    return [x, (torch.randn(VOCAB, HIDDEN, device=device) * std).bfloat16()]


def _target(device, ignored=0.0):
    target = torch.randint(VOCAB, (ROWS,), device=device)
    target[: round(ROWS * ignored)] = -100
    return target[torch.randperm(ROWS, device=device)]


def _functions(target, **options):
    def bind(function):
        return lambda x, weight: function(x, weight, target, **options)

    return bind(linear_cross_entropy), bind(linear_cross_entropy_reference)


def _results(function, x, weight, needs=(True, True)):
    leaves = [t.detach().requires_grad_(need) for t, need in zip((x, weight), needs, strict=True)]
    loss = function(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss, [t for t in leaves if t.requires_grad])]


def _parts(vocab, hidden, rows):
    """In how many parts the columns of one chunk lie."""
    return len(_weight_grad.WeightGrad(torch.empty(vocab, hidden, dtype=torch.bfloat16)).room(rows))


def _one(device):
    return [torch.ones((), device=device)]


@pytest.mark.parametrize(
    ("ignored", "options"),
    [
        (0.0, {}),
        (0.005, {}),
        (0.4, {}),
        (0.4, {"reduction": "sum", "scale": 0.7, "z_loss": 0.01}),
        (0.0, {"softcap": 2.0, "scale": 1.3}),
    ],
    ids=str,
)
@pytest.mark.parametrize("chunks", [1, 3])
def test_as_accurate_as_eager(device, poison, assert_as_accurate, products, chunks, options, ignored):
    functions = _functions(_target(device, ignored), logits_budget=2 * (VOCAB + 16) * ROWS // chunks, **options)
    assert_as_accurate(*functions, _inputs(device), upstream=_one(device))
    assert len(products) >= 4 * min(chunks, 2)  # each in two turns; a second backward computes all again
    assert [need.item() for need in products] == [1, 0] * (len(products) // 2)


@pytest.mark.parametrize("ignored", [0.0, 0.3])
@pytest.mark.parametrize("hidden", [HIDDEN, 2 * ROWS + 8])
def test_in_the_memory_of_the_gradient(device, poison, assert_as_accurate, products, monkeypatch, hidden, ignored):
    """One chunk lies there as far as it can, and so need not be cut although it is above the budget."""
    monkeypatch.setattr(_unnormalised, "MOST_ROWS", ROWS // 3)
    vocab = 8500
    x = torch.randn(ROWS, hidden, device=device).bfloat16()
    weight = (torch.randn(vocab, hidden, device=device) * hidden**-0.5).bfloat16()
    target = torch.randint(vocab, (ROWS,), device=device)
    target[torch.randperm(ROWS, device=device)[: round(ROWS * ignored)]] = -100
    rows = round(ROWS * (1 - ignored))
    inside = _weight_grad.columns_inside(vocab, hidden, rows)
    assert _parts(vocab, hidden, rows) > 1
    budget = 2 * rows * (vocab + 16 - inside) - 2 * weight.numel()
    functions = _functions(target, logits_budget=max(1, budget))
    assert_as_accurate(*functions, [x, weight], upstream=_one(device))
    assert [need.item() for need in products] == [1, 0, 1, 0]  # two calls, each of two turns


def test_no_kernel_is_compiled_for_a_number_of_parts(monkeypatch):
    """Which changes with the number of rows."""
    launched = []
    monkeypatch.setattr(_hopper, "launch", lambda *args: launched.append(args))
    monkeypatch.setattr(_hopper_loss, "_exponentials_kernel", None, raising=False)  # there is none without Gluon
    x, weight, rows = torch.empty(8, 16), torch.empty(2000, 16), torch.empty(8)
    for widths in ([2000], [512, 1488], [256, 256, 512, 976]):
        parts = list(torch.empty(8, 2048)[:, :2000].split(widths, dim=1))
        _hopper_loss.exponentials(x, weight, 1.0, None, rows, rows, rows, parts, rows, rows, rows)
        results, strides, ends = launched[-1][7]
        assert len(results) == len(strides) == len(ends) + 1 == 4
        assert list(ends[: len(widths) - 1]) == list(itertools.accumulate(widths[:-1]))
        assert all(end > 2000 and end % 16 == 0 for end in ends[len(widths) - 1 :])


@pytest.mark.parametrize("label", [0, 7, VOCAB - 1])
def test_labels_that_repeat(device, poison, assert_as_accurate, products, label):
    target = _target(device)
    target[::2] = label
    assert_as_accurate(*_functions(target, logits_budget=2 * VOCAB * ROWS // 3), _inputs(device), upstream=_one(device))
    assert products


def test_rows_that_overflow(device, poison, assert_as_accurate, products):
    """With losses in the hundreds, exponentials relative to the label are infinite, and the product is done again."""
    x, weight = _inputs(device, 30 * STD)
    target = _target(device, 0.2)
    x[::3] /= 100  # not these
    functions = _functions(target)
    assert functions[1](x, weight) > 50
    assert_as_accurate(*functions, [x, weight], upstream=_one(device))
    assert [need.item() for need in products] == [1] * len(products)


def test_a_loss_near_zero_keeps_its_digits(device, products):
    x = torch.eye(HIDDEN, device=device).repeat(-(-ROWS // HIDDEN), 1)[:ROWS].bfloat16()
    weight = torch.zeros(VOCAB, HIDDEN, device=device).bfloat16()
    weight[:HIDDEN] = torch.eye(HIDDEN, device=device) * 14.0
    target = torch.arange(ROWS, device=device) % HIDDEN
    loss, dx, dw = _results(_functions(target)[0], x, weight)
    assert products
    expected, *gradients = _results(lambda x, w: F.cross_entropy(x @ w.t(), target), x.double(), weight.double())
    assert 1e-4 < expected < 1e-2
    torch.testing.assert_close(loss.double(), expected, rtol=5e-3, atol=0.0)
    for got, wanted in zip((dx, dw), gradients, strict=True):
        assert (got.double() - wanted).norm() <= 0.02 * wanted.norm()


@pytest.mark.parametrize("ignored", [0.0, 0.3])
def test_each_gradient_alone(device, poison, products, ignored):
    function, _ = _functions(_target(device, ignored), logits_budget=2 * VOCAB * ROWS // 3)
    inputs = _inputs(device)
    loss, dx, dw = _results(function, *inputs)
    assert products
    for needs, expected in (((True, False), dx), ((False, True), dw)):
        alone = _results(function, *inputs, needs)
        assert torch.equal(alone[0], loss) and torch.equal(alone[1], expected)


def test_ignored_rows_among_others(device, poison, products, monkeypatch):
    """As while a CUDA graph is captured: nothing is gathered."""
    target, inputs = _target(device, 0.3), _inputs(device)
    gathered = _results(_functions(target)[0], *inputs)
    monkeypatch.setattr("ligerfx.kernels.linear_crossentropy.CountedRows.kept", lambda self: None)
    loss, dx, dw = _results(_functions(target)[0], *inputs)
    assert products and not dx[target == -100].any()
    for a, b in zip((loss, dx, dw), gathered, strict=True):
        assert (a.double() - b.double()).norm() <= 1e-3 * b.double().norm()


@pytest.mark.parametrize("bad", [-1, VOCAB, 2**40])
def test_target_out_of_range_gives_nan(device, products, bad):
    target = _target(device)
    target[5] = bad
    loss, dx, dw = _results(_functions(target)[0], *_inputs(device))
    assert products and loss.isnan() and dx[5].isnan().all() and dw.isnan().all()
    assert not dx[:5].isnan().any() and not dx[6:].isnan().any()


def test_what_is_not_taken(device, products):
    x, weight = _inputs(device)
    plain = (-100, 1.0, 0.0, None, 0.0)
    assert _unnormalised.takes(x, weight, None, plain)
    assert _unnormalised.takes(x, weight, None, (-100, 1.0, 0.1, 30.0, 0.0))
    assert not _unnormalised.takes(x.half(), weight.half(), None, plain)
    assert not _unnormalised.takes(x, weight, weight[:, 0].contiguous(), plain)
    assert not _unnormalised.takes(x, weight, None, (-100, 1.0, 0.0, None, 0.1))
    with torch.no_grad():  # has no use for what is written
        linear_cross_entropy(x, weight, _target(device))
    assert not products


@pytest.mark.parametrize("before", [0, 3])
def test_a_failure_goes_the_ordinary_way(device, products, monkeypatch, before):
    """From the start, whatever has been computed before."""
    function, inputs = _functions(_target(device, 0.3), logits_budget=2 * VOCAB * ROWS // 3)[0], _inputs(device)
    calls, product = itertools.count(), _hopper_loss.exponentials
    monkeypatch.setattr(_hopper, "takes", lambda *_: False)
    monkeypatch.setattr(_hopper_sum, "takes", lambda *_: False)
    expected = _results(function, *inputs)
    monkeypatch.setattr(_hopper, "takes", lambda *_: True)
    monkeypatch.setattr(_hopper_loss, "exponentials", lambda *args: next(calls) < before and product(*args))
    assert all(torch.equal(a, b) for a, b in zip(_results(function, *inputs), expected, strict=True))
    assert next(calls) == before + 1  # no other is tried


@on_hopper
def test_repeats_its_bits(products):
    """A race between the groups would change some."""
    function, inputs = _functions(_target("cuda"))[0], _inputs("cuda")
    first, *rest = [_results(function, *inputs) for _ in range(20)]
    assert all(torch.equal(a, b) for again in rest for a, b in zip(first, again, strict=True))
