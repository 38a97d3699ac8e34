import functools

import pytest
import torch
import torch.nn.functional as F

from ligerfx.kernels import rms_norm, rms_norm_linear, rms_norm_linear_reference

VARIANTS = [
    {"cast": "before_weight"},
    {"cast": "before_weight", "offset": 1.0},
    {"cast": "after_weight"},
    {"cast": "after_weight", "offset": 1.0, "eps": 1e-3},
]
WIDTHS = (7, 4)


def _bind(function, n, residual=False, **options):
    """The function of flat arguments: x, residual if any, norm_weight, n weights, then biases if any."""

    def bound(x, *rest):
        r, (norm_weight, *rest) = (rest[0], rest[1:]) if residual else (None, rest)
        return function(x, norm_weight, rest[:n], rest[n:] or None, residual=r, **options)

    return bound


def _pair(n=2, residual=False, recompute=True, **options):
    function = _bind(rms_norm_linear, n, residual, recompute=recompute, **options)
    return [function, _bind(rms_norm_linear_reference, n, residual, **options)]


def _inputs(device, *, lead=(2, 3), hidden=33, widths=WIDTHS, residual=False, bias=False, dtype=torch.float32):
    shapes = [(*lead, hidden)] * (1 + residual) + [(hidden,)] + [(n, hidden) for n in widths]
    shapes += [(n,) for n in widths if bias]
    return [torch.randn(shape, device=device).to(dtype) for shape in shapes]


