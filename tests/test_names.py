"""Global names that a forward reads, and modules and parameters with several names: changed after `optimize`.

Each is changed under the original as well, and the optimised module must give its numbers, as it did before.
"""

import threading
import types

import pytest
import torch
from idioms import RMSNorm
from torch import nn

import ligerfx
from ligerfx import OptimizedModule
from ligerfx.names import hold
from models import batch, make

pytestmark = pytest.mark.usefixtures("references")

H = 8
SCALE = 2.0
DOUBLE = True
FACTORS = {"half": 0.5, "third": [3.0]}
NESTED, TABLES = {"a": {"b": {"c": 3.0}}}, [{"a": 3.0}]
SETTINGS = types.SimpleNamespace(inner=types.SimpleNamespace(scale=1.5))
FUNCTIONS = {"twice": lambda x: x * 2 * SCALE}


class Constants:
    shift = 0.25


def scaled(x):
    return x * factor()


def factor():
    return SCALE


def with_bias(bias):
    def add(x):
        return x + bias

    def change(value):
        nonlocal bias
        bias = value

    return add, change


add_bias, change_bias = with_bias(0.5)


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = RMSNorm(H), nn.Linear(H, H)

    def forward(self, x):
        return self.combine(self.norm(x))


def reads(combine):
    """A module that does this with the norm of its input."""
    return type("Reads", (Base,), {"combine": combine})()


def assert_same(optimised, model, x=None):
    x = torch.randn(2, 3, H) if x is None else x
    for _ in range(3):  # by the general way, and by the short one
        torch.testing.assert_close(optimised(x), model(x), rtol=1e-5, atol=1e-6)


def optimised_and_used(model):
    gm = ligerfx.optimize(model, (torch.randn(2, 3, H),))
    assert gm.report.idioms == {"rms_norm": 1} and not gm.report.opaque
    assert_same(gm, model)
    return gm


def setting(name, value):
    return lambda monkeypatch: monkeypatch.setitem(globals(), name, value)


@pytest.mark.parametrize(
    "combine, change",
    [
        (lambda self, x: x * SCALE, setting("SCALE", 5.0)),
        (lambda self, x: scaled(x), setting("SCALE", 5.0)),
        (lambda self, x: scaled(x), setting("factor", lambda: 7.0)),
        (lambda self, x: scaled(x), setting("scaled", lambda x: x - 1)),
        (lambda self, x: x * 2 if DOUBLE else x, setting("DOUBLE", False)),
        (lambda self, x: x * FACTORS["half"], lambda m: m.setitem(FACTORS, "half", 4.0)),
        (lambda self, x: FUNCTIONS["twice"](x), setting("SCALE", 5.0)),
        (lambda self, x: FUNCTIONS["twice"](x), lambda m: m.setitem(FUNCTIONS, "twice", lambda x: x)),
        (lambda self, x: x * NESTED["a"]["b"]["c"], lambda m: m.setitem(NESTED["a"]["b"], "c", 4.0)),
        (lambda self, x: x * TABLES[0]["a"], lambda m: m.setitem(TABLES[0], "a", 4.0)),
        (lambda self, x: x * SETTINGS.inner.scale, lambda m: m.setattr(SETTINGS.inner, "scale", 4.0)),
        (lambda self, x: x + Constants.shift, lambda m: m.setattr(Constants, "shift", 4.0)),
        (lambda self, x: x + getattr(Constants, "shift"), lambda m: m.setattr(Constants, "shift", 4.0)),  # noqa: B009
        (lambda self, x: add_bias(x), lambda m: change_bias(4.0)),
    ],
)
def test_a_global_name_changed_after_optimize(monkeypatch, combine, change):
    model = reads(combine)
    gm = optimised_and_used(model)
    x = torch.randn(2, 3, H)
    before = model(x)
    change(monkeypatch)
    assert not torch.equal(model(x), before), "the change has no effect"
    assert_same(gm, model, x)
    assert gm.report.idioms == {"rms_norm": 1}
    programs = gm._ligerfx_programs.values()
    assert len(programs) == 2 and not any(p.capture.error for p in programs), "it was captured anew"


