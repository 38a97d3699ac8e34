"""`optimize(verify=True)` and `ligerfx.bisect`: rewrites that compute something else are undone, or found."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ligerfx

pytestmark = pytest.mark.usefixtures("references")

SITE = 24  # a width at which the replacements below go wrong: none at which patterns are checked


def wrong_at_the_site(x):
    return torch.tanh(x) * (1.01 if x.shape[-1] == SITE else 1)


class WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(y := torch.tanh(x))
        return y

    @staticmethod
    def backward(ctx, dy):
        (y,) = ctx.saved_tensors
        dx = dy * (1 - y * y)
        return dx * 1.25 if dx.shape[-1] == SITE else dx


def wrong_backward_at_the_site(x):
    return WrongBackward.apply(x)


def raises_at_the_site(x):
    if x.shape[-1] == SITE:
        raise RuntimeError("no kernel for this width")
    return torch.tanh(x)


def tanh_by(replace):
    @ligerfx.pattern(replace=replace, benefit=1)
    def tanh(x: "... I"):
        return torch.tanh(x)

    return tanh


class Model(nn.Module):
    """Two equal blocks, then one of another width."""

    class Block(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.norm, self.up, self.down = nn.RMSNorm(16), nn.Linear(16, width), nn.Linear(width, 16)

        def forward(self, x):
            return x + self.down(torch.tanh(self.up(self.norm(x))))

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([self.Block(32), self.Block(32), self.Block(SITE), self.Block(32)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def x():
    return torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(3))


def modules(report, pattern):
    return [r.module for r in report.rewrites if r.pattern == pattern]


def test_rewrites_that_hold_tell_how_far_they_are_from_the_original():
    report = ligerfx.optimize(Model(), x(), verify=True).report
    assert report.idioms == {"rms_norm": 4}
    for rewrite in report.rewrites:
        assert 0 <= rewrite.verified.forward < 1e-6 and 0 <= rewrite.verified.gradient < 1e-5
        assert rewrite.verified.problem == ""
    assert "verified" in str(report) and "gradient" in str(report)
    without = ligerfx.optimize(Model(), x()).report
    assert all(r.verified is None for r in without.rewrites) and "verified" not in str(without)


@pytest.mark.parametrize(
    ("replace", "reason"),
    [
        (wrong_at_the_site, r"verify: output \(float32 \[2, 5, 24\]\) is \S+ at \[\d, \d, \d+\], not \S+: the largest"),
        (wrong_backward_at_the_site, r"verify: gradient of x \(float32 \[2, 5, 24\]\) is .* rounding explains \d\S+$"),
        (raises_at_the_site, r"verify: the replacement fails: RuntimeError: no kernel for this width"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_a_rewrite_that_fails_is_undone_and_reported(replace, reason):
    model, pattern = Model(), tanh_by(replace)
    optimised = ligerfx.optimize(model, x(), patterns=[pattern], verify=True)
    report = optimised.report
    assert modules(report, "tanh") == ["blocks.0", "blocks.1", "blocks.3"]
    (miss,) = [m for m in report.near_misses if m.pattern == "tanh"]
    assert miss.module == "blocks.2" and re.match(reason, miss.reason), miss.reason
    assert report.idioms["rms_norm"] == 4
    torch.testing.assert_close(optimised(x()), model(x()))
    if replace is not raises_at_the_site:
        assert not same_gradients(ligerfx.optimize(model, x(), patterns=[pattern]), model)
    assert same_gradients(optimised, model)


def same_gradients(a, b):
    grads = []
    for module in (a, b):
        grads.append(torch.autograd.grad(module(x()).square().sum(), list(b.parameters())))
    return all(torch.allclose(p, q, rtol=1e-4, atol=1e-5) for p, q in zip(*grads, strict=True))


def test_what_was_refused_leaves_its_place_to_the_next_pattern():
    @ligerfx.pattern(replace=lambda x: x.tanh())
    def second(x: "... I"):
        return torch.tanh(x)

    report = ligerfx.optimize(Model(), x(), patterns=[tanh_by(wrong_at_the_site), second], verify=True).report
    assert modules(report, "second") == ["blocks.2"] and len(modules(report, "tanh")) == 3


def test_later_captures_are_verified_too():
    model = Model.Block(SITE)
    model.norm = nn.Identity()
    optimised = ligerfx.optimize(model.double(), x().double(), patterns=[tanh_by(wrong_at_the_site)], verify=True)
    assert optimised.report.rewrites == []
    optimised.float()
    assert torch.equal(optimised(x()), model.float()(x()))


def test_each_distinct_rewrite_runs_once(monkeypatch):
    calls = []

    def counted(x):
        calls.append(tuple(x.shape))
        return torch.tanh(x)

    pattern = tanh_by(counted)
    ligerfx.check_pattern(pattern)
    calls.clear()
    ligerfx.optimize(Model(), x(), patterns=[pattern], verify=True)
    assert [shape for shape in calls if shape[-1] == SITE] == [(2, 5, SITE)]
    assert [shape for shape in calls if shape[-1] == 32] == [(2, 5, 32)]


def test_the_random_state_is_left_alone_and_the_numbers_are_the_same_each_time():
    model = Model()
    before = torch.random.get_rng_state()
    first = ligerfx.optimize(model, x(), verify=True).report
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(99)
    again = ligerfx.optimize(model, x(), verify=True).report
    assert [r.verified for r in first.rewrites] == [r.verified for r in again.rewrites]


def test_the_parameters_and_their_gradients_are_left_alone():
    model = Model()
    state = copy.deepcopy(model.state_dict())
    ligerfx.optimize(model, x(), verify=True)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_under_no_grad_and_inference_mode():
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            report = ligerfx.optimize(Model(), x(), patterns=[tanh_by(wrong_backward_at_the_site)], verify=True).report
        assert len(modules(report, "tanh")) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_in_16_bits_the_kernels_may_round_less_often(dtype):
    """And what is wrong is told from rounding all the same."""
    model, inputs = Model().to(dtype), x().to(dtype)
    report = ligerfx.optimize(model, inputs, verify=True).report
    assert report.idioms == {"rms_norm": 4}
    wrong = tanh_by(lambda x: torch.tanh(x) * (1.2 if x.shape[-1] == SITE else 1))
    report = ligerfx.optimize(model, inputs, patterns=[wrong], verify=True).report
    assert len(modules(report, "tanh")) == 3


def test_on_the_meta_device_nothing_is_compared():
    with torch.device("meta"):
        report = ligerfx.optimize(Model(), torch.randn(2, 5, 16), verify=True).report
    assert report.idioms == {"rms_norm": 4}
    assert all(r.verified.problem == "not verified: the model is on the meta device" for r in report.rewrites)


class Head(nn.Module):
    """A loss with integer targets, tied inputs, casts, views and a size from outside."""

    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.RMSNorm(16), nn.Linear(16, 50, bias=False)

    def forward(self, x, target):
        x = x + x
        x = self.norm(x * F.silu(x)).transpose(0, 1).contiguous()
        logits = self.head(x).float()
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), target.t().reshape(-1))


def test_integers_and_views():
    target = torch.randint(50, (2, 5), generator=torch.Generator().manual_seed(0))
    report = ligerfx.optimize(Head(), (x(), target), verify=True).report
    assert report.rewrites and not [m for m in report.near_misses if "verify" in m.reason]
    for rewrite in report.rewrites:
        assert rewrite.verified.problem == "" and rewrite.verified.forward < 1e-5, rewrite


# -- limits and bisecting ------------------------------------------------------------------------------------


def test_the_first_rewrites_are_applied_and_no_more():
    model = Model()
    everything = ligerfx.optimize(model, x(), patterns=[tanh_by(lambda x: x.tanh())]).report.rewrites
    assert len(everything) == 8
    for count in (0, 1, 3, 8, 100):
        optimised = ligerfx.optimize(model, x(), patterns=[tanh_by(lambda x: x.tanh())], max_rewrites=count)
        assert [(r.pattern, r.module) for r in optimised.report.rewrites] == [
            (r.pattern, r.module) for r in everything[:count]
        ]
        torch.testing.assert_close(optimised(x()), model(x()))


def test_no_more_where_modules_are_dissolved():
    class Stream(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.proj = nn.RMSNorm(16), nn.Linear(16, 16)

        def forward(self, x):
            return x + self.proj(self.norm(x))

    model = Stream()
    assert len(ligerfx.optimize(model, x()).report.rewrites) == 1
    optimised = ligerfx.optimize(model, x(), max_rewrites=0)
    assert optimised.report.rewrites == []
    code = optimised.code + "".join(getattr(m, "code", "") for m in optimised.modules())
    assert "ligerfx" not in code
    assert torch.equal(optimised(x()), model(x()))


def test_a_call_unlike_the_captured_one_gets_no_rewrites():
    model = Model()
    optimised = ligerfx.optimize(model, x(), max_rewrites=2).double()
    assert torch.equal(optimised(x().double()), model.double()(x().double()))


def test_max_rewrites_is_a_count():
    with pytest.raises(ligerfx.OptimizeError, match="max_rewrites must not be negative, got -1"):
        ligerfx.optimize(Model(), x(), max_rewrites=-1)


def loss(model):
    return model(x()).square().mean()


def gradient(model):
    return torch.autograd.grad(loss(model), model.blocks[0].norm.weight)[0].norm()


@pytest.mark.parametrize(
    ("replace", "check"), [(wrong_at_the_site, loss), (wrong_backward_at_the_site, gradient)], ids=["loss", "gradient"]
)
def test_the_first_rewrite_that_changes_a_number_is_found(replace, check):
    model = Model()
    culprit = ligerfx.bisect(model, check, x(), rtol=1e-5, patterns=[tanh_by(replace)])
    assert (culprit.rewrite.pattern, culprit.rewrite.module) == ("tanh", "blocks.2")
    assert culprit.expected == check(model).item()
    assert abs(culprit.before - culprit.expected) <= 1e-5 * culprit.expected < abs(culprit.found - culprit.expected)
    good = ligerfx.optimize(model, x(), patterns=[tanh_by(replace)], max_rewrites=culprit.number - 1)
    bad = ligerfx.optimize(model, x(), patterns=[tanh_by(replace)], max_rewrites=culprit.number)
    assert check(good).item() == culprit.before and check(bad).item() == culprit.found
    assert str(culprit).startswith(f"tanh in blocks.2, rewrite {culprit.number}: ")
    assert "torch.tanh(self.up(self.norm(x)))" in str(culprit)


def test_nothing_is_found_where_nothing_is_wrong():
    assert ligerfx.bisect(Model(), loss, x(), rtol=1e-5) is None
    assert ligerfx.bisect(Model(), loss, x(), rtol=0.5, patterns=[tanh_by(wrong_at_the_site)]) is None
    assert ligerfx.bisect(nn.Linear(16, 4), lambda m: m(x()).sum(), x()) is None


def test_a_number_that_is_not_one():
    with pytest.raises(ligerfx.OptimizeError, match="check must give one number"):
        ligerfx.bisect(Model(), lambda m: m(x()), x())


def test_a_number_that_becomes_nan():
    broken = tanh_by(lambda x: torch.tanh(x) / (0 if x.shape[-1] == SITE else 1))
    culprit = ligerfx.bisect(Model(), loss, x(), patterns=[broken])
    assert culprit.rewrite.module == "blocks.2" and not culprit.found < float("inf")
