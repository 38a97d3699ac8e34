"""torch.compile around an optimised model: one graph, and the original's numbers."""

import copy
import importlib
import re
import warnings
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from accelerate.utils import compile_regions
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from transformers import StaticCache

import ligerfx
from ligerfx.deferred import DeferredTensor
from models import batch, default_batch, make


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Recorded:
    """A backend that runs the graphs as they are and keeps what they call; autograd is traced unless it is "eager"."""

    def __init__(self, backend="aot_eager"):
        self.graphs, self.backend = [], backend

    def __call__(self, graph_module, inputs):
        self.graphs.append(graph_module)
        return torch._dynamo.lookup_backend(self.backend)(graph_module, inputs)

    def count(self, name):
        return sum(name in str(node.target) for graph in self.graphs for node in graph.graph.nodes)

    def masks(self):
        calls = [n for graph in self.graphs for n in graph.graph.nodes if n.target is F.scaled_dot_product_attention]
        return [node.kwargs["attn_mask"] for node in calls]


def on(device, family):
    """A model of one layer and a batch there, of a kind of call that optimize does not see: without a mask."""
    model = make(family, num_hidden_layers=1).to(device)
    inputs = default_batch(model)
    inputs.pop("attention_mask", None)
    return model, {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


def losses_and_gradients(model, inputs):
    loss = model(**inputs).loss
    model.zero_grad(set_to_none=True)
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_equal(expected, found):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0)
    for name, gradient in expected[1].items():
        other = found[1][name] if name in found[1] else found[1][f"_orig_mod.{name}"]
        scale = gradient.abs().max().item()
        torch.testing.assert_close(other, gradient, rtol=1e-5, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize(("family", "layers"), [("llama", 1), ("gemma2", 2), ("qwen3", 1)])
def test_no_graph_breaks(references, family, layers):
    """gemma2 has two kinds of layers."""
    model = make(family, num_hidden_layers=layers)
    inputs = default_batch(model)
    compiled = torch.compile(ligerfx.optimize(model), backend="aot_eager", fullgraph=True)
    assert_equal(losses_and_gradients(model, inputs), losses_and_gradients(compiled, inputs))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_kernels_run_in_the_first_call_of_a_compiled_model(device, family):
    model, inputs = on(device, family)
    backend = Recorded()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="torch.compile meets")
        compiled = torch.compile(ligerfx.optimize(model), backend=backend, fullgraph=True)
        found = losses_and_gradients(compiled, inputs)
    assert_equal(losses_and_gradients(model, inputs), found)
    assert len(backend.graphs) == 1
    assert backend.count("rsqrt") == 0, "a norm was traced instead of its kernel"
    assert backend.masks() == [None], "a mask was built where causal attention needs none"
    # The layer's q, k, v; rotation; MLP; the last norm; the head.
    assert backend.count("autograd_function_apply") == 5


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_compiler_gets_the_plain_operations_of_a_small_model(device, monkeypatch, family):
    monkeypatch.setattr("ligerfx.kernels._runtime.SMALL", 2**22)
    model, inputs = on(device, family)
    backend = Recorded()
    compiled = torch.compile(ligerfx.optimize(model), backend=backend, fullgraph=True)
    assert_equal(losses_and_gradients(model, inputs), losses_and_gradients(compiled, inputs))
    assert backend.count("rsqrt") == {"llama": 3, "gemma2": 5}[family]
    assert backend.count("autograd_function_apply") == 0


VIEWS = {"_unsafe_view", "alias", "detach", "permute", "split", "t", "transpose", "view"}


