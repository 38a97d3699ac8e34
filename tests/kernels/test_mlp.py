"""glu_mlp, packed_glu_mlp and rms_norm_mlp: one MLP, without and with the norm before it."""

import pytest
import torch

from ligerfx.kernels import (
    add_rms_norm,
    glu_mlp,
    glu_mlp_reference,
    packed_glu_mlp,
    packed_glu_mlp_reference,
    rms_norm_mlp,
    rms_norm_mlp_reference,
)

KINDS = ["plain", "packed", "norm", "norm packed", "norm residual", "norm residual packed"]
NORMED = [kind for kind in KINDS if "norm" in kind]


def _bind(mlp, packed_mlp, norm_mlp, kind, **options):
    """The function of flat arguments: x, residual and norm_weight if any, the weights, and without a norm a bias."""
    if "norm" not in kind:
        return lambda *args: (packed_mlp if kind == "packed" else mlp)(*args, **options)

    def bound(x, *rest):
        r, (norm_weight, *rest) = (rest[0], rest[1:]) if "residual" in kind else (None, rest)
        weights = (rest[0], None, rest[1]) if "packed" in kind else rest
        return norm_mlp(x, norm_weight, *weights, residual=r, **options)

    return bound


def _pair(kind, recompute=False, **options):
    reference = _bind(glu_mlp_reference, packed_glu_mlp_reference, rms_norm_mlp_reference, kind, **options)
    return [_bind(glu_mlp, packed_glu_mlp, rms_norm_mlp, kind, recompute=recompute, **options), reference]


def _inputs(device, kind, *, lead=(2, 3), hidden=20, width=33, out=7, bias=True, dtype=torch.float32):
    gates = [(2 * width, hidden)] if "packed" in kind else [(width, hidden)] * 2
    shapes = [(*lead, hidden)] * (1 + ("residual" in kind)) + [(hidden,)] * ("norm" in kind) + gates + [(out, width)]
    shapes += [(out,)] * (bias and "norm" not in kind)
    scales = [1.0 if len(s) != 2 or s[:-1] == lead else s[1] ** -0.5 for s in shapes]
    return [(torch.randn(s, device=device) * scale).to(dtype) for s, scale in zip(shapes, scales, strict=True)]


