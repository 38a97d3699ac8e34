"""What `optimize` does to one model of the zoo: what is captured and rewritten, whether the numbers are the same."""

from __future__ import annotations

import copy
import re
import time
from collections import Counter
from types import ModuleType
from typing import Any

import noise
import torch
import zoo as causal
from sites import Sites, counted
from torch import Tensor, nn

import ligerfx

SHAPE, OTHER_SHAPE = (2, 9), (3, 14)
TIGHT = 1e-5
"""Relative to the largest element: the tolerance of fp32 where the bits differ."""

IDIOMS = {
    "rms_norm": ("rms_norm",),
    "glu": ("glu",),
    "rope": ("rope",),
    "loss": ("linear_cross_entropy", "cross_entropy"),
}
"""Which idioms of a report count as which sites."""


def check(name: str, zoo: ModuleType = causal) -> dict[str, Any]:
    """Everything about one model of a zoo, as JSON. Raises what building or running the original model raises."""
    model = zoo.build(name)
    inputs = zoo.example(model, *SHAPE)
    result: dict[str, Any] = {
        "class": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    with counted(model) as sites:
        expected = run(model, inputs)
    result["sites"] = sites.total
    result["repeats"] = not differences(expected, run(model, inputs))

    start = time.perf_counter()
    optimised = ligerfx.optimize(model, inputs)
    result["seconds"] = round(time.perf_counter() - start, 2)
    report = optimised.report
    result["captured"] = "" not in report.opaque
    result["opaque"] = {path or "(model)": reason for path, reason in report.opaque.items()}
    result["rewritten"] = {
        site: sum(report.idioms.get(idiom, 0) for idiom in idioms) for site, idioms in IDIOMS.items()
    }
    result["patterns"] = dict(Counter(rewrite.pattern for rewrite in report.rewrites))
    result["unexplained"] = {
        site: missing for site in IDIOMS if (missing := unexplained(sites, report, site, result["rewritten"][site]))
    }
    result["near_misses"] = sorted({(m.pattern, _folded(m.module), m.source, m.reason) for m in report.near_misses})

    result["fp32"] = beyond_rounding(model, inputs, expected, run(optimised, inputs))
    other = zoo.example(model, *OTHER_SHAPE, seed=1)
    try:
        expected_other = run(model, other)
    except Exception as error:
        result["other_shape"] = f"the model itself fails: {type(error).__name__}: {str(error)[:200]}"
    else:
        result["other_shape"] = beyond_rounding(model, other, expected_other, run(optimised, other))
    result["recaptured"] = len(optimised._ligerfx_programs) > 1
    if hasattr(zoo, "text_example"):
        result["text_alone"] = _text_alone(model, optimised, zoo.text_example(model, *SHAPE))
    result["bf16"] = low_precision(name, inputs, zoo)
    return result


def unexplained(sites: Sites, report: ligerfx.Report, site: str, rewritten: int) -> list[str]:
    """The places that were counted, of which none says that it was rewritten or why it was not."""
    paths = list(getattr(sites, site))
    if rewritten >= len(paths):
        return []
    done = {p for r in report.rewrites if set(r.idioms) & set(IDIOMS[site]) for p in (r.module, *r.reach)}
    near = {m.module for m in report.near_misses if set(m.idioms) & set(IDIOMS[site])}
    told = [p for p in paths if p in done or p in near or _is_opaque(p, report)]
    # What owns no parameters stands in the code of its caller.
    told += [p for p in paths if p not in report.code and p.rpartition(".")[0] in (done | near)]
    return sorted(set(paths) - set(told))


def _is_opaque(path: str, report: ligerfx.Report) -> bool:
    """Whether a module was not captured, or is inside one that was not and has no capture of its own."""
    while path not in report.opaque and path not in report.code and path:
        path = path.rpartition(".")[0]
    return path in report.opaque


def _text_alone(model: nn.Module, optimised: nn.Module, text: dict[str, Any]) -> dict[str, float | str] | str:
    """A call without images, after those with images."""
    try:
        expected = run(model, text)
    except Exception as error:
        return f"the model itself fails: {type(error).__name__}: {str(error)[:200]}"
    return beyond_rounding(model, text, expected, run(optimised, text))


def run(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Loss, logits and gradients by name of one forward and backward."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    output = model(**copy.deepcopy(inputs))
    values = {"loss": output.loss.detach() + 0}
    output.loss.sum().backward()
    if isinstance(getattr(output, "logits", None), Tensor):
        values["logits"] = output.logits.detach() + 0
    for parameter, tensor in model.named_parameters():
        if tensor.grad is not None:
            values[parameter] = tensor.grad
    model.zero_grad(set_to_none=True)
    return values


def differences(expected: dict[str, Tensor], found: dict[str, Tensor]) -> dict[str, float | str]:
    """By name, what is further off than `TIGHT`; {} where everything is equal. NaN where the model itself gives NaN
    is equal."""
    wrong: dict[str, float | str] = {}
    for name in expected.keys() | found.keys():
        if name not in found or name not in expected:
            wrong[name] = "missing" if name in expected else "should not be there"
            continue
        a, b = found[name], expected[name]
        if a.shape != b.shape or a.dtype != b.dtype:
            wrong[name] = f"{a.dtype} {list(a.shape)} instead of {b.dtype} {list(b.shape)}"
        elif not torch.equal(a.nan_to_num(), b.nan_to_num()) or not torch.equal(a.isnan(), b.isnan()):
            off = ((a - b).abs().max() / b.abs().max().clamp_min(1e-12)).item()
            if not off <= TIGHT:
                wrong[name] = off
    return wrong


def beyond_rounding(
    model: nn.Module, inputs: dict[str, Any], expected: dict[str, Tensor], found: dict[str, Tensor]
) -> dict[str, float | str]:
    """`differences`, less those of values that are rounding errors in the original itself (the gradient of a bias of
    keys is zero): a run in double precision tells, from which `found` may be twice as far as the original."""
    off = differences(expected, found)
    if not any(isinstance(amount, float) for amount in off.values()):
        return off
    exact = {n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in inputs.items()}
    try:
        truth = run(copy.deepcopy(model).double(), exact)
    except Exception:  # some operations have no double precision
        return off

    def error(values: dict[str, Tensor], name: str) -> float:
        return (values[name].double() - truth[name].double()).norm().item()

    return {n: e for n, e in off.items() if isinstance(e, str) or error(found, n) > 2 * error(expected, n)}


def low_precision(name: str, inputs: dict[str, Any], zoo: ModuleType) -> dict[str, Any]:
    """How far loss, logits and gradients in bf16 are from fp32: the optimised model's errors in those of the original,
    over as many models and batches as it takes to tell."""
    original = zoo.build(name, torch.bfloat16)
    truth_model = zoo.build(name)
    try:
        eager = run(original, inputs)
    except Exception as error:
        return {"fails": f"the model itself fails: {type(error).__name__}: {str(error)[:200]}"}
    optimised = ligerfx.optimize(original, inputs)
    ours = run(optimised, inputs)
    if eager.keys() == ours.keys() and all(torch.equal(eager[n], ours[n]) for n in eager):
        return {"same bits": True}

    def errors(seed: int) -> list[dict[str, float]]:
        _shuffle(original, truth_model, seed)
        batch = zoo.example(original, *SHAPE, seed=seed)
        truth = run(truth_model, batch)
        return [_errors(run(candidate, batch), truth) for candidate in (original, optimised)]

    return noise.compared(errors)


def _shuffle(rounded: nn.Module, exact: nn.Module, seed: int) -> None:
    """Makes another random model of one, for the price of a copy: the columns of each weight in another order. `exact`
    gets the same weights. Errors for one set of weights have a part in common, which more batches do not average."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight, truth in zip(rounded.parameters(), exact.parameters(), strict=True):
            if weight.ndim and seed:
                weight.copy_(weight[..., torch.randperm(weight.shape[-1], generator=generator)])
            truth.copy_(weight)


def _errors(values: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    off = {
        name: ((values[name].float() - t).norm() / t.norm().clamp_min(1e-12)).item()
        for name, t in truth.items()
        if name in values and t.norm() > 0
    }
    gradients = [e for name, e in off.items() if name not in ("loss", "logits")]
    mean = (sum(e * e for e in gradients) / max(len(gradients), 1)) ** 0.5
    return {"loss": off.get("loss", 0.0), "logits": off.get("logits", 0.0), "gradients": mean}


def _folded(path: str) -> str:
    return re.sub(r"\.\d+", ".*", path) or "(model)"