def passes_over_memory(graph_module, elements):
    """What in a graph is no product, attention, kernel or view, and writes at least so many elements."""
    nodes = [n for n in graph_module.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    large = [n.target for n in nodes if isinstance(n.meta["val"], torch.Tensor) and n.meta["val"].numel() >= elements]
    names = [target._opname for target in large if target.namespace != "ligerfx"]
    return [name for name in names if name != "mm" and name not in VIEWS]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_compiled_step_passes_over_no_memory_in_vain(device, family):
    """Two layers, each of which ends in an addition, and the embedding."""
    model = make(family, dtype=torch.bfloat16).to(device)
    ids = default_batch(model)["input_ids"].to(device)
    found = []

    def keep(graph_module, inputs):
        found.append(passes_over_memory(graph_module, ids.numel() * model.config.hidden_size))
        return make_boxed_func(graph_module.forward)

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition)
    compiled = torch.compile(ligerfx.optimize(model), backend=backend, fullgraph=True)
    compiled(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert found == [["embedding", "add", "add"], ["embedding_dense_backward"]]


def test_the_loss_waits_for_no_part_of_a_compiled_forward(device):
    """What counts of the labels is searched for before the first kernel of a layer."""
    model, inputs = on(device, "llama")
    inputs["labels"] = inputs["labels"].where(inputs["labels"] % 2 == 0, -100)
    backend = Recorded()
    compiled = torch.compile(ligerfx.optimize(model), backend=backend, fullgraph=True)
    module = importlib.import_module("ligerfx.kernels.linear_crossentropy")
    with mock.patch.object(module, "rows_that_count") as search_in_the_loss:
        found = losses_and_gradients(compiled, inputs)
    assert_equal(losses_and_gradients(model, inputs), found)
    assert search_in_the_loss.call_count == 0
    called = [str(node.target) for node in backend.graphs[0].graph.nodes]
    assert called.index("ligerfx.rows_that_count.default") < called.index("autograd_function_apply")


def test_without_gradients_the_compiler_gets_the_plain_operations(device):
    """All but the loss, which never makes the logits."""
    model, inputs = on(device, "llama")
    optimised = ligerfx.optimize(model)
    labels = inputs.pop("labels")
    with torch.no_grad():
        optimised(**inputs)
        for more, heads in (({}, 0), ({"labels": labels}, 1)):
            torch.compiler.reset()
            backend = Recorded()
            found = torch.compile(optimised, backend=backend, fullgraph=True)(**inputs, **more)
            expected = model(**inputs, **more)
            torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
            assert backend.count("rsqrt") == 3
            assert backend.count("ligerfx.linear_cross_entropy") + backend.count("autograd_function_apply") == heads


def test_logits_of_a_compiled_model_stay_deferred_and_have_no_gradient(device):
    model, inputs = on(device, "llama")
    compiled = torch.compile(ligerfx.optimize(model), backend="aot_eager", fullgraph=True)
    for output, expected in ((compiled(**inputs), model(**inputs)), (compiled(**inputs), model(**inputs))):
        assert type(output.logits) is DeferredTensor
        torch.testing.assert_close(output.logits, expected.logits, rtol=1e-5, atol=1e-5)
        with pytest.raises(RuntimeError, match="compiled with torch.compile and was given labels"):
            (output.loss + output.logits.float().mean()).backward()
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs).logits, expected.logits, rtol=1e-5, atol=1e-5)
        output = compiled(**inputs)
        model.lm_head.weight.mul_(2.0)
        with pytest.raises(RuntimeError, match="weights have changed since"):
            output.logits.sum()
    output = compiled(**inputs)
    output.loss.backward()
    torch.optim.AdamW(compiled.parameters(), fused=True).step()
    with pytest.raises(RuntimeError, match="weights have changed since"):
        output.logits.sum()


def test_logits_inside_what_is_compiled_have_their_gradient(device):
    model, inputs = on(device, "llama")
    optimised = ligerfx.optimize(model)
    optimised(**inputs)

    def loss_of(model):
        output = model(**inputs)
        loss = output.loss + output.logits.float().logsumexp(-1).mean()
        model.zero_grad(set_to_none=True)
        loss.backward()
        return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    def forward():
        output = optimised(**inputs)
        return output.loss + output.logits.float().logsumexp(-1).mean()

    expected = loss_of(model)
    loss = torch.compile(forward, backend="aot_eager", fullgraph=True)()
    optimised.zero_grad(set_to_none=True)
    loss.backward()
    found = loss.detach(), {name: parameter.grad for name, parameter in optimised.named_parameters()}
    assert_equal(expected, found)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("prepare", [lambda model: model, copy.deepcopy], ids=["optimised", "copied"])
