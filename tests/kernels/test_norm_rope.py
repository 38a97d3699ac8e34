import functools

import pytest
import torch

from ligerfx.kernels import norm_rope, norm_rope_reference, normed_rotary, rms_norm, rope

VARIANTS = [
    {"cast": "before_weight"},
    {"cast": "before_weight", "offset": 1.0},
    {"cast": "after_weight"},
    {"cast": "after_weight", "offset": 1.0, "eps": 1e-3},
]


def _pair(**options):
    return functools.partial(norm_rope, **options), functools.partial(norm_rope_reference, **options)


def _inputs(device, batch=2, q_heads=3, k_heads=2, tokens=3, width=16, rotated=None, table_batch=1, dtype=None):
    rotated = width if rotated is None else rotated
    shapes = [
        (batch, q_heads, tokens, width),
        (batch, k_heads, tokens, width),
        (width,),
        (width,),
        (table_batch, 1, tokens, rotated),
        (table_batch, 1, tokens, rotated),
    ]
    return [torch.randn(shape, device=device).to(dtype or torch.float32) for shape in shapes]


def _matches(assert_matches, inputs, **options):
    assert_matches(*_pair(**options), inputs, fixed=(4, 5), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "sizes",
    [
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


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_options(device, poison, assert_matches, options):
    _matches(assert_matches, _inputs(device, batch=1, rotated=8), **options)


@pytest.mark.filterwarnings("ignore:(divide by zero|invalid value)")
def test_heads_that_are_not_there_count_for_nothing(device, poison, assert_matches):
    # Three heads in a tile of four, whose norm without eps is 0 / 0.
    _matches(assert_matches, _inputs(device, tokens=2), eps=0.0)


@pytest.mark.parametrize("rotated", [16, 8])
def test_heads_last(device, poison, assert_matches, rotated):
    q, k, q_weight, k_weight, cos, sin = _inputs(device, rotated=rotated, table_batch=2)
    q, k, cos, sin = (t.transpose(1, 2) for t in (q, k, cos, sin))
    _matches(assert_matches, [q, k, q_weight, k_weight, cos, sin])
    q, k, cos, sin = (t.contiguous() for t in (q, k, cos, sin))
    _matches(assert_matches, [q, k, q_weight, k_weight, cos, sin])


def test_keeps_strides(device):
    q, k, *rest = _inputs(device)
    q = q.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    yq, yk = norm_rope(q, k, *rest)
    assert yq.stride() == q.stride() and yk.stride() == k.stride()
    (grad,) = torch.autograd.grad(yq, q, torch.ones(q.shape, device=device))
    assert grad.stride() == q.stride()


@pytest.mark.parametrize("view", ["packed", "columns", "inner", "expanded"])
def test_non_contiguous(device, poison, assert_matches, view):
    q, k, q_weight, k_weight, cos, sin = _inputs(device, q_heads=2)
    if view == "packed":
        packed = torch.randn(2, 3, 4, 16, device=device)
        q, k = packed[:, :, :2].transpose(1, 2), packed[:, :, 2:].transpose(1, 2)
    elif view == "columns":
        q, k = (torch.randn(2, 2, 3, 32, device=device)[..., ::2] for _ in "qk")
        q_weight, k_weight = (torch.randn(32, device=device)[::2] for _ in "qk")
        cos, sin = (torch.randn(1, 1, 3, 32, device=device)[..., ::2] for _ in "cs")
    elif view == "inner":
        q, k = (torch.randn(2, 2, 16, 3, device=device).transpose(2, 3) for _ in "qk")
    else:
        q = q[:1].expand(2, -1, -1, -1)
        cos, sin = cos.expand(2, -1, -1, -1), sin[:, :, :1].expand(2, -1, 3, -1)
    _matches(assert_matches, [q, k, q_weight, k_weight, cos, sin])


def test_tables_of_fewer_dims(device, assert_matches):
    *inputs, cos, sin = _inputs(device)
    _matches(assert_matches, [*inputs, cos[0, 0], sin[0, 0]])


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit(device, poison, assert_as_accurate, dtype, options):
    inputs = _inputs(device, rotated=8, dtype=dtype)
    assert_as_accurate(*_pair(**options), inputs, fixed=(4, 5))


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_is_the_norm_then_the_rotation(device, options):
    # Not bfloat16: the interpreter truncates where it should round.
    q, k, q_weight, k_weight, cos, sin = _inputs(device, rotated=8, dtype=torch.float16)
    together = norm_rope(q, k, q_weight, k_weight, cos, sin, **options)
    apart = rope(rms_norm(q, q_weight, **options), rms_norm(k, k_weight, **options), cos, sin)
    for a, b in zip(together, apart, strict=True):
        # Only a float32 statistic that differs in its last place may tip a rounding.
        assert (a != b).float().mean() < 0.01


@pytest.mark.parametrize("cast", ["before_weight", "after_weight"])
@pytest.mark.parametrize("wide", [(0,), (2,), (2, 3), (4, 5)], ids=["q", "q_weight", "weights", "tables"])
def test_mixed_dtypes(device, poison, assert_as_accurate, wide, cast):
    inputs = [t.float() if i in wide else t for i, t in enumerate(_inputs(device, dtype=torch.float16))]
    assert_as_accurate(*_pair(cast=cast), inputs, fixed=(4, 5), slack=1e-4)


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_used_and_expanded_gradient(device, poison, used):
    inputs = _inputs(device)
    grads = []
    for function in _pair():
        leaves = [t.detach().requires_grad_() for t in inputs[:4]]
        function(*leaves, *inputs[4:])[used].sum().backward()
        grads.append([t.grad for t in leaves])
    for i, (ours, expected) in enumerate(zip(*grads, strict=True)):
        if i % 2 == used:
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
        else:
            assert ours is None or not ours.any()


def test_only_what_is_asked_for_requires_grad(device):
    q, k, q_weight, k_weight, cos, sin = _inputs(device)
    yq, yk = norm_rope(q, k, q_weight.requires_grad_(), k_weight, cos, sin)
    assert yq.requires_grad and not yk.requires_grad


def test_gradient_of_the_tables(device, assert_matches):
    assert_matches(*_pair(), _inputs(device, tokens=2))


@pytest.mark.parametrize("tokens, q_heads, k_heads, blocks", [(2, 4, 2, 1), (3, 2, 1, 2), (1, 1, 1, 3)])
def test_tilings(device, poison, monkeypatch, assert_matches, tokens, q_heads, k_heads, blocks):
    """Whatever the tiling and the number of programs, the result is the same."""
    tiling = normed_rotary.Tiling(tokens, q_heads, k_heads, blocks, 4, 2, 1)
    monkeypatch.setattr(normed_rotary, "forward_tiling", lambda *_: tiling)
    monkeypatch.setattr(normed_rotary, "backward_tiling", lambda *_: tiling)
    _matches(assert_matches, _inputs(device, batch=1))


@pytest.mark.parametrize("sizes", [{"tokens": 0}, {"batch": 0}, {"q_heads": 0}], ids=str)
def test_empty(device, assert_matches, sizes):
    _matches(assert_matches, _inputs(device, **sizes))


def test_errors():
    q, k, q_weight, k_weight, cos, sin = _inputs("cpu")
    for function in (norm_rope, norm_rope_reference):
        with pytest.raises(ValueError, match="norm_rope.*4-D"):
            function(q[0], k, q_weight, k_weight, cos, sin)
        with pytest.raises(ValueError, match="norm_rope.*even"):
            function(q, k, q_weight, k_weight, cos[..., :7], sin[..., :7])
        with pytest.raises(ValueError, match="weights"):
            function(q, k, q_weight, k_weight[:8], cos, sin)
        with pytest.raises(ValueError, match="sideways"):
            function(q, k, q_weight, k_weight, cos, sin, cast="sideways")
        with pytest.raises(TypeError, match="int64"):
            function(q, k, q_weight.long(), k_weight, cos, sin)
        with pytest.raises(TypeError, match="int64"):
            function(q.long(), k, q_weight, k_weight, cos, sin)
