"""Modules that stay as they are because their Python code looks at data: the modules inside and around are captured."""

import weakref

import pytest
import torch
from idioms import RMSNorm
from torch import nn

import ligerfx
from ligerfx.guesses import Guesses
from ligerfx.symbols import FakeInputs

H = 8

pytestmark = pytest.mark.usefixtures("references")


class Pieces(nn.Module):
    """Cuts its rows into pieces of the sizes in a tensor, as an image encoder does; each goes through a norm."""

    def __init__(self, result=lambda rows, sizes: rows):
        super().__init__()
        self.norm = RMSNorm(H)
        self.result = result

    def forward(self, rows, sizes):
        found, start = [], 0
        for size in sizes.tolist():
            found.append(self.norm(rows[start : start + size]))
            start += size
        keep = rows[:start].sum(-1) > 0  # and only some of its rows come out
        return self.result(torch.cat(found)[keep], sizes)


class Model(nn.Module):
    def __init__(self, result=lambda rows, sizes: rows, end=lambda rows: rows * torch.arange(rows.shape[0])[:, None]):
        super().__init__()
        self.pieces, self.norm, self.end = Pieces(result), RMSNorm(H), end

    def forward(self, rows, sizes):
        return self.norm(self.end(self.pieces(rows, sizes)))


def assert_same(model, optimised, *call):
    results = []
    for candidate in (model, optimised):
        model.zero_grad()
        out = candidate(*call)
        out.sum().backward()
        results.append((out.detach(), *(p.grad for p in model.parameters())))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_what_is_inside_and_around_is_captured():
    model = Model()
    rows, sizes = torch.randn(7, H), torch.tensor([3, 4])
    state = torch.get_rng_state()
    optimised = ligerfx.optimize(model, (rows, sizes))
    assert torch.equal(torch.get_rng_state(), state) and sizes.tolist() == [3, 4]
    assert list(optimised.report.opaque) == ["pieces"] and optimised.report.idioms == {"rms_norm": 2}
    for numbers in ([3, 4], [1, 1, 5], [6]):  # other numbers of pieces, and of rows that come out
        assert_same(model, optimised, torch.randn(7, H), torch.tensor(numbers))


def test_sizes_of_its_result_are_measured():
    """The caller's graph asks for them when it runs: as many rows came out as the data wanted."""
    model = Model()
    optimised = ligerfx.optimize(model, (torch.ones(5, H), torch.tensor([2, 3])))
    assert "size" in optimised.code
    rows = torch.ones(5, H)
    rows[3] = -1
    assert len(optimised(rows, torch.tensor([2, 3]))) == 4
    assert_same(model, optimised, rows, torch.tensor([2, 3]))


def test_numbers_of_its_result_are_no_constants():
    model = Model(lambda rows, sizes: (rows, sizes.sum().item()), lambda pair: pair[0] * pair[1])
    optimised = ligerfx.optimize(model, (torch.randn(7, H), torch.tensor([3, 4])))
    assert list(optimised.report.opaque) == ["pieces"]
    assert_same(model, optimised, torch.randn(7, H), torch.tensor([1, 2]))

    model.end = lambda pair: pair[0] * (pair[1] + 1)
    optimised = ligerfx.optimize(model, (torch.randn(7, H), torch.tensor([3, 4])))
    assert "computes with a number" in optimised.report.opaque[""]
    assert_same(model, optimised, torch.randn(7, H), torch.tensor([1, 2]))


class Surprising(nn.Module):
    """Keeps of its rows as many as are more surprising than the mean, told by a distribution that checks its numbers:
    what decides is not among the inputs, and can only be guessed."""

    def __init__(self):
        super().__init__()
        self.norm = RMSNorm(H)

    def forward(self, rows, sizes):
        entropies = torch.distributions.Categorical(logits=self.norm(rows)).entropy()
        return rows[: (entropies > entropies.mean()).sum()]


def test_distributions_and_slices_may_need_the_data(monkeypatch):
    # torch.compile switches this off for the whole process.
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)
    model = Model()
    model.pieces = Surprising()
    rows, sizes = torch.randn(7, H), torch.tensor([7])
    optimised = ligerfx.optimize(model, (rows, sizes))
    assert torch.distributions.Distribution._validate_args is True
    assert list(optimised.report.opaque) == ["pieces"] and optimised.report.idioms == {"rms_norm": 2}
    assert "branches on the values of a tensor" in optimised.report.opaque["pieces"]
    for seed in range(3):
        torch.manual_seed(seed)
        assert_same(model, optimised, torch.randn(7, H), sizes)
    with pytest.raises(ValueError, match="Expected parameter logits"):  # the module checks as before
        optimised(torch.full((7, H), float("nan")), sizes)


class Resized(nn.Module):
    """Spreads its rows over as many as a tensor says, and keeps the positive ones, of which there may be enough."""

    def __init__(self):
        super().__init__()
        self.norm = RMSNorm(H)

    def forward(self, rows, sizes):
        (count,) = sizes
        rows = nn.functional.interpolate(self.norm(rows).T[None], size=(count,), mode="linear")[0].T
        positive = rows[rows.sum(-1) > 0]
        return positive if positive.shape[0] > 2 else rows


def test_sizes_in_a_tensor_and_sizes_that_the_data_tell():
    model = Model()
    model.pieces = Resized()
    optimised = ligerfx.optimize(model, (torch.randn(7, H), torch.tensor([9])))
    assert list(optimised.report.opaque) == ["pieces"] and optimised.report.idioms == {"rms_norm": 2}
    for seed, count in enumerate((9, 4, 2, 15)):
        torch.manual_seed(seed)
        assert_same(model, optimised, torch.randn(7, H), torch.tensor([count]))


def test_values_are_known_as_far_as_the_example_inputs_tell():
    fakes = FakeInputs()
    guesses = Guesses(fakes)
    grid = torch.tensor([[1, 4, 6]])
    fake = fakes.tensor(grid)
    guesses.learn(fake, grid)

    def run(function, name, *args):
        return guesses.run(lambda f, n, a, k: f(*a, **k), function, name, args, {})

    with fakes.active():
        row = run(torch.Tensor.__getitem__, "__getitem__", fake, 0)
        assert run(torch.Tensor.tolist, "tolist", row) == [1, 4, 6]
        run(torch.Tensor.add_, "add_", row, 1)
        assert run(torch.Tensor.tolist, "tolist", row) == [2, 5, 7]
        unknown = torch.empty(3, dtype=torch.int64)
        assert run(torch.Tensor.item, "item", unknown) == 0  # a guess
        mixed = run(torch.Tensor.add, "add", unknown, row)
        assert run(torch.Tensor.__bool__, "__bool__", mixed) is False
        # Of how many elements there are, neither the values that are unknown nor those of which only the sizes count.
        mask = run(torch.Tensor.ge, "ge", row, 5)
        assert run(torch.Tensor.__getitem__, "__getitem__", torch.empty(3, 8), mask).shape == (2, 8)
        wide = run(torch.Tensor.expand_as, "expand_as", mask, torch.empty(4, 3))
        assert run(torch.Tensor.__getitem__, "__getitem__", torch.empty(4, 3), wide).shape == (8,)
    assert grid.tolist() == [[1, 4, 6]]  # what was given is as it was


def test_a_capture_lets_go_of_the_inputs_that_it_looked_at():
    optimised = ligerfx.optimize(RMSNorm(H), (torch.randn(2, 3, H),))
    x = torch.randn(2, 3, H, dtype=torch.bfloat16)  # another kind of call: captured now
    seen = weakref.ref(x)
    optimised(x)
    del x
    assert seen() is None
