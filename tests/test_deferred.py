"""Deferred logits: nothing is computed before it is looked at, and then it is what eager gives."""

import contextlib
import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.checkpoint import checkpoint

import ligerfx
from ligerfx import DeferredTensor
from ligerfx.deferred import deferred_logits
from models import batch, make

B, S, H, V = 2, 3, 4, 5
LINEAR = F.linear  # `computed` counts calls of the one that ligerfx looks up


@pytest.fixture
def computed(monkeypatch):
    """A list that grows by one at every linear layer that is computed."""
    calls, linear = [], F.linear

    def counting(*args):
        calls.append(1)
        return linear(*args)

    monkeypatch.setattr("ligerfx.deferred.F.linear", counting)
    return calls


def parts(bias=True, dtype=torch.float32):
    x = torch.randn(B, S, H, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, H, dtype=dtype, requires_grad=True)
    return x, weight, torch.randn(V, dtype=dtype, requires_grad=True) if bias else None


def eager(x, weight, bias=None, softcap=None, scale=1.0):
    logits = LINEAR(x, weight, bias) * scale
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


METADATA = {
    "shape": (lambda t: t.shape, torch.Size([B, S, V])),
    "size()": (lambda t: t.size(), torch.Size([B, S, V])),
    "size(-1)": (lambda t: t.size(-1), V),
    "ndim": (lambda t: t.ndim, 3),
    "dim()": (lambda t: t.dim(), 3),
    "len": (len, B),
    "numel": (lambda t: t.numel(), B * S * V),
    "dtype": (lambda t: t.dtype, torch.float32),
    "device": (lambda t: t.device, torch.device("cpu")),
    "requires_grad": (lambda t: t.requires_grad, True),
    "is_floating_point": (lambda t: t.is_floating_point(), True),
    "torch.is_floating_point": (torch.is_floating_point, True),
    "is_cuda": (lambda t: t.is_cuda, False),
    "element_size": (lambda t: t.element_size(), 4),
    "nbytes": (lambda t: t.nbytes, 4 * B * S * V),
    "isinstance": (lambda t: isinstance(t, torch.Tensor), True),
    "torch.is_tensor": (torch.is_tensor, True),
}


@pytest.mark.parametrize("name", METADATA)
def test_metadata_computes_nothing(computed, name):
    read, expected = METADATA[name]
    assert read(deferred_logits(*parts())) == expected
    assert not computed


LAZY = {
    "float": (lambda t: t.float(), torch.float32, True),
    "to dtype": (lambda t: t.to(torch.float32), torch.float32, True),
    "to dtype by name": (lambda t: t.to(dtype=torch.float64), torch.float64, True),
    "double": (lambda t: t.double(), torch.float64, True),
    "half": (lambda t: t.half(), torch.float16, True),
    "bfloat16": (lambda t: t.bfloat16(), torch.bfloat16, True),
    "detach": (lambda t: t.detach(), torch.bfloat16, False),
    "contiguous": (lambda t: t.contiguous(), torch.bfloat16, True),
    "a chain": (lambda t: t.float().contiguous().detach().half(), torch.float16, False),
}


@pytest.mark.parametrize("name", LAZY)
def test_casts_stay_deferred(computed, name):
    cast, dtype, requires_grad = LAZY[name]
    inputs = parts(dtype=torch.bfloat16)
    logits = cast(deferred_logits(*inputs))
    assert type(logits) is DeferredTensor and not computed
    assert logits.dtype == dtype and logits.shape == (B, S, V) and logits.requires_grad == requires_grad
    expected = cast(eager(*inputs))
    assert torch.equal(logits + 0, expected) and len(computed) == 1
    assert (logits + 0).requires_grad == requires_grad


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"scale": 0.5}, {"softcap": 2.0, "scale": 3}], ids=str)
def test_values_and_gradients_are_those_of_eager(options, bias):
    inputs = parts(bias)
    leaves = [t for t in inputs if t is not None]
    logits, expected = deferred_logits(*inputs, **options), eager(*inputs, **options)
    seed = torch.randn(B, S, V)
    found = torch.autograd.grad(logits * 1, leaves, seed)
    assert torch.equal(logits + 0, expected)
    assert all(map(torch.equal, found, torch.autograd.grad(expected, leaves, seed)))


def test_backward_from_the_tensor_itself():
    inputs = parts()
    deferred_logits(*inputs).sum().backward()
    found = [t.grad.clone() for t in inputs]
    for t in inputs:
        t.grad = None
    deferred_logits(*inputs).backward(torch.ones(B, S, V))
    assert all(torch.equal(t.grad, g) for t, g in zip(inputs, found, strict=True))