def _kept(function, known):
    """Sizes of what a call keeps for the backward besides `known`."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t.numel()}) or t, lambda t: t):
        outputs = function()
    known = {t.data_ptr() for t in (*known, *(outputs[1:] if isinstance(outputs, tuple) else ()))}
    return sorted(size for pointer, size in kept.items() if pointer not in known)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recompute", [False, True])
def test_matches_reference(device, poison, assert_matches, kind, recompute):
    assert_matches(*_pair(kind, recompute), _inputs(device, kind))


@pytest.mark.parametrize("kind", NORMED)
@pytest.mark.parametrize("options", [{"offset": 1.0, "cast": "after_weight"}, {"cast": "after_weight", "eps": 1e-3}])
def test_kinds_of_norm(device, poison, assert_matches, kind, options):
    assert_matches(*_pair(kind, **options), _inputs(device, kind))


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "relu2"])
@pytest.mark.parametrize("kind", ["plain", "packed", "norm residual"])
def test_activations(device, poison, assert_matches, kind, activation):
    assert_matches(*_pair(kind, activation=activation), _inputs(device, kind, lead=(4,)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "lead, hidden, width, out", [((), 5, 3, 2), ((7,), 1, 1, 1), ((0,), 8, 8, 8), ((2, 0), 4, 4, 4)]
)
def test_sizes(device, assert_matches, kind, lead, hidden, width, out):
    assert_matches(*_pair(kind), _inputs(device, kind, lead=lead, hidden=hidden, width=width, out=out))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit(device, poison, assert_as_accurate, dtype, kind):
    if dtype == torch.bfloat16 and device == "cpu" and "norm" in kind:
        pytest.skip("the interpreter truncates to bfloat16, twice here: needs a CUDA GPU")
    inputs = _inputs(device, kind, lead=(40,), hidden=128, width=64, out=48, dtype=dtype)
    assert_as_accurate(*_pair(kind), inputs)


@pytest.mark.parametrize("kind", ["plain", "packed", "norm residual", "norm packed"])
def test_every_set_of_gradients(device, poison, kind):
    """Those of eager, and the same bits whether the product is kept or computed again."""
    inputs = _inputs(device, kind)
    kept, reference = _pair(kind)
    again, _ = _pair(kind, recompute=True)
    for wanted in range(1, 2 ** len(inputs)):
        grads, upstream = [], None
        for function in (reference, kept, again):
            leaves = [t.detach().requires_grad_(bool(wanted >> i & 1)) for i, t in enumerate(inputs)]
            outputs = function(*leaves)
            outputs = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if o.requires_grad]
            upstream = upstream or [torch.randn_like(o) for o in outputs]
            assert len(outputs) == len(upstream)
            grads.append(torch.autograd.grad(outputs, [t for t in leaves if t.requires_grad], upstream))
        for a, b, c in zip(*grads, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=2e-5)
            assert torch.equal(b, c)


@pytest.mark.parametrize("kind", NORMED)
def test_every_set_of_outputs(device, poison, kind):
    """Only the result, only the stream, and with frozen layers before the MLP."""
    inputs = _inputs(device, kind)
    for used in ([0], [1], [0, 1]):
        grads, upstream = [], None
        for function in _pair(kind):
            leaves = [t.detach().requires_grad_() for t in inputs]
            outputs = [function(*leaves)[i] for i in used]
            upstream = upstream or [torch.randn_like(o) for o in outputs]
            grads.append(torch.autograd.grad(outputs, leaves, upstream, allow_unused=True))
        for a, b in zip(*grads, strict=True):
            assert (a is None or not a.any()) if b is None else torch.allclose(a, b, rtol=1e-5, atol=2e-5)
    frozen = [t.requires_grad_(i > ("residual" in kind)) for i, t in enumerate(inputs)]
    _, h = _pair(kind)[0](*frozen)
    assert not h.requires_grad


@pytest.mark.parametrize("kind, extra", [("plain", []), ("packed", []), ("norm residual", [6]), ("norm packed", [6])])
def test_what_is_kept(device, kind, extra):
    """x or h, a number a row of a norm, gate and up, and their product unless it is computed again or not needed."""
    inputs = [t.requires_grad_() for t in _inputs(device, kind, bias=False)]
    gates = [6 * 66] if "packed" in kind else [6 * 33] * 2
    # x without its leading dims is another view of the same memory.
    assert _kept(lambda: _pair(kind)[0](*inputs), inputs) == sorted(extra + gates + [6 * 33])
    assert _kept(lambda: _pair(kind, recompute=True)[0](*inputs), inputs) == sorted(extra + gates)
    inputs[-1].requires_grad_(False)
    assert _kept(lambda: _pair(kind)[0](*inputs), inputs) == sorted(extra + gates)


@pytest.mark.parametrize("kind", NORMED)
def test_h_carries_the_residual_stream(device, kind):
    inputs = [t.requires_grad_() for t in _inputs(device, kind)]
    _, h = _pair(kind)[0](*inputs)
    assert torch.equal(h, inputs[0] + inputs[1] if "residual" in kind else inputs[0])
    assert (h.data_ptr() == inputs[0].data_ptr()) == ("residual" not in kind)


@pytest.mark.parametrize("kind", ["plain", "packed", "norm residual"])
@pytest.mark.parametrize("view", ["permuted", "columns", "expanded"])
def test_non_contiguous(device, poison, assert_matches, view, kind):
    inputs = _inputs(device, kind, lead=(4, 6))
    inputs[0] = {
        "permuted": lambda: torch.randn(6, 4, 20, device=device).transpose(0, 1),
        "columns": lambda: torch.randn(4, 6, 40, device=device)[..., ::2],
        "expanded": lambda: torch.randn(1, 1, 20, device=device).expand(4, 6, 20),
    }[view]()
    last = 2 if kind == "plain" else -1
    inputs[last] = torch.randn(*inputs[last].shape[::-1], device=device).t()
    assert_matches(*_pair(kind), inputs)


@pytest.mark.parametrize("kind", ["plain", "packed", "norm residual"])
def test_autocast_is_the_composition(device, kind):
    inputs = _inputs(device, kind)
    mlp = "packed" if "packed" in kind else "plain"
    with torch.autocast(device, dtype=torch.bfloat16):
        got = _pair(kind)[0](*inputs)
        if "norm" in kind:
            (got, h), (x, r, norm_weight, *weights) = got, inputs
            y, expected_h = add_rms_norm(x, r, norm_weight)
            assert torch.equal(h, expected_h)
            inputs = [y, *weights]
        expected = _pair(mlp)[1](*inputs)
    assert got.dtype == expected.dtype == torch.bfloat16
    assert (got.float() - expected.float()).norm() <= 2e-2 * expected.float().norm()


def test_float32_norm_weight(device, poison, assert_as_accurate):
    """The layers' dtype is y's."""
    x, norm_weight, *weights = _inputs(device, "norm", lead=(12,), hidden=48)
    inputs = [x.half(), norm_weight, *(w.half() for w in weights)]
    function, reference = _pair("norm", cast="after_weight")
    out = function(inputs[0].clone().requires_grad_(), *inputs[1:])[0]
    assert type(out.grad_fn).__name__ == "_RMSNormMLPBackward" and out.dtype == torch.float16
    assert_as_accurate(function, reference, inputs, slack=1e-4)


def test_errors():
    x, gate_weight, up_weight, weight, bias = _inputs("cpu", "plain")
    for function in (glu_mlp, glu_mlp_reference):
        with pytest.raises(ValueError, match="activation must be one of"):
            function(x, gate_weight, up_weight, weight, bias, "sine")
        with pytest.raises(ValueError, match="as many rows"):
            function(x, gate_weight, up_weight[1:], weight, bias)
        for wrong in (gate_weight.t(), gate_weight[0]):
            with pytest.raises(ValueError, match="weight"):
                function(x, wrong, up_weight, weight, bias)
        with pytest.raises(ValueError, match="weight"):
            function(x, gate_weight, up_weight, weight.t(), bias)
        with pytest.raises(ValueError, match="bias"):
            function(x, gate_weight, up_weight, weight, bias[1:])
        with pytest.raises(TypeError, match="int64"):
            function(x.long(), gate_weight, up_weight, weight, bias)
        with pytest.raises(TypeError, match="int64"):
            function(x, gate_weight, up_weight.long(), weight, bias)
    for function in (packed_glu_mlp, packed_glu_mlp_reference):
        with pytest.raises(ValueError, match="even"):
            function(x, gate_weight, weight)
    for function in (rms_norm_mlp, rms_norm_mlp_reference):
        with pytest.raises(ValueError, match="residual"):
            function(x, torch.ones(20), gate_weight, up_weight, weight, residual=x[0])
        with pytest.raises(ValueError, match="sideways"):
            function(x, torch.ones(20), gate_weight, up_weight, weight, cast="sideways")
        with pytest.raises(ValueError, match="even"):
            function(x, torch.ones(20), gate_weight, None, weight)
