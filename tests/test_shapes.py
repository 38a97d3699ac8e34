"""What shapes.py says of an operation is what torch says: sizes, strides, dtype and device, symbols included."""

import pytest
import torch
import torch.nn.functional as F

from ligerfx.shapes import Shapes
from ligerfx.symbols import FakeInputs, expression

FAKES = FakeInputs()


def fake(*sizes, dtype=torch.float32):
    """A tensor of a batch of hidden states: all sizes but the last are symbols."""
    return FAKES.tensor(torch.empty(sizes, dtype=dtype))


def parameter(*sizes, dtype=torch.float32):
    return FAKES.parameter(torch.empty(sizes, dtype=dtype))


def transposed():
    with FAKES.active():
        return fake(3, 5, 7, 8).transpose(1, 2)


X = fake(3, 5, 8)
BF16 = {"dtype": torch.bfloat16}
LOGITS, LABELS = parameter(15, 32), parameter(15, dtype=torch.int64)

KNOWN = {
    "add": (torch.add, (X, X), {}),
    "add number": (torch.add, (X, 2), {}),
    "sub of a row": (torch.sub, (X, parameter(8)), {}),
    "mul by a column": (torch.mul, (X, fake(3, 5, 1)), {}),
    "mul of a column": (torch.mul, (fake(3, 5, 1), X), {}),
    "mul of a parameter": (torch.mul, (parameter(8), X), {}),
    "mul of dtypes": (torch.mul, (fake(3, 5, 8, **BF16), X), {}),
    "div": (torch.div, (fake(3, 5, 8, **BF16), 0.5), {}),
    "neg": (torch.neg, (X,), {}),
    "rsqrt": (torch.rsqrt, (X,), {}),
    "pow": (torch.pow, (X, 2), {}),
    "silu": (F.silu, (fake(3, 5, 8, **BF16),), {"inplace": False}),
    "gelu": (F.gelu, (X,), {"approximate": "tanh"}),
    "tanh": (torch.tanh, (X,), {}),
    "sigmoid": (torch.sigmoid, (X,), {}),
    "mean": (torch.mean, (X, -1), {"keepdim": True}),
    "linear": (F.linear, (X, parameter(12, 8)), {}),
    "linear with bias": (F.linear, (X, parameter(12, 8), parameter(12)), {}),
    "linear of rows": (F.linear, (parameter(15, 8), parameter(12, 8)), {}),
    "cross_entropy": (F.cross_entropy, (LOGITS, LABELS), {"ignore_index": -1, "reduction": "sum"}),
}


def facts(t):
    return [expression(s) for s in (*t.shape, *t.stride())], t.dtype, t.device, t.requires_grad


@pytest.mark.parametrize("case", KNOWN)
def test_is_what_torch_says(case):
    function, args, kwargs = KNOWN[case]
    with FAKES.active(), FAKES.shape_env.suppress_guards():
        expected = function(*args, **kwargs)
    assert facts(Shapes(FAKES).result(function.__name__, args, kwargs)) == facts(expected)


LEFT_TO_TORCH = {
    "another layout": (torch.mul, (transposed(), 2.0), {}),
    "integers": (torch.add, (LABELS, LABELS), {}),
    "a number that is a tensor": (torch.mul, (X, parameter()), {}),
    "sizes that do not fit": (torch.mul, (X, parameter(7)), {}),
    "both operands grow": (torch.add, (fake(3, 1, 8), fake(1, 5, 8)), {}),
    "alpha": (torch.add, (X, X), {"alpha": 2}),
    "an output given": (torch.mul, (X, X), {"out": X}),
    "in place": (F.silu, (X, True), {}),
    "a tensor as exponent": (torch.pow, (X, X), {}),
    "mean of all": (torch.mean, (X,), {}),
    "mean over another dimension": (torch.mean, (X, 1), {"keepdim": True}),
    "mean without its dimension": (torch.mean, (X, -1), {}),
    "mean in another dtype": (torch.mean, (X, -1), {"keepdim": True, "dtype": torch.float64}),
    "linear of the wrong width": (F.linear, (X, parameter(12, 9)), {}),
    "linear of a width that is a symbol": (F.linear, (fake(3, 8), parameter(12, 8)), {}),
    "linear of other dtypes": (F.linear, (X, parameter(12, 8, **BF16)), {}),
    "a class weight": (F.cross_entropy, (LOGITS, LABELS, parameter(32)), {}),
    "labels that are probabilities": (F.cross_entropy, (LOGITS, LOGITS), {}),
    "no reduction": (F.cross_entropy, (LOGITS, LABELS), {"reduction": "none"}),
    "not a fake": (torch.neg, (torch.ones(2),), {}),
    "unknown": (torch.cumsum, (X, 0), {}),
}


@pytest.mark.parametrize("case", LEFT_TO_TORCH)
def test_leaves_the_rest_to_torch(case):
    function, args, kwargs = LEFT_TO_TORCH[case]
    assert Shapes(FAKES).result(function.__name__, args, kwargs) is None


def test_autocast_is_left_to_torch():
    with torch.autocast("cpu", torch.bfloat16):
        assert Shapes(FAKES).result("linear", (X, parameter(12, 8)), {}) is None
    assert Shapes(FAKES).result("linear", (X, parameter(12, 8)), {}) is not None


def test_results_share_no_memory():
    shapes = Shapes(FAKES)
    first, second = (shapes.result("neg", (X,), {}) for _ in range(2))
    assert first.untyped_storage()._cdata != second.untyped_storage()._cdata
