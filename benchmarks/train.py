"""Time and peak memory of a training step (forward, backward, fused AdamW): ligerfx beside its peers.

    python -m benchmarks.train --model llama-1b --json out.json
    python -m benchmarks.train --model small-host --variants eager,liger,ligerfx
    python -m benchmarks.train --model llama-1b --rounds 1 --profile liger,ligerfx --json out.json

Weights are random and bf16, attention is SDPA (eager for Gemma-2), labels are given and no attention mask is. Every
measurement is a process of its own, and the results are written after each. Variants alternate, `--rounds` times over,
so that a machine that slows down does so for all of them. Compilation caches start empty and are kept between rounds.
(`benchmarks.alternate`: in one process.)

The first round also measures the host alone: the time until all calls of a step have returned, on a device that
is idle when the step starts. It includes waiting where a step reads from the device, or has launched more than
the device takes in advance (about a thousand kernels).
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import workers
from benchmarks.breakdown import FLOOR, FUSED, profile
from benchmarks.environment import environment
from benchmarks.models import VARIANTS, WORKLOADS, Workload, build, load
from benchmarks.tables import wide_console

WARM_UP = 3  # steps; the first compiles kernels, the second still grows the allocator
HOST_STEPS = 20


class Training:
    """A workload that is trained with one variant."""

    def __init__(self, name: str, workload: Workload):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.manual_seed(0)
        model = build(workload.model_type, workload.config, device, workload.attention)
        self.ids = torch.randint(model.config.vocab_size, (workload.batch, workload.seq), device=device)
        synchronize()
        start = time.perf_counter()
        self.model = VARIANTS[name](model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.losses: list[torch.Tensor] = []
        self.step()
        synchronize()
        self.first_step_seconds = time.perf_counter() - start
        for _ in range(WARM_UP - 1):
            self.step()

    def step(self) -> None:
        loss = self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.detach())

    def milliseconds(self, steps: int) -> tuple[float, float]:
        """Of a step: the median by the device's clock, and by the host's from idle to idle."""
        synchronize()
        start = time.perf_counter()
        # Marked on the device's own clock and not synchronised, as in training: the host may run ahead.
        marks = [mark()]
        for _ in range(steps):
            self.step()
            marks.append(mark())
        synchronize()
        wall = (time.perf_counter() - start) * 1000 / steps
        return statistics.median(between(a, b) for a, b in zip(marks[:-1], marks[1:], strict=True)), wall


def measure(name: str, workload: Workload, steps: int, details: bool, profiled: bool) -> dict[str, Any]:
    """Train `workload` with one variant in this process; gives milliseconds, GiB and losses.

    With `details` the host time of a step too, and if `profiled` where the device's time goes.
    """
    load(name)
    training = Training(name, workload)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    milliseconds, wall = training.milliseconds(steps)
    result = {
        "milliseconds": milliseconds,
        "wall_milliseconds": wall,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
        "first_step_seconds": training.first_step_seconds,
        "losses": [loss.item() for loss in training.losses],
    }
    if hasattr(training.model, "report"):
        result["idioms"] = dict(training.model.report.idioms)
    if details:
        result["host_milliseconds"] = statistics.median(host_milliseconds(training.step) for _ in range(HOST_STEPS))
    if profiled:
        result |= profile(training.step)
    return result


def host_milliseconds(step: Callable[[], None]) -> float:
    """Until the calls of one step have returned, from an idle device."""
    synchronize()
    start = time.perf_counter()
    step()
    return (time.perf_counter() - start) * 1000


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def mark() -> Any:
    """A point in time, on the GPU's clock where there is one."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(start: Any, end: Any) -> float:
    """Milliseconds from one `mark` to another."""
    return (end - start) * 1000 if isinstance(start, float) else start.elapsed_time(end)


def workload_of(arguments: argparse.Namespace) -> Workload:
    workload = WORKLOADS[arguments.model]
    return workload._replace(batch=arguments.batch) if arguments.batch else workload


def work(arguments: argparse.Namespace) -> None:
    """The process of one measurement."""
    try:
        workload = workload_of(arguments)
        workers.answer(measure(arguments.worker, workload, arguments.steps, arguments.details, bool(arguments.profile)))
    except Exception as error:
        workers.answer({"error": workers.reason(error)})


