"""Patterns of the user's own: scoped, registered, ordered by benefit, and checked before they are used."""

import pickle
import sys
import threading
import time
import types
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ligerfx
from ligerfx import kernels
from ligerfx.pattern import Inputs
from ligerfx.patterns import default_patterns

pytestmark = pytest.mark.usefixtures("references")


class QuickGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(1.702 * x)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(1.702 * x)
        return dy * (s + 1.702 * x * s * (1 - s))


def lean(x):
    return QuickGELU.apply(x)


def make(function=lambda x: x * torch.sigmoid(1.702 * x), replace=lean, name="quick_gelu", **options):
    def activation(x: "... I"):
        return function(x)

    activation.__name__ = name
    return ligerfx.pattern(replace=replace, **options)(activation)


class Block(nn.Module):
    """A norm, which the library knows, and an activation that it does not."""

    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        h = self.up(self.norm(x))
        return x + self.down(torch.sigmoid(h * 1.702).mul(h))


def names(model, **options):
    return sorted(r.pattern for r in ligerfx.optimize(model, torch.randn(2, 3, 16), **options).report.rewrites)


def gradients(module, x):
    x = x.detach().requires_grad_()
    out = module(x)
    return out, torch.autograd.grad(out.square().sum(), [x, *module.parameters()])


# -- scoped and registered -----------------------------------------------------------------------------------


def test_scoped_patterns_come_besides_those_of_the_library():
    model = Block()
    library = names(model)
    assert len(library) == 1 and "rms_norm" in library[0]
    assert names(model, patterns=[make()]) == sorted(["quick_gelu", *library])
    assert names(model, patterns=[make()], defaults=False) == ["quick_gelu"]
    assert names(model, patterns=[make(), *default_patterns()]) == sorted(["quick_gelu", *library])
    assert names(model) == library, "a scoped pattern outlasted its call"