def test_second_use_computes_once(computed):
    logits = deferred_logits(*parts())
    assert torch.equal(logits + 0, logits * 1)
    logits.float().sum()
    assert len(computed) == 1


USES = {
    "argmax": lambda t: t.argmax(-1),
    "torch.argmax": lambda t: torch.argmax(t, dim=-1),
    "last position": lambda t: t[:, -1],
    "mask": lambda t: t[t > 0],
    "tensor index": lambda t: t[torch.tensor([1, 0])],
    "index by a tensor": lambda t: torch.arange(10.0).take(t.argmax(-1)),
    "stack": lambda t: torch.stack([t, t * 2]),
    "cat": lambda t: torch.cat([t, t], 0),
    "softmax": lambda t: F.softmax(t, -1),
    "cross entropy": lambda t: F.cross_entropy(t.view(-1, V), torch.zeros(B * S, dtype=torch.long)),
    "right operand": lambda t: 1 - t,
    "tensor on the left": lambda t: torch.ones(V) * t,
    "matmul": lambda t: t @ torch.ones(V, 2),
    "comparison": lambda t: t == t,
    "cpu": lambda t: t.cpu(),
    "to device": lambda t: t.to("cpu"),
    "to device and dtype": lambda t: t.to("cpu", torch.float64),
    "clone": lambda t: t.clone(),
    "unbind": lambda t: torch.stack(t.unbind(0)),
    "iteration": lambda t: torch.stack(list(t)),
    "transpose": lambda t: t.mT,
    "max": lambda t: t.max(-1).values,
    "topk": lambda t: torch.topk(t, 2).indices,
    "where": lambda t: torch.where(t > 0, t, 0),
    "deep copy": lambda t: copy.deepcopy(t.detach()),
    "out": lambda t: torch.add(t.detach(), 1, out=torch.empty(B, S, V)),
    "copy into": lambda t: torch.empty(B, S, V).copy_(t.detach()),
    "setitem of another": lambda t: torch.zeros(B, S, V).index_copy(0, torch.arange(B), t),
}


@pytest.mark.parametrize("name", USES)
def test_use(name):
    inputs = parts()
    found, expected = USES[name](deferred_logits(*inputs)), USES[name](eager(*inputs))
    assert found.dtype == expected.dtype and torch.equal(found, expected)


def test_leaving_torch():
    inputs = parts()
    logits, expected = deferred_logits(*inputs), eager(*inputs)
    assert repr(logits) == repr(F.linear(*inputs)) and str(logits) == str(F.linear(*inputs))
    assert np.array_equal(logits.detach().numpy(), expected.detach().numpy())
    assert np.array_equal(np.asarray(logits.detach()), expected.detach().numpy())
    assert logits.tolist() == expected.tolist()
    assert logits[0, 0, 0].item() == expected[0, 0, 0].item()
    assert f"{logits.sum():.4f}" == f"{expected.sum():.4f}"
    with pytest.raises(RuntimeError, match="detach"):
        logits.numpy()


def test_in_place_on_the_logits():
    inputs = parts()
    logits, expected = deferred_logits(*inputs).detach(), eager(*inputs).detach()
    for t in (logits, expected):
        t.mul_(2)
        t[0, 0] = 0
    assert torch.equal(logits + 0, expected)


def test_pickle_and_save(tmp_path):
    inputs = parts()
    torch.save(deferred_logits(*inputs).detach(), tmp_path / "logits.pt")
    assert torch.equal(torch.load(tmp_path / "logits.pt") + 0, eager(*inputs))


def test_used_without_grad_then_with():
    inputs = parts()
    logits = deferred_logits(*inputs)
    with torch.no_grad():
        assert not (logits + 0).requires_grad
    total = logits.sum()
    assert total.requires_grad
    found = torch.autograd.grad(total, inputs)
    assert all(map(torch.equal, found, torch.autograd.grad(eager(*inputs).sum(), inputs)))


def test_used_without_grad_after_with():
    logits = deferred_logits(*parts())
    assert (logits + 0).requires_grad
    with torch.no_grad():
        assert not (logits + 0).requires_grad
    assert not logits.detach().sum().requires_grad


def test_made_without_grad():
    with torch.no_grad():
        logits = deferred_logits(*parts())
    assert not logits.requires_grad and not (logits + 0).requires_grad


