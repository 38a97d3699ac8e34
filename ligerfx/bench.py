"""A model trained as it is and optimised, in this process: a first look at time and memory on one's own device.

The figures of the documentation come from `benchmarks/` in the repository, which gives each measurement a process of
its own and compares with other libraries.
"""

from __future__ import annotations

import torch
from rich.table import Table
from torch import nn

from .demo import Run, train
from .optimize import optimize


def compare(model: nn.Module, batch: int, sequence: int, steps: int, low_memory: bool = False) -> Table:
    """Trains `model` and then the same weights optimised, on random token ids [batch, sequence].

    Returns:
        A table with milliseconds a step and peak memory above the weights (on a GPU), and the first and the last loss.
    """
    device = next(model.parameters()).device
    weights = {name: value.detach().clone().cpu() for name, value in model.state_dict().items()}
    batches = [torch.randint(model.config.get_text_config().vocab_size, (batch, sequence), device=device)] * 2
    original = train(model, batches, steps)
    model.load_state_dict(weights)
    optimised = train(optimize(model, low_memory=low_memory), batches, steps)
    return table(original, optimised, batch * sequence)


def table(original: Run, optimised: Run, tokens: int) -> Table:
    on = torch.cuda.get_device_name() if original.milliseconds is not None else "the CPU"
    columns = "", "ms a step", "tokens / s", "GiB above the weights", "first loss", "last loss"
    table = Table(*columns, title=f"training on {on}")
    for name, run in (("original", original), ("optimised", optimised)):
        time, rate, memory = "", "", ""
        if run.milliseconds is not None:
            time, rate = f"{run.milliseconds:.1f}", f"{tokens / run.milliseconds * 1000:,.0f}"
            memory = f"{run.peak_bytes / 2**30:.2f}"
        table.add_row(name, time, rate, memory, f"{run.losses[0]:.6f}", f"{run.losses[-1]:.6f}")
    return table