def test_equal_numbers_and_names_that_forward_does_not_read_change_nothing(monkeypatch):
    gm = optimised_and_used(model := reads(lambda self, x: x * SCALE))
    monkeypatch.setitem(globals(), "SCALE", float("2"))
    monkeypatch.setitem(globals(), "DOUBLE", False)
    monkeypatch.setattr(Constants, "shift", 9.0)
    assert_same(gm, model)
    assert len(gm._ligerfx_programs) == 1


def test_a_forward_that_sets_a_global_name_stays_as_it_is():
    def forward(self, x):
        global SCALE
        SCALE += 1.0
        return self.norm(x) * SCALE

    global SCALE
    before = SCALE
    try:
        gm = ligerfx.optimize(model := type("Counts", (Base,), {"forward": forward})(), (torch.randn(2, 3, H),))
        assert "forward sets a global variable" in gm.report.opaque[""]
        x = torch.randn(2, 3, H)
        first, second = gm(x), gm(x)
        SCALE -= 2.0
        torch.testing.assert_close((first, second), (model(x), model(x)))
        assert not torch.equal(first, second)
    finally:
        SCALE = before


def test_a_method_and_a_property_read_global_names(monkeypatch):
    class Reads(Base):
        @property
        def scale(self):
            return SCALE

        def shifted(self, x):
            return x + Constants.shift

        def combine(self, x):
            return self.shifted(x) * self.scale

    gm = optimised_and_used(model := Reads())
    monkeypatch.setattr(Constants, "shift", 3.0)
    assert_same(gm, model)
    monkeypatch.setitem(globals(), "SCALE", 3.0)
    assert_same(gm, model)


def test_the_names_of_a_module_that_was_dissolved_into_its_caller(monkeypatch):
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up, self.down = (nn.Linear(H, H) for _ in range(3))

        def forward(self, x):
            return self.down(nn.functional.silu(self.gate(x)) * self.up(x)) * SCALE

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.mlp = RMSNorm(H), Gated()

        def forward(self, x):
            return x + self.mlp(self.norm(x))

    model = Block()
    gm = ligerfx.optimize(model, (torch.randn(2, 3, H),))
    assert "mlp" in gm._ligerfx_program.dissolved
    assert_same(gm, model)
    monkeypatch.setitem(globals(), "SCALE", 6.0)
    assert_same(gm, model)


def test_a_name_that_another_thread_has_wrapped_for_its_capture_holds():
    """Meanwhile a name of the model's file leads to a function that records the call."""
    model = make("llama", num_hidden_layers=1)
    inputs = batch(model)
    gm = ligerfx.optimize(model, inputs)
    gm(**inputs)
    attention = gm.model.layers[0]
    before = len(attention._ligerfx_programs)
    inside, done = threading.Event(), threading.Event()

    class Waits(nn.Module):
        def forward(self, x):
            inside.set()
            done.wait(20)
            return x * 2

    waits = type("Waits", (Waits,), {"__module__": type(model).__module__})()  # of the same file
    thread = threading.Thread(target=ligerfx.optimize, args=(waits, (torch.ones(2),)))
    thread.start()
    assert inside.wait(20)
    try:
        torch.testing.assert_close(gm(**inputs).loss, model(**inputs).loss)
    finally:
        done.set()
        thread.join()
    assert len(attention._ligerfx_programs) == before