def test_used_in_inference_mode():
    inputs = parts()
    with torch.inference_mode():
        logits = deferred_logits(*inputs)
        assert torch.equal(logits.argmax(-1), eager(*inputs).argmax(-1))


@pytest.mark.parametrize("which", [0, 1, 2], ids=["x", "weight", "bias"])
def test_change_in_place_before_first_use_is_an_error(which):
    inputs = parts()
    logits = deferred_logits(*inputs)
    with torch.no_grad():
        inputs[which].add_(1)
    assert logits.shape == (B, S, V)
    with pytest.raises(RuntimeError, match="Read outputs.logits before the weights change"):
        logits + 0
    with pytest.raises(RuntimeError, match="weights have changed"):
        logits.float().argmax(-1)


def test_change_in_place_after_first_use_is_not():
    inputs = parts()
    logits, expected = deferred_logits(*inputs), eager(*inputs)
    expected = expected.detach().clone()
    logits + 0
    with torch.no_grad():
        inputs[1].add_(1)
    assert torch.equal(logits.detach() + 0, expected)


def test_autocast():
    inputs = parts()
    with torch.autocast("cpu", torch.bfloat16):
        logits, expected = deferred_logits(*inputs), eager(*inputs)
        assert logits.dtype == expected.dtype == torch.bfloat16
        assert torch.equal(logits + 0, expected)


def test_used_after_autocast_has_ended():
    """The dtype that was promised, and the values of eager, which computed them inside."""
    inputs = parts()
    with torch.autocast("cpu", torch.bfloat16):
        logits, expected = deferred_logits(*inputs), eager(*inputs)
    found = logits + 0
    assert found.dtype == logits.dtype == torch.bfloat16
    assert torch.equal(found, expected)


def test_made_outside_autocast_and_used_inside():
    inputs = parts()
    logits, expected = deferred_logits(*inputs), eager(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = logits + 0
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_pytree():
    inputs = parts()
    logits = deferred_logits(*inputs)
    leaves, _ = tree_flatten({"logits": logits, "other": (1, logits)})
    assert leaves[0] is logits and leaves[2] is logits
    doubled = tree_map(lambda t: t * 2, [logits])
    assert torch.equal(doubled[0], eager(*inputs) * 2)


# -- in a model's output -------------------------------------------------------------------------------------


pytestmark = pytest.mark.usefixtures("references")


def test_model_output():
    model = make("llama")
    inputs = batch(model)
    optimised = ligerfx.optimize(model, inputs)
    output, expected = optimised(**inputs), model(**inputs)
    assert type(output) is type(expected) and output.keys() == expected.keys()
    assert type(output.logits) is DeferredTensor
    assert output["logits"] is output.logits and output[1] is output.logits
    assert output.logits.shape == expected.logits.shape and output.logits._value is None
    torch.testing.assert_close(output.logits + 0, expected.logits)
    torch.testing.assert_close(output.loss, expected.loss)


def test_model_output_as_a_tuple():
    model = make("llama")
    inputs = batch(model)
    optimised = ligerfx.optimize(model, inputs)
    loss, logits, *_ = optimised(**inputs, return_dict=False)
    expected = model(**inputs, return_dict=False)
    torch.testing.assert_close(loss, expected[0])
    torch.testing.assert_close(logits + 0, expected[1])


def test_optimiser_step_before_the_logits_are_read():
    model = make("llama")
    inputs = batch(model)
    optimised = ligerfx.optimize(model, inputs)
    optimiser = torch.optim.SGD(optimised.parameters(), lr=0.1)
    output = optimised(**inputs)
    output.loss.backward()
    optimiser.step()
    with pytest.raises(RuntimeError, match="optimiser step"):
        output.logits.argmax(-1)


def _fused_step(parameters):
    torch.optim.AdamW(parameters, lr=1e-3, fused=True).step()


def _assign(parameters):
    for parameter in parameters:
        parameter.data = parameter.data * 0.9


def _write(parameters):
    for parameter in parameters:
        parameter.data.sub_(0.01 * parameter.grad)


@pytest.mark.parametrize("step", [_fused_step, _assign, _write])
def test_steps_that_leave_the_version_of_a_weight_are_noticed(step):
    model = make("llama")
    inputs = batch(model)
    optimised = ligerfx.optimize(model, inputs)
    output = optimised(**inputs)
    output.loss.backward()
    before = optimised.lm_head.weight._version
    step(list(optimised.parameters()))
    assert optimised.lm_head.weight._version == before, "the step says so itself"
    with pytest.raises(RuntimeError, match="optimiser step"):
        output.logits.argmax(-1)


@pytest.mark.parametrize("step", [_fused_step, _assign, _write])
def test_a_step_of_other_weights_changes_no_logits(step):
    model = make("llama")
    inputs = batch(model)
    expected = model(**inputs).logits
    optimised = ligerfx.optimize(model, inputs)
    output = optimised(**inputs)
    output.loss.backward()
    step([parameter for name, parameter in optimised.named_parameters() if name != "lm_head.weight"])
    torch.testing.assert_close(output.logits, expected, rtol=1e-5, atol=1e-5)


class Squares(torch.autograd.Function):
    """A loss that takes logits as they are, which nobody asks for their values before."""

    @staticmethod
    def forward(ctx, logits):
        ctx.save_for_backward(logits)
        return logits.square().sum()

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0]


