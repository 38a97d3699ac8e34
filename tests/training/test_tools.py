"""What people do with a model after `optimize`, and the tools of torch that they hand it to: all of it once with the
original and once with the optimised model, with equal results to the bit."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils import parametrizations, parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from training import equality

import ligerfx
from models import default_batch, make

pytestmark = pytest.mark.usefixtures("references")


@pytest.fixture(scope="module")
def models():
    """Originals and what was made of them, to be copied."""
    made = {}
    for name in ("llama", "llama_tied"):
        model = make(name)
        made[name] = model, ligerfx.optimize(model)
    return made


@pytest.fixture
def pair(models):
    return tuple(copy.deepcopy(m) for m in models["llama"])


@pytest.fixture
def tied(models):
    return tuple(copy.deepcopy(m) for m in models["llama_tied"])


def assert_same(model, optimised, inputs=None):
    return equality.assert_same(model, optimised, inputs or default_batch(model))


def assert_changed(pair, change):
    """After `change` of both, they are still the same, and not what they were."""
    before = assert_same(*pair)
    torch.manual_seed(1)
    change(pair[0])
    torch.manual_seed(1)
    change(pair[1])
    after = assert_same(*pair)
    assert not torch.equal(before, after)


SITES = ["lm_head", "model.norm", "model.layers.0", "model.layers.1.mlp", "model.layers.0.self_attn.q_proj"]


# -- hooks ---------------------------------------------------------------------------------------------------


def add_hooks(module, seen):
    def pre(module, args, kwargs):
        seen.append(("pre", [a.shape for a in args], sorted(kwargs)))
        return tuple(a * 1.25 for a in args), kwargs

    def post(module, args, out):
        seen.append(("post", len(args)))
        return out * 0.5

    def backward(module, grad_in, grad_out):
        seen.append(("backward", [g.shape for g in grad_out], [g.norm().item() for g in grad_out]))
        return tuple(g if g is None else g * 2 for g in grad_in)

    def backward_pre(module, grad_out):
        seen.append(("backward pre", [g.norm().item() for g in grad_out]))
        return tuple(g * 3 for g in grad_out)

    return [
        module.register_forward_pre_hook(pre, with_kwargs=True),
        module.register_forward_hook(post),
        module.register_full_backward_hook(backward),
        module.register_full_backward_pre_hook(backward_pre),
    ]


@pytest.mark.parametrize("path", SITES)
def test_every_kind_of_hook_before_and_after(models, path):
    model = copy.deepcopy(models["llama"][0])
    expected, found = [], []
    add_hooks(model.get_submodule(path), expected)
    plain = assert_same(*models["llama"])

    after = copy.deepcopy(models["llama"][1])
    handles = add_hooks(after.get_submodule(path), found)
    loss = assert_same(model, after)
    assert found == expected and len(found) == 4 and not torch.equal(loss, plain)
    for handle in handles:
        handle.remove()
    assert_same(models["llama"][0], after)

    before = ligerfx.optimize(model)
    del expected[:]
    assert_same(model, before)
    assert expected[:4] == expected[4:] and len(expected) == 8  # the hooks write into one list


def test_tensor_hooks(pair):
    seen = []
    for model in pair:
        found = []
        seen.append(found)
        for parameter in (model.lm_head.weight, model.model.norm.weight, model.model.layers[0].mlp.up_proj.weight):
            parameter.register_hook(lambda grad, found=found: found.append(grad.norm()) or grad * 2)
    assert_same(*pair)
    # The same gradients, three of them, whichever comes first.
    assert len(seen[0]) == 3 and sorted(seen[0]) == sorted(seen[1])


# -- outputs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
def test_hidden_states_in_every_kind_of_call(when):
    """transformers collects them in hooks, which the first call that wants them leaves on the model."""
    model = make("llama")
    inputs = default_batch(model)
    wanted = {**inputs, "output_hidden_states": True}
    if when == "before":
        model(**wanted)
    optimised = ligerfx.optimize(model)
    without_labels = {name: value for name, value in wanted.items() if name != "labels"}
    for call in (wanted, without_labels, {**wanted, "use_cache": True}, inputs):
        expected, found = model(**call), optimised(**call)
        assert len(expected.hidden_states or ()) == len(found.hidden_states or ())
        assert all(map(torch.equal, expected.hidden_states or (), found.hidden_states or ()))
        assert torch.equal(expected.logits, found.logits + 0)


def test_attentions_and_hidden_states(pair):
    for model in pair:
        model.set_attn_implementation("eager")
    inputs = default_batch(pair[0])
    expected, found = (m(**inputs, output_attentions=True, output_hidden_states=True) for m in pair)
    for kind in ("attentions", "hidden_states"):
        assert len(expected[kind]) == len(found[kind]) > 1
        assert all(torch.equal(a, b) for a, b in zip(expected[kind], found[kind], strict=True))
    gradients = []
    for output, model in ((expected, pair[0]), (found, pair[1])):
        model.zero_grad()
        (output.loss + sum(a.square().mean() for a in output.attentions)).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# -- conversions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("convert", ["half", "bfloat16", "double"])
def test_converted(pair, convert):
    for model in pair:
        getattr(model, convert)()
    assert_same(*pair)
    assert pair[1].lm_head.weight.dtype == pair[0].lm_head.weight.dtype != torch.float32


def test_to_meta_and_back(pair):
    """`to_empty` and loading weights: what large models are built with."""
    state = make("llama", seed=3).state_dict()

    def change(model):
        buffers = {n: b.clone() for n, b in model.named_buffers()}
        model.to("meta").to_empty(device="cpu")
        for name, value in buffers.items():
            model.get_buffer(name).copy_(value)
        model.load_state_dict(state)

    assert_changed(pair, change)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_and_with_again(pair, mode):
    inputs = default_batch(pair[0])
    for _ in range(2):
        with mode():
            expected, found = (m.eval()(**inputs) for m in pair)
            assert torch.equal(expected.loss, found.loss) and torch.equal(expected.logits, found.logits + 0)
            assert not found.loss.requires_grad and not found.logits.requires_grad
        for model in pair:
            model.train()
        assert_same(*pair)


# -- weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "llama_tied"])
@pytest.mark.parametrize("size", [264, 240])
def test_resized_embeddings(models, name, size):
    def change(model):
        model.resize_token_embeddings(size)

    pair = tuple(copy.deepcopy(m) for m in models[name])
    for model in pair:
        torch.manual_seed(1)
        change(model)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == (name == "llama_tied")
    inputs = default_batch(pair[0])  # token ids of the new size
    assert_same(*pair, inputs)
    assert pair[1](**inputs).logits.shape[-1] == size


def test_weights_tied_afterwards(pair):
    def tie(model):
        model.lm_head.weight = model.model.embed_tokens.weight

    assert_changed(pair, tie)
    assert pair[1].lm_head.weight.grad is pair[1].model.embed_tokens.weight.grad


def test_weights_untied_afterwards(tied):
    def untie(model):
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 1.5)

    assert_changed(tied, untie)


@pytest.mark.parametrize(
    "frozen", [["lm_head"], ["model.embed_tokens", "model.layers.0"], ["model.norm"], ["model"]], ids=str
)
def test_frozen_and_thawed(pair, frozen):
    for flag in (False, True):
        for model in pair:
            for name in frozen:
                model.get_submodule(name).requires_grad_(flag)
        assert_same(*pair)


def test_everything_frozen(pair):
    for model in pair:
        model.requires_grad_(False)
    expected, found = (m(**default_batch(m)) for m in pair)
    assert torch.equal(expected.loss, found.loss) and not found.loss.requires_grad


@pytest.mark.parametrize("path", ["lm_head", "model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj"])
@pytest.mark.parametrize("kind", ["parametrization", "weight_norm", "old weight_norm"])
def test_parametrized_linear(pair, path, kind):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.5))

        def forward(self, weight):
            return weight * self.scale

    def change(model):
        linear = model.get_submodule(path)
        if kind == "parametrization":
            parametrize.register_parametrization(linear, "weight", Scaled())
        elif kind == "weight_norm":
            parametrizations.weight_norm(linear)
            with torch.no_grad():
                linear.parametrizations.weight.original0.mul_(1.5)
        else:
            nn.utils.weight_norm(linear)
            with torch.no_grad():
                linear.weight_g.mul_(1.5)

    assert_changed(pair, change)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_parametrized_norm_and_removed(pair):
    class Doubled(nn.Module):
        def forward(self, weight):
            return weight * 2

    paths = ["model.norm", "model.layers.0.input_layernorm"]

    def change(model):
        for path in paths:
            parametrize.register_parametrization(model.get_submodule(path), "weight", Doubled())

    before = assert_same(*pair)
    assert_changed(pair, change)
    for model in pair:
        for path in paths:
            parametrize.remove_parametrizations(model.get_submodule(path), "weight", leave_parametrized=False)
    assert torch.equal(assert_same(*pair), before)


def test_parameter_data_exchanged(pair):
    """What optimisers with their own storage do."""

    def change(model):
        for parameter in model.parameters():
            parameter.data = parameter.data * 1.1

    assert_changed(pair, change)


# -- modules -------------------------------------------------------------------------------------------------


def test_layer_of_another_kind_and_fewer_layers(pair):
    """A whole layer replaced by one that was never captured, and layers dropped."""
    other = make("llama", seed=4)

    def change(model):
        model.model.layers[0] = copy.deepcopy(other.model.layers[1])

    assert_changed(pair, change)

    def drop(model):
        model.model.layers = model.model.layers[:1]

    assert_changed(pair, drop)


class Shared(nn.Module):
    """One module under two names."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.b = self.a
        self.norm = nn.RMSNorm(8)

    def forward(self, x):
        x = self.norm(x)
        return self.a(x) * torch.sigmoid(self.b(x) * 2) + self.a(x)


