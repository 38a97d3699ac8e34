import functools

import pytest
import torch

from ligerfx.kernels import cross_entropy, cross_entropy_reference

VARIANTS = [
    {},
    {"reduction": "sum"},
    {"label_smoothing": 0.1},
    {"softcap": 3.0},
    {"scale": -0.3},
    {"z_loss": 0.1},
    {"label_smoothing": 0.2, "softcap": 2.0, "scale": 1.7, "reduction": "sum", "ignore_index": 2, "z_loss": 0.01},
]


def _pair(target, **options):
    return [lambda z, f=f: f(z, target, **options) for f in (cross_entropy, cross_entropy_reference)]


def _target(shape, vocab, device, ignore=-100):
    target = torch.randint(0, vocab, shape, device=device)
    target.view(-1)[1::3] = ignore
    return target


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("shape", [(5, 1), (4, 7), (2, 3, 130), (3, 4100), (2, 8192), (50,)])
def test_matches_reference(device, poison, assert_matches, shape, options):
    target = _target(shape[:-1], shape[-1], device, options.get("ignore_index", -100))
    if not shape[:-1]:
        target = torch.tensor(3, device=device)
    assert_matches(*_pair(target, **options), [2 * torch.randn(shape, device=device)], atol=1e-6)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit(device, poison, assert_as_accurate, dtype, options):
    target = _target((9,), 150, device, options.get("ignore_index", -100))
    logits = (2 * torch.randn(9, 150, device=device)).to(dtype)
    assert_as_accurate(*_pair(target, **options), [logits])


@pytest.mark.parametrize("value", [100.0, -100.0, 1e4])
def test_large_logits(device, assert_matches, value):
    logits = torch.randn(4, 40, device=device) + value
    logits[:, 3] = float("-inf")
    assert_matches(*_pair(torch.tensor([0, 1, 2, 39], device=device)), [logits], rtol=1e-4)


def test_first_block_masked_out(device, assert_matches):
    logits = torch.randn(2, 5000, device=device)
    logits[:, :4500] = float("-inf")
    assert_matches(*_pair(torch.tensor([4600, 4999], device=device)), [logits])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 0.1}], ids=str)
def test_all_ignored(device, poison, reduction, options):
    target = torch.full((4,), -100, device=device)
    for function in _pair(target, reduction=reduction, **options):
        logits = torch.randn(4, 9, device=device, requires_grad=True)
        loss = function(logits)
        loss.backward()
        assert loss.isnan() if reduction == "mean" else loss == 0
        assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("view", ["rows", "columns", "shifted", "transposed", "expanded"])
def test_non_contiguous(device, poison, assert_matches, view):
    logits = {
        "rows": lambda: torch.randn(6, 12, device=device)[:, :10],
        "columns": lambda: torch.randn(6, 20, device=device)[:, ::2],
        "shifted": lambda: torch.randn(2, 4, 10, device=device)[:, :-1],
        "transposed": lambda: torch.randn(10, 6, device=device).t(),
        "expanded": lambda: torch.randn(1, 10, device=device).expand(6, 10),
    }[view]()
    target = _target((*logits.shape[:-1], 2), 10, device)[..., 0]
    assert_matches(*_pair(target), [logits], atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_empty(device, reduction):
    for function in _pair(torch.empty(0, dtype=torch.int64, device=device), reduction=reduction):
        logits = torch.randn(0, 9, device=device, requires_grad=True)
        loss = function(logits)
        loss.backward()
        assert loss.isnan() if reduction == "mean" else loss == 0
        assert logits.grad.shape == (0, 9)


@pytest.mark.parametrize("bad", [-1, 10, 2**40, -(2**40)])
def test_target_out_of_range_gives_nan(device, bad):
    logits = torch.randn(3, 10, device=device, requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([1, bad, 2], device=device))
    loss.backward()
    assert loss.isnan() and logits.grad[1].isnan().all()
    assert logits.grad[[0, 2]].isfinite().all()


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_bad_logits_give_nan(device, bad):
    logits = torch.randn(3, 5000, device=device)
    logits[1, 4500] = bad
    logits.requires_grad_()
    loss = cross_entropy(logits, torch.tensor([1, 2, 3], device=device))
    loss.backward()
    assert loss.isnan() and logits.grad[[0, 2]].isfinite().all() and logits.grad[1].isnan().any()


def test_z_loss_formula(device):
    logits, target = torch.randn(3, 10, device=device), torch.tensor([1, -100, 3], device=device)
    lse = torch.logsumexp(logits, -1)
    extra = cross_entropy(logits, target, z_loss=0.5) - cross_entropy(logits, target)
    torch.testing.assert_close(extra, 0.25 * (lse[0] ** 2 + lse[2] ** 2))


def test_errors():
    logits, target = torch.randn(3, 10), torch.tensor([1, 2, 3])
    for f in (cross_entropy, cross_entropy_reference):
        function = functools.partial(f, logits)
        with pytest.raises(ValueError, match="target"):
            function(target[:2])
        with pytest.raises(TypeError, match="int32"):
            function(target.int())
        with pytest.raises(ValueError, match="none"):
            function(target, reduction="none")
        with pytest.raises(ValueError, match="label_smoothing"):
            function(target, label_smoothing=1.5)
        with pytest.raises(ValueError, match="softcap"):
            function(target, softcap=0.0)
        with pytest.raises(TypeError, match="floating"):
            f(logits.long(), target)
