"""Loops over pieces whose sizes only the data tell are one call of the graph; what is no such loop stays as it is."""

import pytest
import torch
from idioms import RMSNorm
from torch import nn

import ligerfx

H = 8

pytestmark = pytest.mark.usefixtures("references")


def eager_attention_forward(module, query, key, value, attention_mask=None, scaling=1.0, bias=0.0):
    weights = torch.softmax(query @ key.transpose(-1, -2) * scaling + bias, dim=-1)
    return (weights @ value).transpose(1, 2), weights


def attended(module, pieces, **kwargs):
    return [eager_attention_forward(module, *piece, **kwargs)[0] for piece in pieces]


class Attention(nn.Module):
    """Attention within each piece of its rows; `loop` gets whole query, key and value, and the lengths."""

    def __init__(self, loop):
        super().__init__()
        self.norm, self.qkv, self.out = RMSNorm(H), nn.Linear(H, 3 * H), nn.Linear(H, H)
        self.loop = loop

    def forward(self, rows, ends):
        x = self.qkv(self.norm(rows)).reshape(rows.shape[0], 3, 2, H // 2).permute(1, 2, 0, 3)
        out = self.loop(self, x[:, None].unbind(0), ends[1:] - ends[:-1])
        return self.out(out.reshape(rows.shape[0], -1))


def split(wholes, lengths):
    return zip(*(torch.split(x, lengths.tolist(), dim=2) for x in wholes), strict=True)


def comprehension(module, wholes, lengths):
    return torch.cat(attended(module, split(wholes, lengths)), dim=1)


def appended(module, wholes, lengths):
    found, sizes = [], lengths.tolist()
    for query, key, value in zip(*(x.split(sizes, -2) for x in wholes), strict=True):
        out, _ = eager_attention_forward(module, query, value=value, key=key, scaling=0.5)
        found.append(out)
    return torch.cat(found, 1)


def weights_of_whole_keys(module, wholes, lengths):
    query, key, value = wholes
    pieces = torch.split(query, lengths.tolist(), dim=2)
    return torch.cat([eager_attention_forward(module, q, key, value)[1] for q in pieces], dim=-2) @ value


def optimised_and_same(loop, *numbers):
    torch.manual_seed(0)
    model = Attention(loop)
    optimised = ligerfx.optimize(model, (torch.randn(7, H), torch.tensor([0, 3, 7])))
    for lengths in numbers or ([3, 4], [1, 1, 5], [6], [2, 2, 2, 2, 1]):
        rows = torch.randn(sum(lengths), H)
        ends = torch.tensor([0, *lengths]).cumsum(0)
        results = []
        for candidate in (model, optimised):
            model.zero_grad()
            inputs = rows.clone().requires_grad_()
            out = candidate(inputs, ends)
            (out * torch.arange(H)).sum().backward()
            results.append((out.detach(), inputs.grad, *(p.grad for p in model.parameters())))
        for expected, found in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    return optimised


@pytest.mark.parametrize("loop", [comprehension, appended, weights_of_whole_keys])
def test_a_loop_is_one_call(loop):
    optimised = optimised_and_same(loop)
    assert optimised.report.opaque == {} and optimised.report.idioms == {"rms_norm": 1}
    assert optimised.code.count("eager_attention_forward_over_pieces(") == 1
    assert len(optimised._ligerfx_programs) == 1
    with pytest.raises(RuntimeError, match="split_with_sizes"):
        optimised(torch.randn(7, H), torch.tensor([0, 3, 6]))


def numbered(module, wholes, lengths):
    pieces = enumerate(split(wholes, lengths))
    return torch.cat([eager_attention_forward(module, *x, scaling=1.0 + i)[0] for i, x in pieces], dim=1)


def carried(module, wholes, lengths):
    found, bias = [], 0.0
    for piece in split(wholes, lengths):
        found.append(eager_attention_forward(module, *piece, bias=bias)[0])
        bias = found[-1].mean()
    return torch.cat(found, dim=1)


def computed_with(module, wholes, lengths):
    return torch.cat([eager_attention_forward(module, q * 2, k, v)[0] for q, k, v in split(wholes, lengths)], dim=1)


def other_way_round(module, wholes, lengths):
    return torch.cat(attended(module, split(wholes, lengths))[::-1], dim=1)


def others_besides(module, wholes, lengths):
    first, *rest = attended(module, split(wholes, lengths))
    return torch.cat([first * 2, *rest], dim=1)


def changed_meanwhile(module, wholes, lengths):
    bias = torch.zeros(1)
    found = attended(module, split(wholes, lengths), bias=bias)
    bias.add_(1)
    return torch.cat([*found], dim=1) + bias


def misaligned(module, wholes, lengths):
    pieces = [*split(wholes, lengths)]
    turned = [(query, *others) for (query, *_), (_, *others) in zip(pieces, pieces[::-1], strict=True)]
    return torch.cat(attended(module, turned), dim=1)


def another_third(module, wholes, lengths):
    pieces = enumerate(split(wholes, lengths))
    return torch.cat([eager_attention_forward(module, *x, scaling=1.0 + (i > 1))[0] for i, x in pieces], dim=1)


ALONE = "a piece of a tensor, of a size that only the data tell, is used by itself"


@pytest.mark.parametrize(
    "loop",
    [
        numbered, another_third, carried, computed_with, other_way_round, others_besides,
        changed_meanwhile, misaligned,
    ],
)  # fmt: skip
def test_no_loop_over_equals(loop):
    assert optimised_and_same(loop).report.opaque[""].startswith(ALONE)


def by_size(module, wholes, lengths):
    pieces = split(wholes, lengths)
    found = [eager_attention_forward(module, q, k, v)[0] if q.shape[2] > 1 else v.transpose(1, 2) for q, k, v in pieces]
    return torch.cat(found, dim=1)


def test_a_loop_that_looks_at_sizes():
    reason = optimised_and_same(by_size).report.opaque[""]
    assert reason.startswith("depends on ") and "does not follow from the sizes of its inputs" in reason


def counted(module, wholes, lengths):
    return comprehension(module, wholes, lengths) * len(lengths.tolist())


def summed(module, wholes, lengths):
    return comprehension(module, wholes, lengths) * sum(lengths.tolist())


@pytest.mark.parametrize("loop", [counted, summed])
def test_lengths_that_are_looked_at(loop):
    reason = optimised_and_same(loop).report.opaque[""]
    assert reason.startswith("its Python code branches on the values of a tensor (test_pieces.py:")


class Lengths(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x, bounds):
        return x * self.scale, bounds.diff().tolist()


class Halves(nn.Module):
    """One module tells the lengths, another multiplies what is before the first bound."""

    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(H, eps=1e-6)
        self.lengths = Lengths()
        self.first = First()

    def forward(self, x, bounds):
        x, lengths = self.lengths(x, bounds)
        return self.norm(self.first(x, lengths))


class First(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((1,), 2.0))

    def forward(self, x, lengths):
        first, *rest = x.split(lengths)
        return torch.cat([first * self.scale, *rest])


def test_lengths_that_another_module_gets():
    model, inputs = Halves(), (torch.randn(6, H), torch.tensor([0, 2, 6]))
    optimised = ligerfx.optimize(model, inputs)
    assert optimised.report.opaque["lengths"] == "a list of the numbers in a tensor is handed to another module"
    assert "" not in optimised.report.opaque and optimised.report.idioms == {"rms_norm": 1}
    for x, bounds in (inputs, (torch.randn(7, H), torch.tensor([0, 5, 7]))):
        assert torch.equal(optimised(x, bounds), model(x, bounds))
