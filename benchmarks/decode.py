"""Time of a token that `generate` decodes: the original model, and the optimised one.

    python -m benchmarks.decode --json decode.json
    python -m benchmarks.decode --models tiny --device cpu       # to try this script out

Greedy, in bf16 with random weights, at batch 1, where the host is often the limit. `trained`: the optimised model has
trained for a step before, as a trainer's evaluation finds it. Variants alternate, and figures are medians of whole
calls, divided by their tokens. (That the tokens are the same is a test's matter: tests/training/test_generate.py.)
"""

import argparse
import copy
import json
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn

import ligerfx
from benchmarks.environment import environment
from benchmarks.models import WORKLOADS, build
from benchmarks.tables import wide_console
from benchmarks.train import synchronize

CACHES = ("dynamic", "static")  # with a static one transformers compiles the decoding on a GPU
PROMPT = 32


def variants(name: str, device: str) -> dict[str, nn.Module]:
    workload = WORKLOADS[name]
    torch.manual_seed(0)
    original = build(workload.model_type, workload.config, device, workload.attention).eval()
    found = {"original": original}
    found["ligerfx"] = ligerfx.optimize(copy.deepcopy(original))
    found["trained"] = ligerfx.optimize(copy.deepcopy(original)).train()
    ids = torch.randint(original.config.vocab_size, (2, 64), device=device)
    found["trained"](input_ids=ids, labels=ids).loss.backward()
    found["trained"].zero_grad()
    found["trained"].eval()
    return found


def decode(model: nn.Module, prompt: torch.Tensor, tokens: int, cache: str) -> float:
    """Seconds of a call of `generate`."""
    synchronize()
    start = time.perf_counter()
    model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
        cache_implementation=cache, pad_token_id=0,
    )  # fmt: skip
    synchronize()
    return time.perf_counter() - start


def measure(name: str, cache: str, device: str, tokens: int, repeats: int) -> dict[str, Any]:
    """Milliseconds a token of each variant: the median, and the least and the most."""
    models = variants(name, device)
    prompt = torch.randint(1, models["original"].config.vocab_size, (1, PROMPT), device=device)
    times = defaultdict(list)
    for repeat in range(repeats + 2):  # the first two capture, and compile
        for variant, model in models.items():
            seconds = decode(model, prompt, tokens, cache)
            if repeat >= 2:
                times[variant].append(seconds * 1000 / tokens)
    return {
        "milliseconds": {variant: statistics.median(values) for variant, values in times.items()},
        "spread": {variant: [min(values), max(values)] for variant, values in times.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="small-host,llama-1b,qwen3-0.6b", help=f"of {','.join(WORKLOADS)}")
    parser.add_argument("--caches", default=",".join(CACHES))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()
    console = wide_console()
    results = []
    table = Table("model", "cache", "original", "ligerfx", "trained", title="ms a token, and relative to the original")
    for name in arguments.models.split(","):
        for cache in arguments.caches.split(","):
            console.print(f"{name}, {cache} cache", style="dim")
            result = measure(name, cache, arguments.device, arguments.tokens, arguments.repeats)
            results.append({"model": name, "cache": cache} | result | {"tokens": arguments.tokens})
            base, *others = result["milliseconds"].values()
            table.add_row(name, cache, f"{base:.2f}", *(f"{ms:.2f} ({ms / base:.2f}x)" for ms in others))
            if arguments.json:
                report = {"environment": environment(), "results": results}
                arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    console.print(table)


if __name__ == "__main__":
    main()
