"""Fixtures of the kernel tests, which run on the GPU if there is one, else in Triton's interpreter."""

from collections.abc import Callable

import pytest
import torch


@pytest.fixture
def device() -> str:
    from ligerfx.kernels._runtime import HAS_TRITON, INTERPRET

    if torch.cuda.is_available():
        return "cuda"
    if not (HAS_TRITON and INTERPRET):
        pytest.skip("needs a CUDA GPU, or TRITON_INTERPRET=1 before Triton is imported")
    return "cpu"


@pytest.fixture
def poison(monkeypatch):
    """Fill what torch.empty and its kin return with NaN, so that an element left unwritten shows."""

    def poisoned(make):
        def function(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return function

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


def _tuple(value) -> tuple:
    return value if isinstance(value, tuple) else (value,)


def _run(function, inputs, wanted, upstream=None):
    """(outputs, upstream gradients, input gradients) of function, with the inputs at `wanted` as leaves."""
    leaves = [
        t.detach().requires_grad_(i in wanted) if torch.is_tensor(t) and t.is_floating_point() else t
        for i, t in enumerate(inputs)
    ]
    outputs = _tuple(function(*leaves))
    if upstream is None:
        upstream = [torch.randn_like(o) for o in outputs]
    sources = [leaves[i] for i in wanted]
    roots = [o for o in outputs if o.requires_grad]
    seeds = [u for o, u in zip(outputs, upstream, strict=True) if o.requires_grad]
    first = torch.autograd.grad(roots, sources, seeds, retain_graph=True)
    # Taken before the second backward, which must not change them.
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(roots, sources, seeds)
    for a, b, c in zip(first, kept, second, strict=True):
        assert torch.equal(a, b) and torch.equal(b, c), "a second backward differs from the first"
    return outputs, upstream, first


@pytest.fixture
def assert_matches() -> Callable:
    """Assert that a float32 op equals its reference: outputs, each gradient wanted alone and all together."""

    def check(function, reference, inputs, *, rtol=1e-5, atol=1e-5, fixed=()):
        floats = [i for i, t in enumerate(inputs) if torch.is_tensor(t) and t.is_floating_point() and i not in fixed]
        before = [t.clone() if torch.is_tensor(t) else t for t in inputs]
        expected, upstream, gradients = _run(reference, inputs, floats)
        for wanted in [floats] + [[i] for i in floats if len(floats) > 1]:
            outputs, _, got = _run(function, inputs, wanted, upstream)
            for a, b in zip(outputs, expected, strict=True):
                assert a.dtype == b.dtype and a.shape == b.shape
                torch.testing.assert_close(a, b, rtol=rtol, atol=atol)
            for i, gradient in zip(wanted, got, strict=True):
                target = gradients[floats.index(i)]
                assert gradient.dtype == target.dtype and gradient.shape == target.shape
                scale = max(1.0, target.abs().max().item()) if target.numel() else 1.0
                torch.testing.assert_close(gradient, target, rtol=rtol, atol=atol * scale)
        with torch.no_grad():
            for a, b in zip(_tuple(function(*inputs)), expected, strict=True):
                torch.testing.assert_close(a, b.detach(), rtol=rtol, atol=atol)
        for t, copy in zip(inputs, before, strict=True):
            assert not torch.is_tensor(t) or torch.equal(t, copy), "an input was written to"

    return check


@pytest.fixture
def assert_as_accurate() -> Callable:
    """Assert that in a 16-bit dtype the op is as close to the float32 truth as the eager reference is."""

    def error(values, truths):
        return [
            ((v.double() - t.double()).norm() / t.double().norm().clamp(min=1e-30)).item()
            for v, t in zip(values, truths, strict=True)
        ]

    def check(function, reference, inputs, *, upstream=None, slack=None, fixed=()):
        floats = [i for i, t in enumerate(inputs) if torch.is_tensor(t) and t.is_floating_point() and i not in fixed]
        wide = [t.float() if torch.is_tensor(t) and t.is_floating_point() else t for t in inputs]
        eager, upstream, eager_grads = _run(reference, inputs, floats, upstream)
        truth, _, truth_grads = _run(reference, wide, floats, [u.float() for u in upstream])
        ours, _, our_grads = _run(function, inputs, floats, upstream)
        for a, b in zip((*ours, *our_grads), (*eager, *eager_grads), strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
        dtype = inputs[floats[0]].dtype
        slack = torch.finfo(dtype).eps / 50 if slack is None else slack
        # Casting to bfloat16, the interpreter truncates instead of rounding.
        least = 2 * torch.finfo(dtype).eps if dtype == torch.bfloat16 and not ours[0].is_cuda else 0.0
        ours_error = error((*ours, *our_grads), (*truth, *truth_grads))
        eager_error = error((*eager, *eager_grads), (*truth, *truth_grads))
        for a, b in zip(ours_error, eager_error, strict=True):
            assert a <= max(1.1 * b + slack, least), (ours_error, eager_error)

    return check
