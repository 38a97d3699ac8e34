"""FSDP2 on two processes: optimise the model, then shard what comes back.

torchrun --nproc-per-node 2 docs/examples/fsdp2.py

Gloo and the CPU where there are fewer than two GPUs, else NCCL.
"""

import os
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import ligerfx

rank, world = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
device = torch.device("cuda", rank) if torch.cuda.device_count() >= world else torch.device("cpu")
if device.type == "cuda":
    torch.cuda.set_device(device)
dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
mesh = init_device_mesh(device.type, (world,))

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
)
model = LlamaForCausalLM(config).to(device)
model = ligerfx.optimize(model)

policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh, mp_policy=policy)
fully_shard(model, mesh=mesh, mp_policy=policy)  # embeddings, last norm and lm_head: the loss is fused with the head

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
torch.manual_seed(rank)  # every process has data of its own
for step in range(20):
    ids = torch.randint(64, (4, 32), device=device).repeat(1, 2)
    output = model(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    output.loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if rank == 0 and step % 5 == 4:
        print(f"step {step + 1}: loss {output.loss.item():.3f}, {type(output.logits).__name__}", flush=True)

folder = [tempfile.mkdtemp()]
dist.broadcast_object_list(folder, device=device)
dcp.save(get_model_state_dict(model), checkpoint_id=folder[0])  # the keys of the original model
state = get_model_state_dict(model)
dcp.load(state, checkpoint_id=folder[0])
set_model_state_dict(model, state)
dist.destroy_process_group()
