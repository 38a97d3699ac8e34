import functools

import pytest
import torch
import torch.nn.functional as F

from ligerfx.kernels import (
    glu,
    glu_linear,
    glu_linear_reference,
    packed_glu,
    packed_glu_linear,
    packed_glu_linear_reference,
)

ACTIVATIONS = ["silu", "gelu", "gelu_tanh", "relu"]


def _inputs(device, *, packed=False, lead=(2, 3), width=33, n=7, bias=False, dtype=torch.float32):
    """(gate, up), or the packed tensor, weight, bias or None."""
    shapes = [(*lead, 2 * width)] if packed else [(*lead, width)] * 2
    shapes += [(n, width), (n,) if bias else None]
    return [None if shape is None else torch.randn(shape, device=device).to(dtype) for shape in shapes]


def _pair(packed=False, activation="silu", **options):
    function, reference = (
        (packed_glu_linear, packed_glu_linear_reference) if packed else (glu_linear, glu_linear_reference)
    )
    return [
        functools.partial(function, activation=activation, **options),
        functools.partial(reference, activation=activation),
    ]


def _saved(function):
    """What a call keeps for the backward: {address: bytes}."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t.nbytes}) or t, lambda t: t):
        function()
    return kept


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("lead, width, n", [((), 5, 7), ((3,), 1, 1), ((2, 3), 33, 65), ((20,), 64, 16)])
def test_matches_reference(device, poison, assert_matches, lead, width, n, recompute, bias, packed):
    inputs = _inputs(device, packed=packed, lead=lead, width=width, n=n, bias=bias)
    assert_matches(*_pair(packed, recompute=recompute), inputs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("packed", [False, True])
def test_activations(device, poison, assert_matches, packed, activation):
    assert_matches(*_pair(packed, activation), _inputs(device, packed=packed, lead=(3,), width=1100))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit(device, poison, assert_as_accurate, dtype, recompute, packed):
    inputs = _inputs(device, packed=packed, lead=(40,), width=64, n=48, bias=True, dtype=dtype)
    assert_as_accurate(*_pair(packed, recompute=recompute), inputs)


def _gradients(y, leaves, dy):
    """Gradients, None for those not required; taken twice, to see that the first changed nothing."""
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    before = dy.clone()
    first = torch.autograd.grad(y, wanted, dy, retain_graph=True)
    second = torch.autograd.grad(y, wanted, dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)) and torch.equal(dy, before)
    first = iter(first)
    return [next(first) if t is not None and t.requires_grad else None for t in leaves]


@pytest.mark.parametrize("packed", [False, True])
def test_every_set_of_gradients(device, poison, packed):
    """Those of eager, and the same bits whether z is kept or computed again."""
    inputs = _inputs(device, packed=packed, lead=(6,), bias=True)
    before = [t.clone() for t in inputs]
    reference = _pair(packed)[1]
    dy = torch.randn(6, 7, device=device)
    expected = [t.clone().requires_grad_() for t in inputs]
    expected = _gradients(reference(*expected), expected, dy)
    for wanted in range(1, 2 ** len(inputs)):
        leaves = [t.detach().requires_grad_(bool(wanted >> i & 1)) for i, t in enumerate(inputs)]
        again, kept = (
            _gradients(_pair(packed, recompute=recompute)[0](*leaves), leaves, dy) for recompute in (True, False)
        )
        for got, same, target in zip(again, kept, expected, strict=True):
            if got is not None:
                torch.testing.assert_close(got, target, rtol=1e-5, atol=1e-5)
                assert torch.equal(got, same)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_backward_repeats_the_bits_of_the_forward(device, poison, dtype, packed, activation):
    *gates, weight, _ = _inputs(device, packed=packed, lead=(6,), width=100, dtype=dtype)
    z = (packed_glu if packed else glu)(*gates, activation)
    dy = torch.randn(6, 7, device=device).to(dtype)
    for gates_need in (True, False):
        leaves = [*(t.detach().requires_grad_(gates_need) for t in gates), weight.detach().requires_grad_()]
        y = _pair(packed, activation)[0](*leaves)
        assert torch.equal(y, F.linear(z, weight))
        assert torch.equal(_gradients(y, leaves, dy)[-1], dy.t() @ z)


# What needs a gradient -> what is kept for the backward, where z is computed again and where it is not.
KEPT = {
    ("gates", "weight", "bias"): (["gates", "weight"], ["gates", "weight", "z"]),
    ("gates", "bias"): (["gates", "weight"], ["gates", "weight"]),
    ("weight",): (["gates"], ["z"]),
    ("bias",): ([], []),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("needs", KEPT, ids="-".join)
@pytest.mark.parametrize("recompute", [True, False])
def test_bytes_kept(device, recompute, needs, packed):
    *gates, weight, bias = _inputs(device, packed=packed, bias=True)
    for name, tensors in (("gates", gates), ("weight", [weight]), ("bias", [bias])):
        for tensor in tensors:
            tensor.requires_grad_(name in needs)
    kept = _saved(lambda: _pair(packed, recompute=recompute)[0](*gates, weight, bias))
    tensors = {"gates": gates, "weight": [weight]}
    expected = KEPT[needs][not recompute]
    known = {t.data_ptr(): t.nbytes for name in expected if name != "z" for t in tensors[name]}
    rest = {pointer: size for pointer, size in kept.items() if pointer not in known}
    assert known.items() <= kept.items()
    assert list(rest.values()) == ([2 * 3 * 33 * 4] if "z" in expected else [])


@pytest.mark.parametrize("weight_needs, recompute", [(False, True), (True, False)])
def test_nothing_is_computed_again_where_z_is_kept_or_not_needed(device, monkeypatch, weight_needs, recompute):
    from ligerfx.kernels import gated_linear

    gate, up, weight, _ = _inputs(device)
    y = glu_linear(gate.requires_grad_(), up.requires_grad_(), weight.requires_grad_(weight_needs), recompute=recompute)
    seen = []
    backward = gated_linear.glu_backward
    monkeypatch.setattr(gated_linear, "glu_backward", lambda *args: seen.append(args[-1]) or backward(*args))
    monkeypatch.setattr(gated_linear, "glu_forward", None)
    y.sum().backward()
    assert seen == [False]


@pytest.mark.parametrize("view", ["halves", "transposed", "columns", "expanded"])
def test_non_contiguous(device, poison, assert_matches, view):
    _, _, weight, bias = _inputs(device, lead=(6,), width=20, bias=True)
    gate, up = {
        "halves": lambda: torch.randn(6, 40, device=device).chunk(2, -1),
        "transposed": lambda: [torch.randn(20, 6, device=device).t() for _ in "gu"],
        "columns": lambda: [torch.randn(6, 40, device=device)[:, ::2] for _ in "gu"],
        "expanded": lambda: (torch.randn(1, 20, device=device).expand(6, 20), torch.randn(6, 20, device=device)),
    }[view]()
    assert_matches(*_pair(), [gate, up, weight, bias])
    assert_matches(*_pair(packed=True), [gate, weight[:, :10], bias])


@pytest.mark.parametrize("packed", [False, True])
def test_expanded_gradient(device, packed):
    inputs = _inputs(device, packed=packed, bias=True)
    grads = []
    for function in _pair(packed):
        leaves = [t.clone().requires_grad_() for t in inputs]
        function(*leaves).sum().backward()
        grads.append([t.grad for t in leaves])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("lead, width, n", [((0,), 8, 7), ((2, 0), 8, 7), ((3,), 0, 7), ((3,), 8, 0)])
def test_empty(device, assert_matches, lead, width, n, packed):
    assert_matches(*_pair(packed), _inputs(device, packed=packed, lead=lead, width=width, n=n, bias=True))


def test_mixed_gate_and_up(device):
    gate, *rest = _inputs(device)
    gate = gate.half()
    y = glu_linear(gate.requires_grad_(), *rest)
    assert type(y.grad_fn).__name__ == "_GLULinearBackward"
    torch.testing.assert_close(y, glu_linear_reference(gate.float(), *rest), rtol=1e-5, atol=1e-5)
    assert torch.autograd.grad(y.sum(), gate)[0].dtype == torch.float16


@pytest.mark.parametrize("packed", [False, True])
def test_autocast_is_the_unfused_composition(device, packed):
    *gates, weight, bias = _inputs(device, packed=packed, bias=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = _pair(packed)[0](*gates, weight, bias)
        expected = F.linear((packed_glu if packed else glu)(*gates), weight, bias)
    assert y.dtype == expected.dtype and torch.equal(y, expected)


@pytest.mark.parametrize("packed", [False, True])
def test_backward_under_autocast(device, packed):
    inputs = [t.requires_grad_() for t in _inputs(device, packed=packed, bias=True)]
    y = _pair(packed)[0](*inputs)
    dy = torch.ones_like(y)
    expected = torch.autograd.grad(y, inputs, dy, retain_graph=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        got = torch.autograd.grad(y, inputs, dy)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_errors():
    gate, up, weight, bias = _inputs("cpu", bias=True)
    for function in (glu_linear, glu_linear_reference):
        with pytest.raises(ValueError, match="glu_linear.*swish"):
            function(gate, up, weight, activation="swish")
        with pytest.raises(ValueError, match="one shape"):
            function(gate, up[:1], weight)
        with pytest.raises(ValueError, match="weight"):
            function(gate, up, weight.t())
        with pytest.raises(ValueError, match="bias"):
            function(gate, up, weight, bias[:2])
        with pytest.raises(TypeError, match="int64"):
            function(gate, up.long(), weight)
        with pytest.raises(TypeError, match="int64"):
            function(gate, up, weight.long())
    for function in (packed_glu_linear, packed_glu_linear_reference):
        with pytest.raises(ValueError, match="packed_glu_linear.*even"):
            function(gate, weight)
        with pytest.raises(ValueError, match="weight"):
            function(torch.cat([gate, up], -1), weight.t())
        with pytest.raises(RuntimeError, match="dtype"):
            function(torch.cat([gate, up], -1), weight.half())
