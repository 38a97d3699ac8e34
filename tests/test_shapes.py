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


def turned(tensor):
    with FAKES.active():
        return tensor.transpose(-1, -2)


def of_sizes(*sizes, dtype=torch.float32):
    return FAKES.of_layout(sizes, None, dtype, torch.device("cpu"))


X = fake(3, 5, 8)
BATCH, SEQ, _ = X.shape
BOOL = {"dtype": torch.bool}
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
    "relu": (F.relu, (X,), {"inplace": False}),
    "exp": (torch.exp, (X,), {}),
    "dropout": (F.dropout, (X,), {"p": 0.0, "training": True, "inplace": False}),
    "clamp": (torch.clamp, (X,), {"min": -1.0, "max": 1.0}),
    "clamp below": (torch.clamp, (fake(3, 5, 8, **BF16),), {"min": 1e-5}),
    "clamp of integers to a size": (torch.clamp, (of_sizes(BATCH, SEQ, dtype=torch.int64), 0, SEQ - 1), {}),
    "layer_norm": (F.layer_norm, (X, (8,)), {"weight": parameter(8), "bias": parameter(8), "eps": 1e-6}),
    "layer_norm without weight": (F.layer_norm, (X, (8,)), {}),
    "masked_fill": (torch.masked_fill, (fake(3, 5, 8), of_sizes(1, SEQ, 1, **BOOL), float("-inf")), {}),
    "comparison": (torch.le, (of_sizes(1, SEQ), of_sizes(SEQ, 1)), {}),
    "comparison with a number": (torch.gt, (X, 0.5), {}),
    "masks": (torch.Tensor.__and__, (of_sizes(1, SEQ, SEQ, **BOOL), of_sizes(BATCH, 1, SEQ, **BOOL)), {}),
    "view": (torch.Tensor.view, (X, -1, 8), {}),
    "view of the sizes": (torch.Tensor.view, (X, BATCH, SEQ, -1, 4), {}),
    "reshape": (torch.Tensor.reshape, (X, (BATCH * SEQ, 8)), {}),
    "sum": (torch.sum, (X,), {"dim": 1, "keepdim": True}),
    "matmul": (torch.matmul, (fake(3, 5, 7, 8), parameter(1, 1, 8, 6)), {}),
    "matmul of another layout": (torch.matmul, (transposed(), turned(transposed())), {}),
    "cat": (torch.cat, ([X, X],), {"dim": -1}),
    "cat of two sizes": (torch.cat, ((fake(3, 5, 8), fake(3, 7, 8)), 1), {}),
    "grid_sample of another layout": (F.grid_sample, (transposed(), fake(3, 11, 4, 2)), {"align_corners": False}),
    "grid_sample": (F.grid_sample, (fake(3, 5, 7, 9), fake(3, 11, 4, 2)), {"mode": "bicubic", "align_corners": False}),
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
    "a view in another dtype": (torch.Tensor.view, (X, torch.int32), {}),
    "a reshape of another layout": (torch.Tensor.reshape, (transposed(), -1, 8), {}),
    "masks that do not fit": (torch.le, (fake(3, 5), fake(5, 3)), {}),
    "a mask of bits": (torch.Tensor.__and__, (LABELS, parameter(1)), {}),
    "a bound that widens integers": (torch.clamp, (LABELS, 0.5), {}),
    "a bound that is a tensor": (torch.clamp, (X, X), {}),
    "a sum over several dimensions": (torch.sum, (X, (0, 1)), {"keepdim": True}),
    "matrices that do not fit": (torch.matmul, (fake(3, 5, 7, 8), fake(3, 5, 7, 8)), {}),
    "a matrix times rows": (torch.matmul, (parameter(8, 8), fake(3, 8, 7)), {}),
    "cat of another layout": (torch.cat, ([transposed(), transposed()],), {}),
    "cat of dtypes": (torch.cat, ([X, fake(3, 5, 8, **BF16)],), {"dim": -1}),
    "cat of tensors that do not fit": (torch.cat, ([X, fake(3, 7, 8)],), {"dim": -1}),
    "a norm over two dimensions": (F.layer_norm, (X, (5, 8)), {}),
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