def test_the_result_is_the_models():
    model, x = Block(), torch.randn(2, 3, 16)
    optimised = ligerfx.optimize(model, x, patterns=[make()])
    (out, grads), (expected, expected_grads) = gradients(optimised, x), gradients(model, x)
    for a, b in zip((out, *grads), (expected, *expected_grads), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_registered_until_removed():
    model = Block()
    before = names(model)
    handle = ligerfx.register(make())
    assert names(model) == sorted(["quick_gelu", *before])
    assert names(model, defaults=False) == []
    optimised = ligerfx.optimize(model, torch.randn(2, 3, 16))
    handle.remove()
    handle.remove()  # a second time does nothing
    assert names(model) == before
    assert "quick_gelu" in optimised.report.idioms  # made while it was registered
    optimised.double()(torch.randn(2, 3, 16, dtype=torch.float64))  # captured anew, with the patterns of its making
    *_, last = optimised._ligerfx_programs.values()
    assert "lean" in last.code


def test_registered_in_a_block():
    model = Block()
    with ligerfx.register(make(name="one"), make(torch.tanh, lambda x: x.tanh(), "two")):
        assert "one" in names(model)
    assert "one" not in names(model)
    with pytest.raises(RuntimeError, match="on purpose"), ligerfx.register(make(name="one")):
        raise RuntimeError("on purpose")
    assert "one" not in names(model)


def test_registering_holds_in_other_threads():
    found = []
    with ligerfx.register(make()):
        thread = threading.Thread(target=lambda: found.extend(names(Block())))
        thread.start()
        thread.join()
    assert "quick_gelu" in found


@pytest.mark.parametrize("wrong", [lambda x: x, "rms_norm", nn.SiLU()])
def test_only_patterns_are_registered(wrong):
    before = names(Block())
    with pytest.raises(ligerfx.PatternError, match="decorate with @ligerfx.pattern"):
        ligerfx.register(make(), wrong)
    assert names(Block()) == before


def test_the_pattern_that_fails_keeps_the_others_out():
    before = names(Block())
    with pytest.raises(ligerfx.PatternError, match="wrong"):
        ligerfx.register(make(), make(torch.tanh, lambda x: x.sin(), "wrong"))
    assert names(Block()) == before


# -- in another process ---------------------------------------------------------------------------------------


@pytest.fixture
def own_patterns(monkeypatch):
    """A module that holds a pattern, as one of the user's would."""
    module = types.ModuleType("own_patterns")
    module.quick_gelu = make()
    module.quick_gelu.function.__module__, module.quick_gelu.function.__qualname__ = "own_patterns", "quick_gelu"
    monkeypatch.setitem(sys.modules, "own_patterns", module)
    return module


def loaded(model, x, **options):
    """The result of `optimize` after a pickle, and the patterns with which it learns its graphs again."""
    data = pickle.dumps(ligerfx.optimize(model, x, **options))
    module = pickle.loads(data)
    module(x)
    return module, [match.pattern.name for p in module._ligerfx_programs.values() for match in p.matches]


def test_an_unpickled_model_finds_the_patterns_that_a_module_holds(own_patterns, recwarn):
    model, x = Block(), torch.randn(2, 3, 16)
    module, found = loaded(model, x, patterns=[own_patterns.quick_gelu], verify=True)
    assert "quick_gelu" in found and len(found) == 2 and not recwarn
    for a, b in zip(gradients(module, x)[1], gradients(model, x)[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert loaded(model, x, patterns=[own_patterns.quick_gelu], defaults=False)[1] == ["quick_gelu"]
    assert loaded(model, x, max_rewrites=0)[1] == []
    with ligerfx.register(own_patterns.quick_gelu):
        data = pickle.dumps(ligerfx.optimize(model, x))
    again = pickle.loads(data)
    again(x)
    assert again._ligerfx_session.patterns[0] is own_patterns.quick_gelu


def test_an_unpickled_model_says_which_patterns_it_does_without(own_patterns, monkeypatch):
    model, x = Block(), torch.randn(2, 3, 16)
    with pytest.warns(UserWarning, match=r"without some of its patterns: quick_gelu \(no module holds it"):
        module, found = loaded(model, x, patterns=[make()])
    assert len(found) == 1 and torch.equal(module(x), ligerfx.optimize(model, x)(x))
    data = pickle.dumps(ligerfx.optimize(model, x, patterns=[own_patterns.quick_gelu]))
    wrong = make(replace=lambda x: x * torch.sigmoid(1.7 * x))
    monkeypatch.setattr(own_patterns, "quick_gelu", wrong)
    with pytest.warns(UserWarning, match="quick_gelu .*the largest difference is"):
        assert wrong not in pickle.loads(data)._ligerfx_session.patterns


# -- order ---------------------------------------------------------------------------------------------------


def glu(gate, up):
    return lean(gate) * up


@ligerfx.pattern(replace=glu)
def gated(gate: "... I", up: "... I"):
    return gate * torch.sigmoid(1.702 * gate) * up


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        gate = self.gate(x)
        return gate * torch.sigmoid(1.702 * gate) * self.up(x)


def test_the_larger_one_wins_unless_the_smaller_has_more_benefit():
    assert names(Gated(), patterns=[make(), gated]) == ["gated"]
    assert names(Gated(), patterns=[gated, make(benefit=1)]) == ["quick_gelu"]
    gated_more = ligerfx.pattern(replace=glu, benefit=2)(gated.function)
    assert names(Gated(), patterns=[make(benefit=1), gated_more]) == ["gated"]


def test_of_equals_the_one_with_more_benefit_wins_then_the_first():
    first, second = make(name="first"), make(name="second")
    assert names(Gated(), patterns=[first, second]) == ["first"]
    assert names(Gated(), patterns=[second, first]) == ["second"]
    assert names(Gated(), patterns=[first, make(name="second", benefit=0.5)]) == ["second"]
    assert names(Gated(), patterns=[make(name="first", benefit=-1), second]) == ["second"]


# -- several outputs, patterns over our own ops, conditions --------------------------------------------------


def both(x, y):
    return torch.sin(x) * y, torch.cos(x) * y


class Both(nn.Module):
    def forward(self, x):
        y = x.exp()
        return y * x.cos() - x.sin() * y


@pytest.mark.parametrize("replace", [both, (lambda x, y: torch.sin(x) * y, lambda x, y: torch.cos(x) * y)])
def test_several_outputs(replace):
    @ligerfx.pattern(replace=replace)
    def polar(x: "...", y: "..."):
        return y * torch.sin(x), y * torch.cos(x)

    model, x = Both(), torch.randn(2, 3, 16)
    optimised = ligerfx.optimize(model, x, patterns=[polar])
    assert optimised.report.idioms == {"polar": 1}
    for a, b in zip(gradients(optimised, x)[1], gradients(model, x)[1], strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(optimised(x), model(x))


def test_all_outputs_must_be_there():
    @ligerfx.pattern(replace=both)
    def polar(x: "...", y: "..."):
        return y * torch.sin(x), y * torch.cos(x)

    class Half(nn.Module):
        def forward(self, x):
            return x.exp() * x.cos()

    assert names(Half(), patterns=[polar]) == []


def test_a_pattern_over_our_own_ops_reaches_across_modules():
    """`add`, then a norm module of the model: written with the kernels' public functions, found in plain PyTorch."""

    @ligerfx.pattern(replace=kernels.add_rms_norm, idioms=["rms_norm"], benefit=1)
    def mine(x: "... H", residual: "... H", weight: "H", *, eps: float):
        total = x + residual
        return kernels.rms_norm(total, weight, eps), total

    class Stream(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj, self.norm, self.out = nn.Linear(16, 16), nn.RMSNorm(16, eps=1e-5), nn.Linear(16, 16)

        def forward(self, x):
            x = x + self.proj(x)
            return x + self.out(self.norm(x))

    model, x = Stream(), torch.randn(2, 3, 16)
    optimised = ligerfx.optimize(model, x, patterns=[mine])
    (rewrite,) = optimised.report.rewrites
    assert rewrite.pattern == "mine" and rewrite.module == ""
    (out, grads), (expected, expected_grads) = gradients(optimised, x), gradients(model, x)
    for a, b in zip((out, *grads), (expected, *expected_grads), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


class UsesOurOps(nn.Module):
    """A model that was written with the kernels themselves."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(16))

    def forward(self, x):
        return kernels.rms_norm(x + x.flip(0), self.weight, 1e-5)


def test_a_model_written_with_our_own_ops_is_matched():
    assert names(UsesOurOps()) == ["add_rms_norm_rounded_first"]


def test_conditions_on_shapes_dtypes_and_constants():
    def fits(x, cap):
        if x.dtype != torch.float32:
            return f"{x.dtype} is not float32"
        if x.shape[-1] % 8:
            return f"width {x.shape[-1]} is no multiple of 8"
        return None if cap <= 100 else f"cap {cap} is above 100"

    def capped(x, cap):
        return torch.tanh(x / cap) * cap

    @ligerfx.pattern(replace=capped, when=fits)
    def cap(x: "... V", *, cap: float):
        return torch.tanh(x / cap) * cap

    class Capped(nn.Module):
        def __init__(self, cap):
            super().__init__()
            self.cap = cap

        def forward(self, x):
            return self.cap * torch.tanh(x / self.cap)

    def outcome(model, x):
        report = ligerfx.optimize(model, x, patterns=[cap]).report
        return report.idioms or report.near_misses[0].reason

    assert outcome(Capped(30.0), torch.ones(2, 3, 16)) == {"cap": 1}
    assert outcome(Capped(300.0), torch.ones(2, 3, 16)) == "cap 300.0 is above 100"
    assert outcome(Capped(30.0), torch.ones(2, 3, 12)) == "width 12 is no multiple of 8"
    assert outcome(Capped(30.0), torch.ones(2, 3, 16).bfloat16()) == "torch.bfloat16 is not float32"


# -- the check -----------------------------------------------------------------------------------------------


def error_of(function=None, replace=lean, **options):
    with pytest.raises(ligerfx.PatternError) as raised:
        ligerfx.check_pattern(make(function, replace, **options) if function else replace)
    return str(raised.value)


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


def test_a_wrong_constant_is_found_and_told_where():
    """1.7 for 1.702."""
    text = error_of(quick_gelu, lambda x: x * torch.sigmoid(1.7 * x))
    assert text.startswith(
        "quick_gelu on x float32 [2, 6, 40]: gradient of x (float32 [2, 6, 40]) is 0.141064 at [0, 3, 0]"
    )
    assert text.endswith("not 0.140159: the largest difference is 0.00091, rounding explains 2.8e-05")


def test_a_wrong_gradient_is_found():
    class Wrong(QuickGELU):
        @staticmethod
        def backward(ctx, dy):
            (x,) = ctx.saved_tensors
            s = torch.sigmoid(1.702 * x)
            return dy * (s + x * s * (1 - s))

    text = error_of(quick_gelu, lambda x: Wrong.apply(x))
    assert "gradient of x (float32 [2, 6, 40]) is " in text


def test_a_missing_gradient_is_found():
    text = error_of(quick_gelu, lambda x: quick_gelu(x.detach()))
    assert "gradient of x (float32 [2, 6, 40]): the replacement gives none" in text


def test_the_index_and_the_values_are_those_of_the_largest_difference():
    def off_at_one_place(x):
        y = quick_gelu(x)
        at = torch.zeros_like(y)
        at[..., 7] = 0.25
        return y + at

    text = error_of(quick_gelu, off_at_one_place)
    assert ", 7], not " in text and "the largest difference is 0.25," in text


def test_a_difference_in_one_dtype_only():
    def rounds_early(x):
        return quick_gelu(x) if x.dtype != torch.float16 else quick_gelu(x.bfloat16()).half() * 1.05

    assert error_of(quick_gelu, rounds_early).startswith("quick_gelu on x float16")


def test_a_difference_in_one_shape_only():
    def forgets_the_tail(x):
        y = quick_gelu(x)
        return torch.cat([y[..., :128], y[..., 128:] * 0], -1)

    assert error_of(quick_gelu, forgets_the_tail).startswith("quick_gelu on x float32 [134]")


def test_rows_with_gaps_between_them():
    def reads_as_if_contiguous(x):
        return QuickGELU.apply(torch.as_strided(x, x.shape, torch.empty(x.shape).stride()))

    assert error_of(quick_gelu, reads_as_if_contiguous).startswith("quick_gelu on x float32 [3, 54]")


def test_another_dtype_or_shape_of_the_result():
    assert "the replacement gives torch.float32 [2, 6, 40]" in error_of(quick_gelu, lambda x: quick_gelu(x.float()))
    assert "the replacement gives torch.float32 [480]" in error_of(quick_gelu, lambda x: quick_gelu(x.flatten()))
    assert "gives 2 results, not 1" in error_of(quick_gelu, lambda x: (quick_gelu(x), x))


def test_an_input_that_is_written_to():
    def in_place(x):
        y = quick_gelu(x)
        x.data.mul_(2)
        return y

    assert error_of(quick_gelu, in_place).endswith("the replacement writes to its input x")


def test_a_replacement_that_fails():
    def only_float32(x):
        if x.dtype != torch.float32:
            raise TypeError("float32 only")
        return lean(x)

    text = error_of(quick_gelu, only_float32)
    assert text.startswith("quick_gelu on x bfloat16") and "TypeError: float32 only" in text and "`when`" in text
    narrow = make(quick_gelu, only_float32, when=lambda x: None if x.dtype == torch.float32 else "no")
    assert ligerfx.check_pattern(narrow) == 3


def test_mixed_dtypes():
    def in_the_states_dtype(x, weight):
        return x * weight.to(x.dtype)

    @ligerfx.pattern(replace=in_the_states_dtype)
    def scale(x: "... H", weight: "H"):
        return x * weight

    assert "the replacement gives torch.bfloat16" in error_of(replace=scale)


def test_names():
    def other(y):
        return y

    def more(x, scale):
        return x

    def positional(x, /):
        return x

    def without_bias(x, weight):
        return F.linear(x, weight)

    def needs_bias(x, weight, bias):
        return F.linear(x, weight, bias)

    def linear(x: "... K", weight: "N K", bias: "N" = None):
        return F.linear(x, weight, bias)

    assert "other needs y, which is no parameter of the pattern: it has x" in error_of(quick_gelu, other)
    assert "more needs scale" in error_of(quick_gelu, more)
    assert "positional gets its arguments by name: x must have one" in error_of(quick_gelu, positional)
    assert "the replacement has no parameter x" in error_of(quick_gelu, lambda: 0)
    assert "no parameter bias" in error_of(replace=ligerfx.pattern(replace=without_bias)(linear))
    assert "bias may be absent" in error_of(replace=ligerfx.pattern(replace=needs_bias)(linear))
    assert "by name" in error_of(quick_gelu, partial(more, 2))
    assert "Inputs names ['z']" in error_of(quick_gelu, partial(more, scale=Inputs("z")))


def test_fixed_arguments_reach_a_replacement_with_keywords():
    """They are no names of its signature: the rewriter and the check must pass them all the same."""

    def scaled(x, **options):
        return x * options["scale"]

    @ligerfx.pattern(replace=partial(scaled, scale=3.0))
    def triple(x: "..."):
        return x * 3

    class Triple(nn.Module):
        def forward(self, x):
            return x * 3

    x = torch.randn(2, 3, 16)
    optimised = ligerfx.optimize(Triple(), x, patterns=[triple])
    assert optimised.report.idioms == {"triple": 1} and "scale = 3.0" in optimised.code
    assert torch.equal(optimised(x), x * 3)


def test_a_replacement_without_a_signature():
    with pytest.raises(ligerfx.PatternError, match="quick_gelu: .* does not tell its parameters"):
        make(replace=torch.tanh)


def test_what_cannot_be_traced_or_matched():
    error = error_of(lambda x: x if x.sum() > 0 else -x)
    assert "not traceable: its Python code branches on the values of a tensor (test_registration.py:" in error
    assert "nothing that can be matched" in error_of(F.dropout)


def test_no_input_to_compare_on_and_an_example():
    def wide(x):
        return None if x.shape[-1] == 512 else "only 512"

    assert "(`when`: only 512): give sizes and constants with `example`" in error_of(quick_gelu, when=wide)
    assert ligerfx.check_pattern(make(when=wide, example={"I": 512})) == 9
    with pytest.raises(ligerfx.PatternError, match=r"example names \['J'\], which no annotation does"):
        make(example={"J": 512})


def test_constants_are_varied():
    def ignores(x, cap):
        return torch.tanh(x / 0.4375) * 0.4375  # the value that the pattern is traced with

    @ligerfx.pattern(replace=ignores)
    def cap(x: "...", *, cap: float):
        return torch.tanh(x / cap) * cap

    assert "cap on x float32 [3], cap=1.09375: " in error_of(replace=cap)


def test_forks_and_early_arguments_are_checked():
    def forked(x, weight, eps):
        return kernels.rms_norm_reference(x, weight, eps), x * 1.5

    @ligerfx.pattern(replace=forked, forks="x")
    def norm(x: "... H", weight: "H", *, eps: float):
        return kernels.rms_norm_reference(x, weight, eps)

    assert "output 1 (float32 [2, 6, 40])" in error_of(replace=norm)

    def early(x, norm=None):
        return torch.tanh(x) if norm is None else norm

    @ligerfx.pattern(replace=early, early={"norm": lambda x: torch.tanh(x) + 1})
    def tanh(x: "..."):
        return torch.tanh(x)

    assert "the largest difference is 1," in error_of(replace=tanh)


def test_the_check_takes_a_fraction_of_a_second_and_is_made_once():
    quick = make()
    start = time.perf_counter()
    assert ligerfx.check_pattern(quick) == 9
    assert time.perf_counter() - start < 0.5
    assert ligerfx.check_pattern(quick) == 0  # done already


def test_the_check_leaves_the_random_state_alone():
    before = torch.random.get_rng_state()
    ligerfx.check_pattern(make())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_optimize_checks_scoped_patterns():
    with pytest.raises(ligerfx.PatternError, match="wrong on x float32"):
        ligerfx.optimize(Block(), torch.randn(2, 3, 16), patterns=[make(torch.tanh, lambda x: x.sin(), "wrong")])


def test_the_library_passes():
    patterns = dict.fromkeys([*default_patterns(False), *default_patterns(True)])
    assert len(patterns) > 60
    for pattern in patterns:
        assert ligerfx.check_pattern(pattern) >= 3, pattern.name
