import functools

import pytest
import torch

from ligerfx.kernels import add_rms_norm, add_rms_norm_reference, rms_norm, rmsnorm

VARIANTS = [
    {"cast": "before_weight"},
    {"cast": "before_weight", "offset": 1.0},
    {"cast": "after_weight"},
    {"cast": "after_weight", "offset": 1.0, "eps": 1e-3},
]


def _pair(**options):
    return functools.partial(add_rms_norm, **options), functools.partial(add_rms_norm_reference, **options)


def _inputs(shape, device, residual=True, dtype=None):
    x, r, weight = (torch.randn(s, device=device, dtype=dtype) for s in (shape, shape, shape[-1:]))
    return [x, r if residual else None, weight]


@pytest.mark.parametrize("residual", [True, False], ids=["add", "fork"])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("shape", [(7, 1), (2, 3, 33), (40, 64)])
def test_matches_reference(device, poison, assert_matches, shape, options, residual):
    assert_matches(*_pair(**options), _inputs(shape, device, residual))


@pytest.mark.parametrize("residual", [True, False], ids=["add", "fork"])
def test_long_rows(device, poison, assert_matches, residual):
    assert_matches(*_pair(), _inputs((2, 2100), device, residual))


@pytest.mark.parametrize("residual", [True, False], ids=["add", "fork"])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit(device, poison, assert_as_accurate, dtype, options, residual):
    assert_as_accurate(*_pair(**options), _inputs((40, 64), device, residual, dtype))


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_rounds_where_the_reference_does(device, options):
    # Not bfloat16: the interpreter truncates where it should round.
    inputs = _inputs((40, 64), device, dtype=torch.float16)
    (y, h), (expected_y, expected_h) = (function(*inputs) for function in _pair(**options))
    assert torch.equal(h, expected_h)
    # Only a float32 statistic that differs in its last place may tip a rounding.
    assert (y != expected_y).float().mean() < 0.01


@pytest.mark.parametrize("cast", ["before_weight", "after_weight"])
@pytest.mark.parametrize("wide", ["x", "residual", "weight"])
def test_mixed_dtypes(device, poison, assert_as_accurate, wide, cast):
    inputs = _inputs((12, 48), device, dtype=torch.float16)
    position = ["x", "residual", "weight"].index(wide)
    inputs[position] = inputs[position].float()
    assert_as_accurate(*_pair(cast=cast), inputs, slack=1e-4)


def test_a_contiguous_summand_decides_the_layout(device, poison, assert_matches):
    x = torch.randn(2, 5, 3, 16, device=device).transpose(1, 2)
    r, weight = torch.randn(2, 3, 5, 16, device=device), torch.randn(16, device=device)
    for summands in ((x, r), (r, x)):
        assert_matches(*_pair(), [*summands, weight])
        assert all(out.is_contiguous() for out in add_rms_norm(*summands, weight))


@pytest.mark.parametrize("residual", [True, False], ids=["add", "fork"])
def test_dense_permutation_keeps_its_strides(device, poison, assert_matches, residual):
    x = torch.randn(2, 5, 3, 16, device=device).transpose(1, 2)
    r = torch.randn_like(x) if residual else None
    weight = torch.randn(16, device=device)
    assert_matches(*_pair(), [x, r, weight])
    leaf = x.detach().requires_grad_()
    y, h = add_rms_norm(leaf, r, weight)
    assert y.stride() == h.stride() == x.stride()
    # Incoming gradients of other strides than x's.
    (grad,) = torch.autograd.grad((y, h), leaf, [torch.ones(y.shape, device=device)] * 2)
    assert grad.stride() == x.stride()


@pytest.mark.parametrize("view", ["rows", "columns", "inner", "expanded"])
def test_non_contiguous(device, poison, assert_matches, view):
    x, r = (
        {
            "rows": lambda: torch.randn(8, 20, device=device)[::2],
            "columns": lambda: torch.randn(4, 40, device=device)[:, ::2],
            "inner": lambda: torch.randn(20, 4, device=device).t(),
            "expanded": lambda: torch.randn(1, 20, device=device).expand(4, 20),
        }[view]()
        for _ in "xr"
    )
    weight = torch.randn(40, device=device)[::2]
    assert_matches(*_pair(), [x, r, weight])
    assert_matches(*_pair(), [torch.randn(4, 20, device=device), r, weight])
    assert_matches(*_pair(), [x, None, weight])


