"""Time, memory and host overhead of each kernel: ligerfx beside its peers.

    python -m benchmarks.kernels --json out.json                    # at most 8 minutes on an H100
    python -m benchmarks.kernels --ops linear_cross_entropy --peers ligerfx,floor
    python -m benchmarks.kernels --device cpu --quick               # tiny shapes, to try this script out

All in bf16. Peers: `ligerfx-bf16` sums the weight gradient of the loss in bf16, where `ligerfx` does so in
float32; `eager` is our reference in plain PyTorch, as the Hugging Face models compute it; `inductor` the same
under torch.compile; `aten` a single PyTorch function; `cce` is Apple's cut-cross-entropy; `floor` the three
matrix products of the loss and nothing else, at the best of a few chunk sizes; `copy` a copy that moves as many bytes
as must move, which at a few dozen MB does not reach the speed of a long one, either. Peers alternate, and figures
are medians. One that is missing, fails, is wrong or takes too long over its first call is listed as not
measured, with the reason: each result is first compared with the reference in float32.

Device time excludes the host's and starts with a cold L2 cache; of matrix products, at the card's power limit.
Bandwidth counts each input read once and each output written once. Extra memory is the peak of one forward and
backward above what was allocated before, results and gradients included. Host overhead is what the host spends
on one forward and backward at a size where the device keeps up.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config

from benchmarks.cases import OPS, Case
from benchmarks.clock import PRODUCTS_REPEAT_MS, PRODUCTS_WARM_UP_MS, REPEAT_MS, WARM_UP_MS, Clock, limits
from benchmarks.environment import environment
from benchmarks.peers import IN_PLACE, PEERS, Calls, at_most, check, floors, like, load, peers_of, prepare, truth
from benchmarks.tables import show, show_host, show_missing, wide_console

ROUNDS = 3
PEER_SECONDS = 60  # for the first call of a peer on a case, which compiles and tunes


class Run:
    """Measures cases one by one, and gathers the results and what could not be measured."""

    def __init__(self, clock: Clock, limits: dict[str, float], peers: list[str], time_limit: float):
        self.clock, self.limits, self.peers = clock, limits, peers
        self.deadline = time.monotonic() + time_limit
        self.results: list[dict[str, Any]] = []
        self.host: list[dict[str, Any]] = []
        self.missing: list[dict[str, Any]] = []

    def miss(self, op: str, shape: str, peer: str, reason: str | Exception) -> None:
        if isinstance(reason, Exception):
            text = str(reason).strip().splitlines() or [""]
            reason = f"{type(reason).__name__}: {text[0]}"
        self.missing.append({"op": op, "shape": shape, "peer": peer, "reason": reason})

    def late(self, op: str, shape: str, peers: list[str]) -> bool:
        """Whether the time is up; then these peers are listed as not measured."""
        if time.monotonic() < self.deadline:
            return False
        for peer in peers:
            self.miss(op, shape, peer, "time limit")
        return True

    def case(self, op: str, shape: tuple) -> Case:
        # Or the compiler would give up on the ninth shape of a function.
        torch.compiler.reset()
        torch.manual_seed(0)
        with torch.device(self.clock.device):
            return OPS[op].case(*shape)

    def prepared(self, case: Case, peers: list[str]) -> Iterator[tuple[str, Calls, float]]:
        """The peers that run and are right, with their error."""
        try:
            expected = truth(case)
        except Exception as reason:
            for peer in peers:
                self.miss(case.op, case.shape, peer, reason)
            return
        for peer in peers:
            if self.late(case.op, case.shape, [peer]):
                continue
            try:
                with at_most(PEER_SECONDS):
                    calls = prepare(load(case.op, peer), case, peer in IN_PLACE)
                    error = check(calls.both(), expected, peer)
            except Exception as reason:
                self.miss(case.op, case.shape, peer, reason)
            else:
                yield peer, calls, error

    def overhead(self, name: str) -> None:
        """Host overhead of each peer at the op's small shape."""
        peers = peers_of(name, self.peers)
        if self.late(name, "host overhead", peers):
            return
        case = self.case(name, OPS[name].small)
        calls = {peer: calls.both for peer, calls, _ in self.prepared(case, peers)}
        samples = defaultdict(list)
        for _ in range(ROUNDS):
            for peer, call in calls.items():
                samples[peer].append(self.clock.host_microseconds(call))
        for peer, values in samples.items():
            microseconds = statistics.median(values)
            self.host.append({"op": name, "shape": case.shape, "peer": peer, "microseconds": microseconds})

    def device(self, name: str, shape: tuple) -> None:
        """Device time and memory of each peer at one shape."""
        peers = peers_of(name, self.peers)
        if self.late(name, " x ".join(map(str, shape)), peers):
            return
        case = self.case(name, shape)
        timed: dict[tuple[str, str], tuple[Callable, Callable]] = {}
        if case.flops and "floor" in self.peers:
            for rows, products in floors(case).items():
                timed[f"floor {rows}", "total"] = products, lambda: None
        facts: dict[str, dict[str, Any]] = {}
        if not case.flops and "copy" in self.peers:
            for part, count in ("forward", case.forward_bytes), ("backward", case.backward_bytes):
                timed["copy", part] = copy_of(count, self.clock.device), lambda: None
            facts["copy"] = {}
        for peer, calls, error in self.prepared(case, peers):
            calls.restore()
            facts[peer] = {"relative_error": error, "extra_mb": self.clock.extra_megabytes(calls.both)}
            if case.flops:  # may compute its gradients with the loss: only the sum can be compared
                timed[peer, "total"] = calls.both, calls.restore
                continue
            calls.restore()
            outputs = calls.forward()
            gradients = like(calls.upstream, outputs)
            backward = partial(torch.autograd.grad, outputs, calls.leaves, gradients, retain_graph=True)
            timed[peer, "forward"] = calls.forward, calls.restore
            timed[peer, "backward"] = backward, calls.restore
        samples: dict[tuple[str, str], list[float]] = defaultdict(list)
        products = case.flops and self.clock.cuda
        repeat, warm_up = (PRODUCTS_REPEAT_MS, PRODUCTS_WARM_UP_MS) if products else (REPEAT_MS, WARM_UP_MS)
        for _ in range(ROUNDS):
            for key, (call, restore) in list(timed.items()):
                try:
                    samples[key] += self.clock.sample(call, restore, repeat / ROUNDS, warm_up / ROUNDS)
                except Exception as reason:
                    del timed[key]
                    samples.pop(key, None)
                    self.miss(case.op, case.shape, key[0], reason)
        times: dict[str, dict[str, float]] = defaultdict(dict)
        for (peer, part), values in samples.items():
            times[peer][part] = statistics.median(values)
        self.add(case, times, facts)

    def add(self, case: Case, times: dict[str, dict[str, float]], facts: dict[str, dict[str, Any]]) -> None:
        """Results of one case, from each peer's times and other facts."""
        floors = {peer: times.pop(peer)["total"] for peer in list(times) if peer.startswith("floor ")}
        best = min(floors, key=floors.get, default=None)
        if best:
            times["floor"] = {"total": floors[best]}
            facts["floor"] = {"rows": int(best.split()[1])}
        for peer, parts in times.items():
            if not case.flops and len(parts) < 2:
                continue  # failed half way, and is listed
            forward, backward = parts.get("forward"), parts.get("backward")
            total = parts["total"] if case.flops else forward + backward
            self.results.append(
                {
                    "op": case.op,
                    "shape": case.shape,
                    "peer": peer,
                    "forward_ms": forward,
                    "backward_ms": backward,
                    "total_ms": total,
                    "forward_copy_share": self.copy_share(case.forward_bytes, forward),
                    "backward_copy_share": self.copy_share(case.backward_bytes, backward),
                    "matmul_share": case.flops / total * 1e3 / self.limits["matmul_flops_per_second"] or None,
                    "times_floor": total / floors[best] if best else None,
                    **facts[peer],
                }
            )

    def copy_share(self, count: int, milliseconds: float | None) -> float | None:
        if milliseconds is None:
            return None
        share = count / milliseconds * 1e3 / self.limits["copy_bytes_per_second"]
        # Faster than memory by far: the gradient was computed in the forward pass, and is only handed out.
        return share if share < 1.5 else None


