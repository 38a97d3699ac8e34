"""The sum of products that takes 24 bits a number: its products run on H100 or H200, and are stand-ins elsewhere."""

import pytest
import torch

from ligerfx.kernels import _hopper, _hopper_sum, linear_cross_entropy, linear_cross_entropy_reference
from ligerfx.kernels._runtime import tl, triton
from ligerfx.kernels._weight_grad import WeightGrad

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
on_hopper = pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")
# M, H, V: on a GPU more tiles than programs, with rests of tiles and of stages.
ROWS, HIDDEN, VOCAB = (1900, 264, 9000) if torch.cuda.is_available() else (64, 16, 300)


def _joined(upper, lower):
    return ((upper.int() << 16) | (lower.int() << 8)).view(torch.float32)


def _add_product(upper, lower, a, b, first, last):
    total = a.float().t() @ b.float()
    if not first:
        total += _joined(upper, lower)
    if last:
        upper.view(torch.bfloat16).copy_(total)
        rest = (total.view(torch.int32) - (upper.int() << 16) + 0x80) >> 8
        lower.copy_(rest.clamp(-128, 127).to(torch.int8).view(torch.uint8))
    else:
        bits = total.view(torch.int32)
        bits += torch.where(total.isfinite(), 0x80, 0).int()
        upper.copy_((bits >> 16).short())
        lower.copy_((bits >> 8 & 0xFF).byte())
    return True


@pytest.fixture
def products(monkeypatch):
    """(first, last) of each product of a sum in 24 bits."""
    calls = []
    function = _hopper_sum.add_product if HOPPER else _add_product

    def noted(upper, lower, a, b, first, last):
        calls.append((first, last))
        return function(upper, lower, a, b, first, last)

    monkeypatch.setattr(_hopper_sum, "add_product", noted)
    if not HOPPER:
        monkeypatch.setattr(_hopper_sum, "takes", lambda x, weight: x.dtype == torch.bfloat16)
    return calls


def _sum(device, a, b, factor=1.0):
    total = WeightGrad(torch.empty(a[0].shape[1], b[0].shape[1], dtype=torch.bfloat16, device=device), 24)
    for i, factors in enumerate(zip(a, b, strict=True)):
        assert total.add([factors[0]], factors[1], last=i == len(a) - 1)
    return total.scaled(torch.tensor(factor, device=device))


@pytest.mark.parametrize("chunks", [[64, 64], [40, 72, 8], [300, 1, 33, 500]])
@pytest.mark.parametrize("widths", [(VOCAB, HIDDEN), (17 * 1024, 256), (2176, 2048)])
def test_integers_are_exact(device, poison, products, widths, chunks):
    """Sums of less than 2**16 take 16 digits. So the result is what is rounded once."""
    if not HOPPER:
        widths = [width // 16 for width in widths]
    a = [torch.randint(-3, 4, (m, widths[0]), device=device).bfloat16() for m in chunks]
    b = [torch.randint(-9, 10, (m, widths[1]), device=device).bfloat16() for m in chunks]
    exact = sum(x.float().t() @ y.float() for x, y in zip(a, b, strict=True))
    assert torch.equal(_sum(device, a, b), exact.bfloat16())
    assert products == [(i == 0, i == len(chunks) - 1) for i in range(len(chunks))]


@pytest.mark.parametrize("factor", [3.0, -0.7, 1e-3])
def test_scaling_rounds_anew(device, products, factor):
    a, b = torch.randn(2, 64, VOCAB, device=device).bfloat16(), torch.randn(2, 64, HIDDEN, device=device).bfloat16()
    first, second = (x.double().t() @ y.double() for x, y in zip(a, b, strict=True))
    exact = factor * (first + second)
    error = (_sum(device, a, b, factor).double() - exact).abs()
    # Rounded twice, some would be off by nearly twice the half of a last place. Each product and sum has 16 digits.
    assert (error <= 2**-8 * exact.abs() + 2**-14 * abs(factor) * (first.abs() + second.abs())).all()
    assert products


@on_hopper
@pytest.mark.parametrize("first", [True, False])
def test_what_is_between_two_products(poison, first):
    a, b = torch.randn(700, VOCAB, device="cuda").bfloat16(), torch.randn(700, HIDDEN, device="cuda").bfloat16()
    upper = torch.randn(VOCAB, HIDDEN, device="cuda").bfloat16().view(torch.int16)
    lower = torch.randint(256, (VOCAB, HIDDEN), device="cuda").byte()
    product = a.double().t() @ b.double()
    exact = product + (0.0 if first else _joined(upper, lower).double())
    assert _hopper_sum.add_product(upper, lower, a, b, first, last=False)
    # The product cut to 16 digits, their sum rounded to 16; and float32's own errors over 700 rows.
    bound = product.abs() * 2**-15 + exact.abs() * 2**-16 + 1e-4
    assert ((_joined(upper, lower) - exact).abs() <= bound).all()


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 3e38])
def test_what_is_not_finite_stays_so(device, products, value):
    a = [torch.ones(64, VOCAB, device=device).bfloat16() for _ in range(3)]
    b = [torch.ones(64, HIDDEN, device=device).bfloat16() for _ in range(3)]
    a[0][5, 7] = value
    expected = sum(x.float().t() @ y.float() for x, y in zip(a, b, strict=True)).bfloat16()
    torch.testing.assert_close(_sum(device, a, b), expected, rtol=2**-8, atol=0.0, equal_nan=True)
    assert products