@pytest.mark.parametrize("residual", [True, False], ids=["add", "fork"])
@pytest.mark.parametrize("used", ["y", "h", "both"])
def test_one_output_used_and_expanded_gradient(device, poison, used, residual):
    inputs = _inputs((6, 20), device, residual)
    grads = []
    for function in _pair():
        leaves = [None if t is None else t.clone().requires_grad_() for t in inputs]
        y, h = function(*leaves)
        {"y": y.sum(), "h": h.sum(), "both": y.sum() + 2 * h.sum()}[used].backward()
        grads.append([None if t is None else t.grad for t in leaves])
    for a, b in zip(*grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("residual", [True, False], ids=["add", "fork"])
def test_only_the_weight_is_trained(device, residual):
    *inputs, weight = _inputs((6, 20), device, residual)
    y, h = add_rms_norm(*inputs, weight.requires_grad_())
    assert y.requires_grad and not h.requires_grad


def test_a_fork_shares_memory_and_guards_it(device):
    x, _, weight = _inputs((6, 20), device)
    leaf = x.clone().requires_grad_()
    stream = leaf * 1
    _, h = add_rms_norm(stream, None, weight)
    assert h.data_ptr() == stream.data_ptr()
    with pytest.raises(RuntimeError, match="inplace"):
        h.add_(1)
    y, _ = add_rms_norm(stream, None, weight)
    stream.add_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        y.sum().backward()


def test_a_residual_stream(device):
    """Each block forks or adds; the whole agrees with plain operations."""
    inputs = [torch.randn(6, 20, device=device), *(torch.randn(20, device=device) for _ in range(3))]
    grads = []
    for function in _pair():
        leaves = [t.clone().requires_grad_() for t in inputs]
        x, *weights = leaves
        y, x = function(x, None, weights[0])
        for weight in weights[1:]:
            y, x = function(y.sin(), x, weight)
        (y * x).sum().backward()
        grads.append([t.grad for t in leaves])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("dtypes", ["float16 float16", "float16 float32", "float32 float32"])
def test_backward_writes_the_output_again(device, poison, monkeypatch, dtypes, options, in_place):
    """In tiles of many rows, and where a row is several tiles, the last one smaller."""
    x_dtype, w_dtype = (getattr(torch, name) for name in dtypes.split())
    options = {"eps": 1e-6, "offset": 0.0} | options
    offset, cast_after = options["offset"], options["cast"] == "after_weight"
    for shape in ((40, 64), (3, 80)):
        if shape[1] == 80:
            monkeypatch.setattr(rmsnorm, "forward_tiling", lambda *_: (1, 32, 4))
            monkeypatch.setattr(rmsnorm, "backward_tiling", lambda *_: (1, 32, 4, 2, 1))
        x, r, weight = _inputs(shape, device)
        x, r, weight = x.to(x_dtype), r.to(x_dtype), weight.to(w_dtype)
        y, h, rstd = rmsnorm.forward(x, r, weight, options["eps"], offset, cast_after)
        assert torch.equal(y, add_rms_norm(x, r, weight, **options)[0])
        dy, dh = torch.randn_like(y), torch.randn_like(h)
        *expected, nothing = rmsnorm.backward(dy, dh, h, weight, rstd, offset, cast_after, True, True)
        assert nothing is None
        kept = dy.clone()
        backward = rmsnorm.backward if in_place else torch.ops.ligerfx.rms_norm_backward
        *got, again = backward(dy, dh, h, weight, rstd, offset, cast_after, True, True, True)
        assert _written_again(again, y)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        assert again is dy if in_place else torch.equal(dy, kept)
        # With nothing else to do.
        *_, again = backward(dy.fill_(float("nan")), None, h, weight, rstd, offset, cast_after, False, False, True)
        assert _written_again(again, y)


def _written_again(again, y):
    """The same bits; on a GPU an element in thousands, halfway between two numbers, may have become the other one."""
    differ = (again != y).float().mean()
    return differ == 0 or (y.is_cuda and differ < 1e-3 and torch.allclose(again, y, rtol=1e-3))


@pytest.mark.parametrize("residual", [True, False], ids=["add", "fork"])
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (3, 0)])
def test_empty(device, assert_matches, shape, residual):
    assert_matches(*_pair(), _inputs(shape, device, residual))


@pytest.mark.parametrize("residual", [True, False], ids=["add", "fork"])
def test_float64_takes_the_reference(device, assert_matches, residual):
    assert_matches(*_pair(), _inputs((4, 8), device, residual, torch.float64))


def test_is_rms_norm_of_the_sum(device):
    x, r, weight = _inputs((70, 64), device)
    y, h = add_rms_norm(x, r, weight)
    assert torch.equal(h, x + r) and torch.equal(y, rms_norm(h, weight))
    y, h = add_rms_norm(x, None, weight)
    assert torch.equal(h, x) and torch.equal(y, rms_norm(x, weight))


@pytest.mark.parametrize("rows, block", [(1, 128), (4, 128), (1, 32), (2, 64)])
def test_tilings(device, poison, monkeypatch, assert_matches, rows, block):
    """Whatever the tiling and the number of programs, the result is the same."""
    monkeypatch.setattr(rmsnorm, "forward_tiling", lambda *_: (rows, block, 4))
    monkeypatch.setattr(rmsnorm, "backward_tiling", lambda *_: (rows, block, 4, 2, 1))
    for residual in (True, False):
        assert_matches(*_pair(), _inputs((11, 100), device, residual))


def test_errors():
    x, weight = torch.randn(2, 8), torch.randn(8)
    for function in (add_rms_norm, add_rms_norm_reference):
        with pytest.raises(ValueError, match="add_rms_norm.*weight"):
            function(x, x, torch.randn(7))
        with pytest.raises(ValueError, match="residual"):
            function(x, x[:1], weight)
        with pytest.raises(ValueError, match="sideways"):
            function(x, None, weight, cast="sideways")
        with pytest.raises(TypeError, match="int64"):
            function(x.long(), x, weight)
        with pytest.raises(TypeError, match="residual.*int64"):
            function(x, x.long(), weight)
