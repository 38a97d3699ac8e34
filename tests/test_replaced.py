"""Methods, classes' forwards and functions that others take the place of, before `optimize` or after it.

Each is replaced under the original as well, and the optimised module must give its numbers, as it did before.
"""

import copy
import types

import pytest
import torch
import torch.nn.functional as F
from idioms import RMSNorm
from torch import nn
from transformers.activations import SiLUActivation
from transformers.loss import loss_utils
from transformers.models.llama import modeling_llama as llama

import ligerfx
from models import batch, make

pytestmark = pytest.mark.usefixtures("references")

H = 8

LIKE_LINEAR = lambda self, x: F.linear(x, self.weight * 1.2, self.bias)  # noqa: E731
REPLACED = {
    "norm": (llama.LlamaRMSNorm, "forward", lambda old: lambda self, x: old(self, x) * 1.5),
    "mlp": (llama.LlamaMLP, "forward", lambda old: lambda self, x: old(self, x) * 1.5),
    "attention": (
        llama.LlamaAttention,
        "forward",
        lambda old: lambda self, *args, **kwargs: (old(self, *args, **kwargs)[0] * 1.5, None),
    ),
    "activation": (SiLUActivation, "forward", lambda old: lambda self, x: F.relu(x)),
    "linear": (nn.Linear, "forward", lambda old: LIKE_LINEAR),
    "rotary": (llama, "rotate_half", lambda old: lambda x: old(x) * 0.5),
    "fixed_cross_entropy": (loss_utils, "fixed_cross_entropy", lambda old: lambda *args, **kw: old(*args, **kw) * 2),
    "F.silu": (F, "silu", lambda old: lambda x, inplace=False: old(x) * 1.5),
    "F.cross_entropy": (F, "cross_entropy", lambda old: lambda *args, **kwargs: old(*args, **kwargs) * 2),
    "F.linear": (F, "linear", lambda old: lambda x, weight, bias=None: old(x, weight * 1.2, bias)),
    "F.scaled_dot_product_attention": (
        F,
        "scaled_dot_product_attention",
        lambda old: lambda *args, **kwargs: old(*args, **kwargs) * 1.5,
    ),
}


def step(model, inputs):
    out = model(**inputs)
    out.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return out.loss.detach(), out.logits.detach() + 0, gradients


def assert_same_step(optimised, model, inputs):
    expected = step(model, inputs)
    for _ in range(3):  # by the general way, and by the short one
        torch.testing.assert_close(step(optimised, inputs), expected, rtol=1e-4, atol=1e-5)
    return expected[0].item()


@pytest.mark.parametrize("what", REPLACED)
def test_replaced_after_optimize_and_put_back(monkeypatch, what):
    model = make("llama", num_hidden_layers=2)
    inputs = batch(model)
    gm = ligerfx.optimize(copy.deepcopy(model), inputs)
    before = assert_same_step(gm, model, inputs)
    owner, name, new = REPLACED[what]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, new(getattr(owner, name)))
        assert assert_same_step(gm, model, inputs) != before, "it has no effect"
    programs = [len(m._ligerfx_programs) for m in gm.modules() if isinstance(m, ligerfx.OptimizedModule)]
    assert assert_same_step(gm, model, inputs) == before
    assert programs == [len(m._ligerfx_programs) for m in gm.modules() if isinstance(m, ligerfx.OptimizedModule)]
    assert gm.report.idioms["linear_cross_entropy"] == 1


@pytest.mark.parametrize("what", REPLACED)
def test_replaced_before_optimize(monkeypatch, what):
    model = make("llama", num_hidden_layers=2)
    inputs = batch(model)
    owner, name, new = REPLACED[what]
    monkeypatch.setattr(owner, name, new(getattr(owner, name)))
    assert_same_step(ligerfx.optimize(copy.deepcopy(model), inputs), model, inputs)


# -- methods of modules of one's own ---------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = RMSNorm(H), nn.Linear(H, H)

    def combine(self, x):
        return x * 2

    @property
    def scale(self):
        return 3.0

    def forward(self, x):
        return self.combine(self.linear(self.norm(x))) * self.scale


class Child(Block):
    pass


