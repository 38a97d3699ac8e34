import functools

import pytest
import torch

from ligerfx.kernels import rope, rope_reference, rotary


def _inputs(device, batch=2, q_heads=3, k_heads=2, tokens=5, width=16, rotated=None, table_batch=1, dtype=None):
    rotated = width if rotated is None else rotated
    shapes = [
        (batch, q_heads, tokens, width),
        (batch, k_heads, tokens, width),
        (table_batch, 1, tokens, rotated),
        (table_batch, 1, tokens, rotated),
    ]
    return [torch.randn(shape, device=device).to(dtype or torch.float32) for shape in shapes]


def _matches(assert_matches, inputs):
    assert_matches(rope, rope_reference, inputs, fixed=(2, 3), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"table_batch": 2},
        {"width": 2},
        {"width": 20, "q_heads": 1, "k_heads": 1},
        {"width": 64, "q_heads": 9, "k_heads": 3},
        {"width": 80, "rotated": 32},
        {"width": 7, "rotated": 4},
        {"width": 16, "rotated": 0},
        {"tokens": 1},
        {"batch": 1, "q_heads": 70, "k_heads": 1, "width": 128, "tokens": 2},
    ],
    ids=str,
)
def test_matches_reference(device, poison, assert_matches, sizes):
    _matches(assert_matches, _inputs(device, **sizes))


VARIANTS = [
    {"half_tables": True},
    {"pairs": "neighbours"},
    {"pairs": "neighbours", "half_tables": True},
    {"pairs": "neighbours_to_halves", "half_tables": True},
]


def _variant(options):
    return functools.partial(rope, **options), functools.partial(rope_reference, **options)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("width, rotated, heads_last", [(16, 16, False), (20, 8, False), (7, 4, False), (20, 8, True)])