@triton.jit
def _there_and_back(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    upper, lower = _hopper_sum.to_24_bits(tl.load(x_ptr + at))
    tl.store(y_ptr + at, _hopper_sum.from_24_bits(upper, lower))


def test_rounding_to_24_bits(device):
    edges = [0x00000000, 0x80000000, 0x3F80007F, 0x3F800080, 0xBF800080, 0x3FFFFFFF, 0x7F7FFFFF, 0x7F800000]
    edges += [0xFF800000, 0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x00000001, 0x000000FF]
    bits = torch.tensor(edges + [int(i) for i in torch.randint(2**32, (242,))], dtype=torch.int64, device=device)
    x = bits.to(torch.int32).view(torch.float32)
    y = torch.empty_like(x)
    _there_and_back[(1,)](x, y, len(x))
    rounded = torch.where(x.isfinite(), (bits + 0x80) & 0xFFFFFF00, bits & 0xFFFFFF00)
    assert torch.equal(y.view(torch.int32), rounded.to(torch.int32))
    assert torch.equal(y.isnan(), x.isnan())


@triton.jit
def _rounded_and_back(x_ptr, result_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    rounded, rest = _hopper_sum.to_result(tl.load(x_ptr + at))
    tl.store(result_ptr + at, rounded)
    tl.store(y_ptr + at, _hopper_sum.from_result(rounded, rest))


def test_result_and_rest(device):
    """The result is what a cast gives. The rest has half of 256ths of its last place; 128 of them are 127."""
    ties = [257.0, 259.0, -257.0, 1.0 + 2**-8, 2.0 - 2**-8, 2.0 - 2**-9, 0.0, -0.0, 1e-40, float("inf"), float("-inf")]
    x = torch.tensor(ties + [0.0] * 5 + torch.randn(240).tolist(), device=device)
    result, y = torch.empty(len(x), dtype=torch.int16, device=device), torch.empty_like(x)
    _rounded_and_back[(1,)](x, result, y, len(x))
    rounded = x.bfloat16()
    assert torch.equal(result.view(torch.bfloat16), rounded)
    assert torch.equal(y[~x.isfinite()], x[~x.isfinite()])
    places = rounded.view(torch.int16).int() << 16
    off = (y.view(torch.int32) - x.view(torch.int32)).abs()
    assert (off[x.isfinite()] <= torch.where(x.view(torch.int32) - places == 0x8000, 0x100, 0x80)[x.isfinite()]).all()


def _functions(target, budget, **options):
    def bind(function):
        return lambda x, weight: function(x, weight, target, logits_budget=budget, **options)

    return bind(linear_cross_entropy), bind(linear_cross_entropy_reference)


def _target(device):
    target = torch.randint(VOCAB, (ROWS,), device=device)
    target[::7] = 3
    return target


def _inputs(device):
    weight = torch.randn(VOCAB, HIDDEN, device=device) * HIDDEN**-0.5
    return [torch.randn(ROWS, HIDDEN, device=device).bfloat16(), weight.bfloat16()]


BUDGET = 2 * (VOCAB + 16) * ROWS // 3
"""Of a loss in three chunks or, since they are rounded up, two."""


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"reduction": "sum", "z_loss": 0.01}], ids=str)
def test_loss_as_accurate_as_eager(device, poison, assert_as_accurate, products, options):
    functions = _functions(_target(device), BUDGET, **options)
    assert_as_accurate(*functions, _inputs(device), upstream=[torch.ones((), device=device)])
    assert products[0] == (True, False) and (False, True) in products and (True, True) not in products


def test_one_chunk_and_other_dtypes_have_no_such_sum(device, products):
    def step(dtype, budget, **options):
        x, weight = (t.to(dtype).requires_grad_() for t in _inputs(device))
        linear_cross_entropy(x, weight, _target(device), logits_budget=budget, **options).backward()

    step(torch.bfloat16, 4 * BUDGET)
    step(torch.bfloat16, BUDGET, accumulate_in=None)
    step(torch.float16, BUDGET)
    step(torch.float32, BUDGET)
    assert not products
    step(torch.bfloat16, BUDGET)
    assert products


@pytest.mark.parametrize("before", [0, 1])
def test_a_failure_goes_the_ordinary_way(device, products, monkeypatch, before):
    x, weight = (t.requires_grad_() for t in _inputs(device))
    function, _ = _functions(_target(device), BUDGET)
    add_product = _hopper_sum.add_product
    monkeypatch.setattr(_hopper_sum, "add_product", lambda *args: len(products) < before and add_product(*args))
    got = torch.autograd.grad(function(x, weight), [x, weight])
    assert len(products) == before
    monkeypatch.setattr(_hopper_sum, "takes", lambda *_: False)
    monkeypatch.setattr(_hopper, "takes", lambda *_: False)
    assert all(map(torch.equal, got, torch.autograd.grad(function(x, weight), [x, weight])))


@on_hopper
def test_what_is_taken():
    x, weight = _inputs("cuda")
    assert _hopper_sum.takes(x, weight)
    assert not _hopper_sum.takes(x.half(), weight.half())
    assert not _hopper_sum.takes(x[:, :260], weight[:, :260])  # rows of x * a would not be aligned
    assert not _hopper_sum.takes(x, weight[:1000])  # too few tiles


@on_hopper
def test_repeats_its_bits(products):
    """A race between the groups, or with the copies, would change some."""
    x, weight = (t.requires_grad_() for t in _inputs("cuda"))
    function, _ = _functions(_target("cuda"), BUDGET)
    first, *rest = [torch.autograd.grad(function(x, weight), weight)[0] for _ in range(20)]
    assert products and all(torch.equal(first, again) for again in rest)
