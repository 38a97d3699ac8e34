"""The module that comes back: dispatch, guards, copies, and that it is the model's own class."""

import copy
import functools
import gc
import inspect
import io
import pickle
import weakref
from types import SimpleNamespace

import pytest
import torch
from idioms import RMSNorm
from torch import nn

import ligerfx
from ligerfx import OptimizedModule
from ligerfx.tracer import Tracer
from models import batch, make

H = 8


pytestmark = pytest.mark.usefixtures("references")


class Norm(RMSNorm):
    def __init__(self):
        super().__init__(H)
        self.scales = [1.0, 2.0]

    def forward(self, x, power: int = 1, *, twice=False):
        x = super().forward(x) * self.scales[1]
        return x * 2 if twice else x


CAPTURED = {}


@pytest.fixture(scope="module")
def llama():
    """A model that is captured once: see `optimized`."""
    model = make("llama")
    CAPTURED[model] = ligerfx.optimize(model, batch(model))
    yield model
    del CAPTURED[model]


def optimized(model):
    """Captured with the call that the tests make, so that they need no second capture. Of `llama` a copy, with
    `llama`'s own parameters, as `optimize` gives."""
    if model not in CAPTURED:
        return ligerfx.optimize(model, batch(model))
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(CAPTURED[model], {id(tensor): tensor for tensor in tensors})


def programs(optimised):
    """How many programs each optimised module holds."""
    return {name: len(m._ligerfx_programs) for name, m in optimised.named_modules() if isinstance(m, OptimizedModule)}


def assert_same(optimised, model, inputs, rtol=1e-6):
    found, expected = optimised(**inputs), model(**inputs)
    torch.testing.assert_close(found.loss, expected.loss, rtol=rtol, atol=0)
    atol = rtol * expected.logits.abs().max().item()
    torch.testing.assert_close(found.logits + 0, expected.logits, rtol=rtol, atol=atol)
    optimised.zero_grad(set_to_none=True)
    found.loss.backward()
    gradients = {n: p.grad for n, p in optimised.named_parameters()}
    optimised.zero_grad(set_to_none=True)
    expected.loss.backward()
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert (gradients[name] is None) == (gradient is None), name
        if gradient is not None:
            atol = 1e-5 * gradient.abs().max().item()
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=atol)
    model.zero_grad(set_to_none=True)


# -- what it is ----------------------------------------------------------------------------------------------


def test_it_is_a_graph_module_and_the_models_class(llama):
    optimised = optimized(llama)
    assert isinstance(optimised, torch.fx.GraphModule) and isinstance(optimised, type(llama))
    assert type(optimised).__name__ == type(llama).__name__
    assert inspect.signature(optimised.forward) == inspect.signature(llama.forward)
    assert inspect.signature(type(optimised).forward) == inspect.signature(type(llama).forward)
    mlp, original = optimised.model.layers[0].mlp, llama.model.layers[0].mlp
    assert isinstance(mlp, torch.fx.GraphModule) and isinstance(mlp, type(original))
    assert "glu" in mlp.code and "glu" in str(mlp.graph)


def test_state_and_parameters_are_shared(llama):
    optimised = optimized(llama)
    assert list(optimised.state_dict()) == list(llama.state_dict())
    assert [n for n, _ in optimised.named_modules()] == [n for n, _ in llama.named_modules()]
    pairs = zip(optimised.named_parameters(), llama.named_parameters(), strict=True)
    assert all(n == m and p is q for (n, p), (m, q) in pairs)
    assert str(optimised).splitlines()[0] == str(llama).splitlines()[0]


def test_optimising_the_result_again(llama):
    once = optimized(llama)
    twice = ligerfx.optimize(once)
    assert twice.report.idioms == once.report.idioms
    assert type(twice).__mro__.count(OptimizedModule) == 1
    assert_same(twice, llama, batch(llama))


def test_load_state_dict(llama):
    model = copy.deepcopy(llama)
    optimised = optimized(model)
    other = make("llama", seed=5)
    optimised.load_state_dict(other.state_dict())
    assert_same(optimised, other, batch(llama))


# -- dispatch ------------------------------------------------------------------------------------------------


