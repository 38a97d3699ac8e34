"""Canonical values: equal for equal spellings, different for what differs, roundings included."""

import pytest
import sympy
import torch
import torch.nn.functional as F

from ligerfx.algebra import LARGEST, normal, number
from ligerfx.canonical import Canonicalizer
from ligerfx.recorder import Recorder
from ligerfx.symbols import FakeInputs
from ligerfx.terms import Terms


class Values:
    """Canonical values of functions of x [2, 6, 8], y [2, 6, 8] and w [8], all in one table of terms."""

    def __init__(self, dtype=torch.float32, w_dtype=None, rounding=True):
        self.fakes = FakeInputs()
        self.terms = Terms()
        self.rounding = rounding
        self.inputs = {
            "x": self.fakes.tensor(torch.empty(2, 6, 8, dtype=dtype)),
            "y": self.fakes.tensor(torch.empty(2, 6, 8, dtype=dtype)),
            "w": self.fakes.parameter(torch.empty(8, dtype=w_dtype or dtype)),
        }
        self.symbols = {n: self.terms.symbol("input", (n,), (), t.dtype) for n, t in self.inputs.items()}

    def __call__(self, function):
        graph = Recorder(fakes=self.fakes).trace_function(function, self.inputs)
        cuts = {n: self.symbols[n.target] for n in graph.nodes if n.op == "placeholder"}
        canonical = Canonicalizer(self.terms, cuts, rounding=self.rounding)
        (output,) = (n for n in graph.nodes if n.op == "output")
        return normal(canonical.value(output.args[0]))


