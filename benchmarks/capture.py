"""How long `optimize` takes, and its report as a page: a Llama-3-8B shape on the meta device, at several depths.

    python -m benchmarks.capture

The first call of a process also imports parts of torch and traces the pattern library; it is shown apart.
"""

import statistics
import time

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import ligerfx

DEPTHS = (2, 32, 80)
REPEATS = 5


def build(layers: int) -> nn.Module:
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def seconds(model: nn.Module) -> float:
    start = time.perf_counter()
    ligerfx.optimize(model)
    return time.perf_counter() - start


def page(model: nn.Module) -> tuple[float, int]:
    """Seconds and bytes of the report's page."""
    report = ligerfx.optimize(model).report
    start = time.perf_counter()
    text = report.to_html()
    return time.perf_counter() - start, len(text.encode())


def main() -> None:
    first = seconds(build(2))
    table = Table("layers", "optimize", "page", "size", title="Llama-3-8B shape, meta device")
    for depth in DEPTHS:
        model = build(depth)
        times, sizes = zip(*(page(model) for _ in range(REPEATS)), strict=True)
        optimize = statistics.median(seconds(model) for _ in range(REPEATS))
        page_time = statistics.median(times)
        table.add_row(str(depth), f"{optimize:.2f} s", f"{page_time:.2f} s", f"{max(sizes) / 1000:.0f} kB")
    console = Console()
    console.print(table)
    console.print(f"first call of the process, 2 layers: {first:.2f} s")


if __name__ == "__main__":
    main()
