"""`explain`: why a module was rewritten or not, and what to write."""

import pytest
import torch
from idioms import ALMOST_INPUT, BranchesOnValues, EpsOutsideTheRoot, GateIsUsedTwice, MeanOverAnotherDim, Norm, almost
from torch import nn

import ligerfx
from ligerfx.advice import advice
from ligerfx.errors import LigerfxError
from ligerfx.report import Miss
from models import make


@pytest.fixture(scope="module")
def llama():
    return ligerfx.optimize(make("llama", device="meta"))


def test_a_rewritten_module_that_was_dissolved(llama):
    found = ligerfx.explain(llama, "model.layers.0.mlp")
    assert [r.pattern for r in found.rewrites] == ["add_rms_norm_rounded_first_silu_glu_mlp"]
    assert not found.missed and not found.closest and found.opaque is None
    text = str(found)
    assert text.startswith("model.layers.0.mlp: LlamaMLP")
    assert "Its operations stand in the code of model.layers.0" in text
    assert "down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))" in text


def test_a_layer_of_torch_that_a_call_reads(llama):
    [found] = ligerfx.explain(llama, "model.layers.1.mlp.down_proj").rewrites
    assert found.pattern == "add_rms_norm_rounded_first_silu_glu_mlp" and found.module == "model.layers.1"
    assert [r.pattern for r in ligerfx.explain(llama, "lm_head").rewrites] == ["logits_loss"]
    assert not ligerfx.explain(llama, "model.layers.1.self_attn.o_proj").rewrites


def test_equal_layers_are_told_once(llama):
    found = ligerfx.explain(llama, "model.layers")
    assert len(found.rewrites) == 6
    assert [(r.pattern, where) for r, where in found.groups()][0] == ("rotary", "model.layers.* x2")
    assert "rewritten: rotary, in the code of model.layers.* x2\n" in str(found)


@pytest.mark.parametrize(
    "module, note",
    [
        ("model.rotary_emb", "No pattern "),
        ("model.embed_tokens", "A layer of torch, which stays one call"),
        ("model.layers.0.mlp.act_fn", "It owns no parameters, so it has no code of its own"),
    ],
)
def test_modules_without_a_rewrite(llama, module, note):
    found = ligerfx.explain(llama, module)
    assert not found.rewrites and not found.missed
    assert any(n.startswith(note) for n in found.notes)


def lines(found):
    return [(line.found, line.text) for line in found.missed[0].lines]


def test_the_first_line_that_differs_is_marked():
    """What follows from it is neither found nor wrong."""
    eps = ligerfx.explain(EpsOutsideTheRoot(), example_inputs=ALMOST_INPUT)
    assert lines(eps) == [
        (True, "pow_1 = x.pow(2)"),
        (True, "mean = pow_1.mean(-1, keepdim = True)"),
        (False, "add = mean + eps"),
        (None, "rsqrt = torch.rsqrt(add)"),
        (None, "mul = x * rsqrt"),
        (None, "mul_1 = weight * mul"),
    ]
    dim = ligerfx.explain(MeanOverAnotherDim(), example_inputs=ALMOST_INPUT)
    assert lines(dim)[1] == (False, "mean = pow_1.mean(-1, keepdim = True)")
    assert lines(dim)[0][0] is True


def test_a_match_that_is_obstructed_has_all_lines():
    found = ligerfx.explain(GateIsUsedTwice(), example_inputs=ALMOST_INPUT)
    assert [there for there, _ in lines(found)] == [True, True]
    assert found.missed[0].advice.startswith("Compute `silu` again for idioms.py:")


def test_a_near_miss_beside_a_rewrite():
    """The layer is found in the pattern's lines, though the graph no longer reads its weight."""

    class Beside(GateIsUsedTwice):
        def __init__(self):
            super().__init__()
            self.down = nn.Linear(64, 64)

        def forward(self, x):
            eps = 1e-6
            normed = self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))
            return super().forward(torch.exp(self.down(normed)))

    gm = ligerfx.optimize(Beside(), (ALMOST_INPUT,))
    found = ligerfx.explain(gm, "")
    assert [r.pattern for r in found.rewrites] == ["rms_norm_rounded_first"]
    assert [(m.miss.pattern, [line.found for line in m.lines]) for m in found.missed] == [("silu_glu", [True, True])]


def by_hand(x):
    return torch.tanh(1 + torch.exp(-x)) * x


def test_a_users_pattern_is_shown_as_its_own_lines():
    @ligerfx.pattern(replace=by_hand)
    def own(x):
        size = 1 + torch.exp(-x)
        return x * torch.tanh(size)

    class Other(Norm):
        def forward(self, x):
            x = x * self.weight
            return x * torch.tanh(2 + torch.exp(-x))

    gm = ligerfx.optimize(nn.Sequential(Other(), nn.Linear(64, 64)), (ALMOST_INPUT,), patterns=[own])
    [missed] = ligerfx.explain(gm, "0").missed
    assert [(line.found, line.text) for line in missed.lines] == [
        (False, "size = 1 + torch.exp(-x)"),
        (None, "return x * torch.tanh(size)"),
    ]


