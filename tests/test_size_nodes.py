"""Sizes whose comparisons wait: the same answers, expressions and guards as torch's own."""

import operator
from collections.abc import Callable

import pytest
import sympy
import torch
from torch.fx.experimental.sym_node import SymNode
from torch.fx.experimental.symbolic_shapes import ShapeEnv, statically_known_true

import ligerfx
from ligerfx import symbols
from ligerfx.size_nodes import Question, SizeNode
from ligerfx.symbols import FakeInputs, expression
from models import make

COMPARISONS = [operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge]


@pytest.fixture
def sizes() -> tuple[FakeInputs, torch.SymInt, torch.SymInt]:
    fakes = FakeInputs()
    return fakes, fakes.size(6), fakes.size(9)


def test_results_are_sizes_of_the_same_kind(sizes: tuple) -> None:
    _, a, b = sizes
    for value in (a, a + b, a - 1, 2 * a, a * b, a // 4, a % 4, -a, torch.sym_max(a, b), torch.sym_sum([a, b, 1])):
        assert type(value.node) is SizeNode


@pytest.mark.parametrize("compare", COMPARISONS)
def test_question_is_what_torch_asks(sizes: tuple, compare: Callable) -> None:
    fakes, a, b = sizes
    asked = compare(a * b, 7 * a)
    assert type(asked.node) is Question
    theirs = getattr(SymNode, f"_{compare.__name__}")((a * b).node, (7 * a).node)
    assert asked.node.expr == theirs.expr
    assert asked.node.hint is theirs.hint
    with fakes.shape_env.suppress_guards():
        assert bool(asked) is compare(6 * 9, 7 * 6)
    assert not fakes.shape_env.guards


def test_expression_waits_until_it_is_asked_for(sizes: tuple) -> None:
    fakes, a, b = sizes
    asked = a * 2 == b + 3
    with fakes.shape_env.suppress_guards():
        assert bool(asked)
    assert asked.node._asked is not None
    assert asked.node.expr == sympy.Eq(2 * a.node.expr, b.node.expr + 3)
    assert asked.node._asked is None


def test_answer_where_guards_count_is_a_guard(sizes: tuple) -> None:
    fakes, a, b = sizes
    assert a < b
    assert [guard.expr for guard in fakes.shape_env.guards] == [sympy.Lt(expression(a), expression(b))]


def test_answer_at_hand_is_not_known_for_all_sizes(sizes: tuple) -> None:
    _, a, b = sizes
    assert not statically_known_true(a * 3 == b * 2)
    assert statically_known_true(a * 3 >= a)


def test_expectation_is_a_guard_unless_suppressed(sizes: tuple) -> None:
    fakes, a, b = sizes
    with fakes.shape_env.suppress_guards():
        torch._check(a < b)
    assert not fakes.shape_env.guards
    torch._check(a < b)
    assert len(fakes.shape_env.guards) == 1


def test_size_that_the_data_tell_is_left_to_torch(sizes: tuple) -> None:
    fakes, a, _ = sizes
    unknown = fakes.shape_env.create_unbacked_symint()
    assert (a == unknown).node.hint is None
    assert (a + unknown).node.hint is None


@pytest.mark.parametrize(
    "divide",
    [
        lambda a, b: (a * b * 8) // (b * 4),
        lambda a, b: (a * 8) // 12,
        lambda a, b: (a * b) // (a * b),
        lambda a, b: (a + b) // 3,
        lambda a, b: (3 * a + 6) // 3,
        lambda a, b: (a * (b + 1)) // (b + 1),
        lambda a, b: (a * b + a) // a,
        lambda a, b: a // 4 * b // b,
        lambda a, b: a // b,
    ],
)
def test_quotient_is_torchs(sizes: tuple, divide: Callable) -> None:
    _, a, b = sizes
    plain = ShapeEnv(specialize_zero_one=False)
    theirs = divide(*(torch.SymInt(SymNode(size.node.expr, plain, int, size.node.hint)) for size in (a, b)))
    ours = divide(a, b)
    assert expression(ours) == expression(theirs)
    assert ours.node.hint == theirs.node.hint == divide(6, 9)


def test_a_torch_of_other_internals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capture takes torch's own way there, to the same graphs."""
    model = make("llama")
    expected = ligerfx.optimize(model)
    monkeypatch.setattr(symbols, "TRIED", False)
    monkeypatch.delattr(torch, "_functionalize_unsafe_set")
    found = ligerfx.optimize(model)
    assert type(FakeInputs().size(6).node) is SymNode
    for path, module in expected.named_modules():
        if isinstance(module, ligerfx.OptimizedModule):
            assert found.get_submodule(path).code == module.code
    assert found.report.idioms == expected.report.idioms
