"""The checks of test_deepspeed.py: the optimised model and the original, each in a DeepSpeed engine."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["LOCAL_RANK"] = "0"

import deepspeed
import torch
import torch.distributed as dist
from _workers import main, shards

import ligerfx
from models import make

STEPS = range(5)

# Processes of one machine may reduce by an operation in C++, which it takes minutes to compile. Here gloo does.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def engine_of(model, stage):
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    return deepspeed.initialize(model=model, config=config(stage))[0]


def config(stage):
    return {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
        # Every parameter is sharded, however small.
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }


def run(engine):
    """Losses, parameters and the last output of some steps."""
    losses = []
    for step in STEPS:
        output = engine(**shards(step)[dist.get_rank()], use_cache=False)
        engine.backward(output.loss)
        losses.append(output.loss.item())
        if step < STEPS[-1]:
            engine.step()
    return losses, parameters(engine.module), output


def parameters(module):
    found = dict(module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(found.values())):
        return {name: p.detach().clone() for name, p in found.items()}


def assert_equal(a, b):
    assert a[0] == b[0], (a[0], b[0])
    assert len(set(a[0])) == len(a[0]), "the parameters did not change"
    assert all(torch.equal(a[1][name], value) for name, value in b[1].items())


def idioms(module, path):
    programs = module.get_submodule(path)._ligerfx_programs.values()
    return [sorted(i for match in p.matches for i in match.pattern.idioms) for known in programs for p in known]


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
        assert type(optimised[2].logits) is torch.Tensor
        assert idioms(gm, "")[-1] == ["cross_entropy"], idioms(gm, "")
        assert idioms(gm, "model.layers.1.self_attn")[-1] == ["rope"]
        assert idioms(gm, "model.layers.1.input_layernorm")[-1] == ["rms_norm"]
        assert idioms(gm, "model.layers.1.mlp")[-1] == ["glu"]
        assert gm.model.layers[0]._forward_hooks


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