def test_other_sizes_make_no_program(llama):
    optimised = optimized(llama)
    optimised(**batch(llama))
    before = programs(optimised)
    for shape in [(1, 4), (3, 9), (2, 2), (5, 16), (1, 1), (7, 2)]:
        inputs = batch(llama, *shape, ignore=0.0)
        expected = llama(**inputs).logits
        torch.testing.assert_close(optimised(**inputs).logits + 0, expected, rtol=1e-5, atol=1e-5)
    assert programs(optimised) == before


def test_a_new_signature_is_captured_once(llama):
    optimised = optimized(llama)
    inputs = batch(llama)
    optimised(**inputs)
    variants = [
        {k: v for k, v in inputs.items() if k != "labels"},
        {k: v for k, v in inputs.items() if k != "attention_mask"},
        {**inputs, "output_hidden_states": True},
        {**inputs, "return_dict": False},
        {**inputs, "use_cache": False},
    ]
    for variant in variants:
        before = programs(optimised)[""]
        for _ in range(3):
            optimised(**variant)
        assert programs(optimised)[""] <= before + 1
    settled = programs(optimised)
    for variant in variants:
        optimised(**variant)
    assert programs(optimised) == settled


def test_positional_and_keyword_arguments(llama):
    optimised, inputs = optimized(llama), batch(llama)
    expected = llama(inputs["input_ids"], inputs["attention_mask"]).logits
    torch.testing.assert_close(optimised(inputs["input_ids"], inputs["attention_mask"]).logits + 0, expected)


def test_inputs_embeds(llama):
    optimised, inputs = optimized(llama), batch(llama)
    embeds = llama.model.embed_tokens(inputs.pop("input_ids")).detach()
    assert_same(optimised, llama, {**inputs, "inputs_embeds": embeds})


def test_wrong_arguments_raise_as_in_the_original(llama):
    optimised = optimized(llama)
    for wrong in ({"nonsense": 1, "input_ids": torch.ones(1, 2)}, {}):
        with pytest.raises(Exception) as expected:  # noqa: PT011, B017
            llama(**wrong)
        with pytest.raises(expected.type):
            optimised(**wrong)


