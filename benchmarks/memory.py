"""Peak memory of one forward and backward pass against sequence length and vocabulary: ligerfx beside its peers.

    python -m benchmarks.memory --json memory.json                       # about 5 minutes on an H100
    python -m benchmarks.memory --variants ligerfx-low --json memory.json    # adds to the file
    python -m benchmarks.memory --model tiny                             # to try this script out, also without a GPU

A Llama in bf16 with random weights, batch 1, SDPA attention, labels and no attention mask, no optimizer. Peak
memory includes the weights and all gradients, which are freed before the next pass. Each axis of each variant is
a process of its own, which goes from small to large until something does not fit; then it looks for the longest
sequence that does, to within one resolution. Times are medians of two passes after one to warm up; passes
of that search are not timed. torch.compile sees the sequence length as dynamic, so it compiles once for all, and
is given every second vocabulary, as it compiles for each.
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import workers
from benchmarks.environment import environment
from benchmarks.models import VARIANTS, WORKLOADS, build, load
from benchmarks.tables import wide_console

AXES = ("seq", "vocab")
TIMED_STEPS = 2

Point = dict[str, Any]


class Walk(NamedTuple):
    """The sizes of both axes for one model."""

    seqs: list[int]
    longest: int  # of the search for what fits
    resolution: int
    vocabs: list[int]
    seq_of_vocabs: int


WALKS = {
    "llama-1b": Walk([2**n for n in range(11, 17)], 2**18, 2**13, [2**n for n in range(15, 19)], seq_of_vocabs=8192),
    "tiny": Walk([32, 64, 128], 512, 64, [256, 512], seq_of_vocabs=64),
}


def step(model: nn.Module, ids: Tensor) -> None:
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    model.zero_grad()
    if ids.is_cuda:
        torch.cuda.synchronize()


def measure(model: nn.Module, ids: Tensor, timed: bool) -> Point:
    """Peak memory of a pass and, if `timed`, its milliseconds; or only that it does not fit."""
    fits = True
    milliseconds = []
    try:
        if timed:
            step(model, ids)
        if ids.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(TIMED_STEPS if timed else 1):
            start = time.perf_counter()
            step(model, ids)
            milliseconds.append((time.perf_counter() - start) * 1000)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        fits = False
    # Not before the exception is gone, whose traceback holds the activations.
    model.zero_grad()
    clear()
    return {
        "fits": fits,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if fits and ids.is_cuda else None,
        "milliseconds": statistics.median(milliseconds) if fits and timed else None,
    }


def clear() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def is_out_of_memory(error: RuntimeError) -> bool:
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "alloc_failed" in text


def walk_vocabs(variant: str, config: dict[str, Any], walk: Walk, device: str) -> None:
    for vocab in walk.vocabs[1::2] if variant == "compile" else walk.vocabs:
        torch.compiler.reset()
        model = VARIANTS[variant](build("llama", config | {"vocab_size": vocab}, device))
        ids = torch.randint(vocab, (1, walk.seq_of_vocabs), device=device)
        point = measure(model, ids, timed=True)
        workers.answer({"size": vocab} | point)
        if not point["fits"]:
            return
        del model
        clear()


def walk_seqs(variant: str, config: dict[str, Any], walk: Walk, device: str) -> None:
    config = config | {"max_position_embeddings": walk.longest}
    model = VARIANTS[variant](build("llama", config, device))

    def fits(seq: int, timed: bool = False) -> bool:
        ids = torch.randint(config["vocab_size"], (1, seq), device=device)
        if variant == "compile":
            torch._dynamo.mark_dynamic(ids, 1)
        point = measure(model, ids, timed)
        workers.answer({"size": seq} | point)
        return point["fits"]

    longest = 0
    for seq in walk.seqs:
        if not fits(seq, timed=True):
            break
        longest = seq
    if longest:
        search(fits, longest, None if longest == walk.seqs[-1] else seq, walk)


def search(fits: Callable[[int], bool], longest: int, too_long: int | None, walk: Walk) -> None:
    """Try sizes between one that fits and one that does not, until they are one resolution apart."""
    while longest < walk.longest and (too_long is None or too_long - longest > walk.resolution):
        steps = (longest + (too_long or 3 * longest)) // 2 // walk.resolution  # doubles while all fit
        seq = min(steps * walk.resolution, walk.longest)
        if fits(seq):
            longest = seq
        else:
            too_long = seq


def work(arguments: argparse.Namespace) -> None:
    """The process of one variant and axis; answers with one point after another."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    walk = walk_seqs if arguments.axes == "seq" else walk_vocabs
    try:
        load(arguments.worker)
        torch.manual_seed(0)
        walk(arguments.worker, WORKLOADS[arguments.model].config, WALKS[arguments.model], device)
    except Exception as error:
        workers.answer({"error": workers.reason(error)})


