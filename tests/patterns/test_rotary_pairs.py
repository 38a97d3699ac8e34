"""Rotary embeddings of pairs (interleaved), written with strides, stacks, views and complex numbers, or of halves with
tables of half the width: each kind is one pattern, however it is spelled."""

import pytest
import torch
from torch import nn

import ligerfx

B, S, N, D = 6, 5, 4, 8


def pairs(x, cos, sin):
    """(x0 + i x1) * (cos + i sin), for each pair."""
    x0, x1 = x[..., ::2], x[..., 1::2]
    return torch.stack((x0 * cos - x1 * sin, x1 * cos + x0 * sin), -1).flatten(-2)


@ligerfx.pattern(replace=pairs)
def half_tables(x: "B S N 2E", cos: "* S * E", sin: "* S * E"):
    return pairs(x, cos, sin)


def every_two(x, cos, sin):
    x0, x1 = x[..., ::2], x[..., 1::2]
    return x * cos + torch.stack((-x1, x0), -1).flatten(-2) * sin


@ligerfx.pattern(replace=every_two)
def full_tables(x: "B S N D", cos: "* S * D", sin: "* S * D"):
    return every_two(x, cos, sin)


def turned(x, freqs):
    return pairs(x, freqs.real, freqs.imag)


@ligerfx.pattern(replace=turned)
def complex_table(x: "B S N 2E", freqs: "complex * S * E"):
    return torch.view_as_real(torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * freqs).flatten(-2)


def halves(x, cos, sin):
    x0, x1 = x.chunk(2, -1)
    return torch.cat((x0 * cos - x1 * sin, x1 * cos + x0 * sin), -1)


@ligerfx.pattern(replace=halves)
def half_tables_of_halves(x: "B S N 2E", cos: "* S * E", sin: "* S * E"):
    return halves(x, cos, sin)


PATTERNS = [half_tables, full_tables, complex_table, half_tables_of_halves]


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def angles():
    return torch.randn(S, D // 2, generator=torch.Generator().manual_seed(1))


def inputs(kind, dtype=torch.float32):
    """States, and the tables of a kind of spelling, with a dimension for the batch and one for the heads."""
    x = torch.randn(B, S, N, D, generator=torch.Generator().manual_seed(2)).to(dtype)
    turn = angles()
    if kind == "complex":
        return x, torch.polar(torch.ones_like(turn), turn)[None, :, None]
    if kind == "angles":
        return x, turn[None, :, None]
    if kind == "full":
        turn = turn.repeat_interleave(2, -1)
    return x, turn.cos()[None, :, None], turn.sin()[None, :, None]


# -- spellings -----------------------------------------------------------------------------------------------


def stacked_and_flattened(x, cos, sin):
    x0, x1 = x[..., 0::2], x[..., 1::2]
    return torch.stack([x0 * cos - x1 * sin, x0 * sin + x1 * cos], dim=-1).flatten(-2, -1)


def shaped_and_indexed(x, cos, sin):
    y = x.float().reshape(*x.shape[:-1], -1, 2)
    out = torch.stack([y[..., 0] * cos - y[..., 1] * sin, y[..., 1] * cos + y[..., 0] * sin], -1)
    return out.flatten(3).type_as(x)


def unbound(x, cos, sin):
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).reshape(x.shape)


def unbound_view(x, cos, sin):
    a, b = torch.unbind(x.view(x.shape[0], x.shape[1], x.shape[2], x.shape[3] // 2, 2), dim=4)
    return torch.stack((cos * a + (-sin) * b, sin * a + cos * b), dim=4).view(x.shape)


def complex_from_halves(x, cos, sin):
    z = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2)) * torch.view_as_complex(
        torch.stack((cos, sin), -1)
    )
    return torch.view_as_real(z).flatten(3).type_as(x)


def polar_in_place_of_a_table(x, angle):
    z = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * torch.polar(torch.ones_like(angle), angle)
    return torch.view_as_real(z).flatten(3)


def complex_table_first(x, freqs):
    z = freqs * torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(z).flatten(3).to(x.dtype)