@pytest.mark.parametrize("replaced", ["a", "b"])
def test_one_of_two_names_of_a_module_replaced(replaced):
    model = Shared()
    optimised = ligerfx.optimize(model, (torch.randn(2, 3, 8),))
    x = torch.randn(2, 3, 8)
    assert torch.equal(optimised(x), model(x))
    other = nn.Linear(8, 8)
    for m in (model, optimised):
        setattr(m, replaced, other)
    assert torch.equal(optimised(x), model(x))


# -- torch's own tools ---------------------------------------------------------------------------------------


def test_functional_call(pair):
    """Other parameters, and gradients with respect to them."""
    inputs = default_batch(pair[0])
    results = []
    for model in pair:
        other = {n: (p.detach() * 1.3).requires_grad_() for n, p in model.named_parameters()}
        output = torch.func.functional_call(model, other, kwargs=inputs)
        gradients = torch.autograd.grad(output.loss, list(other.values()))
        results.append((output.loss, output.logits + 0, *gradients))
        assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not torch.equal(results[0][0], pair[0](**inputs).loss)


def test_grad_of_functional_call(pair):
    inputs = default_batch(pair[0])
    found = []
    for model in pair:
        parameters = {n: p.detach() for n, p in model.named_parameters()}
        loss = lambda p, model=model: torch.func.functional_call(model, p, kwargs=inputs).loss  # noqa: E731
        found.append(torch.func.grad(loss)(parameters))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_threads():
    """Each thread optimises a model of its own and all call a shared one, in ways that must be captured first."""
    shared = make("llama", num_hidden_layers=1)
    shared_inputs = default_batch(shared)
    optimised = ligerfx.optimize(shared)
    expected = shared(**shared_inputs).loss.item()
    variants = [shared_inputs, {**shared_inputs, "output_hidden_states": True}]
    losses, errors = [], []

    def work(number):
        try:
            own = make("llama", seed=number, num_hidden_layers=1)
            mine = ligerfx.optimize(own)
            for variant in variants:
                losses.append(optimised(**variant).loss.item())
                assert torch.equal(mine(**variant).loss, own(**variant).loss)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and losses == [expected] * 4


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