class Run:
    """All variants, and the file that keeps their points."""

    def __init__(self, console: Console, arguments: argparse.Namespace):
        self.console, self.arguments = console, arguments
        self.start = time.monotonic()
        self.points: list[Point] = []
        workload = WORKLOADS[arguments.model]
        cuda = torch.cuda.is_available()
        self.conditions = {
            "model": arguments.model,
            "config": workload.config,
            "seq_of_vocabs": WALKS[arguments.model].seq_of_vocabs,
            "environment": environment(),
            "card_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1) if cuda else None,
        }
        if arguments.json and arguments.json.exists():
            report = json.loads(arguments.json.read_text())
            self.points = report.pop("points")
            if report != self.conditions:
                raise SystemExit(f"{arguments.json} was measured under other conditions: {report}")

    def all(self, variants: list[str], axes: list[str]) -> None:
        with tempfile.TemporaryDirectory() as caches:
            for axis in axes:
                for variant in variants:
                    self.one(variant, axis, Path(caches, variant))

    def one(self, variant: str, axis: str, caches: Path) -> None:
        spent = time.monotonic() - self.start
        if spent > self.arguments.time_limit:
            self.console.print(f"{variant}, {axis}: not measured: time limit", style="red")
            return
        self.console.print(f"{spent:.0f} s: {variant}, {axis}", style="dim")
        self.points = [p for p in self.points if (p["variant"], p["axis"]) != (variant, axis)]
        options = ["--worker", variant, "--axes", axis, "--model", self.arguments.model]
        for point in workers.answers("benchmarks.memory", options, caches, self.arguments.worker_timeout):
            self.points.append({"variant": variant, "axis": axis} | point)
            self.write()

    def write(self) -> None:
        if self.arguments.json:
            report = self.conditions | {"points": self.points}
            self.arguments.json.write_text(json.dumps(report, indent=1) + "\n")


def show(console: Console, axis: str, title: str, points: list[Point]) -> None:
    """GiB and milliseconds: a row a size, a column a variant."""
    points = [point for point in points if point["axis"] == axis]
    variants = list(dict.fromkeys(point["variant"] for point in points))
    cells = {(point["size"], point["variant"]): cell(point) for point in points if "size" in point}
    table = Table(axis, *variants, title=title)
    for size in sorted({size for size, _ in cells}):
        table.add_row(f"{size:,}", *(cells.get((size, variant), "-") for variant in variants))
    console.print(table)
    for point in points:
        if "error" in point:
            console.print(f"{point['variant']}, {axis}: stopped: {point['error']}", style="red", markup=False)


def cell(point: Point) -> str:
    if not point["fits"]:
        return "does not fit"
    peak = "-" if point["peak_gib"] is None else f"{point['peak_gib']:.2f} GiB"
    return peak if point["milliseconds"] is None else f"{peak}, {point['milliseconds']:,.0f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=WALKS, default="llama-1b")
    parser.add_argument("--variants", default="eager,liger,ligerfx", help=f"of {','.join(VARIANTS)}")
    parser.add_argument("--axes", default=",".join(AXES), help="comma-separated")
    parser.add_argument("--json", type=Path, help="write the points here; keeps those of other variants")
    parser.add_argument("--time-limit", type=float, default=360, help="seconds after which no process starts")
    parser.add_argument("--worker-timeout", type=float, default=240, help="seconds that one process may take")
    parser.add_argument("--worker", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments)
        return
    variants, axes = arguments.variants.split(","), arguments.axes.split(",")
    if unknown := (set(variants) - set(VARIANTS)) | (set(axes) - set(AXES)):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join((*VARIANTS, *AXES))}")

    console = wide_console()
    run = Run(console, arguments)
    run.all(variants, axes)
    titles = {
        "seq": f"{arguments.model}, against sequence length",
        "vocab": f"{arguments.model}, against vocabulary, 1 x {run.conditions['seq_of_vocabs']}",
    }
    for axis in axes:
        show(console, axis, titles[axis], run.points)
    console.print(
        ", ".join(f"{name} {version}" for name, version in run.conditions["environment"].items()), style="dim"
    )


if __name__ == "__main__":
    main()