class Outer(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return x + self.inner(x)


def assert_same(optimised, model):
    x = torch.randn(2, 3, H)
    for _ in range(3):
        torch.testing.assert_close(optimised(x), model(x), rtol=1e-5, atol=1e-6)


def five(self, x):
    return x * 5


@pytest.mark.parametrize("path", ["", "inner"])
@pytest.mark.parametrize("cls", [Block, Child])
@pytest.mark.parametrize(
    "change",
    [
        lambda patch, module: patch.setattr(Block, "combine", five),
        lambda patch, module: patch.setattr(Block, "scale", property(lambda self: 4.0)),
        lambda patch, module: patch.setattr(Block, "forward", five),
        lambda patch, module: patch.setattr(RMSNorm, "forward", five),
        lambda patch, module: patch.setattr(type(module), "combine", five, raising=False),
        lambda patch, module: patch.setattr(type(module), "forward", five, raising=False),
        lambda patch, module: None,  # on the module itself
    ],
    ids=["method", "property", "forward", "norm", "method of a subclass", "forward of a subclass", "own"],
)
def test_methods_of_a_module(monkeypatch, path, cls, change):
    model = Outer(cls()) if path else cls()
    gm = ligerfx.optimize(model, (torch.randn(2, 3, H),))
    assert gm.report.idioms == {"rms_norm": 1}
    assert_same(gm, model)
    before = model(torch.ones(1, 2, H))
    change(monkeypatch, model.get_submodule(path))
    if change.__code__.co_names == ():
        for m in (model, gm):
            module = m.get_submodule(path)
            module.combine = types.MethodType(five, module)
    assert not torch.equal(model(torch.ones(1, 2, H)), before), "it has no effect"
    assert_same(gm, model)


def test_a_class_whose_forward_was_replaced_is_compiled_anew(monkeypatch):
    model = Outer(Block())
    gm = ligerfx.optimize(model, (torch.randn(2, 3, H),))
    compiled = torch.compile(gm, backend="eager", fullgraph=True)
    assert_same(compiled, model)
    with monkeypatch.context() as patch:
        patch.setattr(Block, "combine", five)
        assert_same(compiled, model)
    assert_same(compiled, model)


# -- objects inside a configuration ----------------------------------------------------------------------------


class Settings:
    def __init__(self, **settings):
        self.__dict__.update(settings)


class Configured(Block):
    def __init__(self):
        super().__init__()
        self.config = Settings(text=Settings(factor=2.0, unused=1), other=Settings(count=0))

    def forward(self, x):
        return self.norm(x) * self.config.text.factor + getattr(self.config, "shift", 0.0)


@pytest.mark.parametrize("compiled", [False, True])
def test_an_object_inside_a_configuration(compiled):
    model = Configured()
    gm = ligerfx.optimize(copy.deepcopy(model), (torch.randn(2, 3, H),))
    run = torch.compile(gm, backend="eager", fullgraph=True) if compiled else gm
    twin = copy.deepcopy(gm)
    assert_same(run, model)
    for m in (model, gm):
        m.config.text.factor = 5.0
    assert_same(run, model)
    for m in (model, gm):
        m.config.text = Settings(factor=7.0)
    assert_same(run, model)
    assert len(gm._ligerfx_programs) == 3
    for m in (model, gm):
        m.config.shift = 1.0  # which was missing
    if not compiled:
        assert_same(run, model)
    model.config = Settings(text=Settings(factor=2.0))
    assert_same(twin, model)  # which has a configuration of its own


def test_an_object_inside_a_configuration_that_no_code_speaks_of():
    gm = ligerfx.optimize(model := Configured(), (torch.randn(2, 3, H),))
    model.config.other.count += 1  # they share it
    assert_same(gm, model)
    assert len(gm._ligerfx_programs) == 1


# -- side effects ----------------------------------------------------------------------------------------------

SEEN, COUNTS = [], {"calls": 0}


class NotesInAList(Block):
    def forward(self, x):
        SEEN.append(tuple(x.shape))
        return super().forward(x)


class NotesInADict(Block):
    def forward(self, x):
        COUNTS["calls"] += 1
        return super().forward(x)


def test_a_forward_that_changes_a_list_or_dict_outside_of_the_model_stays_as_it_is():
    gm = ligerfx.optimize(NotesInAList(), (torch.randn(2, 3, H),))
    assert gm.report.opaque == {"": "forward changes what 'SEEN' holds, outside of the model"}
    del SEEN[:]
    gm(torch.randn(2, 3, H)), gm(torch.randn(1, 4, H))
    assert SEEN == [(2, 3, H), (1, 4, H)]
    gm = ligerfx.optimize(Outer(NotesInADict()), (torch.randn(2, 3, H),))
    assert gm.report.opaque == {"inner": "forward changes what 'COUNTS' holds, outside of the model"}
    before = COUNTS["calls"]
    gm(torch.randn(2, 3, H)), gm(torch.randn(1, 4, H))
    assert COUNTS["calls"] == before + 2
    del SEEN[:]


def test_what_forward_changes_in_a_closure_holds_no_fakes():
    def keeper():
        kept = {}

        class Keeps(Block):
            def forward(self, x):
                if "first" not in kept:
                    kept["first"] = x * 2
                return super().forward(x) + kept["first"]

        return Keeps(), kept

    model, kept = keeper()
    gm = ligerfx.optimize(model, (torch.randn(2, 3, H),))
    assert "'kept'" in gm.report.opaque[""]
    assert not any(isinstance(value, torch._subclasses.FakeTensor) for value in kept.values())
    x = torch.randn(2, 3, H)
    torch.testing.assert_close(gm(x), model(x))


def test_a_forward_that_prints_stays_as_it_is(capsys):
    class Prints(Block):
        def forward(self, x):
            print("rows:", x.shape[0])
            return super().forward(x)

    gm = ligerfx.optimize(Outer(Prints()), (torch.randn(2, 3, H),))
    assert gm.report.opaque == {"inner": "forward prints"} and gm.report.idioms == {"rms_norm": 1}
    assert capsys.readouterr().out == "", "of fakes"
    gm(torch.randn(2, 3, H)), gm(torch.randn(1, 4, H))
    assert capsys.readouterr().out == "rows: 2\nrows: 1\n"
