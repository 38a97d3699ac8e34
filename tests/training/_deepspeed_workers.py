"""The checks of test_deepspeed.py: the optimised model and the original, each in a DeepSpeed engine."""

import os
import warnings

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["LOCAL_RANK"] = "0"

import deepspeed
import torch
import torch.distributed as dist
from _workers import main, shards
from deepspeed.utils import safe_get_full_grad
from training.zero import idioms, parameters

import ligerfx
from models import make

STEPS = range(5)

# Processes of one machine may reduce by an operation in C++, which it takes minutes to compile. Here gloo does.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def engine_of(model, stage, **settings):
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    return deepspeed.initialize(model=model, config=config(stage) | settings)[0]


def config(stage):
    return {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
        # Every parameter is sharded, however small.
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }


def run(engine, steps=STEPS):
    """Losses, parameters and the last output of some steps, the last of which changes no parameter."""
    losses = []
    for step in steps:
        output = engine(**shards(step)[dist.get_rank()], use_cache=False)
        engine.backward(output.loss)
        losses.append(output.loss.item())
        if step < steps[-1]:
            engine.step()
    return losses, parameters(engine.module), output


def assert_equal(a, b):
    assert a[0] == b[0], (a[0], b[0])
    assert len(set(a[0])) == len(a[0]), "the parameters did not change"
    assert all(torch.equal(a[1][name], value) for name, value in b[1].items())


def zero2(folder):
    for name in ("llama", "llama_tied"):
        optimised, original = (run(engine_of(m, 2)) for m in (ligerfx.optimize(make(name)), make(name)))
        assert_equal(optimised, original)
        assert type(optimised[2].logits) is ligerfx.DeferredTensor and optimised[2].logits._value is None


def zero3(folder):
    """DeepSpeed hooks every module: none with parameters is bypassed, and what lies inside one is still rewritten."""
    for name in ("llama", "llama_tied"):
        gm = ligerfx.optimize(make(name))
        optimised, original = (run(engine_of(m, 3)) for m in (gm, make(name)))
        assert_equal(optimised, original)
        assert type(optimised[2].logits) is ligerfx.DeferredTensor and optimised[2].logits._value is None
        assert idioms(gm, "")[-1] == ["linear_cross_entropy"], idioms(gm, "")
        assert idioms(gm, "model.layers.1.self_attn")[-1] == ["rope"]
        assert idioms(gm, "model.layers.1.input_layernorm")[-1] == ["rms_norm"]
        assert idioms(gm, "model.layers.1.mlp")[-1] == ["glu"]
        assert gm.model.layers[0]._forward_hooks


def gradients(model, inputs, total):
    """Of the total of the output, and the logits as they are after the backward."""
    output = model(**inputs, use_cache=False)
    if isinstance(model, deepspeed.DeepSpeedEngine):
        model.backward(total(output))
        found = {name: safe_get_full_grad(p) for name, p in model.module.named_parameters()}
    else:
        total(output).backward()
        found = {name: p.grad for name, p in model.named_parameters()}
    return found, output.logits.detach() + 0


def square(logits):
    return logits.float().square().mean()


def without_graph(output):
    with torch.no_grad():
        return output.loss * square(output.logits)


TOTALS = {
    "loss and logits": lambda output: output.loss + square(output.logits),
    "logits alone": lambda output: square(output.logits),
    "logits that were read before": lambda output: output.loss + 0 * without_graph(output) + square(output.logits),
    "logits without a graph": lambda output: output.loss * without_graph(output),
    "detached logits": lambda output: output.loss * square(output.logits.detach()),
}


def zero3_logits(folder):
    """Logits can be read after ZeRO-3 has freed the head's weights, and have the gradients that they have without."""
    inputs = shards(0)
    for name in ("llama", "llama_tied"):
        optimised = engine_of(ligerfx.optimize(make(name)), 3)
        for what, total in TOTALS.items():
            found, logits = gradients(optimised, inputs[dist.get_rank()], total)
            expected = [gradients(make(name), each, total) for each in inputs]
            torch.testing.assert_close(logits, expected[dist.get_rank()][1], rtol=1e-5, atol=1e-5)
            for n, gradient in found.items():
                wanted = (expected[0][0][n] + expected[1][0][n]) / 2
                apart, size = (gradient - wanted).norm().item(), wanted.norm().item()
                assert apart < 1e-5 * size, (name, what, n, apart, size)
            optimised.optimizer.zero_grad()
        assert idioms(optimised.module, "")[-1] == ["linear_cross_entropy"]
        optimised.eval()
        with torch.no_grad():
            output, plain = (m(**inputs[dist.get_rank()], use_cache=False) for m in (optimised, make(name).eval()))
        torch.testing.assert_close(output.logits + 0, plain.logits, rtol=1e-5, atol=1e-5)


def zero3_head_with_a_hook(folder):
    """A hook of somebody else sees the call of the head that it sees without ligerfx; and a warning says so."""
    engine, calls = engine_of(ligerfx.optimize(make("llama")), 3), []
    inputs = shards(0)[dist.get_rank()]
    assert type(engine(**inputs, use_cache=False).logits) is ligerfx.DeferredTensor
    hook = engine.module.lm_head.register_forward_hook(lambda module, args, output: calls.append(output.shape))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        output = engine(**inputs, use_cache=False)
    assert len(calls) == 1 and type(output.logits) is torch.Tensor and output.logits.shape == calls[0]
    assert [str(w.message) for w in caught if "and has other hooks than those that gather" in str(w.message)]
    hook.remove()
    assert type(engine(**inputs, use_cache=False).logits) is ligerfx.DeferredTensor and len(calls) == 1


def zero_checkpoints(folder):
    """Two batches a step. What one engine saves, the other goes on from, whichever of the models each has."""
    models = {"original": make, "optimised": lambda name: ligerfx.optimize(make(name))}
    for stage in (2, 3):
        runs = {}
        for saver, build in models.items():
            engine = engine_of(build("llama"), stage, gradient_accumulation_steps=2)
            for step in range(4):
                engine.backward(engine(**shards(step)[dist.get_rank()], use_cache=False).loss)
                engine.step()
            engine.save_checkpoint(str(folder / f"{saver}{stage}"))
            runs[saver] = run(engine, range(4, 7))
            for loader, other in models.items():
                engine = engine_of(other("llama"), stage, gradient_accumulation_steps=2)
                engine.load_checkpoint(str(folder / f"{saver}{stage}"))
                runs[saver, loader] = run(engine, range(4, 7))
        for found in runs.values():
            assert_equal(found, runs["original"])
        untrained = run(engine_of(make("llama"), stage, gradient_accumulation_steps=2), range(4, 7))
        assert untrained[0][0] != runs["original"][0][0], "nothing was loaded"


def zero3_built_in_shards(folder):
    """Under zero.Init, as from_pretrained does it, no process ever holds a whole parameter; and torch's F.linear has
    been replaced before `optimize`."""

    model = make("llama", pad_token_id=None)

    def build():
        torch.manual_seed(0)
        with deepspeed.zero.Init(config_dict_or_path=config(3)):
            return type(model)(model.config)

    gm = ligerfx.optimize(build())
    assert gm.lm_head.weight.numel() == 0 and gm.report.idioms["rms_norm"] == 5, gm.report
    assert_equal(*(run(engine_of(m, 3)) for m in (gm, build())))


if __name__ == "__main__":
    main(globals())
