"""The language-model head and its loss: variants that are fused, and what only looks like one."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ligerfx
from ligerfx import DeferredTensor

H, V = 8, 12
FUSED, LOSS_ONLY = "logits_loss", "loss_of_logits"


class LM(nn.Module):
    """An embedding, a head and `loss(logits, labels)`; the logits are returned if `logits` is true."""

    def __init__(self, loss, *, bias=False, tied=False, change=None, logits=True, dtype=torch.float32):
        super().__init__()
        self.embed = nn.Embedding(V, H, dtype=dtype)
        self.mix = nn.Linear(H, H, dtype=dtype)
        self.lm_head = nn.Linear(H, V, bias=bias, dtype=dtype)
        for weight in (self.embed.weight, self.lm_head.weight):
            nn.init.normal_(weight, std=1.0)
        if tied:
            self.lm_head.weight = self.embed.weight
        self.loss, self.change, self.with_logits = loss, change, logits

    def forward(self, ids, labels):
        logits = self.lm_head(torch.tanh(self.mix(self.embed(ids))))
        if self.change is not None:
            logits = self.change(logits)
        loss = self.loss(logits, labels)
        return (loss, logits) if self.with_logits else loss


def call(*shape, ignored=-100):
    ids, labels = torch.randint(V, shape), torch.randint(V, shape)
    labels.view(-1)[::3] = ignored
    return [ids, labels]


def plain(logits, labels, **options):
    return F.cross_entropy(logits.float().view(-1, V), labels.view(-1), **options)


def fused(optimise, module, *, ignored=-100, rtol=1e-6, pattern=FUSED):
    others = [call(1, 5, ignored=ignored), call(4, 3, ignored=ignored)]
    return optimise(module, call(2, 6, ignored=ignored), [pattern], others=others, rtol=rtol)


@pytest.mark.parametrize("logits", [True, False], ids=["logits", "loss alone"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_head(optimise, bias, tied, logits):
    report = fused(optimise, LM(plain, bias=bias, tied=tied, logits=logits))
    assert report.idioms == {"linear_cross_entropy": 1} and not report.near_misses


class LossModule(nn.Module):
    """`loss` of flattened logits: a module of the model, as DistilBERT has one."""

    def __init__(self, **options):
        super().__init__()
        self.loss = nn.CrossEntropyLoss(**options)

    def forward(self, logits, labels):
        return self.loss(logits.view(-1, V), labels.view(-1))


@pytest.mark.parametrize("options", [{}, {"ignore_index": 3, "reduction": "sum", "label_smoothing": 0.1}], ids=str)
def test_loss_that_is_a_module(optimise, options):
    report = fused(optimise, LM(LossModule(**options)), ignored=options.get("ignore_index", -100))
    assert report.idioms == {"linear_cross_entropy": 1} and not report.near_misses


def test_loss_module_that_changes_later(assert_same):
    module = LM(LossModule())
    inputs = call(2, 6)
    optimised = ligerfx.optimize(module, tuple(inputs))
    for change in ({"label_smoothing": 0.1}, {"reduction": "sum"}, {"weight": torch.rand(V)}):
        for model in (module, optimised):
            vars(model.loss.loss).update({k: v for k, v in change.items() if k != "weight"})
            model.loss.loss.weight = change.get("weight")
        assert_same(module, optimised, inputs, rtol=1e-6)


def test_loss_module_with_class_weights(optimise):
    optimise(LM(LossModule(weight=torch.rand(V))), call(2, 6), [])


CHANGES = {
    "softcap": lambda x: torch.tanh(x / 3.0) * 3.0,
    "softcap the other way": lambda x: 3.0 * torch.tanh(x * (1 / 3.0)),
    "softcap in steps": lambda x: (x / 3.0).tanh().mul(3.0),
    "scaled": lambda x: x * 0.5,
    "scaled by division": lambda x: x / 4.0,
    "scaled by a whole number": lambda x: 2 * x,
    "scaled and capped": lambda x: torch.tanh(x * 0.5 / 3.0) * 3.0,
    "float": lambda x: x.float(),
    "contiguous": lambda x: x.contiguous(),
}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("change", CHANGES)
def test_logits_changed(optimise, change, bias):
    fused(optimise, LM(plain, change=CHANGES[change], bias=bias))


LOSSES = {
    "functional": plain,
    "module": lambda x, y: nn.CrossEntropyLoss()(x.view(-1, V), y.view(-1)),
    "reshape": lambda x, y: F.cross_entropy(x.reshape(-1, x.shape[-1]), y.reshape(-1)),
    "flatten": lambda x, y: F.cross_entropy(x.flatten(0, 1), y.flatten()),
    "view by size": lambda x, y: F.cross_entropy(x.view(x.size(0) * x.size(1), -1), y.view(-1)),
    "keywords": lambda x, y: F.cross_entropy(input=x.view(-1, V), target=y.view(-1), reduction="mean"),
    "smoothing": lambda x, y: nn.CrossEntropyLoss(label_smoothing=0.1)(x.view(-1, V), y.view(-1)),
    "sum": lambda x, y: plain(x, y, reduction="sum"),
    "sum over number": lambda x, y: plain(x, y, reduction="sum") / 7,
    "sum over count": lambda x, y: plain(x, y, reduction="sum") / (y != -100).sum(),
    "scaled": lambda x, y: 0.3 * plain(x, y),
    "shifted labels": lambda x, y: plain(x, F.pad(y, (0, 1), value=-100)[..., 1:].contiguous()),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_spelling_of_the_loss(optimise, loss):
    fused(optimise, LM(LOSSES[loss]))


def test_logits_shifted_by_a_slice(optimise):
    """The logits of all but the last token: older models. What is fused, if anything, must be right."""

    def loss(x, y):
        return plain(x[..., :-1, :].contiguous(), y[..., 1:].contiguous())

    optimise(LM(loss), call(2, 6), [LOSS_ONLY], others=[call(4, 3)], rtol=1e-6)


@pytest.mark.parametrize("ignored", [-1, 0, 3])
def test_ignore_index(optimise, ignored):
    fused(optimise, LM(lambda x, y: plain(x, y, ignore_index=ignored)), ignored=ignored)


def test_all_labels_ignored(optimise):
    module = LM(plain, logits=False)
    optimised = ligerfx.optimize(module, tuple(call(2, 6)))
    ids, labels = call(2, 6)
    labels[:] = -100
    assert optimised(ids, labels).isnan() and module(ids, labels).isnan()


def test_two_dimensional(optimise):
    fused_2d = LM(F.cross_entropy)
    optimise(fused_2d, call(6), [FUSED], others=[call(2), call(9)], rtol=1e-6)


def test_bf16(optimise):
    """On the reference path: the products, roundings and the loss in fp32 are those of the original."""
    optimise(LM(plain, dtype=torch.bfloat16), call(2, 6), [FUSED], rtol=2**-7)


def test_bf16_loss_without_a_cast_is_not_rewritten(optimise):
    module = LM(lambda x, y: F.cross_entropy(x.view(-1, V), y.view(-1)), dtype=torch.bfloat16)
    report = optimise(module, call(2, 6), [], rtol=2**-7)
    assert any("torch.float32" in miss.reason or "rounds" in miss.reason for miss in report.near_misses)


def test_logits_that_come_from_elsewhere(optimise):
    """No linear layer in sight: only the loss is fused."""

    class Module(nn.Module):
        def forward(self, logits, labels):
            return plain(logits, labels)

    report = optimise(Module(), [torch.randn(2, 6, V), call(2, 6)[1]], [LOSS_ONLY], rtol=1e-6)
    assert report.idioms == {"cross_entropy": 1}


def test_functional_linear(optimise):
    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(V, H)), nn.Parameter(torch.randn(V))

        def forward(self, x, labels):
            return plain(F.linear(x, self.weight, self.bias), labels), plain(F.linear(x, self.weight), labels)

    optimise(Module(), [torch.randn(2, 6, H), call(2, 6)[1]], [FUSED, FUSED], rtol=1e-6)


def test_logits_are_deferred_until_used():
    module = LM(plain)
    optimised = ligerfx.optimize(module, tuple(call(2, 6)))
    loss, logits = optimised(*call(2, 6))
    assert type(logits) is DeferredTensor and logits._value is None
    assert logits.shape == (2, 6, V) and logits._value is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled on a machine with a GPU")
def test_in_the_interpreter(optimise, monkeypatch):
    monkeypatch.setattr("ligerfx.kernels._runtime.INTERPRET", True)
    module = LM(LOSSES["sum over count"], bias=True, change=CHANGES["scaled and capped"])
    optimise(module, call(2, 6), [FUSED], rtol=1e-5)


# -- what must not match -------------------------------------------------------------------------------------

NEVER_FUSED = {
    "no reduction": lambda x, y: plain(x, y, reduction="none").mean(),
    "class weights": lambda x, y: plain(x, y, weight=torch.linspace(0.5, 2.0, V)),
    "nll of log softmax": lambda x, y: F.nll_loss(x.float().view(-1, V).log_softmax(-1), y.view(-1)),
    "temperature inside": lambda x, y: plain(x.softmax(-1), y),
    "classes in the middle": lambda x, y: F.cross_entropy(x.transpose(1, 2), y),
    "something added": lambda x, y: plain(x + 1e-3 * x.abs(), y),
}  # fmt: skip


@pytest.mark.parametrize("loss", NEVER_FUSED)
def test_another_loss_does_not_absorb_the_head(assert_same, loss):
    module, inputs = LM(NEVER_FUSED[loss]), call(2, 6)
    optimised = ligerfx.optimize(module, tuple(inputs))
    assert FUSED not in [r.pattern for r in optimised.report.rewrites]
    assert_same(module, optimised, inputs, rtol=1e-6)


@pytest.mark.parametrize("loss", ["no reduction", "class weights"])
def test_another_loss_gives_a_reason(loss):
    report = ligerfx.optimize(LM(NEVER_FUSED[loss]), tuple(call(2, 6))).report
    assert not report.rewrites and report.near_misses
    reasons = " ".join(miss.reason for miss in report.near_misses)
    assert {"no reduction": "reduction", "class weights": "cross_entropy"}[loss] in reasons


def soft_targets(x, y):
    return F.cross_entropy(x.view(-1, V), F.one_hot(y.view(-1).clamp(min=0), V).float())


def test_soft_targets_are_not_rewritten(optimise):
    optimise(LM(soft_targets), call(2, 6), [], rtol=1e-6)


USED_ELSEWHERE = {
    "z-loss": lambda x, y: plain(x, y) + 1e-2 * x.float().logsumexp(-1).pow(2).mean(),
    "mean of squares": lambda x, y: plain(x, y) + x.pow(2).mean(),
    "accuracy": lambda x, y: plain(x, y) + (x.argmax(-1) == y).float().mean(),
    "two losses": lambda x, y: plain(x, y) + plain(x, y.flip(0), label_smoothing=0.1),
    "the same loss twice": lambda x, y: plain(x, y) + plain(x, y),
    "entropy": lambda x, y: plain(x, y) - (x.softmax(-1) * x.log_softmax(-1)).sum(-1).mean(),
}


@pytest.mark.parametrize("logits", [True, False], ids=["logits", "loss alone"])
@pytest.mark.parametrize("loss", USED_ELSEWHERE)
def test_logits_used_elsewhere(assert_same, loss, logits):
    """Whatever is chosen, loss, logits and gradients are those of the original."""
    module, inputs = LM(USED_ELSEWHERE[loss], logits=logits), call(2, 6)
    assert_same(module, ligerfx.optimize(module, tuple(inputs)), inputs, rtol=2e-6)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_head_with_a_hook_is_not_absorbed(register):
    module, inputs, fired = LM(plain), call(2, 6), []
    getattr(module.lm_head, register)(lambda *args: fired.append(1))
    optimised = ligerfx.optimize(module, tuple(inputs))
    assert FUSED not in [r.pattern for r in optimised.report.rewrites] and not fired
    torch.testing.assert_close(optimised(*inputs)[0], module(*inputs)[0])
    assert len(fired) == 2  # one of each model


def test_hook_that_changes_the_logits(assert_same):
    module, inputs = LM(plain), call(2, 6)
    module.lm_head.register_forward_hook(lambda m, args, out: out * 2)
    assert_same(module, ligerfx.optimize(module, tuple(inputs)), inputs, rtol=1e-6)


class ScaledLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 1.5


def test_subclass_of_linear_is_not_absorbed(assert_same):
    module, inputs = LM(plain), call(2, 6)
    head = ScaledLinear(H, V, bias=False)
    head.weight = module.lm_head.weight
    module.lm_head = head
    optimised = ligerfx.optimize(module, tuple(inputs))
    assert FUSED not in [r.pattern for r in optimised.report.rewrites]
    assert_same(module, optimised, inputs, rtol=1e-6)


def test_parametrized_head_is_not_absorbed(assert_same):
    module, inputs = LM(plain), call(2, 6)
    nn.utils.parametrizations.weight_norm(module.lm_head)
    optimised = ligerfx.optimize(module, tuple(inputs))
    assert FUSED not in [r.pattern for r in optimised.report.rewrites]
    assert_same(module, optimised, inputs, rtol=1e-6)


def test_hook_registered_after_optimize_fires(assert_same):
    module, inputs = LM(plain), call(2, 6)
    optimised = ligerfx.optimize(module, tuple(inputs))
    assert optimised.report.idioms == {"linear_cross_entropy": 1}
    for head in (module.lm_head, optimised.lm_head):
        head.register_forward_hook(lambda m, args, out: out * 2)
    assert_same(module, optimised, inputs, rtol=1e-6)


def test_fused_again_when_a_hook_is_gone(assert_same):
    module, inputs = LM(plain), call(2, 6)
    optimised = ligerfx.optimize(module, tuple(inputs))

    def defers():
        return type(optimised(*inputs)[1]) is DeferredTensor

    assert defers() and defers()  # by its signature, and by the short way for calls like the last one
    for _ in range(2):
        hook = optimised.lm_head.register_forward_hook(lambda m, args, out: None)
        assert not defers() and not defers()
        hook.remove()
        assert defers() and defers()
    assert_same(module, optimised, inputs, rtol=1e-6)


def test_labels_flattened_before_a_cast(optimise):
    def loss(logits, labels):
        return F.cross_entropy(logits.float().view(-1, V), labels.view(-1).to(torch.int64))

    inputs = [torch.randint(V, (2, 6)), torch.randint(V, (2, 6), dtype=torch.int32)]
    (miss,) = optimise(LM(loss), inputs, []).near_misses
    assert miss.reason.startswith("target: expected shape [s") and "found [" in miss.reason