def copy_of(count: int, device: str) -> Callable[[], Any]:
    """A copy that moves this many bytes: half of them are read, and half written."""
    source, target = (torch.zeros(count // 2, dtype=torch.int8, device=device) for _ in range(2))
    return partial(target.copy_, source)


def chosen(parser: argparse.ArgumentParser, names: str, known: Any) -> list[str]:
    names = names.split(",")
    if unknown := set(names) - set(known):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", default=",".join(OPS), help="comma-separated")
    parser.add_argument("--peers", default=",".join(PEERS), help="comma-separated")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="one shape an op; on a CPU it is always a tiny one")
    parser.add_argument("--time-limit", type=float, default=450, help="seconds after which nothing new starts")
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()
    ops = chosen(parser, arguments.ops, OPS)
    peers = chosen(parser, arguments.peers, PEERS)

    console = wide_console()
    clock = Clock(arguments.device)
    report: dict[str, Any] = {"environment": environment("cut-cross-entropy") | limits(clock)}
    if not clock.cuda:
        report["environment"]["device"] = "cpu"
    run = Run(clock, report["environment"], peers, arguments.time_limit)
    report |= {"results": run.results, "host": run.host, "not_measured": run.missing}
    start = time.monotonic()
    for name in ops:
        op = OPS[name]
        shapes = op.shapes[:1] if arguments.quick else op.shapes
        # A saved buffer that a compiled backward reuses cannot serve a second one, which only the op that is
        # not timed apart can do without.
        with torch._functorch.config.patch(donated_buffer=name == "linear_cross_entropy"):
            console.print(f"{time.monotonic() - start:.0f} s: {name}, host overhead", style="dim")
            run.overhead(name)
            for shape in shapes if clock.cuda else [op.small]:
                console.print(f"{time.monotonic() - start:.0f} s: {name} {shape}", style="dim")
                run.device(name, shape)
                gc.collect()
                torch.cuda.empty_cache()
                if arguments.json:  # after each, so that a run cut short leaves what it has
                    arguments.json.write_text(json.dumps(report, indent=1) + "\n")
        show(console, name, [result for result in run.results if result["op"] == name])
    show_host(console, run.host, [peer for peer in peers if peer not in ("floor", "copy")])
    show_missing(console, run.missing)
    bandwidth, rate = (run.limits[key] for key in ("copy_bytes_per_second", "matmul_flops_per_second"))
    console.print(f"copy {bandwidth / 1e12:.2f} TB/s, matmul {rate / 1e12:.0f} TFLOP/s", style="dim")
    console.print(", ".join(f"{k} {v}" for k, v in report["environment"].items() if isinstance(v, str)), style="dim")
    if any(miss["peer"].startswith("ligerfx") and miss["reason"] != "time limit" for miss in run.missing):
        sys.exit("ligerfx failed")


if __name__ == "__main__":
    main()
