"""Arguments of modules that are more than tensors: sizes, and lists and dicts that a forward changes."""

import enum
from collections import OrderedDict, UserDict, namedtuple

import numpy as np
import pytest
import torch
from idioms import RMSNorm
from torch import nn

import ligerfx

pytestmark = pytest.mark.usefixtures("references")

H = 8


class Layer(nn.Module):
    """Calls `combine` of the class that is made of it with its norm's output, and what else it is given."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear = RMSNorm(H), nn.Linear(H, H)

    def forward(self, x, other):
        return self.combine(self.linear(self.norm(x)), other)


def layer(combine):
    return type("Combines", (Layer,), {"combine": combine})()


class Caller(nn.Module):
    def __init__(self, inner, call):
        super().__init__()
        self.norm, self.inner, self.call = RMSNorm(H), inner, call

    def forward(self, x):
        return self.call(self.inner, self.norm(x))


def assert_same(optimised, model, *inputs):
    for _ in range(3):
        torch.testing.assert_close(optimised(*inputs), model(*inputs), rtol=1e-5, atol=1e-5)


def check(model, opaque=()):
    """The same numbers for several sizes, and nothing opaque but these modules."""
    gm = ligerfx.optimize(model, (torch.randn(2, 3, H),))
    assert set(gm.report.opaque) == set(opaque), gm.report.opaque
    for shape in ((2, 3, H), (4, 5, H)):
        assert_same(gm, model, torch.randn(shape))
    return gm


@pytest.mark.parametrize(
    "combine",
    [
        lambda self, x, shape: x.view(shape[0] * shape[1], -1),
        lambda self, x, shape: x.reshape(shape) * len(shape),
        lambda self, x, shape: x.reshape(shape[:-1] + (2, -1)) if isinstance(shape, torch.Size) else x,
    ],
)
@pytest.mark.parametrize("by_name", [False, True])
def test_a_size_handed_to_a_module(combine, by_name):
    call = (lambda inner, x: inner(x, other=x.shape)) if by_name else (lambda inner, x: inner(x, x.shape))
    gm = check(model := Caller(layer(combine), call))
    assert gm.report.idioms == {"rms_norm": 2}
    assert type(gm.inner).__name__ == "Combines"

    x = torch.randn(2, 3, H)  # and as an input of the model itself, from which other calls may differ
    gm = ligerfx.optimize(model.inner, (x, x.shape))
    assert not gm.report.opaque
    assert_same(gm, model.inner, x, x.shape)
    assert_same(gm, model.inner, x[:, :2], x[:, :2].shape)
    assert_same(gm, model.inner, x, tuple(x.shape))


def test_numbers_that_a_size_computes_unseen():
    check(Caller(layer(lambda self, x, shape: x * shape.numel()), lambda inner, x: inner(x, x.shape)), {"inner"})
    x = torch.randn(2, 3, H)
    gm = ligerfx.optimize(model := layer(lambda self, x, shape: x * shape.numel()), (x, x.shape))
    assert_same(gm, model, x, x.shape)
    assert_same(gm, model, x, torch.Size((2, 2)))


def test_a_returned_size_is_one():
    def call(inner, x):
        y, shape = inner(x, None)
        return y.reshape(shape) * (2 if isinstance(shape, torch.Size) else 3)

    gm = check(Caller(layer(lambda self, x, _: (x.flatten(), x.shape)), call))
    x = torch.randn(2, 3, H)
    for _ in range(3):
        shape = gm.inner(x, None)[1]
        assert type(shape) is torch.Size and shape == x.shape


def replaces(self, x, items):
    items["a"] = items["a"] + x
    return x


def appends(self, x, items):
    items.append(x)
    return x


def appends_inside(self, x, items):
    items["all"][0].append(x)
    return x


@pytest.mark.parametrize(
    "combine, make, read",
    [
        (replaces, lambda x: {"a": x * 2}, lambda items: items["a"]),
        (appends, lambda x: [], lambda items: items[-1] if items else 1),
        (appends_inside, lambda x: {"all": ([],)}, lambda items: sum(items["all"][0])),
    ],
)
def test_a_list_or_dict_that_a_module_changes(combine, make, read):
    def call(inner, x):
        items = make(x)
        return inner(x, items) * read(items)

    gm = check(Caller(layer(combine), call), {"inner", ""})
    assert "changes a list or dict" in gm.report.opaque["inner"]
    assert gm.report.idioms == {"rms_norm": 2}, "the norms are modules of their own"


def test_a_change_that_nobody_reads_is_the_callers_as_well():
    """The list comes from outside: the module between must not hand on a copy."""

    class Middle(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.inner = RMSNorm(H), layer(appends)

        def forward(self, x, items):
            return self.inner(self.norm(x), items)

    model, x = Middle(), torch.randn(2, 3, H)
    gm = ligerfx.optimize(model, (x, []))
    assert "changes a list or dict" in gm.report.opaque[""]
    for _ in range(3):
        found, expected = [], []
        torch.testing.assert_close(gm(x, found), model(x, expected))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert len(found) == 1


def test_items_that_layers_leave_for_others_in_a_user_dict():
    """As it is one object for all of them, what a layer puts there is put there by its graph."""

    class Keeps(Layer):
        def combine(self, x, items):
            items["kept"] = x, x * 2
            return x

    class Takes(Layer):
        def combine(self, x, items):
            first, second = items["kept"]
            return x + first * second

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.keeps, self.between, self.takes = Keeps(), layer(lambda self, x, items: x), Takes()

        def forward(self, x, items):
            return self.takes(self.between(self.keeps(x, items), items), items)

    model, x = Model(), torch.randn(2, 3, H)
    gm = ligerfx.optimize(model, (x, UserDict()))
    assert not gm.report.opaque and gm.report.idioms == {"rms_norm": 3}
    for shape in ((2, 3, H), (5, 2, H)):
        x = torch.randn(shape)
        for _ in range(3):
            found, expected = UserDict(), UserDict()
            torch.testing.assert_close(gm(x, found), model(x, expected), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(found["kept"], expected["kept"], rtol=1e-5, atol=1e-5)
    with pytest.raises(KeyError):
        gm.takes(x, UserDict())

    given = UserDict(kept=(torch.ones(1), torch.ones(1)))
    ligerfx.optimize(model, (x, given))
    assert torch.equal(given["kept"][0], torch.ones(1)), "a capture changed its example inputs"


def test_a_user_dict_made_by_the_caller_or_looked_through():
    def call(inner, x):
        items = UserDict(a=x * 2)
        return inner(x, items) * items["a"]

    check(Caller(layer(replaces), call), {""})
    check(Caller(layer(lambda self, x, items: x * len(items)), call), {"", "inner"})


Pair = namedtuple("Pair", "a b")
Flag = enum.Flag("Flag", "A B")


@pytest.mark.parametrize(
    ("combine", "other"),
    [
        (lambda self, x, other: x * 2 if "k" in other else x, OrderedDict(k=1)),
        (lambda self, x, other: x * len(other), OrderedDict(k=1, j=2)),
        (lambda self, x, other: x if other else x * 2, OrderedDict()),
        (lambda self, x, other: x * sum(other.values()), OrderedDict(k=3.0)),
        (lambda self, x, other: x * other.a + other[1], Pair(2.0, torch.ones(H))),
        (lambda self, x, other: x * 2 if other == Pair(1, 2) else x, Pair(1, 2)),
        (lambda self, x, other: x + torch.from_numpy(other), np.ones(H, dtype=np.float32)),
        (lambda self, x, other: x * 2 if other & Flag.A else x, Flag.A),
        (lambda self, x, other: x * 2 if 3 in other else x, frozenset({3})),
        (lambda self, x, other: x * {frozenset({3}): 2}[other], frozenset({3})),
        (lambda self, x, other: x * other(), lambda: 4),
        (lambda self, x, other: x * 2 if isinstance(other, OrderedDict) else x, OrderedDict()),
    ],
)
def test_an_object_of_any_class(combine, other):
    """What is written in C, and what has no subclasses, too. Whoever looks into one runs as it is."""
    model = layer(combine)
    gm = ligerfx.optimize(model, (torch.randn(2, 3, H), other))
    assert_same(gm, model, torch.randn(4, 5, H), other)
    assert set(gm.report.opaque) <= {""}