EQUAL = {
    "squares": [
        lambda x, y, w: x * x, lambda x, y, w: x**2, lambda x, y, w: x.pow(2),
        lambda x, y, w: torch.square(x),
        lambda x, y, w: x.square(), lambda x, y, w: torch.pow(x, 2.0), lambda x, y, w: torch.mul(x, x),
    ],
    "inverse roots": [
        lambda x, y, w: torch.rsqrt(x + 1), lambda x, y, w: 1 / torch.sqrt(x + 1),
        lambda x, y, w: (1 + x) ** -0.5, lambda x, y, w: (x + 1.0).sqrt().reciprocal(),
        lambda x, y, w: torch.pow(x + 1, -0.5), lambda x, y, w: 1 / (x + 1) ** 0.5,
    ],
    "quotients": [
        lambda x, y, w: x / y, lambda x, y, w: x * y.reciprocal(), lambda x, y, w: x.div(y),
        lambda x, y, w: torch.true_divide(x, y), lambda x, y, w: x * (1 / y), lambda x, y, w: x * y**-1,
    ],
    "constant factors": [
        lambda x, y, w: x / 2, lambda x, y, w: x * 0.5, lambda x, y, w: 0.5 * x, lambda x, y, w: x / 2.0,
        lambda x, y, w: x.mul(2) / 4,
    ],
    "a factor of one": [
        lambda x, y, w: x, lambda x, y, w: x * 1, lambda x, y, w: x * 1.0, lambda x, y, w: x + 0,
        lambda x, y, w: x * 8 * 0.125, lambda x, y, w: x.neg().neg(), lambda x, y, w: x.contiguous(),
    ],
    "sums": [
        lambda x, y, w: x + y + w, lambda x, y, w: w + (y + x), lambda x, y, w: torch.add(x, y).add(w),
        lambda x, y, w: x - (-y) + w,
    ],
    "distribution": [lambda x, y, w: x * (1 + w), lambda x, y, w: x + x * w, lambda x, y, w: (w + 1.0) * x],
    "silu": [
        lambda x, y, w: F.silu(x), lambda x, y, w: x * torch.sigmoid(x),
        lambda x, y, w: x / (1 + torch.exp(-x)),
        lambda x, y, w: F.sigmoid(x) * x, lambda x, y, w: x * torch.exp(x) / (1 + torch.exp(x)),
        lambda x, y, w: x * (x.exp() / x.exp().add(1)), lambda x, y, w: x * (1 - 1 / (1 + torch.exp(x))),
        lambda x, y, w: x - x / (torch.exp(x) + 1), lambda x, y, w: x * (1 - torch.sigmoid(-x)),
        lambda x, y, w: 2 * x * x.exp() / (2 + 2 * x.exp()), lambda x, y, w: x * -(1 / (1 + x.exp()) - 1),
        lambda x, y, w: x - x * (1 - x.sigmoid()), lambda x, y, w: x / (1 + 1 / x.exp()),
    ],
    "sigmoid of a sum": [
        lambda x, y, w: torch.sigmoid(x + y), lambda x, y, w: 1 - 1 / (1 + torch.exp(x + y)),
        lambda x, y, w: torch.exp(x + y) / (1 + torch.exp(y + x)), lambda x, y, w: 1 - torch.sigmoid(-x - y),
    ],
    "what a sigmoid lacks": [
        lambda x, y, w: w * torch.sigmoid(-x), lambda x, y, w: w * (1 - torch.sigmoid(x)),
        lambda x, y, w: w - w / (1 + torch.exp(-x)), lambda x, y, w: w / (1 + torch.exp(x)),
        lambda x, y, w: w * torch.exp(-x) * torch.sigmoid(x),
    ],
    "two gates": [
        lambda x, y, w: x * torch.sigmoid(w) + y * (1 - torch.sigmoid(w)),
        lambda x, y, w: x * torch.sigmoid(w) + y * torch.sigmoid(-w),
        lambda x, y, w: y - y * torch.sigmoid(w) + x * w.sigmoid(),
    ],
    "gelu": [
        lambda x, y, w: F.gelu(x), lambda x, y, w: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
        lambda x, y, w: x / 2 * (1 + (x * 0.7071067811865476).erf()),
    ],
    "gelu tanh": [
        lambda x, y, w: F.gelu(x, approximate="tanh"),
        lambda x, y, w: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
        lambda x, y, w: 0.5 * x * (1 + torch.tanh(x * 0.7978845608028654 * (1 + 0.044715 * x * x))),
    ],
    "relu": [lambda x, y, w: F.relu(x), lambda x, y, w: torch.relu(x), lambda x, y, w: x.relu()],
    "means": [
        lambda x, y, w: x.mean(-1, keepdim=True), lambda x, y, w: torch.mean(x, dim=2, keepdim=True),
        lambda x, y, w: x.mean((-1,), True), lambda x, y, w: x.mean(-1).unsqueeze(-1),
        lambda x, y, w: x.mean(-1)[..., None], lambda x, y, w: x.sum(-1, keepdim=True) / 8,
        lambda x, y, w: x.sum(-1, keepdim=True) / x.shape[-1],
        lambda x, y, w: x.sum(-1, keepdim=True) * 0.125,
    ],
    "first halves": [
        lambda x, y, w: x[..., :4], lambda x, y, w: x.chunk(2, -1)[0], lambda x, y, w: x.split(4, dim=-1)[0],
        lambda x, y, w: x[:, :, 0:4], lambda x, y, w: x[..., : x.shape[-1] // 2], lambda x, y, w: x[..., :-4],
        lambda x, y, w: x.narrow(2, 0, 4), lambda x, y, w: torch.split(x, [4, 4], 2)[0],
        lambda x, y, w: x[..., :6][..., :4],
    ],
    "middles": [
        lambda x, y, w: x[..., 2:4], lambda x, y, w: x.split(2, -1)[1], lambda x, y, w: x[..., 1:][..., 1:3],
        lambda x, y, w: x.chunk(4, dim=2)[1], lambda x, y, w: x[..., -6:-4],
        lambda x, y, w: x.split([2, 2, 4], -1)[1],
    ],
    "reshapes": [
        lambda x, y, w: x.view(-1, 8), lambda x, y, w: x.reshape(x.shape[0] * x.shape[1], x.shape[2]),
        lambda x, y, w: x.flatten(0, 1), lambda x, y, w: x.view(-1).view(-1, 8),
    ],
    "reshapes to the same": [
        lambda x, y, w: x, lambda x, y, w: x.view(x.shape), lambda x, y, w: x.reshape(*x.shape),
        lambda x, y, w: x.flatten(0, 1).view(x.shape[0], x.shape[1], 8), lambda x, y, w: x[...],
        lambda x, y, w: x[:],
    ],
    "transposes": [
        lambda x, y, w: x.transpose(1, 2), lambda x, y, w: x.transpose(-1, -2),
        lambda x, y, w: x.permute(0, 2, 1),
        lambda x, y, w: x.swapaxes(2, 1), lambda x, y, w: torch.permute(x, (0, 2, 1)),
    ],
    "concatenations": [
        lambda x, y, w: torch.cat((x, y), -1), lambda x, y, w: torch.cat([x, y], dim=2),
        lambda x, y, w: torch.concat((x, y), 2), lambda x, y, w: torch.cat((x, x[..., :0], y), -1),
    ],
    "linear": [
        lambda x, y, w: F.linear(x, w.view(1, 8)),
        lambda x, y, w: F.linear(x, weight=w.view(1, 8), bias=None),
    ],
    "casts that change nothing": [
        lambda x, y, w: x, lambda x, y, w: x.float(), lambda x, y, w: x.to(torch.float32),
        lambda x, y, w: x.type_as(y), lambda x, y, w: x.to(y), lambda x, y, w: x.double().float(),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("first", "other"),
    [pytest.param(v[0], f, id=f"{name}-{i}") for name, v in EQUAL.items() for i, f in enumerate(v) if i],
)
def test_equal_spellings(first, other):
    values = Values()
    assert values(first) == values(other)


DIFFERENT = {
    "x": lambda x, y, w: x,
    "y": lambda x, y, w: y,
    "x + y": lambda x, y, w: x + y,
    "x - y": lambda x, y, w: x - y,
    "y - x": lambda x, y, w: y - x,
    "2x": lambda x, y, w: 2 * x,
    "x + 2y by alpha": lambda x, y, w: torch.add(x, y, alpha=2),
    "x * 1.0001": lambda x, y, w: x * 1.0001,
    "x * 1.0002": lambda x, y, w: x * 1.0002,
    "abs": lambda x, y, w: x.abs(),
    "root of the square": lambda x, y, w: x.square().sqrt(),
    "x ** 3": lambda x, y, w: x**3,
    "x ** y": lambda x, y, w: x**y,
    "y ** x": lambda x, y, w: y**x,
    "2 ** x": lambda x, y, w: 2**x,
    "sigmoid": lambda x, y, w: x.sigmoid(),
    "silu": lambda x, y, w: F.silu(x),
    "silu of minus": lambda x, y, w: F.silu(-x),
    "sigmoid of minus": lambda x, y, w: 1 - x.sigmoid(),
    "sigmoid with twice the exponential": lambda x, y, w: x.exp() / (1 + 2 * x.exp()),
    "sigmoid with two for one": lambda x, y, w: x.exp() / (2 + x.exp()),
    "sigmoid of two arguments": lambda x, y, w: x.exp() / (1 + y.exp()),
    "sigmoid with a minus": lambda x, y, w: x.exp() / (1 - x.exp()),
    "one and an inverse": lambda x, y, w: 1 + 1 / (1 + x.exp()),
    "one less two inverses": lambda x, y, w: 1 - 2 / (1 + x.exp()),
    "two less an inverse": lambda x, y, w: 2 - 1 / (1 + x.exp()),
    "one less a square": lambda x, y, w: 1 - 1 / (1 + x.exp()) ** 2,
    "an exponential less a sigmoid": lambda x, y, w: x.exp() - 1 / (1 + x.exp()),
    "tanh": lambda x, y, w: x.tanh(),
    "tanh of half": lambda x, y, w: (x / 2).tanh(),
    "derivative of the sigmoid": lambda x, y, w: x.sigmoid() * (1 - x.sigmoid()),
    "gelu": lambda x, y, w: F.gelu(x),
    "gelu tanh": lambda x, y, w: F.gelu(x, approximate="tanh"),
    "quick gelu": lambda x, y, w: x * (1.702 * x).sigmoid(),
    "relu": lambda x, y, w: F.relu(x),
    "relu6": lambda x, y, w: F.relu6(x),
    "mean": lambda x, y, w: x.mean(-1, keepdim=True),
    "mean without the dimension": lambda x, y, w: x.mean(-1),
    "mean over dim 1": lambda x, y, w: x.mean(1, keepdim=True),
    "mean over both": lambda x, y, w: x.mean((1, 2), keepdim=True),
    "mean over all": lambda x, y, w: x.mean(),
    "sum": lambda x, y, w: x.sum(-1, keepdim=True),
    "sum over dim 1": lambda x, y, w: x.sum(1, keepdim=True),
    "amax": lambda x, y, w: x.amax(-1, keepdim=True),
    "variance": lambda x, y, w: x.var(-1, keepdim=True),
    "first half": lambda x, y, w: x[..., :4],
    "second half": lambda x, y, w: x[..., 4:],
    "every second": lambda x, y, w: x[..., ::2],
    "half of dim 0": lambda x, y, w: x[: x.shape[0] // 2],
    "one column": lambda x, y, w: x[..., 3],
    "one column, kept": lambda x, y, w: x[..., 3:4],
    "transpose": lambda x, y, w: x.transpose(1, 2),
    "transpose of the batch": lambda x, y, w: x.transpose(0, 1),
    "reshape": lambda x, y, w: x.view(-1, 8),
    "reshape to another width": lambda x, y, w: x.view(-1, 4),
    "reshape of the transpose": lambda x, y, w: x.transpose(0, 1).reshape(-1, 8),
    "cat": lambda x, y, w: torch.cat((x, y), -1),
    "cat the other way": lambda x, y, w: torch.cat((y, x), -1),
    "cat over dim 1": lambda x, y, w: torch.cat((x, y), 1),
    "pad": lambda x, y, w: F.pad(x, (0, 1)),
    "pad before": lambda x, y, w: F.pad(x, (1, 0)),
    "pad with ones": lambda x, y, w: F.pad(x, (0, 1), value=1.0),
    "rms_norm": lambda x, y, w: F.rms_norm(x, (8,), w, 1e-6),
    "rms_norm with another eps": lambda x, y, w: F.rms_norm(x, (8,), w, 1e-5),
    "rms_norm over two dims": lambda x, y, w: F.rms_norm(x, (6, 8), eps=1e-6),
    "rms_norm without weight": lambda x, y, w: F.rms_norm(x, (8,), eps=1e-6),
    "layer_norm": lambda x, y, w: F.layer_norm(x, (8,), w),
    "linear": lambda x, y, w: F.linear(x, w.view(1, 8)),
    "unsqueeze": lambda x, y, w: x.unsqueeze(0),
    "unsqueeze at the end": lambda x, y, w: x.unsqueeze(-1),
    "floor division": lambda x, y, w: x // 2,
    "rounded division": lambda x, y, w: torch.div(x, 2, rounding_mode="floor"),
    "clamp": lambda x, y, w: x.clamp(min=0),
    "dropout": lambda x, y, w: F.dropout(x, 0.5),
}


def test_different_values():
    values = Values()
    found = {}
    for name, function in DIFFERENT.items():
        value = values(function)
        assert value not in found, f"{name} has the value of {found[value]}"
        found[value] = name


def test_random_ops_are_never_equal():
    values = Values()
    assert values(lambda x, y, w: torch.rand_like(x)) != values(lambda x, y, w: torch.rand_like(x))
    assert values(lambda x, y, w: F.dropout(x) - F.dropout(x)) != 0


def test_in_place_result_is_not_taken_for_the_out_of_place_one():
    """An in-place op is a leaf: nothing that follows may be matched across it."""
    values = Values()
    assert values(lambda x, y, w: (x + y).mul_(2)) != values(lambda x, y, w: (x + y) * 2)


def test_integer_arithmetic_is_no_algebra():
    """Division of integers rounds: (x // 2) * 2 is not x, and neither is a cast through int."""
    values = Values()
    assert values(lambda x, y, w: x.long().float()) != values(lambda x, y, w: x)
    assert values(lambda x, y, w: (x.long() // 2 * 2).float()) != values(lambda x, y, w: x.long().float())


# -- roundings -----------------------------------------------------------------------------------------------

ROUNDINGS = {
    "low precision product": lambda x, y, w: (x * y).float() * w,
    "product in fp32": lambda x, y, w: x.float() * y.float() * w,
    "product rounded at the end": lambda x, y, w: (x.float() * y.float() * w).to(x.dtype),
    "another product rounded in between": lambda x, y, w: (x.float() * w.float()).to(x.dtype) * y,
    "factor rounded": lambda x, y, w: x.float() * (y.float() + 1).to(x.dtype) * w,
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_roundings_tell_values_apart(dtype):
    values = Values(dtype)
    assert len({values(f) for f in ROUNDINGS.values()}) == len(ROUNDINGS)


def test_without_roundings_all_products_are_one():
    values = Values(torch.bfloat16, rounding=False)
    products = [values(f) for name, f in ROUNDINGS.items() if name != "factor rounded"]
    assert len(set(products)) == 1


def test_in_fp32_there_are_no_roundings():
    values = Values(torch.float32)
    products = [values(f) for name, f in ROUNDINGS.items() if name != "factor rounded"]
    assert len(set(products)) == 1


EXACT = {
    "an input widened": (lambda x, y, w: x.float() * y, lambda x, y, w: x.float() * y.float()),
    "an input there and back": (lambda x, y, w: x.float().to(x.dtype), lambda x, y, w: x),
    "a rounded value there and back": (
        lambda x, y, w: (x.float() * y.float()).to(x.dtype).float().to(x.dtype),
        lambda x, y, w: (x.float() * y.float()).to(x.dtype),
    ),
    "a slice of the wide input": (lambda x, y, w: x.float()[..., :4], lambda x, y, w: x[..., :4].float()),
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_casts_that_round_nothing_leave_no_trace(name):
    values = Values(torch.bfloat16)
    first, second = EXACT[name]
    assert values(first) == values(second)


def test_a_round_term_names_the_dtype():
    values = Values(torch.bfloat16)
    value = values(lambda x, y, w: (x.float() * 3).to(x.dtype))
    term = values.terms.terms[value]
    assert term.op == "round" and term.attrs == (torch.bfloat16,)
    assert term.args == (3 * values.symbols["x"],)
    assert values(lambda x, y, w: (x.float() * 3).half()) != value


def test_overflow_of_half_is_no_exact_widening():
    """bf16 to fp16 loses values, although both have 16 bits."""
    values = Values(torch.bfloat16)
    assert values(lambda x, y, w: x.half().to(torch.bfloat16)) != values(lambda x, y, w: x)


def test_promotion_rounds_the_narrow_operand():
    """(x + y) is computed in bf16, and rounded, before it meets the fp32 weight."""
    values = Values(torch.bfloat16, w_dtype=torch.float32)
    narrow = values(lambda x, y, w: (x + y) * w)
    assert narrow == values(lambda x, y, w: (x + y).float() * w)
    assert narrow != values(lambda x, y, w: (x.float() + y.float()) * w)


# -- normal --------------------------------------------------------------------------------------------------

A, C = sympy.symbols("a c", real=True)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (A * (1 + C), A + A * C),
        (sympy.Float(1.0) * A, A),
        (sympy.Float(0.5) * A, A / 2),
        (A * sympy.Float(0.1), A * sympy.Float(0.1 * (1 + 1e-12))),
        (sympy.tanh(A * (1 + C)), sympy.tanh(A + A * C)),
    ],
    ids=str,
)
def test_normal_is_one_form(first, second):
    assert normal(first) == normal(second)


def test_normal_keeps_what_fp32_can_tell_apart():
    assert normal(A * sympy.Float(0.1)) != normal(A * sympy.Float(0.1000001))
    assert normal(A + number(1e-6)) != normal(A + number(1.001e-6))
    assert normal(A + number(1e-12)) != normal(A)


def test_number():
    assert number(2.0) == sympy.Integer(2) and number(2.0).is_Integer
    assert number(float("inf")) != number(float("nan"))
    assert number(0.1) == sympy.Float(0.1)


def test_dividing_by_sums_in_turn_stays_small():
    """Twenty rounds of Sinkhorn would be 2**40 summands, multiplied out; an idiom has no value so large."""

    def sinkhorn(x, y, w):
        for _ in range(20):
            x = x / (x.sum(-1, keepdim=True) + 1e-6)
            x = x / (x.sum(-2, keepdim=True) + 1e-6)
        return x

    assert len(sympy.Add.make_args(Values()(sinkhorn))) <= LARGEST