def test_more_signatures_than_are_remembered():
    module = Norm()
    optimised = ligerfx.optimize(module, (torch.randn(2, 3, H),))
    for rank in range(1, 25):
        x = torch.randn(*[1] * rank, H)
        assert torch.equal(optimised(x), module(x))
    assert programs(optimised)[""] <= 16
    x = torch.randn(2, 3, H)
    assert torch.equal(optimised(x), module(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_another_dtype_of_input(dtype):
    module = Norm()
    optimised = ligerfx.optimize(module, (torch.randn(2, 3, H),))
    x = torch.randn(2, 3, H, dtype=dtype)
    found, expected = optimised(x), module(x)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=2**-7 if dtype.itemsize == 2 else 1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_converted_after_optimize(dtype):
    model = make("llama")
    optimised = optimized(copy.deepcopy(model)).to(dtype)
    model = model.to(dtype)
    loss, expected = optimised(**batch(model)).loss, model(**batch(model)).loss
    torch.testing.assert_close(loss, expected, rtol=1e-12 if dtype == torch.float64 else 2**-6, atol=0)


# -- guards --------------------------------------------------------------------------------------------------


def both(model):
    return optimized(model), copy.deepcopy(model)


def test_attribute_changed_after_optimize(llama):
    optimised, model = both(llama)
    inputs = batch(llama)
    assert_same(optimised, model, inputs)
    for value in (0.5, 2.0, 1e-6):
        for m in (optimised, model):
            m.model.layers[0].input_layernorm.variance_epsilon = value
        assert_same(optimised, model, inputs)
    assert llama.model.layers[0].input_layernorm.variance_epsilon == 1e-6


def test_attribute_of_the_attention_changed(llama):
    optimised, model = both(llama)
    for m in (optimised, model):
        m.model.layers[1].self_attn.scaling = 3.0
    assert_same(optimised, model, batch(llama))


class Optional(nn.Module):
    """Looks for what is not there, or None, or empty."""

    def __init__(self):
        super().__init__()
        self.norm, self.adapters, self.table, self.last = (
            nn.RMSNorm(H),
            nn.ModuleList(),
            nn.ModuleDict(),
            nn.Sequential(),
        )
        self.register_buffer("shift", None)
        self.register_parameter("bias", None)
        self.register_module("head", None)

    def forward(self, x):
        y = self.norm(x)
        if hasattr(self, "scale"):
            y = y * self.scale
        y = y * getattr(self, "gain", 1.0)
        if self.shift is not None:
            y = y + self.shift
        if self.bias is not None:
            y = y + self.bias
        if self.head is not None:
            y = self.head(y)
        for adapter in self.adapters:
            y = y + adapter(y)
        for adapter in self.table.values():
            y = y * adapter(y)
        return self.last(y)


LATER = {
    "an attribute": lambda m: setattr(m, "scale", 2.0),
    "one that has a default": lambda m: setattr(m, "gain", 3.0),
    "an attribute of the class": lambda m: setattr(getattr(m, "_original_class", type(m)), "scale", 5.0),
    "a buffer": lambda m: setattr(m, "shift", torch.arange(float(H))),
    "a parameter": lambda m: setattr(m, "bias", nn.Parameter(torch.arange(float(H)))),
    "a parameter of another name": lambda m: setattr(m, "scale", nn.Parameter(torch.arange(float(H)))),
    "a module": lambda m: setattr(m, "head", nn.Softmax(-1)),
    "in a list": lambda m: m.adapters.append(nn.Softmax(-1)),
    "in a dict": lambda m: m.table.update({"a": nn.Softmax(-1)}),
    "in a sequence": lambda m: m.last.append(nn.Softmax(-1)),
}


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("what", LATER)
def test_what_was_missing_and_comes_later(monkeypatch, references, what, called):
    if what == "an attribute of the class":
        monkeypatch.setattr(Optional, "scale", None, raising=False)
        monkeypatch.delattr(Optional, "scale")
    model, x = Optional(), torch.randn(2, 3, H)
    optimised, before = ligerfx.optimize(model, (x,)), model(x)
    program = optimised._ligerfx_program
    if called:
        torch.testing.assert_close(optimised(x), before)
        assert optimised._ligerfx_program is program, "what was looked for in vain is found"
    LATER[what](model)
    if what != "an attribute of the class":
        LATER[what](optimised)
    torch.testing.assert_close(optimised(x), model(x))
    assert not torch.allclose(model(x), before)


def twice(logits, labels, vocab_size, **kwargs):
    return 2 * nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def test_a_loss_function_that_is_set_afterwards(llama):
    optimised, model = both(llama)
    inputs = batch(llama)
    assert_same(optimised, model, inputs)
    for m in (optimised, model):
        m.loss_function = twice
    assert_same(optimised, model, inputs)


class Loss:
    """A loss that has state, as an object that is called and by a method."""

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, *args, **kwargs):
        return self.factor * twice(*args, **kwargs)

    def method(self, *args, **kwargs):
        return self(*args, **kwargs)


@pytest.mark.parametrize("function", [lambda loss: loss, lambda loss: loss.method], ids=["object", "method"])
def test_a_loss_function_with_state(llama, function):
    model, loss, inputs = copy.deepcopy(llama), Loss(3.0), batch(llama)
    model.loss_function = function(loss)
    optimised = optimized(model)
    for m in (optimised, model):
        m.loss_function = function(loss)  # the very object, which copies do not share
    found = []
    for change in (lambda: None, lambda: setattr(loss, "factor", 5.0), lambda: setattr(loss, "factor", 3.0)):
        change()
        for _ in range(2):
            assert_same(optimised, model, inputs)
        found.append(model(**inputs).loss.item())
    assert found[0] != found[1] and found[0] == found[2]
    for m in (optimised, model):
        m.loss_function = function(Loss(7.0))
    assert_same(optimised, model, inputs)


def test_a_module_that_was_compiled_in_place(llama):
    """No copy has the compiled call of the module that it is a copy of."""
    inputs = batch(llama)
    model = copy.deepcopy(llama)
    model.compile(backend="eager")
    with pytest.warns(UserWarning, match="was compiled with compile\\(\\). The result is not"):
        optimised = ligerfx.optimize(model, inputs)
    assert optimised.report.idioms == ligerfx.optimize(llama, inputs).report.idioms
    assert type(optimised(**inputs).logits) is ligerfx.DeferredTensor
    optimised.compile(backend="eager")
    expected = optimised(**inputs).loss
    for make_copy in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        other = make_copy(optimised)
        other.lm_head = nn.Linear(*reversed(llama.lm_head.weight.shape), bias=False)
        assert not torch.allclose(other(**inputs).loss, expected)
        torch.testing.assert_close(optimised(**inputs).loss, expected)
    assert copy.copy(optimised)._compiled_call_impl is None


def test_list_attribute_changed_in_place():
    module = Norm()
    optimised, x = ligerfx.optimize(module, (torch.randn(2, 3, H),)), torch.randn(2, 3, H)
    optimised(x)
    optimised.scales = [1.0, 5.0]
    assert torch.equal(optimised(x), module(x) / 2 * 5)
    optimised.scales[1] = 3.0
    torch.testing.assert_close(optimised(x), module(x) / 2 * 3)


def test_attribute_of_the_config_changed(llama):
    optimised, model = both(make("gemma2"))
    inputs = batch(llama)
    assert_same(optimised, model, inputs)
    for m in (optimised, model):
        m.config.final_logit_softcapping = 1.5
    assert_same(optimised, model, inputs)


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.config = nn.RMSNorm(H), SimpleNamespace(rope={"factor": 2.0}, types=["full", "sliding"])
        self.table = {"a": {"b": 3.0}}

    def forward(self, x):
        y = self.norm(x) * self.config.rope["factor"] + self.table["a"]["b"]
        return y if self.config.types[0] == "full" else y * 7


NESTED = {
    "a dict of the configuration": lambda m: m.config.rope.update(factor=5.0),
    "a list of the configuration": lambda m: m.config.types.__setitem__(0, "sliding"),
    "a dict in a dict": lambda m: m.table["a"].update(b=5.0),
}


@pytest.mark.parametrize("what", NESTED)
def test_what_is_inside_a_configuration_changed(references, what):
    model, x = Nested(), torch.randn(2, 3, H)
    optimised, before = ligerfx.optimize(copy.deepcopy(model), (x,)), model(x)
    for _ in range(2):
        torch.testing.assert_close(optimised(x), before)
    assert len(optimised._ligerfx_programs) == 1
    for m in (model, optimised):
        NESTED[what](m)
    for _ in range(2):
        torch.testing.assert_close(optimised(x), model(x))
    assert not torch.allclose(model(x), before) and not optimised._ligerfx_program.capture.error


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_activation_replaced(llama, activation):
    optimised, model = both(llama)
    for m in (optimised, model):
        m.model.layers[0].mlp.act_fn = activation()
    assert_same(optimised, model, batch(llama))


def test_activation_with_another_attribute():
    class MLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up, self.act = nn.Linear(H, H), nn.Linear(H, H), nn.GELU()

        def forward(self, x):
            return self.act(self.gate(x)) * self.up(x)

    optimised, model = ligerfx.optimize(module := MLP(), (torch.randn(2, 3, H),)), copy.deepcopy(module)
    for m in (optimised, model):
        m.act.approximate = "tanh"
    x = torch.randn(2, 3, H) * 3
    assert torch.equal(optimised(x), model(x))


@pytest.mark.parametrize(("family", "use_cache"), [("llama", True), ("llama", False), ("gemma3", True)])
def test_layers_alike_learn_once(family, use_cache, monkeypatch):
    """What a first call has to capture does not grow with depth, and a second call captures nothing."""
    captured = []
    trace = Tracer.trace
    monkeypatch.setattr(Tracer, "trace", lambda self, *a: captured.append(type(self.root).__name__) or trace(self, *a))
    kinds = {"layer_types": ["sliding_attention", "full_attention"] * 2} if family == "gemma3" else {}
    optimised = ligerfx.optimize(make(family, num_hidden_layers=4, **kinds))
    inputs = batch(optimised) | {"use_cache": use_cache}
    captured.clear()
    optimised(**inputs)
    layers = [name for name in captured if name.endswith("DecoderLayer")]
    assert len(layers) <= (2 if kinds else 1)
    captured.clear()
    optimised(**inputs)
    assert not captured


@pytest.mark.parametrize("padding", [None, "left"])
def test_a_first_call_with_a_cache_captures_no_module_twice(llama, padding, monkeypatch):
    """The backbone, which makes the cache, cannot be captured: that is found out once, with its caller. So is the graph
    of the layers, where they are called as they were then."""
    captured = []
    trace = Tracer.trace
    optimised, model = ligerfx.optimize(llama), copy.deepcopy(llama)  # captured without a cache
    monkeypatch.setattr(Tracer, "trace", lambda self, *a: captured.append(type(self.root).__name__) or trace(self, *a))
    inputs = batch(llama, padding=padding)
    assert_same(optimised, model, inputs)
    # Without padding the model leaves the mask out, which depends on its values.
    assert captured == ["LlamaForCausalLM"] + ["LlamaDecoderLayer"] * (padding is None)


def test_a_layer_takes_over_what_optimize_captured_of_a_twin(llama, monkeypatch):
    inputs = batch(llama, padding="left")  # the mask is a tensor, as for all that capture knows
    optimised = ligerfx.optimize(llama, inputs | {"use_cache": False})
    expected = optimised(**inputs, use_cache=False).loss
    optimised.model.layers[1]._ligerfx_programs.clear()
    monkeypatch.setattr(Tracer, "trace", lambda *_: pytest.fail("captured again"))
    assert torch.equal(optimised(**inputs, use_cache=False).loss, expected)


def test_an_attribute_that_is_a_partial():
    class Gelu(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = functools.partial(nn.functional.gelu, approximate="tanh")

        def forward(self, x):
            return self.act(x)

    class MLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up, self.act = nn.Linear(H, H), nn.Linear(H, H), Gelu()

        def forward(self, x):
            return self.act(self.gate(x)) * self.up(x)

    x = torch.randn(2, 3, H) * 3
    optimised, model = ligerfx.optimize(module := MLP(), (x,)), copy.deepcopy(module)
    for m in (optimised, copy.deepcopy(optimised)):
        m(x)
        assert programs(m) == {"": 1}  # nothing new: it is the same partial, or one like it
    for m in (optimised, model):
        m.act.act = functools.partial(nn.functional.gelu, approximate="none")
    assert torch.equal(optimised(x), model(x))


class Plus(nn.Module):
    """An adapter: wraps a layer and adds something to its result."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.scale = layer, nn.Parameter(torch.tensor(0.3))

    @property
    def weight(self):
        return self.layer.weight

    def forward(self, x):
        out = self.layer(x)
        return out + self.scale * out.sin()


@pytest.mark.parametrize(
    "path",
    ["lm_head", "model.layers.0.mlp.gate_proj", "model.layers.1.self_attn.q_proj", "model.norm",
     "model.layers.0.mlp", "model.embed_tokens"],
)  # fmt: skip
def test_layer_wrapped_after_optimize(llama, path):
    optimised, model = both(llama)
    assert_same(optimised, model, batch(llama))
    for m in (optimised, model):
        m.set_submodule(path, Plus(m.get_submodule(path)))
    assert_same(optimised, model, batch(llama))


@pytest.mark.parametrize(
    "change",
    [
        lambda layers: layers.__delitem__(0),
        lambda layers: layers.append(copy.deepcopy(layers[0])),
        lambda layers: layers.insert(1, copy.deepcopy(layers[1])),
        lambda layers: layers.__setitem__(0, layers[1]),
    ],
    ids=["removed", "appended", "inserted", "replaced"],
)
def test_list_of_layers_changed(llama, change):
    optimised, model = both(llama)
    for m in (optimised, model):
        change(m.model.layers)
        m.config.num_hidden_layers = 3  # all that there are
    assert_same(optimised, model, batch(llama))


def test_positions_of_the_models_own_are_not_searched_for_packed_sequences(llama, monkeypatch):
    masking = pytest.importorskip("transformers.masking_utils")
    looked = []
    find = masking.find_packed_sequence_indices
    monkeypatch.setattr(masking, "find_packed_sequence_indices", lambda ids: looked.append(ids) or find(ids))
    given = {**batch(llama, 2, 12, packed=True), "use_cache": False}
    inputs = {name: value for name, value in given.items() if name != "position_ids"}
    optimised, model = ligerfx.optimize(llama, inputs), llama
    assert_same(optimised, model, inputs)
    looked.clear()
    optimised(**inputs)
    assert not looked
    model(**inputs)
    assert len(looked) == 1
    assert_same(optimised, model, given)  # these are packed, and treated as such
    assert not torch.equal(optimised(**given).logits + 0, optimised(**inputs).logits + 0)


@pytest.mark.parametrize("bias", [True, False])
def test_head_replaced_by_another_linear(llama, bias):
    optimised, model = both(llama)
    head = nn.Linear(64, 256, bias=bias)
    for m in (optimised, model):
        m.lm_head = head
    assert_same(optimised, model, batch(llama))


def test_bias_added_to_the_head(llama):
    optimised, model = both(llama)
    bias = nn.Parameter(torch.randn(256))
    for m in (optimised, model):
        m.lm_head.bias = bias
    assert_same(optimised, model, batch(llama))


def test_weights_replaced_and_resized(llama):
    optimised, model = both(copy.deepcopy(llama))
    for m in (optimised, model):
        torch.manual_seed(2)
        m.resize_token_embeddings(264)
    assert_same(optimised, model, batch(llama))


@pytest.mark.parametrize("path", ["lm_head", "model.layers.1.mlp.down_proj", "model.layers.1.self_attn.q_proj"])
@pytest.mark.parametrize("where", ["in the table", "beside the table"])
def test_weight_exchanged_between_calls(llama, path, where):
    """The short way of a call like the last one takes a weight from where the module itself finds it."""
    optimised, model = both(copy.deepcopy(llama))
    inputs = batch(llama)
    for _ in range(2):
        assert_same(optimised, model, inputs)
    weight = nn.Parameter(model.get_submodule(path).weight.detach() * -0.5)
    for m in (optimised, model):
        layer = m.get_submodule(path)
        if where == "in the table":
            layer.weight = weight
        else:
            vars(layer)["weight"] = weight  # as FSDP1 does, with the original parameters in the table
    for _ in range(2):
        assert_same(optimised, model, inputs)


@pytest.mark.parametrize("path", ["lm_head", "model.layers.0.mlp.act_fn", "model.layers.0.mlp", "model.norm"])
def test_forward_replaced_on_an_instance(llama, path):
    optimised, model = both(llama)
    for m in (optimised, model):
        layer = m.get_submodule(path)
        layer.forward = (lambda f: lambda x: f(x) * 0.5)(layer.forward)
    assert_same(optimised, model, batch(llama))


@pytest.mark.parametrize("path", ["lm_head", "model.layers.0.mlp.act_fn", "model.norm"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_hook_fires(llama, path, when):
    model = copy.deepcopy(llama)
    if when == "before":
        model.get_submodule(path).register_forward_hook(lambda m, args, out: out * 1.5)
        optimised = optimized(model)
    else:
        optimised = optimized(model)
        for m in (optimised, model):
            m.get_submodule(path).register_forward_hook(lambda m, args, out: out * 1.5)
    assert_same(optimised, model, batch(llama))


def test_hooks_that_gather_nothing(llama):
    """DeepSpeed's ZeRO-3 hooks every module. One without parameters needs no call for that, unless somebody else hooks
    it, too."""
    optimised, model = both(llama)
    fired = []

    def gather(module, *_):
        fired.append(module)

    gather.__module__ = "deepspeed.runtime.zero.parameter_offload"
    mlp = optimised.model.layers[0].mlp
    for module in mlp.modules():
        module.register_forward_hook(gather)
    for _ in range(2):
        fired.clear()
        assert_same(optimised, model, batch(llama))
        assert fired == [mlp.gate_proj, mlp.up_proj, mlp.down_proj, mlp]
    *_, program = mlp._ligerfx_programs.values()
    assert "kernels_glu(gate_proj, up_proj)" in program.code
    for m in (optimised, model):
        m.model.layers[0].mlp.act_fn.register_forward_hook(lambda module, inputs, out: out * 2)
    for _ in range(2):
        fired.clear()
        assert_same(optimised, model, batch(llama))
        assert mlp.act_fn in fired


def test_train_and_eval():
    model = make("llama", attention_dropout=0.5)
    optimised, inputs = optimized(model), batch(model)
    for training in (False, True, False):
        optimised.train(training)
        copied = copy.deepcopy(model).train(training)
        torch.manual_seed(1)
        found = optimised(**inputs).loss
        torch.manual_seed(1)
        torch.testing.assert_close(found, copied(**inputs).loss, rtol=1e-6, atol=0)
    assert model.training


def test_autocast(llama):
    optimised, inputs = optimized(llama), batch(llama)
    optimised(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        loss, expected = optimised(**inputs).loss, llama(**inputs).loss
    torch.testing.assert_close(loss, expected, rtol=2**-7, atol=0)
    assert_same(optimised, llama, inputs)


# -- copies --------------------------------------------------------------------------------------------------


def test_optimized_under_autocast():
    """What was captured there does not serve elsewhere, where a linear layer has another dtype."""

    class Rounded(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(H, H)

        def forward(self, x):
            y = self.linear(x)
            return y.float().exp().to(y.dtype)

    model, x = Rounded(), torch.randn(2, 3, H)
    with torch.autocast("cpu", torch.bfloat16):
        optimised = ligerfx.optimize(model, (x,))
        assert model(x).dtype == torch.bfloat16 and torch.equal(optimised(x), model(x))
    assert optimised(x).dtype == torch.float32 and torch.equal(optimised(x), model(x))


def pickled(module):
    return pickle.loads(pickle.dumps(module))


def saved(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, saved], ids=lambda f: f.__name__)
def test_copies_are_independent_and_optimised(llama, copied):
    optimised, inputs = optimized(llama), batch(llama)
    optimised(**inputs)
    other = copied(optimised)
    assert type(other) is type(optimised) and isinstance(other.model.layers[0].mlp, OptimizedModule)
    assert not {id(p) for p in other.parameters()} & {id(p) for p in optimised.parameters()}
    assert_same(other, llama, inputs)
    used = [p for p in other.model.layers[0]._ligerfx_programs.values() if p.matches]
    assert sorted(m.pattern.name for m in used[0].matches) == [
        "add_rms_norm_rounded_first_silu_glu_mlp", "rms_norm_rounded_first_linear_x3", "rotary"
    ]  # fmt: skip
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    assert_same(optimised, llama, inputs)


def test_copies_keep_ties():
    optimised = ligerfx.optimize(make("llama_tied"))
    for other in (copy.deepcopy(optimised), pickled(optimised)):
        assert other.lm_head.weight is other.model.embed_tokens.weight


def test_deepcopy_keeps_what_was_changed(llama):
    optimised, model = both(llama)
    for m in (optimised, model):
        m.model.norm.variance_epsilon = 0.5
    assert_same(copy.deepcopy(optimised), model, batch(llama))


def test_shallow_copy(llama):
    optimised = copy.copy(optimized(llama))
    assert_same(optimised, llama, batch(llama))


# -- editing -------------------------------------------------------------------------------------------------


def scale_output(module, factor):
    graph = module.graph
    (output,) = (n for n in graph.nodes if n.op == "output")
    with graph.inserting_before(output):
        output.replace_input_with(output.args[0], graph.call_function(torch.mul, (output.args[0], factor)))
    module.recompile()


def test_edited_graph_takes_effect_for_this_module_alone(llama):
    optimised, inputs = optimized(llama), batch(llama)
    first, second = optimised.model.layers[0].mlp, optimised.model.layers[1].mlp
    x = torch.randn(2, 9, 64)
    one, two = first(x), second(x)
    code = second.code
    scale_output(first, 2.0)
    assert torch.equal(first(x), 2 * one) and torch.equal(second(x), two)
    assert "mul" in first.code and second.code == code
    assert not torch.isclose(optimised(**inputs).loss, llama(**inputs).loss, rtol=1e-4)


def test_edited_graph_survives_a_copy(llama):
    optimised = optimized(llama)
    mlp, x = optimised.model.layers[0].mlp, torch.randn(2, 9, 64)
    expected = 2 * mlp(x)
    scale_output(mlp, 2.0)
    assert torch.equal(copy.deepcopy(mlp)(x), expected)


def test_graph_set_and_recompiled():
    module = Norm()
    optimised, x = ligerfx.optimize(module, (torch.randn(2, 3, H),)), torch.randn(2, 3, H)
    graph = torch.fx.Graph()
    graph.output(graph.call_function(torch.neg, (graph.placeholder("x"),)))
    optimised.graph = graph
    assert torch.equal(optimised(x), -x)


def test_reading_the_graph_changes_nothing(llama):
    optimised = optimized(llama)
    mlp, x = optimised.model.layers[0].mlp, torch.randn(2, 9, 64)
    before, code = mlp(x), mlp.code
    assert {n.op for n in mlp.graph.nodes} >= {"placeholder", "output"}
    mlp.graph.lint()
    mlp.recompile()
    assert torch.equal(mlp(x), before) and mlp.code == code
    mlp.print_readable(print_output=False)


# -- calls ---------------------------------------------------------------------------------------------------


def test_arguments_with_defaults_and_keywords():
    module = Norm()
    optimised = ligerfx.optimize(module, (torch.randn(2, 3, H),))
    x = torch.randn(2, 3, H)
    for args, kwargs in [((x,), {}), ((x, 3), {}), ((x,), {"twice": True}), ((), {"x": x, "power": 2})]:
        assert torch.equal(optimised(*args, **kwargs), module(*args, **kwargs))


def test_a_size_that_must_be_one_number():
    """As of an image, which only the module inside looks at: every caller says so of its own input."""

    class Patches(nn.Module):
        def __init__(self):
            super().__init__()
            self.project = nn.Linear(4, H)

        def forward(self, image):
            if image.shape[1] != 6:
                raise ValueError("the image must have 6 rows")
            return self.project(image.reshape(image.shape[0], 6, -1))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches, self.norm = Patches(), Norm()

        def forward(self, image):
            return self.norm(self.patches(image))

    model = Model()
    optimised = ligerfx.optimize(model, (torch.randn(2, 6, 4),))
    assert not optimised.report.opaque and optimised.report.idioms == {"rms_norm": 1}
    for batch_size in (2, 5):
        image = torch.randn(batch_size, 6, 4)
        torch.testing.assert_close(optimised(image), model(image), rtol=1e-6, atol=1e-6)
    assert set(programs(optimised).values()) == {1}
    with pytest.raises(ValueError, match="6 rows"):
        optimised(torch.randn(2, 7, 4))


def test_requires_grad_of_inputs_does_not_matter():
    module = Norm()
    optimised = ligerfx.optimize(module, (torch.randn(2, 3, H),))
    x = torch.randn(2, 3, H, requires_grad=True)
    for leaf in (x, x.detach()):
        assert torch.equal(optimised(leaf), module(leaf))
    optimised(x).sum().backward()
    assert x.grad is not None
    module.weight.requires_grad_(False)
    assert not optimised(x.detach()).requires_grad


def test_generate(llama):
    model = llama.eval()
    try:
        optimised, inputs = ligerfx.optimize(model).eval(), batch(model)
        call = {k: inputs[k] for k in ("input_ids", "attention_mask")}
        expected = model.generate(**call, max_new_tokens=4, do_sample=False)
        assert torch.equal(optimised.generate(**call, max_new_tokens=4, do_sample=False), expected)
    finally:
        model.train()


def test_report_and_programs_do_not_keep_the_models_alive():
    model = make("llama", num_hidden_layers=1)
    optimised = optimized(model)
    optimised(**batch(model))
    report = optimised.report
    refs = [weakref.ref(model), weakref.ref(optimised), weakref.ref(model.lm_head.weight)]
    del model, optimised
    gc.collect()
    assert [r() for r in refs] == [None] * 3
    assert report.idioms["rms_norm"] == 3 and "RMSNorm" in str(report)


def test_inputs_and_activations_are_not_kept_alive():
    module = nn.Sequential(Norm(), nn.Linear(H, H))
    optimised = ligerfx.optimize(module, (torch.randn(2, 3, H),))
    x = torch.randn(2, 3, 4, H)  # a new signature: captured at this call
    y = optimised(x)
    refs = [weakref.ref(x), weakref.ref(y)]
    del x, y
    gc.collect()
    assert [r() for r in refs] == [None, None]


class NamedAsInFx(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.graph, self.code = nn.RMSNorm(16), 2, 3.0

    def forward(self, x):
        return self.norm(x) * self.graph * self.code


def test_attributes_may_be_called_like_those_of_a_graph_module(references):
    model, x = NamedAsInFx(), torch.randn(2, 16)
    optimised = ligerfx.optimize(model, (x,))
    assert torch.equal(optimised(x), model(x))
    assert torch.equal(torch.compile(optimised, backend="eager")(x), model(x))