def test_a_view_has_the_sizes_that_it_was_asked_for():
    """torch makes an expression of the 5 where a remainder could be left."""
    rows, columns, width = Shapes(FAKES).result("view", (X, BATCH, -1, 5), {}).shape
    assert (rows, width) == (BATCH, 5) and type(width) is int
    assert expression(columns) == expression(8 * SEQ // 5)


def test_nothing_is_written_into_a_fake():
    """Not even with a mask, of which torch would have to know how many elements are true."""
    shapes, mask = Shapes(FAKES), of_sizes(BATCH, SEQ, **BOOL)
    assert run(shapes, torch.Tensor.__setitem__, (fake(3, 5, 8), mask, parameter(7, 8)), {}) is None


def test_autocast_is_left_to_torch():
    with torch.autocast("cpu", torch.bfloat16):
        assert Shapes(FAKES).result("linear", (X, parameter(12, 8)), {}) is None
    assert Shapes(FAKES).result("linear", (X, parameter(12, 8)), {}) is not None


def test_results_share_no_memory():
    shapes = Shapes(FAKES)
    first, second = (shapes.result("neg", (X,), {}) for _ in range(2))
    assert first.untyped_storage()._cdata != second.untyped_storage()._cdata


REMEMBERED = {
    "another layout": (torch.mul, (transposed(), 2.0), {}),
    "a slice": (torch.Tensor.__getitem__, (X, (..., slice(None, 4))), {}),
    "several tensors": (torch.unbind, (parameter(3, 8),), {}),
    "a list of tensors": (torch.stack, ([X, X],), {"dim": -1}),
    "the argument itself": (torch.Tensor.to, (X, torch.float32), {}),
    "a size among the arguments": (torch.Tensor.expand, (fake(1, 5, 8), (X.shape[0], -1, -1)), {}),
}


def run(shapes, function, args, kwargs):
    with FAKES.active(), FAKES.shape_env.suppress_guards():
        return shapes.run(function, function.__name__, args, kwargs)


def asked(call):
    """The result of a call, and how often torch was asked for it."""
    function, args, kwargs = call
    count = []

    def counting(*args, **kwargs):
        count.append(None)
        return function(*args, **kwargs)

    counting.__name__ = function.__name__
    FAKES.results.clear()
    results = [run(Shapes(FAKES), counting, args, kwargs) for _ in range(2)]
    return results, len(count)


@pytest.mark.parametrize("case", REMEMBERED)
def test_torch_is_asked_once(case):
    (first, second), count = asked(REMEMBERED[case])
    assert count == 1
    for a, b in zip(first, second, strict=True) if isinstance(first, tuple) else [(first, second)]:
        assert facts(a) == facts(b)
    assert (first is second) == (case == "the argument itself")
    assert type(first) is type(second)


ASKED_AGAIN = {
    "in place": (torch.Tensor.add_, (fake(3, 5, 8), 1), {}),
    "a size that the data tells": (torch.nonzero, (LABELS,), {}),
    "no tensor": (torch.Tensor.size, (X,), {}),
    "a named tuple": (torch.topk, (X, 2), {}),
    "an argument that requires grad": (torch.abs, (fake(3, 5, 8).requires_grad_(),), {}),
}


@pytest.mark.parametrize("case", ASKED_AGAIN)
def test_torch_is_asked_again(case):
    assert asked(ASKED_AGAIN[case])[1] == 2


def test_calls_are_told_apart():
    shapes = Shapes(FAKES)
    widths = [run(shapes, torch.Tensor.__getitem__, (X, (..., slice(0, n))), {}).shape[-1] for n in (2, 4)]
    assert widths == [2, 4]
    assert run(shapes, torch.mul, (LABELS, 2), {}).dtype == torch.int64
    assert run(shapes, torch.mul, (LABELS, 2.0), {}).dtype == torch.float32
    assert run(shapes, torch.exp, (transposed(),), {}).stride()[-2:] != run(shapes, torch.exp, (X,), {}).stride()[-2:]


def test_a_remembered_result_has_memory_of_its_own():
    shapes = Shapes(FAKES)
    results = [run(shapes, torch.exp, (transposed(),), {}) for _ in range(3)]
    assert len({t.untyped_storage()._cdata for t in (X, *results)}) == 4
    with FAKES.active(), FAKES.shape_env.suppress_guards():
        results[1][:, 1:] = results[2][:, :-1]
        assert facts(results[1].as_strided((4,), (1,), 64))[0][:1] == [4]