TAKEN = {
    "as it is": Squares.apply,
    "cast": lambda logits: Squares.apply(logits.float()),
    "cast and copied": lambda logits: Squares.apply(logits.to(torch.float64).clone()).float(),
    "used before": lambda logits: logits.mean() + Squares.apply(logits),
    "checkpointed": lambda logits: checkpoint(lambda x: x.square().sum(), logits, use_reentrant=True),
}


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "scale": 3}], ids=str)
@pytest.mark.parametrize("taken", TAKEN)
def test_a_function_that_takes_the_tensor_itself_gives_gradients(options, taken):
    inputs = parts()
    gradients = []
    for function in (deferred_logits, eager):
        TAKEN[taken](function(*inputs, **options)).backward()
        gradients.append([t.grad for t in inputs])
        for t in inputs:
            t.grad = None
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_function_that_takes_the_tensor_itself_computes_it_once(computed):
    x, weight, bias = parts()
    logits = deferred_logits(x, weight, bias)
    with torch._C.DisableTorchFunctionSubclass():  # as TorchScript and C++ code call operations
        _ = logits.exp() + logits.sin() + logits.cos()
    assert len(computed) == 1
    assert (logits * 2).requires_grad and len(computed) == 2  # with a graph


def test_weights_that_are_not_numbers_have_not_changed():
    x, weight, bias = parts()
    with torch.no_grad():
        weight.fill_(float("nan"))
    assert deferred_logits(x, weight, bias).sum().isnan()


def test_second_derivatives_of_a_function_that_takes_the_tensor_itself():
    inputs = parts()
    found, expected = [], []
    for make_logits, results in ((deferred_logits, found), (eager, expected)):
        first = torch.autograd.grad(Squares.apply(make_logits(*inputs, softcap=2.0)), inputs, create_graph=True)
        results += torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_hook_sees_the_gradient_of_a_function_that_takes_the_tensor_itself():
    x, weight, bias = parts()
    logits = deferred_logits(x, weight, bias)
    handles = [logits.register_hook(lambda grad: grad * 3), logits.register_hook(lambda grad: grad * 5)]
    handles[1].remove()
    (found,) = torch.autograd.grad(Squares.apply(logits), x)
    (expected,) = torch.autograd.grad(Squares.apply(eager(x, weight, bias)), x)
    torch.testing.assert_close(found, 3 * expected)


@pytest.mark.parametrize("watch", [lambda t: t.retain_grad(), lambda t: t.register_hook(lambda grad: None)])
def test_whoever_wants_the_gradient_of_the_logits_hears_what_it_lacks(watch):
    model = make("llama", num_hidden_layers=1)
    gm = ligerfx.optimize(model, inputs := batch(model))
    with pytest.warns(UserWarning, match="the model's own loss is not") as caught:
        watch(gm(**inputs).logits)
    assert caught[0].filename == __file__
    gm.get_output_embeddings().register_forward_hook(lambda *_: None)
    gradients = []
    with pytest.warns(UserWarning, match="logits are computed in full"):
        out = gm(**inputs)
    for output in (model(**inputs), out):
        output.logits.retain_grad()
        output.loss.backward()
        gradients.append(output.logits.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


def test_a_weight_changed_before_the_gradient_of_a_function_that_takes_the_tensor_itself():
    x, weight, bias = parts()
    loss = Squares.apply(deferred_logits(x, weight, bias))
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="have changed since"):
        loss.backward()