def complex_with_sizes(x, freqs):
    b, s, n, d = x.shape
    z = torch.view_as_complex(x.float().view(b, s, n, d // 2, 2))
    return torch.view_as_real(torch.mul(z, freqs)).reshape(b, s, n, d).type_as(x)


def complex_unflattened(x, freqs):
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * freqs).reshape(x.shape)


def rotate_every_two(x, cos, sin):
    x1, x2 = x[:, :, :, ::2], x[:, :, :, 1::2]
    return (x * cos) + (torch.stack((-x2, x1), dim=-1).flatten(-2) * sin)


def rotate_pairs_unbound(x, cos, sin):
    x1, x2 = x.reshape(*x.shape[:-1], -1, 2).unbind(dim=-1)
    return x * cos + torch.stack((-x2, x1), dim=-1).reshape(x.shape) * sin


def rotate_pairs_viewed(x, cos, sin):
    y = x.view(*x.shape[:-1], x.shape[-1] // 2, 2)
    return sin * torch.stack((-1 * y[..., 1], y[..., 0]), -1).view_as(x) + cos * x


def repeated_tables(x, cos, sin):
    cos, sin = (torch.repeat_interleave(t, 2, dim=-1) for t in (cos, sin))
    x1, x2 = x[..., ::2], x[..., 1::2]
    return x * cos + torch.stack((-x2, x1), dim=-1).flatten(-2) * sin


def concatenated_results(x, cos, sin):
    x1, x2 = torch.chunk(x, 2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)


def concatenated_slices(x, cos, sin):
    half = x.shape[-1] // 2
    x1, x2 = x[..., :half], x[..., half:]
    return torch.cat((cos * x1 - sin * x2, sin * x1 + cos * x2), -1)


def halves_as_a_dimension(x, cos, sin):
    x1, x2 = x.unflatten(-1, (2, -1)).unbind(-2)
    return torch.stack((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -2).flatten(-2)


SPELLINGS = {
    stacked_and_flattened: ("half", "half_tables"),
    shaped_and_indexed: ("half", "half_tables"),
    unbound: ("half", "half_tables"),
    unbound_view: ("half", "half_tables"),
    complex_from_halves: ("half", "half_tables"),
    polar_in_place_of_a_table: ("angles", "complex_table"),
    complex_table_first: ("complex", "complex_table"),
    complex_with_sizes: ("complex", "complex_table"),
    complex_unflattened: ("complex", "complex_table"),
    rotate_every_two: ("full", "full_tables"),
    rotate_pairs_unbound: ("full", "full_tables"),
    rotate_pairs_viewed: ("full", "full_tables"),
    repeated_tables: ("half", "full_tables"),
    concatenated_results: ("half", "half_tables_of_halves"),
    concatenated_slices: ("half", "half_tables_of_halves"),
    halves_as_a_dimension: ("half", "half_tables_of_halves"),
}


def optimised(function, given):
    return ligerfx.optimize(Function(function), given, patterns=PATTERNS, defaults=False)


@pytest.mark.parametrize("function", SPELLINGS, ids=lambda f: f.__name__)
def test_spelling(function, assert_same):
    kind, pattern = SPELLINGS[function]
    given = inputs(kind)
    gm = optimised(function, given)
    assert gm.report.idioms == {pattern: 1}, gm.report
    assert_same(Function(function), gm, given, rtol=1e-6)


# -- look-alikes ---------------------------------------------------------------------------------------------


def stacked(a, b):
    return torch.stack((a, b), -1).flatten(-2)


NOT_ROTATIONS = {
    "a reflection": ("half", lambda a, b, c, s: stacked(a * c + b * s, b * c + a * s), "found -1 besides"),
    "backwards": ("half", lambda a, b, c, s: stacked(a * c + b * s, b * c - a * s), "found -1 besides"),
    "the same sign twice": ("half", lambda a, b, c, s: stacked(a * c - b * s, b * c - a * s), "found -1 besides"),
    "pairs exchanged": ("half", lambda a, b, c, s: stacked(b * c + a * s, a * c - b * s), "found -1 besides"),
    "sine twice": (
        "half",
        lambda a, b, c, s: stacked(a * c - b * s, b * s + a * s),
        "expected cos = arg1, found arg2*strided(arg0, ",
    ),
    "one part left alone": ("half", lambda a, b, c, s: stacked(a * c - b * s, b), ", found strided(arg0, -1, 1, 2)"),
    "scaled": ("half", lambda a, b, c, s: stacked(2 * a * c - b * s, b * c + a * s), "found 2 besides"),
}


@pytest.mark.parametrize("name", NOT_ROTATIONS)
def test_not_a_rotation(name, assert_same):
    kind, turn, reason = NOT_ROTATIONS[name]
    given = inputs(kind)

    def function(x, cos, sin):
        return turn(x[..., ::2], x[..., 1::2], cos, sin)

    gm = optimised(function, given)
    assert gm.report.rewrites == []
    reasons = [miss.reason for miss in gm.report.near_misses]
    assert reason and any(reason in found for found in reasons), reasons
    assert_same(Function(function), gm, given)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, cos, sin: stacked(
            x[..., ::2] * cos - x[..., 1::2] * sin, x[..., ::2] * sin + x[..., 1::2] * cos
        ).flip(-1),
        lambda x, cos, sin: torch.cat(
            (x[..., ::2] * cos - x[..., 1::2] * sin, x[..., 1::2] * cos + x[..., ::2] * sin), -1
        ),
    ],
)
def test_what_stands_around_a_rotation_stays(function, assert_same):
    """Its result reversed; the pairs taken apart, turned, and left apart."""
    given = inputs("half")
    assert_same(Function(function), optimised(function, given), given, rtol=1e-6)
