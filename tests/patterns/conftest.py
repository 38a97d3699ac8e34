"""Fixtures of the pattern tests: the plain PyTorch references run, so numbers compare to the bit."""

from collections.abc import Callable

import pytest
import torch
from torch.fx.node import map_arg

import ligerfx


@pytest.fixture(autouse=True)
def _plain(references):
    """The references everywhere, so that numbers compare to the bit."""


def tensors_of(output) -> list[torch.Tensor]:
    """The tensors of a tensor, tuple or dict; deferred ones computed."""
    if isinstance(output, dict):
        output = tuple(output.values())
    return [t + 0 for t in output] if isinstance(output, tuple) else [output + 0]


def run(module, inputs):
    """Outputs, and gradients of all float inputs and parameters, for fixed random upstream gradients."""
    inputs = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in inputs]
    outputs = tensors_of(module(*inputs))
    generator = torch.Generator().manual_seed(1)
    seeds = [torch.randn(t.shape, generator=generator).to(t.dtype) for t in outputs]
    leaves = [t for t in (*inputs, *module.parameters()) if t.requires_grad]
    return outputs, torch.autograd.grad(outputs, leaves, seeds, allow_unused=True)


@pytest.fixture
def assert_same() -> Callable:
    """Assert equal outputs and gradients of two modules: to the bit, or within `rtol` of the largest."""

    def check(original, optimised, inputs, *, rtol=0.0):
        (expected, expected_grads), (found, found_grads) = run(original, inputs), run(optimised, inputs)
        for a, b in zip((*found, *found_grads), (*expected, *expected_grads), strict=True):
            assert (a is None) == (b is None)
            if b is None:
                continue
            assert a.dtype == b.dtype and a.shape == b.shape
            if rtol == 0:
                assert torch.equal(a, b), f"differs by {(a - b).abs().max().item()}"
            else:
                torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * b.abs().max().item())

    return check


@pytest.fixture
def calls() -> Callable:
    """The kernels in a module's graph, each with its arguments: parameters by their names, None for results."""

    def name(node):
        return node.target if node.op in ("get_attr", "placeholder") else None

    def calls_in(module):
        nodes = [n for n in module.graph.nodes if n.op == "call_function" and "pattern" in n.meta]
        return [(n.target.__name__, *map_arg(n.args, name), dict(map_arg(n.kwargs, name))) for n in nodes]

    return calls_in


@pytest.fixture
def optimise(assert_same) -> Callable:
    """Optimise a module, assert what was rewritten and that it computes the same; returns the report.

    `patterns` are names or beginnings of names. The inputs of the capture come first; `others` are calls with
    other sizes, which must not need another one.
    """

    def run_optimise(module, inputs, patterns, *, others=(), rtol=0.0):
        optimised = ligerfx.optimize(module, tuple(inputs))
        report = optimised.report
        found = sorted(r.pattern for r in report.rewrites)
        as_expected = len(found) == len(patterns) and all(map(str.startswith, found, sorted(patterns)))
        assert as_expected, (found, patterns, report.near_misses, report.opaque)
        for call in (inputs, *others):
            assert_same(module, optimised, call, rtol=rtol)
        assert len(optimised._ligerfx_programs) <= 1, "another size needed another capture"
        return report

    return run_optimise