def test_pairs_and_tables(device, poison, assert_matches, options, width, rotated, heads_last):
    q, k, cos, sin = _inputs(device, width=width, rotated=rotated)
    if options.get("half_tables"):
        cos, sin = cos[..., : rotated // 2], sin[..., : rotated // 2]
    inputs = [t.transpose(1, 2) if heads_last else t for t in (q, k, cos, sin)]
    assert_matches(*_variant(options), inputs, fixed=(2, 3), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_pairs_in_16_bit(device, poison, assert_as_accurate, options):
    inputs = _inputs(device, rotated=16 if "half_tables" not in options else 8, dtype=torch.float16)
    assert_as_accurate(*_variant(options), inputs, fixed=(2, 3))


def test_pairs_say_the_same():
    """The reference is one rotation, written in four orders of elements."""
    q, k, cos, sin = _inputs("cpu", rotated=8)
    expected = rope_reference(q, k, cos.repeat(1, 1, 1, 2), sin.repeat(1, 1, 1, 2))
    order = torch.arange(16).view(2, 8).t().flatten()  # from halves to neighbours
    for options in VARIANTS:
        full = "half_tables" not in options
        tables = [t.repeat_interleave(2, -1) if full else t for t in (cos, sin)]
        inputs = [x[..., order] if "pairs" in options else x for x in (q, k)]
        for found, wanted in zip(rope_reference(*inputs, *tables, **options), expected, strict=True):
            torch.testing.assert_close(found, wanted[..., order] if options.get("pairs") == "neighbours" else wanted)


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("rotated", [16, 8])
def test_heads_last(device, poison, assert_matches, tokens, rotated):
    inputs = [t.transpose(1, 2) for t in _inputs(device, tokens=tokens, rotated=rotated, table_batch=2)]
    _matches(assert_matches, inputs)
    _matches(assert_matches, [t.contiguous() for t in inputs])


def test_keeps_strides(device):
    q, k, cos, sin = _inputs(device)
    q = q.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    yq, yk = rope(q, k, cos, sin)
    assert yq.stride() == q.stride() and yk.stride() == k.stride()
    (grad,) = torch.autograd.grad(yq, q, torch.ones(q.shape, device=device))
    assert grad.stride() == q.stride()


@pytest.mark.parametrize("view", ["packed", "columns", "inner", "expanded"])
def test_non_contiguous(device, poison, assert_matches, view):
    q, k, cos, sin = _inputs(device, q_heads=2)
    if view == "packed":
        packed = torch.randn(2, 5, 4, 16, device=device)
        q, k = packed[:, :, :2].transpose(1, 2), packed[:, :, 2:].transpose(1, 2)
    elif view == "columns":
        q, k = (torch.randn(2, 2, 5, 32, device=device)[..., ::2] for _ in "qk")
        cos, sin = (torch.randn(1, 1, 5, 32, device=device)[..., ::2] for _ in "cs")
    elif view == "inner":
        q, k = (torch.randn(2, 2, 16, 5, device=device).transpose(2, 3) for _ in "qk")
    else:
        q = q[:1].expand(2, -1, -1, -1)
        cos, sin = cos.expand(2, -1, -1, -1), sin[:, :, :1].expand(2, -1, 5, -1)
    _matches(assert_matches, [q, k, cos, sin])


def test_tables_of_fewer_dims(device, assert_matches):
    q, k, cos, sin = _inputs(device)
    _matches(assert_matches, [q, k, cos[0, 0], sin[0, 0]])
    _matches(assert_matches, [q, k, cos[:, :, :1], sin[:, :, :1]])


@pytest.mark.parametrize("rotated", [16, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit(device, poison, assert_as_accurate, dtype, rotated):
    inputs = _inputs(device, rotated=rotated, dtype=dtype)
    assert_as_accurate(rope, rope_reference, inputs, fixed=(2, 3))


def test_float32_tables_widen_the_result(device, poison, assert_as_accurate):
    q, k, cos, sin = _inputs(device)
    inputs = [q.bfloat16(), k.bfloat16(), cos, sin]
    assert rope(*inputs)[0].dtype == torch.float32
    assert_as_accurate(rope, rope_reference, inputs, fixed=(2, 3), slack=1e-4)


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_used_and_expanded_gradient(device, poison, used):
    inputs = _inputs(device)
    grads = []
    for function in (rope, rope_reference):
        leaves = [t.detach().requires_grad_() for t in inputs[:2]]
        function(*leaves, *inputs[2:])[used].sum().backward()
        grads.append([t.grad for t in leaves])
    torch.testing.assert_close(grads[0][used], grads[1][used], rtol=1e-5, atol=1e-6)
    other = grads[0][1 - used]
    assert other is None or not other.any()


def test_gradient_of_the_tables(device, assert_matches):
    assert_matches(rope, rope_reference, _inputs(device))


@pytest.mark.parametrize("tokens, q_heads, k_heads, blocks", [(2, 4, 2, 1), (3, 2, 1, 2), (1, 1, 1, 3)])
def test_tilings(device, poison, monkeypatch, assert_matches, tokens, q_heads, k_heads, blocks):
    """Whatever the tiling, the result is the same."""
    monkeypatch.setattr(rotary, "tiling", lambda *_: rotary.Tiling(tokens, q_heads, k_heads, blocks, 4))
    _matches(assert_matches, _inputs(device))


@pytest.mark.parametrize("sizes", [{"tokens": 0}, {"batch": 0}, {"q_heads": 0}], ids=str)
def test_empty(device, assert_matches, sizes):
    _matches(assert_matches, _inputs(device, **sizes))


def test_errors():
    q, k, cos, sin = _inputs("cpu")
    for function in (rope, rope_reference):
        with pytest.raises(ValueError, match="4-D"):
            function(q[0], k, cos, sin)
        with pytest.raises(ValueError, match="head size"):
            function(q, k[..., :8], cos, sin)
        with pytest.raises(ValueError, match="one shape"):
            function(q, k, cos, sin[..., :8])
        with pytest.raises(ValueError, match="even"):
            function(q, k, cos[..., :7], sin[..., :7])
        with pytest.raises(ValueError, match="cos must be"):
            function(q, k, cos[:, :, :4], sin[:, :, :4])
        with pytest.raises(ValueError, match="sideways"):
            function(q, k, cos, sin, pairs="sideways")
        with pytest.raises(ValueError, match="half_tables"):
            function(q, k, cos, sin, pairs="neighbours_to_halves")
        with pytest.raises(ValueError, match="head size"):
            function(q, k, cos, sin, half_tables=True)
        with pytest.raises(TypeError, match="int64"):
            function(q.long(), k, cos, sin)
