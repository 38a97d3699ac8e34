"""A training step of several variants that take turns in one process, each compiled once.

    python -m benchmarks.alternate --model qwen3-0.6b --batch 2 --json alternate.json
    python -m benchmarks.alternate --model small-host-qwen3 --variants compile,ligerfx-compile

For variants whose compilation takes longer than all that is measured, and where the host is the limit: its speed
changes from one minute to the next, so each round measures all of them. As `benchmarks.train` otherwise. Liger is not
among them, because it would change the others.
"""

import argparse
import json
import statistics
from collections import defaultdict
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.environment import environment
from benchmarks.models import VARIANTS, Workload, load
from benchmarks.tables import wide_console
from benchmarks.train import Training, add_arguments, check_variants, host_milliseconds, workload_of

NAMES = [name for name in VARIANTS if name != "liger"]
FIGURES = {
    "milliseconds": "ms/step",
    "wall_milliseconds": "wall ms",
    "host_milliseconds": "host ms",
    "peak_gib": "peak GiB",
}
HOST_STEPS = 5  # a round

Found = dict[str, dict[str, list[float]]]


def allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def start(names: list[str], workload: Workload, console: Console) -> tuple[dict[str, Training], dict[str, int]]:
    """Each variant's training, and the bytes that it holds between steps."""
    trainings, held = {}, {}
    for name in names:
        load(name)
        before = allocated()
        trainings[name] = training = Training(name, workload)
        held[name] = allocated() - before
        losses = " ".join(f"{loss:.4f}" for loss in training.losses)
        console.print(f"{name}: first step {training.first_step_seconds:.1f} s, losses {losses}")
    return trainings, held


def measure(trainings: dict[str, Training], held: dict[str, int], steps: int, rounds: int) -> Found:
    """Each variant's figures, one of each round; its peak is without what the others hold."""
    found: Found = {name: defaultdict(list) for name in trainings}
    for number in range(rounds):
        for name in list(trainings) if number % 2 else reversed(trainings):
            training, figures = trainings[name], found[name]
            others = allocated() - held[name]
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            milliseconds, wall = training.milliseconds(steps)
            figures["milliseconds"].append(milliseconds)
            figures["wall_milliseconds"].append(wall)
            if torch.cuda.is_available():
                figures["peak_gib"].append((torch.cuda.max_memory_allocated() - others) / 2**30)
            host = statistics.median(host_milliseconds(training.step) for _ in range(HOST_STEPS))
            figures["host_milliseconds"].append(host)
    return found


def show(console: Console, title: str, found: Found) -> None:
    table = Table("variant", title=f"{title}: median (least, most) of rounds")
    for column in FIGURES.values():
        table.add_column(column, justify="right")
    for name, figures in found.items():
        columns = (figures.get(figure) for figure in FIGURES)
        table.add_row(
            name, *(f"{statistics.median(v):.2f} ({min(v):.2f}, {max(v):.2f})" if v else "-" for v in columns)
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "small-host-qwen3", "ligerfx,compile,ligerfx-compile", NAMES, rounds=7)
    arguments = parser.parse_args()
    names = arguments.variants.split(",")
    check_variants(parser, names, NAMES)

    workload = workload_of(arguments)
    workload = workload._replace(steps=arguments.steps or workload.steps)
    console = wide_console()
    trainings, held = start(names, workload, console)
    found = measure(trainings, held, workload.steps, arguments.rounds)
    stack = environment()
    show(console, f"{arguments.model}, {workload.batch} x {workload.seq}, {stack['device']}", found)
    console.print(", ".join(f"{name} {version}" for name, version in stack.items()), style="dim")
    if arguments.json:
        report: dict[str, Any] = {"model": arguments.model, "workload": workload._asdict(), "environment": stack}
        arguments.json.write_text(json.dumps(report | {"results": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
