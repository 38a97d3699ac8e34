"""DDP and FSDP2 of an optimised model on two GPUs beside the original on one: losses, parameters, peak memory.

torchrun --standalone --nproc_per_node=2 tests/gpu/_two_gpus.py
"""

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

sys.path.insert(0, str(Path(__file__).parent.parent))
import ligerfx
from models import make, midsize

STEPS = 10


def steps_of(model, ranks, vocab, seq, count=STEPS):
    """Losses of the given processes' batches, and SGD on their mean."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for step in range(count):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(3, vocab, (2, 4, seq), generator=generator).cuda()
        found = [model(input_ids=ids[r], labels=ids[r], use_cache=False).loss for r in ranks]
        (sum(found) / len(found)).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append([loss.item() for loss in found])
    return losses


def sharded(model):
    mesh = init_device_mesh("cuda", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def with_a_last_unit(model):
    """Sharded as accelerate and the Trainer do it: the last norm and the head, and what is tied to it, are a unit."""
    mesh = init_device_mesh("cuda", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    tied = model.config.tie_word_embeddings
    last = [model.model.norm, *([model.model.embed_tokens] if tied else []), model.lm_head]
    fully_shard(last, mesh=mesh, reshard_after_forward=False)
    return fully_shard(model, mesh=mesh)


def assert_fused(model):
    """The loss of what was called is computed without logits."""
    programs = model._ligerfx_programs.values()
    assert programs and all("linear_cross_entropy" in m.pattern.idioms for p in programs for m in p.matches)
    assert all(program.matches for program in programs)


def whole(parameter):
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def check_training(wrap, tied):
    rank = dist.get_rank()
    original = make("llama", device="cuda", tie_word_embeddings=tied)
    optimised = ligerfx.optimize(copy.deepcopy(original))
    start = [p.detach().clone() for p in original.parameters()]
    expected = [losses[rank] for losses in steps_of(original, (0, 1), 256, 33)]
    wrapped = wrap(optimised)
    found = [losses[0] for losses in steps_of(wrapped, (rank,), 256, 33)]
    assert_fused(optimised)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=0)
    assert expected[-1] != expected[0]
    for (name, p), q, before in zip(original.named_parameters(), wrapped.parameters(), start, strict=True):
        way, apart = (p - before).norm().item(), (p - whole(q)).norm().item()
        assert apart < 1e-3 * way, (name, apart, way)


def check_memory(shard):
    """The optimised model, sharded, takes less than the original, sharded."""
    peaks = []
    for optimise in (lambda model: model, ligerfx.optimize):
        model = shard(optimise(midsize("llama", dtype=torch.bfloat16, device="cuda", vocab_size=32000)))
        steps_of(model, (dist.get_rank(),), 32000, 512, count=1)
        torch.cuda.reset_peak_memory_stats()
        steps_of(model, (dist.get_rank(),), 32000, 512, count=2)
        peaks.append(torch.cuda.max_memory_allocated())
        del model
    original, optimised = (round(peak / 2**20) for peak in peaks)
    print(f"{shard.__name__}: peak of the original {original} MiB, optimised {optimised} MiB", flush=True)
    assert peaks[1] < 0.6 * peaks[0], peaks


def main():
    dist.init_process_group("nccl")
    torch.cuda.set_device(dist.get_rank())
    for tied in (False, True):
        check_training(lambda model: DDP(model, device_ids=[dist.get_rank()]), tied)
        check_training(sharded, tied)
        check_training(with_a_last_unit, tied)
    for shard in (sharded, with_a_last_unit):
        check_memory(shard)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
