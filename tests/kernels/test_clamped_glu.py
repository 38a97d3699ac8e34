import functools

import pytest
import torch

from ligerfx.kernels import clamped_glu, clamped_glu_reference, packed_clamped_glu, packed_clamped_glu_reference

GPT_OSS, SILU = (0.9, 1.702, 1.0), (0.9, 1.0, 0.0)


def _pair(options, packed=False, **more):
    functions = (packed_clamped_glu, packed_clamped_glu_reference) if packed else (clamped_glu, clamped_glu_reference)
    return [
        functools.partial(f, **dict(zip(("limit", "alpha", "offset"), options, strict=True)), **more) for f in functions
    ]


def test_reference():
    gate, up = torch.tensor([-3.0, 0.5, 2.0]), torch.tensor([2.0, -0.25, -9.0])
    g, u = torch.tensor([-3.0, 0.5, 0.9]), torch.tensor([0.9, -0.25, -0.9])
    expected = (u + 1) * g / (1 + (-1.702 * g).exp())
    torch.testing.assert_close(clamped_glu_reference(gate, up, *GPT_OSS), expected)
    interleaved = torch.stack([gate, up], -1).flatten()
    torch.testing.assert_close(packed_clamped_glu_reference(interleaved, *GPT_OSS, interleaved=True), expected)
    torch.testing.assert_close(packed_clamped_glu_reference(torch.cat([gate, up]), *GPT_OSS), expected)
    torch.testing.assert_close(clamped_glu_reference(gate, up, *SILU), u * g / (1 + (-g).exp()))


@pytest.mark.parametrize("options", [GPT_OSS, SILU])
@pytest.mark.parametrize("shape", [(7, 1), (2, 3, 33), (11, 100), (1500,)])
def test_separate(device, poison, assert_matches, shape, options):
    assert_matches(*_pair(options), [torch.randn(shape, device=device) for _ in "gu"])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("shape", [(7, 2), (2, 3, 66), (3, 2200), (10,)])
def test_packed(device, poison, assert_matches, shape, interleaved):
    assert_matches(*_pair(GPT_OSS, packed=True, interleaved=interleaved), [torch.randn(shape, device=device)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit(device, poison, assert_as_accurate, dtype):
    gate, up = (torch.randn(16, 64, device=device).to(dtype) for _ in "gu")
    options = (0.875, *GPT_OSS[1:])  # the limit itself is exact
    assert_as_accurate(*_pair(options), [gate, up])
    assert_as_accurate(*_pair(options, packed=True, interleaved=True), [torch.stack([gate, up], -1).flatten(-2)])


def test_at_the_limit_and_beyond(device, assert_matches):
    gate = torch.tensor([2.0, 2.0, 3.0, 200.0, -200.0, 0.0, float("inf"), 1.0], device=device)
    up = torch.tensor([-2.0, 2.0, -2.5, 300.0, 1.0, -300.0, 1.0, float("-inf")], device=device)
    assert_matches(*_pair((2.0, 1.702, 1.0)), [gate, up])


def test_nan_passes(device):
    nan, one = torch.full((4,), float("nan"), device=device), torch.ones(4, device=device)
    assert clamped_glu(nan, one, 7.0).isnan().all() and clamped_glu(one, nan, 7.0).isnan().all()


@pytest.mark.parametrize("view", ["halves", "transposed", "columns", "expanded"])
def test_non_contiguous(device, poison, assert_matches, view):
    if view == "halves":
        gate, up = torch.randn(2, 3, 40, device=device).chunk(2, -1)
    elif view == "transposed":
        gate, up = (torch.randn(20, 6, device=device).t() for _ in "gu")
    elif view == "columns":
        gate, up = (torch.randn(6, 40, device=device)[:, ::2] for _ in "gu")
    else:
        gate, up = torch.randn(1, 20, device=device).expand(6, 20), torch.randn(6, 20, device=device)
    assert_matches(*_pair(GPT_OSS), [gate, up])
    for interleaved in (False, True):
        assert_matches(*_pair(GPT_OSS, packed=True, interleaved=interleaved), [gate])


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (3, 0)])
def test_empty(device, assert_matches, shape):
    assert_matches(*_pair(SILU), [torch.randn(shape, device=device) for _ in "gu"])
    assert_matches(*_pair(SILU, packed=True, interleaved=True), [torch.randn(shape, device=device)])


def test_errors():
    x = torch.randn(2, 8)
    for function in (clamped_glu, clamped_glu_reference):
        with pytest.raises(ValueError, match="shape"):
            function(x, x[:1], 7.0)
        with pytest.raises(ValueError, match="positive"):
            function(x, x, -7.0)
        with pytest.raises(TypeError, match="int64"):
            function(x, x.long(), 7.0)
    for function in (packed_clamped_glu, packed_clamped_glu_reference):
        with pytest.raises(ValueError, match="even"):
            function(torch.randn(2, 7), 7.0)