def test_layers_that_are_compiled_one_by_one_share_their_code(family, prepare):
    """Before any of them has been called, in a way that optimize did not see."""
    model = make(family, num_hidden_layers=3)
    inputs = default_batch(model)
    inputs.pop("attention_mask")
    expected = losses_and_gradients(model, inputs)
    optimised = prepare(ligerfx.optimize(model))
    graphs = Recorded("eager")
    for layer in optimised.model.layers:
        layer.compile(backend=graphs, fullgraph=True)
    loss, gradients = losses_and_gradients(optimised, inputs | {"use_cache": False})
    assert len(graphs.graphs) == 1 and graphs.count("autograd_function_apply")
    torch.testing.assert_close(loss, expected[0])
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[1][name])


def test_regions_of_accelerate(references):
    """It compiles layer by layer, and what is not in layers."""
    model = make("llama", num_hidden_layers=3)
    inputs = default_batch(model) | {"use_cache": False}
    inputs.pop("attention_mask")

    def loss_of(whole):
        torch.compiler.reset()
        graphs = Recorded("eager")
        return compile_regions(whole, backend=graphs)(**inputs).loss, len(graphs.graphs)

    (expected, count), (loss, compiled) = map(loss_of, (model, ligerfx.optimize(model)))
    assert torch.equal(loss, expected) and compiled == count


@torch._dynamo.config.patch(recompile_limit=1)
def test_models_of_other_classes_do_not_use_up_what_may_be_compiled():
    """The compiler keeps no more than so many variants of one code object."""
    for family in ("llama", "qwen3", "phi3"):
        optimised = ligerfx.optimize(make(family, num_hidden_layers=1))
        inputs = default_batch(optimised)
        loss = optimised(**inputs).loss
        assert torch.equal(torch.compile(optimised, backend="eager", fullgraph=True)(**inputs).loss, loss)


def test_a_step_that_is_compiled_before_its_first_call_warns(device):
    """And is compiled anew when the model has learnt that kind of call."""
    model, inputs = on(device, "llama")
    optimised = ligerfx.optimize(model)
    backend = Recorded("eager")
    step = torch.compile(lambda: optimised(**inputs).loss, backend=backend)
    with pytest.warns(UserWarning, match="a call of LlamaForCausalLM of a kind that ligerfx has not seen"):
        loss = step()
    torch.testing.assert_close(loss, model(**inputs).loss, rtol=1e-6, atol=0)
    assert backend.count("autograd_function_apply") == 4  # the layer and the last norm have been seen
    optimised(**inputs)
    torch.testing.assert_close(step(), loss, rtol=1e-6, atol=0)
    assert backend.count("autograd_function_apply") == 4 + 5


def doubled(module):
    """Changes the graph of an optimised module: what it returns first is doubled."""
    output = next(node for node in module.graph.nodes if node.op == "output")
    value = output.all_input_nodes[0]
    with module.graph.inserting_before(output):
        output.replace_input_with(value, module.graph.call_function(torch.mul, (value, 2)))
    module.recompile()


def set_forward(module):
    module.forward = lambda *args: 2 * type(module).forward(module, *args)


def add_hook(module):
    module.register_forward_hook(lambda module, inputs, output: 2 * output)


def twice(logits, labels, vocab_size, **kwargs):
    return 2 * torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