def test_an_attention_function_registered_anew_under_its_name():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def values(factor):
        def attention(module, q, k, v, mask, **others):
            return (v.repeat_interleave(q.shape[1] // v.shape[1], 1) * factor).transpose(1, 2), None

        return attention

    ALL_ATTENTION_FUNCTIONS.register("of_these_tests", values(1.0))
    try:
        model = make("llama", num_hidden_layers=1, attn_implementation="of_these_tests")
        inputs = {name: batch(model)[name] for name in ("input_ids", "labels")}
        gm = ligerfx.optimize(model, inputs)
        losses = []
        for register in (
            lambda: None,
            lambda: ALL_ATTENTION_FUNCTIONS.register("of_these_tests", values(2.0)),
            lambda: ALL_ATTENTION_FUNCTIONS.__setitem__("of_these_tests", values(3.0)),  # for this registry alone
        ):
            register()
            for _ in range(3):
                expected = model(**inputs).loss
                torch.testing.assert_close(gm(**inputs).loss, expected, rtol=1e-6, atol=0)
            losses.append(expected.item())
        assert len(set(losses)) == 3
        assert all(p.matches for p in gm.model.layers[0]._ligerfx_programs.values())
    finally:
        ALL_ATTENTION_FUNCTIONS._local_mapping.pop("of_these_tests", None)
        ALL_ATTENTION_FUNCTIONS._global_mapping.pop("of_these_tests", None)


def test_what_was_compiled_with_a_global_name_is_compiled_anew(monkeypatch):
    gm = optimised_and_used(model := reads(lambda self, x: x * SCALE))
    compiled = torch.compile(gm, backend="eager", fullgraph=True)
    x = torch.randn(2, 3, H)
    torch.testing.assert_close(compiled(x), model(x))
    monkeypatch.setitem(globals(), "SCALE", 5.0)
    torch.testing.assert_close(compiled(x), model(x))


def test_names_are_looked_up_again_where_the_short_way_is_compiled_by_itself(monkeypatch):
    """That of a forward on which the compiler has given up, which then compiles what it calls."""
    gm = optimised_and_used(reads(lambda self, x: x * SCALE))
    names = tuple(gm._ligerfx_program.capture.names.values())
    torch.compiler.reset()
    compiled = torch.compile(lambda x: x if hold(names) else -x, backend="eager", fullgraph=True)
    x = torch.ones(2)
    for scale, sign in ((SCALE, 1), (5.0, -1), (7.0, -1), (SCALE, 1)):
        monkeypatch.setitem(globals(), "SCALE", scale)
        assert compiled(x).tolist() == [sign, sign]


# -- modules and parameters with several names ----------------------------------------------------------------


class TwoNames(nn.Module):
    """`hidden` is `linear` by an attribute that nn.Module does not know of; `w` is the weight of the norm."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear = RMSNorm(H), nn.Linear(H, H)
        object.__setattr__(self, "hidden", self.linear)
        self.w = self.norm.weight

    def forward(self, x):
        return self.hidden(self.norm(x)) * self.norm.weight


def change_hidden(model, new):
    object.__setattr__(model, "hidden", new)


@pytest.mark.parametrize(
    "new, change",
    [
        (lambda: nn.Linear(H, H), change_hidden),
        (lambda: nn.Linear(H, H), lambda model, new: setattr(model, "linear", new)),
        (lambda: nn.Parameter(torch.randn(H)), lambda model, new: setattr(model, "w", new)),
        (lambda: nn.Parameter(torch.randn(H)), lambda model, new: setattr(model.norm, "weight", new)),
    ],
)
def test_replaced_under_one_of_two_names(new, change):
    model = TwoNames()
    gm = ligerfx.optimize(model, (torch.randn(2, 3, H),))
    assert_same(gm, model)
    assert gm.report.idioms == {"rms_norm": 1} and isinstance(gm, OptimizedModule)
    new = new()
    for m in (gm, model):
        change(m, new)
    assert_same(gm, model)


def test_an_attribute_that_is_a_module_further_out():
    class Inner(nn.Module):
        def forward(self, x):
            return x * self.outer.scale

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.inner, self.scale = RMSNorm(H), Inner(), 2.0
            self.inner.weight = nn.Parameter(torch.ones(H))
            object.__setattr__(self.inner, "outer", self)

        def forward(self, x):
            return self.inner(self.norm(x))

    model = Outer()
    gm = ligerfx.optimize(model, (torch.randn(2, 3, H),))
    assert "outside of 'inner'" in gm.report.opaque["inner"]
    assert_same(gm, model)
    for m in (gm, model):
        m.scale = 3.0
    assert_same(gm, model)