def test_the_closest_pattern_where_nothing_nearly_matched():
    class HalfNorm(Norm):
        """The statistics of a norm, and then something else."""

        def forward(self, x):
            return torch.cumsum(torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6), 0) + self.weight

    found = ligerfx.explain(HalfNorm(), example_inputs=ALMOST_INPUT)
    assert not found.rewrites and not found.missed
    pattern, told = found.closest[0]
    assert pattern.idioms == ("rms_norm",)
    assert [line.text for line in told if line.found][-1] == "rsqrt = torch.rsqrt(add)"
    assert [line.text for line in told if line.found is False] == ["mul = x * rsqrt"]
    assert "No pattern matches here or nearly does." in str(found)


def test_what_could_not_be_captured():
    with pytest.warns(UserWarning, match="nothing in Sequential was rewritten"):
        gm = ligerfx.optimize(nn.Sequential(BranchesOnValues()), (ALMOST_INPUT,))
    found = ligerfx.explain(gm, "0")
    assert "branches on the values of a tensor" in found.opaque
    assert "torch.where" in str(found)


def test_the_whole_model(llama):
    assert len(ligerfx.explain(llama).rewrites) == len(llama.report.rewrites)
    found = ligerfx.explain(ligerfx.optimize(almost(), (ALMOST_INPUT,)))
    assert [m.miss.module for m in found.missed] == ["0", "1", "2"]
    text = str(found)
    assert text.count("why not:") == text.count("what to write:") == 3
    assert max(map(len, text.splitlines())) <= 120


def test_html_holds_what_the_text_does():
    found = ligerfx.explain(almost(), "1", example_inputs=ALMOST_INPUT)
    html = found._repr_html_()
    assert "expected  mean: (-1)" in html and "found     mean: (-2)" in html
    assert '<div class="minus">' in html and "<script" not in html


def test_a_plain_model_is_not_changed():
    model = almost()
    before = {name: (type(m), set(vars(m))) for name, m in model.named_modules()}
    ligerfx.explain(model, "0", example_inputs=ALMOST_INPUT)
    assert {name: (type(m), set(vars(m))) for name, m in model.named_modules()} == before


def test_errors_say_what_to_do(llama):
    with pytest.raises(LigerfxError, match=r"no module 'model\.layer\.0\.mlp', did you mean 'model\.layers\.0\.mlp'\?"):
        ligerfx.explain(llama, "model.layer.0.mlp")
    with pytest.raises(LigerfxError, match="pass the whole, and the path"):
        ligerfx.explain(llama.model.layers[0], "mlp")
    with pytest.raises(ligerfx.OptimizeError, match="pass example_inputs"):
        ligerfx.explain(almost(), "0")


@pytest.mark.parametrize(
    "reason, written",
    [
        ("`silu` has a second user, `mean` at m.py:8", "Compute `silu` again for m.py:8"),
        ("`silu` has a second user, `output`", "Compute `silu` again for `output`"),
        ("its input `x` is changed in place at m.py:3", "Write m.py:3 without working in place"),
        ("`mul_` works in place at m.py:5, before the result is used", "Write m.py:5 without working in place"),
        ("eps: expected a constant, found none in x", "Make `eps` a Python number"),
        ("weight: expected shape [H], found [4, 64]", "Give `weight` the shape that the pattern's annotation asks for"),
        ("expected a result in torch.bfloat16, found torch.float32", "give bfloat16 instead of float32"),
        ("its input `x` has no later use", "Nothing needs to be done"),
        ("expected up as well", "the pattern has up as well"),
        ("found 2*x besides", "Apply 2*x before or after"),
        ("mean: expected (-1), found (-2)", "Where m.py:1 has mean: (-2), the pattern has mean: (-1)"),
        ("rounds at another place or differs in an attribute: expected a, found b", "Cast to another dtype where p"),
        ("cap 200.0 is above 100", "Write m.py:1 as p has it"),
    ],
)
def test_advice_for_each_kind_of_reason(reason, written):
    assert written in advice(Miss("p", "", ("i",), "m.py:1", reason))


def test_a_near_miss_beside_a_layer_that_is_called():
    """The graph that runs does not hold the parameters of such a layer."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.down = nn.Linear(64, 64, bias=False), nn.Linear(64, 64)

        def forward(self, x):
            g = self.gate(x)
            return self.down(g * torch.sigmoid(1.702 * g) * x)

    gm = ligerfx.optimize(nn.Sequential(EpsOutsideTheRoot(), Block()), (ALMOST_INPUT,))
    (missed,) = ligerfx.explain(gm, "1").missed
    assert missed.miss.reason.startswith("expected gate = 1.702*linear(x, gate_weight), found ")
    assert [line.found for line in missed.lines][0] is False
    assert "1.702" in gm.report.to_html()
