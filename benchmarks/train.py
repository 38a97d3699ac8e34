"""Time and peak memory of a training step (forward, backward, fused AdamW): ligerfx beside its peers.

    python -m benchmarks.train --model llama-1b --variants eager,liger,ligerfx,compile --json out.json

Weights are random and bf16, attention is SDPA, labels are given and no attention mask is. Every measurement
is a process of its own, because Liger patches transformers' modules (rotary embedding, class names) for the
whole process, even when it is given one model. Variants alternate, `--rounds` times over, so that a machine
that slows down does so for all of them. Compilation caches start empty and are kept between rounds.
"""

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

WARM_UP = 3  # steps; the first compiles kernels, the second still grows the allocator


class Workload(NamedTuple):
    """A model's shape and how it is trained."""

    model_type: str
    batch: int
    seq: int
    config: dict[str, Any]


WORKLOADS = {
    "llama-1b": Workload(  # Llama-3.2-1B
        "llama",
        batch=8,
        seq=2048,
        config={
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "vocab_size": 128256,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        },
    ),
    "llama-8b-8l": Workload(  # Llama-3-8B, the first 8 of its 32 layers
        "llama",
        batch=4,
        seq=2048,
        config={
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 8,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 128256,
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        },
    ),
    "qwen3-0.6b": Workload(
        "qwen3",
        batch=8,
        seq=2048,
        config={
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
    ),
    "tiny": Workload(  # to try this script out, also without a GPU
        "llama",
        batch=2,
        seq=64,
        config={
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": 512,
        },
    ),
}


def eager(model: nn.Module) -> nn.Module:
    return model


def liger(model: nn.Module) -> nn.Module:
    from liger_kernel.transformers import _apply_liger_kernel_to_instance  # what transformers' Trainer calls

    _apply_liger_kernel_to_instance(model=model)
    return model


def ligerfx(model: nn.Module) -> nn.Module:
    import ligerfx

    return ligerfx.optimize(model)


def compile(model: nn.Module) -> nn.Module:
    return torch.compile(model)


VARIANTS = {variant.__name__: variant for variant in (eager, liger, ligerfx, compile)}
PACKAGES = {"liger": "liger_kernel.transformers", "ligerfx": "ligerfx"}


def measure(name: str, workload: Workload, steps: int, profile: bool) -> dict[str, Any]:
    """Train `workload` with one variant in this process; gives milliseconds, GiB and losses."""
    from transformers import AutoConfig, AutoModelForCausalLM

    # Imports are not part of the time to the first step.
    if name in PACKAGES:
        importlib.import_module(PACKAGES[name])

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    config = AutoConfig.for_model(workload.model_type, **workload.config)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
        ids = torch.randint(config.vocab_size, (workload.batch, workload.seq))
    model.train()

    synchronize()
    start = time.perf_counter()
    model = VARIANTS[name](model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    losses = []

    def step() -> None:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())

    step()
    synchronize()
    first_step = time.perf_counter() - start
    for _ in range(WARM_UP - 1):
        step()

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    # Marked on the device's own clock and not synchronised, as in training: the host may run ahead.
    marks = [mark()]
    for _ in range(steps):
        step()
        marks.append(mark())
    synchronize()
    milliseconds = statistics.median(between(a, b) for a, b in zip(marks[:-1], marks[1:], strict=True))
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None

    if profile:
        print_profile(step, device)
    result = {
        "milliseconds": milliseconds,
        "peak_gib": peak,
        "first_step_seconds": first_step,
        "losses": [loss.item() for loss in losses[: WARM_UP + steps]],
    }
    if name == "ligerfx":
        result["idioms"] = dict(model.report.idioms)
    return result


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


def print_profile(step: Callable[[], None], device: str) -> None:
    """Where the time of three steps goes, by kernel, on stderr."""
    with torch.profiler.profile() as profiler:
        for _ in range(3):
            step()
        synchronize()
    table = profiler.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=40, max_name_column_width=80)
    print(table, file=sys.stderr)


def measure_in_process(name: str, arguments: argparse.Namespace, cache: Path) -> dict[str, Any]:
    """`measure` in a fresh process; a variant that is missing or fails gives {"error": reason}."""
    command = [sys.executable, "-m", "benchmarks.train", "--model", arguments.model]
    command += ["--steps", str(arguments.steps), "--worker", name]
    command += ["--profile"] if arguments.profile and name == "ligerfx" else []
    caches = {"TRITON_CACHE_DIR": str(cache / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor")}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | caches)
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, json.JSONDecodeError):  # died before it could answer
        return {"error": f"exit status {done.returncode}"}


def work(name: str, arguments: argparse.Namespace) -> None:
    """The process that `measure_in_process` starts: one line of JSON on stdout."""
    try:
        result = measure(name, WORKLOADS[arguments.model], arguments.steps, arguments.profile)
    except Exception as error:
        result = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    print(json.dumps(result))


def summarise(rounds: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    """One variant's rounds as one result: medians; the first step is the first round's, with cold caches."""
    failed = [r for r in rounds if "error" in r]
    if failed:
        return {"error": failed[0]["error"]}
    milliseconds = statistics.median(r["milliseconds"] for r in rounds)
    return {
        **rounds[0],
        "milliseconds": milliseconds,
        "milliseconds_of_rounds": [r["milliseconds"] for r in rounds],
        "tokens_per_second": tokens / milliseconds * 1000,
    }


def show(console: Console, title: str, results: dict[str, dict[str, Any]]) -> None:
    """A table of what was measured; below it what was not, and the losses, which should agree."""
    table = Table("variant", title=title)
    for column in ("ms/step", "rounds", "tokens/s", "speed", "peak GiB", "memory", "first step"):
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
            f"{result['tokens_per_second']:,.0f}",
            speed,
            f"{result['peak_gib']:.2f}" if result["peak_gib"] else "-",
            memory,
            f"{result['first_step_seconds']:.1f} s",
        )
    console.print(table)
    if peer:
        console.print("speed and memory: relative to liger", style="dim")
    for name, result in results.items():
        if "error" in result:
            console.print(f"{name}: not measured: {result['error']}", style="red")
        else:
            console.print(f"{name}: losses {' '.join(f'{loss:.4f}' for loss in result['losses'][:5])} ...")


def environment() -> dict[str, str]:
    """The device and the versions that a figure depends on."""
    versions = {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}
    for package in ("torch", "triton", "transformers", "liger-kernel"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=WORKLOADS, default="llama-1b")
    parser.add_argument("--variants", default="eager,liger,ligerfx,compile", help="comma-separated")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8, help="timed steps a round")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--profile", action="store_true", help="print the top kernels of the ligerfx variant")
    parser.add_argument("--worker", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker, arguments)
        return
    names = arguments.variants.split(",")
    if unknown := set(names) - set(VARIANTS):
        parser.error(f"unknown variants: {', '.join(sorted(unknown))}; there are {', '.join(VARIANTS)}")

    console, versions, workload = Console(), environment(), WORKLOADS[arguments.model]
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as caches:
        for number in range(arguments.rounds):
            for name in names:
                console.print(f"round {number + 1}: {name}", style="dim")
                rounds[name].append(measure_in_process(name, arguments, Path(caches, name)))

    results = {name: summarise(runs, workload.batch * workload.seq) for name, runs in rounds.items()}
    show(console, f"{arguments.model}, {workload.batch} x {workload.seq}, {versions['device']}", results)
    console.print(", ".join(f"{name} {version}" for name, version in versions.items()), style="dim")
    if arguments.json:
        report = {
            "model": arguments.model,
            "workload": workload._asdict(),
            "environment": versions,
            "results": results,
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
