"""The comparison of errors in bf16 that the zoo is judged by: chance does not fail it, and an error does not pass."""

import copy
import random

import noise
import pytest
import torch
import zoo
import zoo_check

RATIOS = {"equal": 1.0, "a little better": 0.9}


def rounding(ratio, kind, seed, outliers=0.02):
    """Errors of a batch as they are in models with experts: of several sizes, and now and then a hundred times larger,
    in both computations independently."""
    chance = random.Random(seed)

    def error(scale):
        size = abs(chance.gauss(0, 1)) if kind == "loss" else chance.lognormvariate(0, 0.5)
        return 0.01 * scale * size * (100 if chance.random() < outliers else 1)

    return lambda number: [{kind: error(1.0)}, {kind: error(ratio)}]


@pytest.mark.parametrize("kind", ["loss", "logits"])
@pytest.mark.parametrize("ratio", RATIOS.values(), ids=RATIOS)
def test_chance_is_not_called_wrong(kind, ratio):
    found = [noise.compared(rounding(ratio, kind, seed)) for seed in range(100)]
    assert not any(result["wrong"] for result in found)


@pytest.mark.parametrize("kind, ratio", [("loss", 2.0), ("logits", 1.5), ("gradients", 2.0)])
def test_larger_errors_do_not_pass(kind, ratio):
    assert all(noise.compared(rounding(ratio, kind, seed))["wrong"] == [kind] for seed in range(100))


def test_errors_too_small_to_matter_are_equal():
    result = noise.compared(lambda number: [{"loss": 1e-7 * number}, {"loss": 1e-5}])
    assert not result["wrong"] and result["batches"] == noise.FIRST


def test_nan_is_wrong_unless_the_model_gives_it():
    nan = float("nan")
    assert noise.compared(lambda n: [{"loss": 0.1}, {"loss": nan if n == 5 else 0.1}])["wrong"] == ["loss"]
    assert not noise.compared(lambda n: [{"loss": nan}, {"loss": nan}])["wrong"]


def test_a_model_that_rounds_once_more_is_wrong(monkeypatch):
    """The root mean square of each norm in bf16 rather than in fp32."""

    def rounded(module, args, output):
        x = args[0]
        return module.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon))

    def worse(model, inputs):
        model = copy.deepcopy(model)
        for module in model.modules():
            if "RMSNorm" in type(module).__name__:
                module.register_forward_hook(rounded)
        return model

    monkeypatch.setattr(zoo_check.ligerfx, "optimize", worse)
    model = zoo.build("llama")
    assert zoo_check.low_precision("llama", zoo.example(model, *zoo_check.SHAPE), zoo)["wrong"]