def test_export(pair):
    model, optimised = (m.eval() for m in pair)
    inputs = {name: default_batch(model)[name] for name in ("input_ids", "attention_mask")}
    with pytest.raises(RuntimeError, match="Export the original model"):
        torch.export.export(optimised, (), inputs)
    torch.compile(torch.sin, backend="eager")(torch.ones(2))  # torch.export comes without the compiler's front end
    exported = torch.export.export(Logits(optimised), (), inputs).module()
    with torch.no_grad():
        assert torch.equal(exported(**inputs), Logits(model)(**inputs))
        model.lm_head.weight.mul_(2)
        assert not torch.equal(exported(**inputs), Logits(model)(**inputs))


def replica_of(model):
    """What `torch.nn.parallel.replicate` makes for one GPU, which it does not make of a model on the CPU."""
    modules = list(model.modules())
    replicas = {module: module._replicate_for_data_parallel() for module in modules}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            setattr(replica, name, replicas[child])
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter.clone())
    return replicas[model]


def test_data_parallel_runs_the_original_and_says_so(pair):
    model, optimised = pair
    inputs = default_batch(model)
    expected = equality.run(model, inputs)
    with pytest.warns(UserWarning, match="nn.DataParallel runs the original forward of LlamaForCausalLM"):
        replica = replica_of(optimised)
    assert not any(isinstance(m, ligerfx.OptimizedModule) for m in replica.modules())
    output = replica(**inputs)
    output.loss.backward()
    assert torch.equal(output.loss, expected[0]) and torch.equal(output.logits, expected[1])
    assert all(torch.equal(p.grad, expected[2][name]) for name, p in optimised.named_parameters())
    assert isinstance(optimised, ligerfx.OptimizedModule)
    optimised.zero_grad()
    assert_same(model, optimised)


def test_who_watches_operations_does_not_see_those_of_a_capture(pair):
    """In the first call of a kind; under torch's counter, for its hooks of all modules, calls are captured anew."""

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            assert not any(isinstance(x, (FakeTensor, torch.SymInt)) for x in tree_leaves((args, kwargs))), function
            return function(*args, **kwargs)

    inputs, counts = default_batch(pair[0]), []
    with Watching():
        output = pair[1](**inputs, output_hidden_states=True)
    assert torch.equal(output.hidden_states[1], pair[0](**inputs, output_hidden_states=True).hidden_states[1])
    for m in pair:
        for _ in range(2):
            with FlopCounterMode(display=False) as counter:
                m(**inputs).loss.backward()
            counts.append(counter.get_total_flops())
    assert type(counts[2]) is int and len(set(counts)) == 1, counts
