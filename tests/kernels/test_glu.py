import functools

import pytest
import torch

from ligerfx.kernels import glu, glu_reference, packed_glu, packed_glu_reference

ACTIVATIONS = ["silu", "gelu", "gelu_tanh", "relu", "relu2"]


def _pair(activation, packed=False):
    functions = (packed_glu, packed_glu_reference) if packed else (glu, glu_reference)
    return [functools.partial(f, activation=activation) for f in functions]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(7, 1), (3, 5), (2, 3, 33), (20, 64), (11, 100), (1500,)])
def test_glu(device, poison, assert_matches, shape, activation):
    assert_matches(_pair(activation)[0], _pair(activation)[1], [torch.randn(shape, device=device) for _ in "gu"])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(7, 2), (2, 3, 66), (20, 64), (3, 2200), (10,)])
def test_packed_glu(device, poison, assert_matches, shape, activation):
    assert_matches(*_pair(activation, packed=True), [torch.randn(shape, device=device)])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit(device, poison, assert_as_accurate, dtype, activation):
    gate, up = (torch.randn(16, 64, device=device).to(dtype) for _ in "gu")
    assert_as_accurate(*_pair(activation), [gate, up])
    assert_as_accurate(*_pair(activation, packed=True), [torch.cat([gate, up], -1)])


def test_mixed_dtypes(device, poison, assert_as_accurate):
    gate, up = torch.randn(16, 64, device=device).bfloat16(), torch.randn(16, 64, device=device)
    assert_as_accurate(*_pair("silu"), [gate, up], slack=1e-4)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extreme_values(device, assert_matches, activation):
    gate = torch.tensor([0.0, -0.0, 1e-4, -1e-4, 0.6, 0.65, 8, -8, 60, -60, 200, -200], device=device)
    assert_matches(*_pair(activation), [gate, torch.randn_like(gate)], atol=1e-6)


def test_nan_passes(device):
    nan = torch.full((4,), float("nan"), device=device)
    for activation in ACTIVATIONS:
        assert glu(nan, torch.ones(4, device=device), activation).isnan().all()


@pytest.mark.parametrize("view", ["halves", "transposed", "batched", "columns", "expanded"])
def test_non_contiguous(device, poison, assert_matches, view):
    if view == "halves":
        gate, up = torch.randn(2, 3, 40, device=device).chunk(2, -1)
    elif view == "transposed":
        gate, up = (torch.randn(20, 6, device=device).t() for _ in "gu")
    elif view == "batched":
        gate, up = (torch.randn(3, 4, 20, device=device)[:, 1:].transpose(0, 1) for _ in "gu")
    elif view == "columns":
        gate, up = (torch.randn(6, 40, device=device)[:, ::2] for _ in "gu")
    else:
        gate, up = torch.randn(1, 20, device=device).expand(6, 20), torch.randn(6, 20, device=device)
    assert_matches(*_pair("silu"), [gate, up])
    assert_matches(*_pair("silu", packed=True), [gate])


def test_expanded_gradient(device):
    x = torch.randn(6, 20, device=device)
    grads = []
    for function in _pair("silu", packed=True):
        leaf = x.clone().requires_grad_()
        function(leaf).sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (3, 0)])
def test_empty(device, assert_matches, shape):
    assert_matches(*_pair("silu"), [torch.randn(shape, device=device) for _ in "gu"])
    assert_matches(*_pair("silu", packed=True), [torch.randn(shape, device=device)])


def test_errors():
    x = torch.randn(2, 8)
    for function in (glu, glu_reference):
        with pytest.raises(ValueError, match="swish"):
            function(x, x, "swish")
        with pytest.raises(ValueError, match="shape"):
            function(x, x[:1])
        with pytest.raises(TypeError, match="int64"):
            function(x, x.long())
    for function in (packed_glu, packed_glu_reference):
        with pytest.raises(ValueError, match="even"):
            function(torch.randn(2, 7))
        with pytest.raises(ValueError, match="swish"):
            function(x, "swish")
