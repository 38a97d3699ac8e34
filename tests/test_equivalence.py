"""The optimised model against the original: counts of rewrites, loss, logits and every gradient.

In fp32 the comparison is direct. In low precision both are compared with the model in double precision, and the
optimised one may not be further from it than the original. On a CPU the plain PyTorch references run, and the
Triton kernels in the interpreter; on a GPU the kernels themselves.
"""

import copy
import functools

import pytest
import torch

import ligerfx
from models import FAMILIES, batch, expected_idioms, make, midsize

GPU = torch.cuda.is_available()
BACKENDS = ["triton"] if GPU else ["reference", "interpreter"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "reference":
        request.getfixturevalue("references")
    return request.param


def run(model, inputs):
    """Loss, logits and gradients by parameter name of one forward and backward."""
    model.zero_grad(set_to_none=True)
    output = model(**inputs)
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return output.loss.detach(), output.logits.detach() + 0, gradients


def error(value, truth):
    """Relative error in the Frobenius norm."""
    return ((value.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()


def assert_equal_in_fp32(model, optimised, inputs, bits):
    loss, logits, gradients = run(model, inputs)
    loss_, logits_, gradients_ = run(optimised, inputs)
    assert gradients.keys() == gradients_.keys()
    if bits:
        assert torch.equal(loss, loss_) and torch.equal(logits, logits_)
        assert all(torch.equal(gradients[name], gradients_[name]) for name in gradients)
        return
    torch.testing.assert_close(loss_, loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(logits_, logits, rtol=1e-5, atol=1e-5 * logits.abs().max().item())
    for name, gradient in gradients.items():
        atol = 1e-5 * gradient.abs().max().item()
        torch.testing.assert_close(gradients_[name], gradient, rtol=1e-5, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def assert_no_worse_than_eager(model, optimised, *size, batches=1):
    """Errors against double precision, over all parameters and batches together; one small parameter may be
    luckier in either, so each is held to twice eager's only."""
    truth = copy.deepcopy(model).double()
    squares = {"eager": [], "ours": []}
    for seed in range(batches):
        inputs = batch(model, *size, seed=seed)
        loss, logits, gradients = run(truth, inputs)
        for name, candidate in (("eager", model), ("ours", optimised)):
            loss_, logits_, gradients_ = run(candidate, inputs)
            errors = [abs(loss_ - loss).item() / loss.item(), error(logits_, logits)]
            squares[name].append(
                torch.tensor(errors + [error(gradients_[n], gradients[n]) for n in gradients]).square()
            )
    eager, ours = (torch.stack(rows).mean(0) for rows in squares.values())
    epsilon = torch.finfo(model.dtype).eps
    assert ours[0].sqrt() <= eager[0].sqrt() * 1.1 + epsilon / 4, f"loss: {ours[0].sqrt()}, eager {eager[0].sqrt()}"
    assert ours[1].sqrt() <= eager[1].sqrt() * 1.1, f"logits: {ours[1].sqrt()}, eager {eager[1].sqrt()}"
    mean, mean_eager = ours[2:].mean().sqrt(), eager[2:].mean().sqrt()
    assert mean <= mean_eager * 1.1, f"gradients: {mean}, eager {mean_eager}"
    worst = (ours[2:].sqrt() / eager[2:].sqrt().clamp_min(epsilon / 4)).max()
    assert worst <= 2, f"one gradient is {worst} times as far off as eager's"


@functools.cache
def captured(family, device):
    """A model in float32 and what `optimize` makes of it. Tests only call them: they have a capture in common."""
    model = make(family, device=device)
    return model, ligerfx.optimize(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_idiom_is_rewritten_and_the_report_prints_it(family, device):
    model, optimised = captured(family, device)
    report = optimised.report
    assert report.idioms == expected_idioms(model)
    norms = report.idioms["rms_norm"]
    assert f"{norms}/{norms} RMSNorm" in str(report)
    assert sum(rewrite.bytes_saved for rewrite in report.rewrites) > 0
    assert all(rewrite.source for rewrite in report.rewrites)
    assert not report.near_misses
    # Older transformers choose longrope's frequencies by a branch on the data; the rest is captured all the same.
    assert not report.opaque or (family == "phi4_longrope" and list(report.opaque) == ["model.rotary_emb"])


@pytest.mark.parametrize("family", FAMILIES)
def test_fp32(family, backend, device):
    model, optimised = captured(family, device)
    assert_equal_in_fp32(model, optimised, batch(model), bits=backend == "reference")


# Where kernels are interpreted, a family for each set of them.
INTERPRETED = ["llama", "gemma2", "gemma3", "qwen3", "phi4"]


@pytest.mark.parametrize(
    ("family", "backend"),
    [(family, b) for b in BACKENDS for family in (INTERPRETED if b == "interpreter" else FAMILIES)],
    indirect=["backend"],
)
def test_low_precision(family, backend, device):
    # Triton's interpreter truncates where bf16 should be rounded, so fp16 stands for low precision there.
    dtype = torch.float16 if backend == "interpreter" else torch.bfloat16
    model = make(family, dtype, device)
    optimised = ligerfx.optimize(model, batch(model, 2, 9))
    assert optimised.report.idioms == expected_idioms(model)
    assert_no_worse_than_eager(model, optimised, 2, 9, batches=6 if GPU else 2)


MIDSIZE_FAMILIES = [f for f in FAMILIES if "_" not in f] if GPU else ["llama", "gemma2", "qwen3", "phi4"]


@pytest.mark.parametrize("family", MIDSIZE_FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_midsize(family, dtype, device, references):
    model = midsize(family, dtype=dtype, device=device)
    size = (2, 64 if GPU else 16)
    optimised = ligerfx.optimize(model, batch(model, *size))
    assert optimised.report.idioms == expected_idioms(model)
    if dtype == torch.float32:
        assert_equal_in_fp32(model, optimised, batch(model, *size), bits=not GPU)
    else:
        assert_no_worse_than_eager(model, optimised, *size)