def summarise(rounds: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    """One variant's rounds as one result: medians; all else is the first round's, whose caches were cold."""
    measured = [r for r in rounds if "error" not in r]
    errors = [r["error"] for r in rounds if "error" in r]
    if not measured:
        return {"error": errors[0] if errors else "not run yet"}
    result = dict(measured[0])
    for key in ("milliseconds", "wall_milliseconds"):
        result[key] = statistics.median(r[key] for r in measured)
    result["milliseconds_of_rounds"] = [r["milliseconds"] for r in measured]
    result["tokens_per_second"] = tokens / result["milliseconds"] * 1000
    if errors:
        result["failed_rounds"] = errors
    return result


def add_floor(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each profiled variant's time above the floor: the least that products, attention and optimizer took in any."""
    profiled = [result for result in results.values() if "profile" in result]
    floors = [sum(r["profile"][kind] for kind in FLOOR) for r in profiled if not r["profile"].get(FUSED)]
    for result in profiled:
        result["above_floor_milliseconds"] = result["milliseconds"] - min(floors) if floors else None
    return results


def show(console: Console, title: str, results: dict[str, dict[str, Any]]) -> None:
    """A table of what was measured; below it what was not, and the losses, which should agree."""
    table = Table("variant", title=title)
    for column in ("ms/step", "rounds", "wall ms", "host ms", "tokens/s", "speed", "peak GiB", "memory", "first step"):
        table.add_column(column, justify="right")
    measured = {name: result for name, result in results.items() if "error" not in result}
    peer = measured.get("liger")
    for name, result in measured.items():
        speed = memory = "-"
        if peer:
            speed = f"{peer['milliseconds'] / result['milliseconds']:.2f}x"
        if peer and peer["peak_gib"]:
            memory = f"{result['peak_gib'] / peer['peak_gib']:.2f}x"
        table.add_row(
            name,
            f"{result['milliseconds']:.1f}",
            " ".join(f"{ms:.1f}" for ms in result["milliseconds_of_rounds"]),
            f"{result['wall_milliseconds']:.1f}",
            f"{result['host_milliseconds']:.1f}" if "host_milliseconds" in result else "-",
            f"{result['tokens_per_second']:,.0f}",
            speed,
            f"{result['peak_gib']:.2f}" if result["peak_gib"] else "-",
            memory,
            f"{result['first_step_seconds']:.1f} s",
        )
    console.print(table)
    if peer:
        console.print("speed and memory: relative to liger", style="dim")
    show_profiles(console, measured)
    for name, result in results.items():
        for error in [result["error"]] if "error" in result else result.get("failed_rounds", []):
            console.print(f"{name}: not measured: {error}", style="red", markup=False)
        if "error" not in result:
            console.print(f"{name}: losses {' '.join(f'{loss:.4f}' for loss in result['losses'][:5])} ...")


def show_profiles(console: Console, results: dict[str, dict[str, Any]]) -> None:
    """Device milliseconds a step by category, and what the step takes above the floor."""
    profiled = {name: result for name, result in results.items() if "profile" in result}
    if not profiled:
        return
    categories = list(next(iter(profiled.values()))["profile"])
    table = Table("variant", title="device ms a step")
    for column in (*categories, "step above floor"):
        table.add_column(column, justify="right")
    for name, result in profiled.items():
        values = [result["profile"][kind] for kind in categories] + [result["above_floor_milliseconds"]]
        table.add_row(name, *("-" if value is None else f"{value:.1f}" for value in values))
    console.print(table)
    console.print(f"floor: {' + '.join(FLOOR)}, the least of a variant without {FUSED}", style="dim")


class Run:
    """Rounds of all variants, each measurement in a process of its own."""

    def __init__(self, console: Console, names: list[str], profiled: list[str], arguments: argparse.Namespace):
        self.console, self.names, self.profiled, self.arguments = console, names, profiled, arguments
        self.workload = workload_of(arguments)
        self.environment = environment()
        self.start = time.monotonic()
        self.rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in names}

    def all(self) -> None:
        with tempfile.TemporaryDirectory() as caches:
            for number in range(self.arguments.rounds):
                for name in self.names:
                    self.rounds[name].append(self.one(name, number, Path(caches, name)))
                    self.write()

    def one(self, name: str, number: int, caches: Path) -> dict[str, Any]:
        spent = time.monotonic() - self.start
        if spent > self.arguments.time_limit:
            return {"error": "time limit"}
        self.console.print(f"{spent:.0f} s: round {number + 1}: {name}", style="dim")
        options = ["--worker", name, "--model", self.arguments.model]
        options += ["--steps", str(self.arguments.steps or self.workload.steps), "--batch", str(self.workload.batch)]
        if number == 0:
            options += ["--details"]
            options += ["--profile", name] if name in self.profiled else []
        return list(workers.answers("benchmarks.train", options, caches, self.arguments.worker_timeout))[0]

    def results(self) -> dict[str, dict[str, Any]]:
        tokens = self.workload.batch * self.workload.seq
        return add_floor({name: summarise(runs, tokens) for name, runs in self.rounds.items()})

    def write(self) -> None:
        if self.arguments.json:
            report = {
                "model": self.arguments.model,
                "workload": self.workload._asdict(),
                "environment": self.environment,
                "results": self.results(),
            }
            self.arguments.json.write_text(json.dumps(report, indent=2) + "\n")


def add_arguments(
    parser: argparse.ArgumentParser, model: str, variants: str, known: Iterable[str], rounds: int
) -> None:
    """What is measured, by default this model and these of the known variants, and where to write it."""
    parser.add_argument("--model", choices=WORKLOADS, default=model)
    parser.add_argument("--variants", default=variants, help=f"of {','.join(known)}")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--batch", type=int, help="sequences in a step; default: those of the model's workload")
    parser.add_argument("--steps", type=int, help="timed steps a round; default: 8, or 50 where steps are short")
    parser.add_argument("--json", type=Path, help="write the results here")


def check_variants(parser: argparse.ArgumentParser, names: Iterable[str], known: Iterable[str]) -> None:
    if unknown := set(names) - set(known):
        parser.error(f"unknown variants: {', '.join(sorted(unknown))}; there are {', '.join(known)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "llama-1b", "eager,liger,ligerfx,compile", VARIANTS, rounds=2)
    parser.add_argument("--profile", default="", metavar="VARIANTS", help="these also by kernel; comma-separated")
    parser.add_argument("--time-limit", type=float, default=540, help="seconds after which no measurement starts")
    parser.add_argument("--worker-timeout", type=float, default=240, help="seconds that one measurement may take")
    parser.add_argument("--worker", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--details", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments)
        return
    names, profiled = (list(filter(None, text.split(","))) for text in (arguments.variants, arguments.profile))
    check_variants(parser, {*names, *profiled}, VARIANTS)

    console = wide_console()
    run = Run(console, names, profiled, arguments)
    run.all()
    workload = run.workload
    title = f"{arguments.model}, {workload.batch} x {workload.seq}, {run.environment['device']}"
    show(console, title, run.results())
    console.print(", ".join(f"{name} {version}" for name, version in run.environment.items()), style="dim")


if __name__ == "__main__":
    main()
