"""DeepSpeed's ZeRO-2 and ZeRO-3 around an optimised model on GPUs, beside the original in the same engine: losses,
parameters, peak memory, and what is fused.

torchrun --standalone --nproc_per_node=1 tests/gpu/_deepspeed.py
"""

import gc
import os
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent))
from training.zero import idioms, parameters

import ligerfx
from models import make, midsize

STEPS = 8
IDIOMS = {"": "linear_cross_entropy", "model.layers.1.self_attn": "rope", "model.layers.1.mlp": "glu"}


def engine_of(model, stage, dtype):
    config = {
        "train_micro_batch_size_per_gpu": 4,
        # DeepSpeed's own is compiled when it is first used.
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "bf16": {"enabled": dtype is torch.bfloat16},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    return deepspeed.initialize(model=model, config=config)[0]


def losses_of(engine, vocab, seq, count=STEPS):
    losses = []
    for step in range(count):
        generator = torch.Generator().manual_seed(2 * step + dist.get_rank())
        ids = torch.randint(3, vocab, (4, seq), generator=generator).cuda()
        output = engine(input_ids=ids, labels=ids.where(ids % 3 > 0, -100), use_cache=False)
        engine.backward(output.loss)
        engine.step()
        losses.append(output.loss.item())
    return losses, output


def check_training(stage, tied):
    def build():
        return make("llama", device="cuda", tie_word_embeddings=tied)

    start = {name: p.detach().clone() for name, p in build().named_parameters()}
    optimised, original = (engine_of(model, stage, torch.float32) for model in (ligerfx.optimize(build()), build()))
    (found, output), (expected, _) = (losses_of(engine, 256, 33) for engine in (optimised, original))
    assert type(output.logits) is ligerfx.DeferredTensor and output.logits._value is None
    for path, idiom in IDIOMS.items():
        assert any(idiom in program for program in idioms(optimised.module, path)), path
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=0)
    assert expected[-1] != expected[0]
    wanted = parameters(original.module)
    for name, p in parameters(optimised.module).items():
        # Adam's first steps are the signs of the gradients, of those near zero, too.
        way, apart = (wanted[name] - start[name]).norm().item(), (wanted[name] - p).norm().item()
        assert apart < 1e-2 * way, (name, apart, way)


def check_memory(stage):
    peaks = []
    for optimise in (lambda model: model, ligerfx.optimize):
        gc.collect()  # an engine is part of cycles
        before = torch.cuda.memory_allocated()
        model = optimise(midsize("llama", dtype=torch.bfloat16, device="cuda", vocab_size=32000))
        engine = engine_of(model, stage, torch.bfloat16)
        losses_of(engine, 32000, 2048, count=2)
        torch.cuda.reset_peak_memory_stats()
        losses, _ = losses_of(engine, 32000, 2048, count=2)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        assert all(0 < loss < 20 for loss in losses)
        engine.destroy()
        del model, engine
    original, optimised = (round(peak / 2**20) for peak in peaks)
    print(f"ZeRO-{stage}: peak of the original {original} MiB, optimised {optimised} MiB", flush=True)
    assert peaks[1] < 0.7 * peaks[0], peaks


def main():
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(dist_backend="nccl", auto_mpi_discovery=False)
    for stage in (2, 3):
        for tied in (False, True):
            check_training(stage, tied)
    for stage in (2, 3):
        check_memory(stage)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
