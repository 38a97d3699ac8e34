"""A plain training loop: `ligerfx.optimize` is the one line that was added.

python docs/examples/plain_loop.py
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import ligerfx

device = "cuda" if torch.cuda.is_available() else "cpu"
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
print(model.report)

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, total_iters=10)
accumulate = 2
for step in range(40):
    ids = torch.randint(64, (8, 32), device=device).repeat(1, 2)  # the second half repeats the first
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        loss = model(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids), use_cache=False).loss
    (loss / accumulate).backward()
    if step % accumulate == accumulate - 1:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    if step % 10 == 9:
        print(f"step {step + 1}: loss {loss.item():.3f}")

model.eval()
prompt = torch.randint(64, (1, 32), device=device)
print("generated", model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, 32:].tolist())
