import functools

import pytest
import torch

from ligerfx.kernels import rms_norm, rms_norm_reference
from ligerfx.kernels.rmsnorm import LONG

VARIANTS = [
    {"cast": "before_weight"},
    {"cast": "before_weight", "offset": 1.0},
    {"cast": "after_weight"},
    {"cast": "after_weight", "offset": 1.0, "eps": 1e-3},
]


def _pair(**options):
    return functools.partial(rms_norm, **options), functools.partial(rms_norm_reference, **options)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("shape", [(7, 1), (3, 5), (2, 3, 33), (70, 64), (5, 100), (2, 300), (64,)])
def test_matches_reference(device, poison, assert_matches, shape, options):
    inputs = [torch.randn(shape, device=device), torch.randn(shape[-1], device=device)]
    assert_matches(*_pair(**options), inputs)


@pytest.mark.parametrize("hidden", [2100, LONG + 100])  # the last reads the weight anew for each row
def test_long_rows(device, assert_matches, hidden):
    assert_matches(*_pair(), [torch.randn(2, hidden, device=device), torch.randn(hidden, device=device)])


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit(device, poison, assert_as_accurate, dtype, options):
    x = torch.randn(40, 64, device=device, dtype=dtype)
    assert_as_accurate(*_pair(**options), [x, torch.randn(64, device=device, dtype=dtype)])


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_rounds_where_the_reference_does(device, options):
    # Not bfloat16: the interpreter truncates where it should round.
    x = torch.randn(40, 64, device=device, dtype=torch.float16)
    weight = torch.randn(64, device=device, dtype=torch.float16)
    function, reference = _pair(**options)
    # Only a float32 statistic that differs in its last place may tip a rounding.
    assert (function(x, weight) != reference(x, weight)).float().mean() < 0.01


@pytest.mark.parametrize("cast", ["before_weight", "after_weight"])
def test_mixed_dtypes(device, poison, assert_as_accurate, cast):
    x = torch.randn(12, 48, device=device, dtype=torch.bfloat16)
    assert_as_accurate(*_pair(cast=cast), [x, torch.randn(48, device=device)], slack=1e-4)


def test_dense_permutation_keeps_its_strides(device, poison, assert_matches):
    x = torch.randn(2, 5, 3, 16, device=device).transpose(1, 2)
    weight = torch.randn(16, device=device)
    assert_matches(*_pair(), [x, weight])
    leaf = x.detach().requires_grad_()
    y = rms_norm(leaf, weight)
    assert y.stride() == x.stride()
    # An incoming gradient of other strides than x's.
    (grad,) = torch.autograd.grad(y, leaf, torch.ones(y.shape, device=device))
    assert grad.stride() == x.stride()


@pytest.mark.parametrize("view", ["rows", "columns", "inner", "expanded"])
def test_non_contiguous(device, poison, assert_matches, view):
    x = {
        "rows": lambda: torch.randn(8, 20, device=device)[::2],
        "columns": lambda: torch.randn(4, 40, device=device)[:, ::2],
        "inner": lambda: torch.randn(20, 4, device=device).t(),
        "expanded": lambda: torch.randn(1, 20, device=device).expand(4, 20),
    }[view]()
    assert_matches(*_pair(), [x, torch.randn(40, device=device)[::2]])


def test_expanded_gradient(device):
    x, weight = torch.randn(6, 20, device=device), torch.randn(20, device=device)
    grads = []
    for function in _pair():
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        function(*leaves).sum().backward()
        grads.append([t.grad for t in leaves])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (3, 0)])
def test_empty(device, assert_matches, shape):
    assert_matches(*_pair(), [torch.randn(shape, device=device), torch.randn(shape[-1], device=device)])


def test_float64_takes_the_reference(device, assert_matches):
    assert_matches(*_pair(), [torch.randn(4, 8, device=device).double(), torch.randn(8, device=device).double()])


def test_errors():
    x = torch.randn(2, 8)
    for function in (rms_norm, rms_norm_reference):
        with pytest.raises(ValueError, match="weight"):
            function(x, torch.randn(7))
        with pytest.raises(ValueError, match="weight"):
            function(x, torch.randn(1, 8))
        with pytest.raises(ValueError, match="sideways"):
            function(x, torch.randn(8), cast="sideways")
        with pytest.raises(TypeError, match="int64"):
            function(x.long(), torch.randn(8))
