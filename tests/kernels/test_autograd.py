"""Kernels called without gradients: their forwards alone, as they are."""

import pytest
import torch
from torch.autograd import forward_ad

from ligerfx.kernels import glu, linear_cross_entropy, rms_norm, rms_norm_linear, rms_norm_reference, rope
from ligerfx.kernels._autograd import apply


class Doubled(torch.autograd.Function):
    """Notes what its forward was given for a context."""

    contexts: list = []

    @staticmethod
    def forward(ctx, x, factor):
        Doubled.contexts.append(ctx)
        ctx.save_for_backward(x)
        ctx.set_materialize_grads(False)
        ctx.needs = list(ctx.needs_input_grad)
        return x * factor

    @staticmethod
    def backward(ctx, grad):
        return grad * 2, None


@pytest.fixture
def contexts():
    Doubled.contexts = []
    return Doubled.contexts


def test_with_gradients_it_is_the_function_itself(contexts):
    x = torch.ones(3, requires_grad=True)
    apply(Doubled, x, 2.0).sum().backward()
    assert x.grad.tolist() == [2.0, 2.0, 2.0]
    assert contexts[0].needs == [True, False]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_kept(contexts, mode):
    x = torch.ones(3, requires_grad=True)
    with mode():
        y = apply(Doubled, x, 2.0)
    assert y.tolist() == [2.0, 2.0, 2.0]
    assert not y.requires_grad
    assert contexts[0].needs == [False, False]
    assert not hasattr(contexts[0], "saved_tensors")


def test_forward_mode_derivatives_are_refused_and_not_lost():
    with torch.no_grad(), forward_ad.dual_level():
        x = forward_ad.make_dual(torch.ones(3), torch.ones(3))
        with pytest.raises(RuntimeError, match="jvp"):
            apply(Doubled, x, 2.0)


def test_transforms_are_refused():
    with torch.no_grad(), pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.vmap(lambda x: apply(Doubled, x, 2.0))(torch.ones(2, 3))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_same_bits_as_with_gradients(device, mode):
    x, weight = torch.randn(2, 5, 32, device=device), torch.randn(32, device=device)
    q, cos = torch.randn(2, 3, 5, 16, device=device), torch.randn(1, 1, 5, 16, device=device)
    matrices = [torch.randn(8, 32, device=device) for _ in range(2)]

    def results():
        rotated = rope(q, q, cos, cos)
        return rms_norm(x, weight), glu(x, x), *rotated, *rms_norm_linear(x, weight, matrices, residual=x)

    for t in (x, weight, q, *matrices):
        t.requires_grad_()
    expected = results()
    assert all(t.requires_grad for t in expected)
    with mode():
        found = results()
    assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(found, expected, strict=True))
    assert not any(t.requires_grad for t in found)


TARGET = torch.arange(12).view(3, 4) % 4


def _loss_of_norm(x, weight):
    return rms_norm(x, weight).square().sum()


def _expected_loss(x, weight):
    return rms_norm_reference(x, weight).square().sum()


def test_transformed_functions_are_those_of_the_plain_operations(device):
    x, weight = torch.randn(3, 4, 32, device=device), torch.randn(32, device=device)
    for transform in (
        lambda f: torch.func.grad(f, (0, 1))(x, weight),
        lambda f: torch.func.vmap(torch.func.grad(f, (0, 1)), (0, None))(x, weight),
        lambda f: torch.func.jvp(f, (x, weight), (weight.expand_as(x), weight)),
        lambda f: torch.func.vmap(f, (0, None))(x, weight),
    ):
        for a, b in zip(transform(_loss_of_norm), transform(_expected_loss), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "loss",
    [
        _loss_of_norm,
        lambda x, weight: linear_cross_entropy(x, weight * torch.ones_like(x[0, :, :1]), TARGET.to(x.device)),
    ],
)
@pytest.mark.parametrize("of", [0, 1])
def test_second_derivatives_raise(device, loss, of):
    """Also where the loss is the last that has a graph: without an error, a part of the gradient would be missing."""
    x = torch.randn(3, 4, 32, device=device, requires_grad=True)
    weight = torch.randn(32, device=device, requires_grad=True)
    value = loss(x, weight)
    (gradient,) = torch.autograd.grad(value, (x, weight)[of], create_graph=True)
    assert gradient.requires_grad
    with pytest.raises(RuntimeError, match="the fused kernels have no second derivative"):
        (value + gradient.square().sum()).backward()