NORM, LAST_NORM, LINEAR = "model.layers.0.input_layernorm", "model.norm", "model.layers.0.mlp.up_proj"
CHANGES = {
    "an attribute": (LAST_NORM, lambda m: setattr(m, "variance_epsilon", 0.25)),
    "an attribute inside": (NORM, lambda m: setattr(m, "variance_epsilon", 0.25)),
    "a forward": (NORM, set_forward),
    "a forward of torch": (LINEAR, set_forward),
    "a parameter": (LINEAR, lambda m: setattr(m, "bias", torch.nn.Parameter(torch.ones(len(m.weight))))),
    "a weight": (LINEAR, lambda m: setattr(m, "weight", torch.nn.Parameter(2 * m.weight.detach()))),
    "a module": ("model.layers.0.mlp", lambda m: setattr(m, "act_fn", torch.nn.ReLU())),
    "a layer": ("model.layers", lambda m: m.__delitem__(0)),
    "a graph": (LAST_NORM, doubled),
    "a graph inside": (NORM, doubled),
    "what was missing": ("", lambda m: setattr(m, "loss_function", twice)),
    "a hook": (NORM, add_hook),
    "a hook inside": (LINEAR, add_hook),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_after_compiling_is_noticed(references, change):
    """Hooks where torch is told to look for them."""
    path, apply = CHANGES[change]
    model = make("llama", num_hidden_layers=2 if change == "a layer" else 1)
    inputs = default_batch(model)
    optimised, compiled = ligerfx.optimize(model), ligerfx.optimize(model)
    step = torch.compile(compiled, backend="eager")
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
        before = step(**inputs).loss
        for m in (optimised, compiled):
            apply(m.get_submodule(path))
        found = step(**inputs).loss
    assert not torch.allclose(found, before, rtol=1e-4), "the change has no effect"
    torch.testing.assert_close(found, optimised(**inputs).loss, rtol=1e-6, atol=0)


def test_a_configuration_changed_after_compiling_is_noticed(references):
    model = make("gemma2")
    inputs = default_batch(model)
    compiled = torch.compile(ligerfx.optimize(model), backend="eager")
    before = compiled(**inputs).loss
    for m in (model, compiled._orig_mod):
        m.config.final_logit_softcapping = 0.5
    found = compiled(**inputs).loss
    assert not torch.allclose(found, before, rtol=1e-4), "the change has no effect"
    torch.testing.assert_close(found, model(**inputs).loss, rtol=1e-6, atol=0)


def test_the_graph_of_a_copy_is_its_own_when_compiled(references):
    """Both run through the same compiled function."""
    model = make("llama", num_hidden_layers=1)
    inputs = default_batch(model)
    optimised = ligerfx.optimize(model)
    expected = torch.compile(optimised, backend="eager")(**inputs).loss
    copied = copy.deepcopy(optimised)
    doubled(copied.model.norm)
    edited = copied(**inputs).loss
    assert not torch.allclose(edited, expected, rtol=1e-4), "the change has no effect"
    for m, loss in ((copied, edited), (optimised, expected), (copied, edited)):
        torch.testing.assert_close(torch.compile(m, backend="eager")(**inputs).loss, loss, rtol=1e-6, atol=0)


def checked_by(model, inputs):
    """The names of what code compiled for a call checks in each call, each for each kind of check."""
    checked = []

    def note(guards):
        kinds = dict.fromkeys((guard.name, guard.guard_type) for guard in guards)  # of equal ones it checks one
        checked.extend(name for name, _ in kinds)
        return [True] * len(guards)

    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True, options={"guard_filter_fn": note})
    return checked, compiled(**inputs)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_compiled_code_checks_the_model_and_little_of_what_was_learnt(references, family):
    """That is a function for whether a program serves, and one that runs it; the rest of programs never changes.

    A layer adds few checks to those of the original's, which reads the same attributes and parameters: of parameters'
    names, of graphs that might be edited, of which programs it knows, and, since torch 2.14, of hooks.
    """
    layers = {}
    for depth in (1, 3):
        model = make(family, num_hidden_layers=depth)
        layers[depth] = [checked_by(m, default_batch(model))[0] for m in (model, ligerfx.optimize(model))]
    original, optimised = (len(layers[3][i]) - len(layers[1][i]) for i in range(2))
    assert optimised < 1.4 * original
    programs = [name.rpartition("_ligerfx_programs")[2] for name in layers[3][1] if "_ligerfx_programs" in name]
    assert {re.sub(r"\d+", "N", name) for name in programs} == {"", "[N]", "[N].guard", "[N].function"}


def test_without_gradients_nothing_is_looked_up_inside_the_model(references):
    """In each call compiled code checks all that was looked at, and a token takes less time than many checks."""
    model = make("llama", num_hidden_layers=2)
    ids = torch.ones(2, 5, dtype=torch.long)
    inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*has not seen")
        checked, found = checked_by(ligerfx.optimize(model), inputs)
    torch.testing.assert_close(found.loss, model(**inputs).loss, rtol=1e-6, atol=0)
    programs = [name for name in checked if "_ligerfx_programs" in name]
    assert programs  # of the whole, whose loss is fused
    assert not [name for name in programs if "layers" in name]