def _saved(function):
    """What a call keeps for the backward: {address: bytes}."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t.nbytes}) or t, lambda t: t):
        outputs = function()
    return kept, outputs


@pytest.mark.parametrize("bias, recompute", [(False, True), (True, False)])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_matches_reference(device, poison, assert_matches, options, recompute, residual, bias):
    inputs = _inputs(device, residual=residual, bias=bias)
    assert_matches(*_pair(residual=residual, recompute=recompute, **options), inputs)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("lead, hidden, widths", [((), 5, (3,)), ((7,), 1, (1, 1)), ((20,), 64, (16, 8, 8, 24))])
def test_sizes(device, poison, assert_matches, lead, hidden, widths, residual):
    inputs = _inputs(device, lead=lead, hidden=hidden, widths=widths, residual=residual)
    assert_matches(*_pair(len(widths), residual), inputs)


def test_some_biases(device, poison, assert_matches):
    x, norm_weight, *weights = _inputs(device, widths=(7, 4, 5))

    def bind(function):
        return lambda x, norm_weight, bias, *weights: function(x, norm_weight, weights, (None, bias, None))

    inputs = [x, norm_weight, torch.randn(4, device=device), *weights]
    assert_matches(bind(rms_norm_linear), bind(rms_norm_linear_reference), inputs)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype, residual", [(torch.bfloat16, True), (torch.float16, True), (torch.float16, False)])
def test_16_bit(device, poison, assert_as_accurate, dtype, options, residual):
    inputs = _inputs(device, lead=(24,), hidden=256, widths=(48, 16), residual=residual, bias=True, dtype=dtype)
    assert_as_accurate(*_pair(residual=residual, **options), inputs)


def _gradients(outputs, leaves, upstream):
    """Gradients, None where there is none; taken twice, to see that the first changed nothing."""
    used = [i for i, (o, u) in enumerate(zip(outputs, upstream, strict=True)) if u is not None and o.requires_grad]
    wanted = [t for t in leaves if t.requires_grad]
    if not used:
        return [None] * len(leaves)
    roots, seeds = [outputs[i] for i in used], [upstream[i] for i in used]
    before = [u.clone() for u in seeds]
    first = torch.autograd.grad(roots, wanted, seeds, retain_graph=True, allow_unused=True)
    kept = [g if g is None else g.clone() for g in first]
    second = torch.autograd.grad(roots, wanted, seeds, allow_unused=True)
    for a, b, c in zip(first, kept, second, strict=True):
        assert a is b is c is None or (torch.equal(a, b) and torch.equal(b, c))
    assert all(torch.equal(a, b) for a, b in zip(seeds, before, strict=True))
    first = iter(first)
    return [next(first) if t.requires_grad else None for t in leaves]


def _assert_same_gradients(got, expected):
    for a, b in zip(got, expected, strict=True):
        if b is None:
            assert a is None or not a.any()
        else:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


def _assert_same_bits(got, expected):
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("residual, widths", [(False, WIDTHS), (True, (7,))])
def test_every_set_of_gradients(device, poison, residual, widths):
    """Those of eager, and the same bits whether y is kept or computed again."""
    inputs = _inputs(device, residual=residual, widths=widths)
    before = [t.clone() for t in inputs]
    again, reference = _pair(len(widths), residual)
    kept, _ = _pair(len(widths), residual, recompute=False)
    upstream = [torch.randn_like(o) for o in reference(*inputs)]
    for wanted in range(1, 2 ** len(inputs)):
        grads = []
        for f in (again, reference, kept):
            leaves = [t.detach().requires_grad_(bool(wanted >> i & 1)) for i, t in enumerate(inputs)]
            grads.append(_gradients(f(*leaves), leaves, upstream))
        _assert_same_gradients(*grads[:2])
        _assert_same_bits(grads[2], grads[0])
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@pytest.mark.parametrize("residual", [False, True])
def test_every_set_of_outputs(device, poison, residual):
    inputs = _inputs(device, residual=residual, bias=True)
    again, reference = _pair(residual=residual)
    kept, _ = _pair(residual=residual, recompute=False)
    upstream = [torch.randn_like(o) for o in reference(*inputs)]
    for used in range(1, 8):
        for frozen in ((), (0, 1)):
            grads = []
            for f in (again, reference, kept):
                leaves = [t.detach().requires_grad_(i not in frozen) for i, t in enumerate(inputs)]
                seeds = [u if used >> i & 1 else None for i, u in enumerate(upstream)]
                grads.append(_gradients(f(*leaves), leaves, seeds))
            _assert_same_gradients(*grads[:2])
            _assert_same_bits(grads[2], grads[0])


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_backward_repeats_the_bits_of_the_forward(device, poison, dtype, options):
    x, norm_weight, weight, _ = _inputs(device, lead=(6,), hidden=100, dtype=dtype)
    y = rms_norm(x, norm_weight, **options)
    dout = torch.randn(6, 7, device=device).to(dtype)
    for need_x in (True, False):
        leaves = [x.detach().requires_grad_(need_x), weight.detach().requires_grad_()]
        out, _ = rms_norm_linear(leaves[0], norm_weight, [leaves[1]], **options)
        assert torch.equal(out, F.linear(y, weight))
        assert torch.equal(torch.autograd.grad(out, leaves[1], dout)[0], dout.t() @ y)


@pytest.mark.parametrize("residual", [False, True])
def test_h_carries_the_residual_stream(device, residual):
    inputs = [t.requires_grad_() for t in _inputs(device, residual=residual)]
    *_, h = _pair(residual=residual)[0](*inputs)
    assert torch.equal(h, inputs[0] + inputs[1] if residual else inputs[0])
    assert (h.data_ptr() == inputs[0].data_ptr()) is not residual


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    "recompute, frozen, keeps_y", [(True, False, False), (False, False, True), (False, True, False)]
)
def test_bytes_kept(device, recompute, frozen, keeps_y, residual):
    """h, the weights and a number a row; y only where some weight needs it and it is not computed again."""
    inputs = [t.requires_grad_() for t in _inputs(device, residual=residual)]
    for weight in inputs[2 + residual :]:
        weight.requires_grad_(not frozen)
    kept, (*_, h) = _saved(lambda: _pair(residual=residual, recompute=recompute)[0](*inputs))
    known = {t.data_ptr(): t.nbytes for t in (h, *inputs[1 + residual :])}
    rest = sorted(size for pointer, size in kept.items() if pointer not in known)
    assert known.items() <= kept.items()
    assert rest == [4 * 2 * 3] + [4 * 2 * 3 * 33] * keeps_y


def test_residual_and_x_share_their_gradient(device):
    inputs = [t.requires_grad_() for t in _inputs(device, residual=True)]
    grads = torch.autograd.grad([o.sum() for o in _pair(residual=True)[0](*inputs)], inputs[:2])
    assert grads[0].data_ptr() == grads[1].data_ptr()


def test_only_h_used(device):
    x, norm_weight, *weights = _inputs(device)
    *_, h = rms_norm_linear(x, norm_weight.requires_grad_(), weights)
    assert not h.requires_grad
    *_, h = rms_norm_linear(x.requires_grad_(), norm_weight, weights)
    dh = torch.randn_like(h)
    assert torch.equal(torch.autograd.grad(h, x, dh)[0], dh)


@pytest.mark.parametrize("weights_need, recompute", [(False, True), (True, False)])
def test_nothing_is_computed_again_where_y_is_kept_or_not_needed(device, monkeypatch, weights_need, recompute):
    from ligerfx.kernels import rmsnorm

    x, norm_weight, *weights = _inputs(device)
    weights = [w.requires_grad_(weights_need) for w in weights]
    outputs = rms_norm_linear(x.requires_grad_(), norm_weight, weights, recompute=recompute)
    seen = []
    backward = rmsnorm.backward
    monkeypatch.setattr(rmsnorm, "backward", lambda *args: seen.append(args[-1]) or backward(*args))
    monkeypatch.setattr(rmsnorm, "forward", None)
    sum(o.sum() for o in outputs).backward()
    assert seen == [False]


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("view", ["permuted", "rows", "columns", "expanded"])
def test_non_contiguous(device, poison, assert_matches, view, residual):
    inputs = _inputs(device, lead=(4, 6), hidden=20, residual=residual)
    make = {
        "permuted": lambda: torch.randn(6, 4, 20, device=device).transpose(0, 1),
        "rows": lambda: torch.randn(8, 6, 20, device=device)[::2],
        "columns": lambda: torch.randn(4, 6, 40, device=device)[..., ::2],
        "expanded": lambda: torch.randn(1, 1, 20, device=device).expand(4, 6, 20),
    }[view]
    function, reference = _pair(residual=residual)
    for which in range(1 + residual):
        mixed = [make() if i == which else t for i, t in enumerate(inputs)]
        assert_matches(function, reference, mixed)


@pytest.mark.parametrize("residual", [False, True])
def test_non_contiguous_weights(device, poison, assert_matches, residual):
    inputs = _inputs(device, hidden=20, residual=residual)
    inputs[1 + residual] = torch.randn(40, device=device)[::2]
    inputs[-1] = torch.randn(20, 4, device=device).t()
    assert_matches(*_pair(residual=residual), inputs)


def test_expanded_gradients(device):
    inputs = _inputs(device, residual=True, bias=True)
    grads = []
    for function in _pair(residual=True):
        leaves = [t.clone().requires_grad_() for t in inputs]
        sum(o.sum() for o in function(*leaves)).backward()
        grads.append([t.grad for t in leaves])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("lead, hidden", [((0,), 8), ((2, 0), 8), ((3,), 0)])
def test_empty(device, assert_matches, lead, hidden, residual):
    assert_matches(*_pair(residual=residual), _inputs(device, lead=lead, hidden=hidden, residual=residual))


@pytest.mark.parametrize("cast, dtype", [("after_weight", torch.float16), ("before_weight", torch.float32)])
def test_float32_norm_weight(device, poison, assert_as_accurate, cast, dtype):
    """The layers' dtype is y's, which the order of the cast decides."""
    x, norm_weight, *weights = _inputs(device, lead=(12,), hidden=48)
    inputs = [x.half(), norm_weight, *(w.to(dtype) for w in weights)]
    out = _pair(cast=cast)[0](inputs[0].requires_grad_(), *inputs[1:])[0]
    assert type(out.grad_fn).__name__ == "_RMSNormLinearBackward" and out.dtype == dtype
    assert_as_accurate(*_pair(cast=cast), [t.detach() for t in inputs], slack=1e-4)


def test_dtypes_that_do_not_agree(device):
    x, residual, norm_weight, *weights = _inputs(device, residual=True)
    for function in (rms_norm_linear, rms_norm_linear_reference):
        with pytest.raises(RuntimeError, match="dtype"):
            function(x.half(), norm_weight, [w.half() for w in weights])
        *_, h = function(x.half(), norm_weight, weights, residual=residual)
        assert h.dtype == torch.float32 and torch.equal(h, x.half() + residual)


@pytest.mark.parametrize("residual", [False, True])
def test_autocast_is_the_unfused_composition(device, residual):
    x, norm_weight, *weights = _inputs(device)
    r = torch.randn_like(x) if residual else None
    biases = [torch.randn(7, device=device), None]
    with torch.autocast(device, dtype=torch.bfloat16):
        *outs, h = rms_norm_linear(x, norm_weight, weights, biases, residual=r)
        y = rms_norm(x if r is None else x + r, norm_weight)
        expected = [F.linear(y, w, b) for w, b in zip(weights, biases, strict=True)]
    assert torch.equal(h, x if r is None else x + r)
    for a, b in zip(outs, expected, strict=True):
        assert a.dtype == b.dtype == torch.bfloat16 and torch.equal(a, b)


def test_backward_under_autocast(device):
    inputs = [t.requires_grad_() for t in _inputs(device, bias=True)]
    outputs = _pair()[0](*inputs)
    seeds = [torch.randn_like(o) for o in outputs]
    expected = torch.autograd.grad(outputs, inputs, seeds, retain_graph=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        got = torch.autograd.grad(outputs, inputs, seeds)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_errors():
    x, norm_weight, *weights = _inputs("cpu")
    for function in (rms_norm_linear, rms_norm_linear_reference):
        call = functools.partial(function, x, norm_weight)
        for wrong in ([], weights * 3):
            with pytest.raises(ValueError, match="1 to 4"):
                call(wrong)
        with pytest.raises(ValueError, match="bias"):
            call(weights, [None])
        with pytest.raises(ValueError, match="bias"):
            call(weights, [None, torch.randn(3)])
        with pytest.raises(ValueError, match="weight"):
            call([weights[0].t()])
        with pytest.raises(ValueError, match="residual"):
            call(weights, residual=x[0])
        with pytest.raises(ValueError, match="weight"):
            function(x, norm_weight[1:], weights)
        with pytest.raises(ValueError, match="sideways"):
            call(weights, cast="sideways")
        with pytest.raises(TypeError, match="int64"):
            function(x.long(), norm_weight, weights)
        with pytest.raises(TypeError, match="int64"):
            call([weights[0].long()])