@pytest.mark.parametrize("context", [contextlib.nullcontext, torch.autograd.graph.save_on_cpu])
def test_checkpointing_of_what_reads_the_logits(context, computed):
    """It runs again in the backward, and finds the values: it must save as many tensors."""
    inputs = parts()
    gradients = []
    for make_logits in (deferred_logits, eager):
        with context():
            logits = make_logits(*inputs, softcap=2.0)
            checkpoint(lambda x: x.float().logsumexp(-1).square().sum(), logits, use_reentrant=False).backward()
        gradients.append([t.grad for t in inputs])
        for t in inputs:
            t.grad = None
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert len(computed) == 2, "for the values, and for their gradient"


@pytest.mark.parametrize("labels", [True, False])
def test_reentrant_checkpointing_of_the_whole_model(labels):
    """It runs the model without gradients, and its outputs get them from the checkpoint."""
    model = make("llama")
    inputs = batch(model)
    ids, labels = inputs["input_ids"], inputs["labels"] if labels else None
    gradients = []
    for m in (model, ligerfx.optimize(model, inputs)):
        embeds = m.get_input_embeddings()(ids)

        def run(embeds, m=m):
            output = m(inputs_embeds=embeds, labels=labels, use_cache=False)
            return output.logits if labels is None else (output.loss, output.logits)

        out = checkpoint(run, embeds, use_reentrant=True)
        loss, logits = (0.0, out) if labels is None else out
        (loss + logits.float().logsumexp(-1).pow(2).mean()).backward()
        gradients.append({n: p.grad for n, p in m.named_parameters()})
        m.zero_grad(set_to_none=True)
    for name, gradient in gradients[0].items():
        atol = 1e-5 * gradient.abs().max().item()
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=atol, msg=name)


def test_backward_through_loss_and_logits_together():
    model = make("llama")
    inputs = batch(model)
    optimised = ligerfx.optimize(model, inputs)
    gradients = []
    for m in (model, optimised):
        output = m(**inputs)
        (output.loss + output.logits.float().logsumexp(-1).pow(2).mean()).backward()
        gradients.append({n: p.grad for n, p in m.named_parameters()})
        m.zero_grad(set_to_none=True)
    for name, gradient in gradients[0].items():
        atol = 1e-5 * gradient.abs().max().item()
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_the_dtype_of_the_original(dtype):
    model = make("gemma2", dtype)
    inputs = batch(model)
    optimised = ligerfx.optimize(model, inputs)
    assert optimised(**inputs).logits.dtype == model(**inputs).logits.dtype == dtype


def late(computed_with=lambda logits: logits):
    """Deferred logits that are late, and what they are made of."""
    made_of = parts()
    return deferred_logits(*made_of, late=computed_with), made_of


@pytest.mark.parametrize("cast", [lambda t: t, torch.Tensor.float, lambda t: t.to(torch.float64).contiguous()])
def test_late_logits_have_a_graph_where_they_are_read_with_gradients(computed, cast):
    logits, made_of = late()
    logits = cast(logits)
    assert isinstance(logits, DeferredTensor) and not logits.requires_grad and not computed
    with torch.no_grad():
        values = logits + 0
    assert not values.requires_grad and len(computed) == 1
    read = logits + 0
    torch.testing.assert_close(read, values, rtol=0, atol=0)
    found = torch.autograd.grad(read.square().sum(), made_of)
    expected = torch.autograd.grad(eager(*made_of).square().sum(), made_of)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(logits + 0, values, rtol=0, atol=0)
    assert len(computed) == 2  # once for each


def test_the_last_word_on_late_logits_with_a_graph():
    logits, made_of = late(lambda logits: logits * 3)
    with torch.no_grad():
        torch.testing.assert_close(logits + 0, eager(*made_of))
    torch.testing.assert_close(logits + 0, 3 * eager(*made_of))


def test_late_logits_made_without_gradients_have_none():
    with torch.no_grad():
        logits, _ = late(lambda logits: pytest.fail("they have no graph"))
    assert not (logits + 0).requires_grad


def test_late_logits_detach_but_for_zero3(computed):
    logits, _ = late()
    assert not (logits.detach() + 0).requires_grad
    hook = {"__name__": "deepspeed.runtime.zero.parameter_offload"}
    exec("def forward(output): return output.detach()", hook)
    with torch.no_grad():
        result = hook["forward"](logits)
    assert isinstance(result, DeferredTensor) and result is not logits and not result.requires_grad
    assert (result + 0).requires_grad
    assert not (deferred_logits(*parts()).detach() + 0).requires_grad