def test_other_sizes_and_padding(references):
    model = make("llama", num_hidden_layers=1)
    compiled = torch.compile(ligerfx.optimize(model), backend="aot_eager")
    for *sizes, every_label in ((3, 11, True), (2, 13, False), (4, 9, False)):
        inputs = batch(model, *sizes, padding="left")
        if not every_label:
            inputs["labels"] = inputs["labels"].where(inputs["labels"] % 2 == 0, -100)
        found, expected = compiled(**inputs), model(**inputs)
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)


def masked(model, length, **inputs):
    """Inputs of that length, and the masks that the attention of the compiled model gets."""
    torch.compiler.reset()
    backend = Recorded("eager")
    ids = torch.arange(length * 2).view(2, length) % 200
    inputs = {"input_ids": ids, "labels": ids, "use_cache": False, **inputs}
    compiled = torch.compile(ligerfx.optimize(model), backend=backend)
    torch.testing.assert_close(compiled(**inputs).loss, model(**inputs).loss, rtol=1e-6, atol=0)
    return [mask is not None for mask in backend.masks()]


def test_masks_are_built_where_they_are_needed(references):
    """Each loss is compared with the original's, too."""
    llama = make("llama", num_hidden_layers=1)
    assert masked(llama, 6) == [False]
    padding = torch.ones(2, 6, dtype=torch.long)
    padding[0, 4:] = 0
    assert masked(llama, 6, attention_mask=padding) == [True]
    packed = torch.tensor([[0, 1, 2, 0, 1, 2]] * 2)
    assert masked(llama, 6, position_ids=packed) == [True]
    gemma = make("gemma3")  # a layer with a sliding window, and one without
    window = gemma.config.sliding_window
    assert masked(gemma, window - 1) == [False, False]
    assert sorted(masked(gemma, window + 1)) == [False, True]


def test_a_compiled_decoding_step_writes_to_the_cache_once(references):
    """The model learns the new kind of call beforehand, and that must not reach the cache."""
    model = make("llama").eval()
    ids = torch.arange(14).view(2, 7) + 3
    logits, filled = [], []
    for m in (model, ligerfx.optimize(model)):
        cache = StaticCache(model.config, max_cache_len=12)
        step = torch.compile(m.__call__, backend="aot_eager", fullgraph=True)
        with torch.no_grad():
            m(input_ids=ids, past_key_values=cache, use_cache=True)
            found = [step(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(3)]
        logits.append(torch.cat(found))
        filled.append([int(layer.cumulative_length) for layer in cache.layers])
    assert filled == [[10, 10]] * 2
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)


class Counting(torch.nn.Module):
    """Counts its calls in a buffer and an attribute."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.RMSNorm(16)
        self.register_buffer("calls", torch.zeros(()))
        self.plain = torch.zeros(())

    def forward(self, x):
        self.calls.add_(1)
        self.plain.add_(1)
        return self.norm(x) * self.calls


def test_what_a_model_learns_when_it_is_compiled_leaves_its_state_alone(references):
    model = Counting()
    optimised = ligerfx.optimize(model, (torch.randn(2, 16),))
    before = model.calls.item()
    compiled = torch.compile(optimised, backend="aot_eager")
    x = torch.randn(2, 3, 16)
    for call in (1, 2):
        torch.testing.assert_close(compiled(x), model.norm(x) * (before + call))
        assert optimised.calls.item() == optimised.plain.item() == before + call
        assert type(optimised.calls) is type(optimised.plain) is torch.Tensor


class Noting(torch.nn.Module):
    """Notes its calls in two lists."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.RMSNorm(16)
        self.widths, self._dtypes = [], []

    def forward(self, x):
        self.widths.append(x.shape[-1])
        self._dtypes.append(x.dtype)
        return self.norm(x)


def test_what_a_model_learns_when_it_is_compiled_is_not_noted(references):
    optimised = ligerfx.optimize(Noting(), (torch.randn(2, 16),))
    before = len(optimised.widths)
    compiled = torch.compile(optimised, backend="aot_eager")
    for call in (1, 2):
        compiled(torch.randn(2, 3, 16))
        assert optimised.widths == [16] * (before + call)
        assert optimised._dtypes == [torch.float32] * (before + call)
