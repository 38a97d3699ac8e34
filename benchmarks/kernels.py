"""Time, memory and host overhead of each kernel: ligerfx beside its peers.

    python -m benchmarks.kernels --json out.json                    # about 6 minutes on an H100
    python -m benchmarks.kernels --ops linear_cross_entropy --peers ligerfx,floor
    python -m benchmarks.kernels --device cpu --quick               # tiny shapes, to try this script out

All in bf16. Peers: `eager` is our reference in plain PyTorch, as the Hugging Face models compute it;
`inductor` the same under torch.compile; `aten` a single PyTorch function; `cce` is Apple's cut-cross-entropy;
`floor` the three matrix products of the loss and nothing else, at the best of a few chunk sizes. Peers
alternate, and figures are medians. One that is missing, fails or is wrong is listed as not measured, with the
reason: each result is first compared with the reference in float32.

Device time excludes the host's and starts with a cold L2 cache. Bandwidth counts each input read once and
each output written once. Extra memory is the peak of one forward and backward above what was allocated
before, results and gradients included. Host overhead is what the host spends on one forward and backward at
a size where the device keeps up.
"""

import argparse
import gc
import importlib
import importlib.metadata
import json
import math
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._functorch.config
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.train import environment
from ligerfx import kernels

ROUNDS = 3
WARM_UP_MS, REPEAT_MS = 20, 60  # of every measurement, over all rounds
HOST_CALLS = 100  # a round
FLUSH_BYTES = 256 * 2**20  # several times the L2 of any GPU
FLOOR_ROWS = (1024, 2048, 4096, 8192)
EPS = 1e-6
# Relative error allowed against float32. Peers may round more: some sum weight gradients in bf16.
TOLERANCE, PEER_TOLERANCE = 0.02, 0.1


class Case(NamedTuple):
    """One op at one shape, with what it works on."""

    op: str
    shape: str
    inputs: list[Tensor]
    upstream: list[Tensor]  # gradients of the outputs
    forward_bytes: int = 0  # that must move; 0 where matrix products are the limit
    backward_bytes: int = 0
    flops: int = 0  # of the matrix products, forward and backward


def leaf(*shape: int, std: float = 1.0) -> Tensor:
    return (std * torch.randn(shape)).bfloat16().requires_grad_()


def size(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def rms_norm(rows: int, hidden: int) -> Case:
    x, weight = leaf(rows, hidden), leaf(hidden)
    return Case(
        "rms_norm",
        f"{rows} x {hidden}",
        inputs=[x, weight],
        upstream=[torch.randn_like(x)],
        forward_bytes=size(x, weight, x),
        backward_bytes=size(x, x, weight, x, weight),
    )


def glu(rows: int, width: int) -> Case:
    gate, up = leaf(rows, width), leaf(rows, width)
    return Case(
        "glu",
        f"{rows} x {width}",
        inputs=[gate, up],
        upstream=[torch.randn_like(gate)],
        forward_bytes=3 * size(gate),
        backward_bytes=5 * size(gate),
    )


def packed_glu(rows: int, width: int) -> Case:
    gate_up, dy = leaf(rows, 2 * width), leaf(rows, width).detach()
    return Case(
        "packed_glu",
        f"{rows} x 2x{width}",
        inputs=[gate_up],
        upstream=[dy],
        forward_bytes=size(gate_up, dy),
        backward_bytes=size(dy, gate_up, gate_up),
    )


def rope(batch: int, seq: int, q_heads: int, k_heads: int, width: int) -> Case:
    # As in the models: heads are a transposed view of the projection's output, [batch, seq, heads, width].
    q, k = (leaf(batch, seq, heads, width).detach().transpose(1, 2).requires_grad_() for heads in (q_heads, k_heads))
    angles = torch.arange(seq).outer(10000.0 ** -torch.linspace(0, 1, width // 2)).repeat(1, 2)
    cos, sin = angles.cos().bfloat16()[None, None], angles.sin().bfloat16()[None, None]
    moved = 2 * size(q, k) + size(cos, sin)
    return Case(
        "rope",
        f"B{batch} S{seq} {q_heads}+{k_heads} x {width}",
        inputs=[q, k, cos, sin],
        upstream=[torch.randn_like(q), torch.randn_like(k)],
        forward_bytes=moved,
        backward_bytes=moved,
    )


def cross_entropy(rows: int, vocab: int) -> Case:
    logits, target = leaf(rows, vocab), torch.randint(vocab, (rows,))
    return Case(
        "cross_entropy",
        f"{rows} x {vocab}",
        inputs=[logits, target],
        upstream=[torch.ones(())],
        forward_bytes=size(logits, target),
        backward_bytes=size(logits, logits, target),
    )


def linear_cross_entropy(rows: int, hidden: int, vocab: int, ignored: float = 0.0) -> Case:
    target = torch.randint(vocab, (rows,))
    target[torch.randperm(rows)[: round(rows * ignored)]] = -100
    return Case(
        "linear_cross_entropy",
        f"{rows} x {hidden} x {vocab}" + (f", {ignored:.0%} ignored" if ignored else ""),
        inputs=[leaf(rows, hidden), leaf(vocab, hidden, std=0.02), target],
        upstream=[torch.ones(())],
        flops=6 * (rows - round(rows * ignored)) * hidden * vocab,
    )


class Op(NamedTuple):
    case: Callable[..., Case]
    shapes: list[tuple]
    small: tuple  # where the host is the limit


OPS = {
    op.case.__name__: op
    for op in (
        Op(
            linear_cross_entropy,
            [(8192, 2048, 128256), (8192, 4096, 128256), (16384, 2048, 151936), (8192, 2048, 128256, 0.6)],
            small=(64, 256, 1024),
        ),
        Op(cross_entropy, [(4096, 128256)], small=(64, 1024)),
        Op(glu, [(8192, 14336), (16384, 8192)], small=(64, 256)),
        Op(packed_glu, [(8192, 8192)], small=(64, 256)),
        Op(rope, [(4, 2048, 32, 8, 128), (8, 2048, 32, 8, 64), (8, 2048, 16, 8, 128)], small=(1, 64, 4, 2, 64)),
        Op(
            rms_norm,
            [
                (8192, 2048), (8192, 4096), (16384, 4096), (4096, 8192), (2048, 16384), (8192, 1024),
                (8192, 3072), (131072, 128), (524288, 64), (262144, 256), (16384, 5120), (1024, 4096),
            ],
            small=(64, 256),
        ),
    )
}  # fmt: skip


def liger(name: str) -> Callable:
    return getattr(importlib.import_module("liger_kernel.transformers.functional"), f"liger_{name}")


def liger_packed_glu() -> Callable:
    return importlib.import_module("liger_kernel.ops").LigerFusedGateUpSiLUMulFunction.apply


def cut_cross_entropy() -> Callable:
    return importlib.import_module("cut_cross_entropy").linear_cross_entropy


# What is not made from our own functions; loaded when asked for, since any may be missing.
OTHERS: dict[str, dict[str, Callable[[], Callable]]] = {
    "rms_norm": {
        "liger": lambda: partial(liger("rms_norm"), eps=EPS),
        "aten": lambda: lambda x, weight: F.rms_norm(x, weight.shape, weight, EPS),
    },
    "glu": {"liger": lambda: liger("swiglu")},
    "packed_glu": {"liger": liger_packed_glu},
    "rope": {"liger": lambda: liger("rope")},
    "cross_entropy": {"liger": lambda: liger("cross_entropy"), "aten": lambda: F.cross_entropy},
    "linear_cross_entropy": {
        "liger": lambda: liger("fused_linear_cross_entropy"),
        "cce": cut_cross_entropy,
    },
}
PEERS = ("ligerfx", "eager", "liger", "inductor", "aten", "cce", "floor")
IN_PLACE = {"liger"}  # writes over its inputs, or over the gradient that comes in


def peers_of(op: str, peers: list[str]) -> list[str]:
    """Those of the peers that have this op; the floor is not one, and is measured apart."""
    return [peer for peer in peers if peer in ("ligerfx", "eager", "inductor") or peer in OTHERS[op]]


def load(op: str, peer: str) -> Callable:
    if peer == "ligerfx":
        return getattr(kernels, op)
    reference = getattr(kernels, f"{op}_reference")
    if peer == "eager":
        return reference
    return torch.compile(reference, dynamic=False) if peer == "inductor" else OTHERS[op][peer]()


class Calls(NamedTuple):
    """A peer, ready to be called on a case."""

    forward: Callable[[], tuple[Tensor, ...]]
    both: Callable[[], list[Tensor]]  # outputs and gradients
    leaves: list[Tensor]
    upstream: list[Tensor]
    restore: Callable[[], None]  # undoes what the peer writes over


def prepare(function: Callable, case: Case, in_place: bool) -> Calls:
    inputs, upstream = case.inputs, case.upstream
    if in_place:
        inputs = [t.detach().clone().requires_grad_(t.requires_grad) for t in inputs]
        upstream = [t.clone() for t in upstream]
    leaves = [t for t in inputs if t.requires_grad]

    def restore() -> None:
        if in_place:
            for mine, original in zip(inputs + upstream, case.inputs + case.upstream, strict=True):
                mine.data.copy_(original.data)  # behind autograd's back, which would refuse a backward

    def forward() -> tuple[Tensor, ...]:
        outputs = function(*inputs)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def both() -> list[Tensor]:
        outputs = forward()
        grads = torch.autograd.grad(outputs, leaves, like(upstream, outputs))
        return [t.detach() for t in outputs] + list(grads)

    return Calls(forward, both, leaves, upstream, restore)


def like(upstream: list[Tensor], outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Incoming gradients in the dtypes of the outputs: a loss may be float32 or bf16."""
    return [u.to(o.dtype) for u, o in zip(upstream, outputs, strict=True)]


def floor(case: Case, rows: int) -> Callable[[], None]:
    """The three matrix products of a linear layer and its loss, on the rows that count, so many at a time."""
    x, weight, target = case.inputs
    x, weight = x.detach()[target != -100], weight.detach()
    dx, dw = torch.empty_like(x), torch.empty_like(weight)

    def run() -> None:
        logits = torch.empty(rows, weight.shape[0], dtype=x.dtype, device=x.device)
        for start in range(0, len(x), rows):
            part = x[start : start + rows]
            chunk = torch.mm(part, weight.t(), out=logits[: len(part)])
            torch.mm(chunk, weight, out=dx[start : start + rows])
            torch.addmm(dw, chunk.t(), part, beta=min(start, 1), out=dw)

    return run


def truth(case: Case) -> list[Tensor]:
    """Outputs and gradients of the reference in float32."""
    reference = getattr(kernels, f"{case.op}_reference")

    def in_chunks(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        """All logits in float32, with what the loss saves of them, would not fit."""
        loss = partial(reference, reduction="sum")
        parts = zip(x.split(2048), target.split(2048), strict=True)
        losses = [checkpoint(loss, rows, weight, labels, use_reentrant=False) for rows, labels in parts]
        return sum(losses) / (target != -100).sum()

    function = in_chunks if case.op == "linear_cross_entropy" else reference
    exact = case._replace(
        inputs=[
            t.detach().float().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in case.inputs
        ],
        upstream=[t.float() for t in case.upstream],
    )
    return prepare(function, exact, in_place=False).both()


def check(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> float:
    """The largest relative error of the outputs and gradients; AssertionError if it is too large."""
    errors = [
        ((a.float() - e).norm() / e.norm()).item() for a, e in zip(actual, expected, strict=True)
    ]  # fmt: skip
    worst = math.nan if any(map(math.isnan, errors)) else max(errors)
    if not worst <= tolerance:
        raise AssertionError(f"wrong: relative errors {', '.join(f'{error:.1e}' for error in errors)}")
    return worst


class Clock:
    """Times calls on a device."""

    def __init__(self, device: str):
        self.device = device
        self.cuda = device == "cuda"
        if self.cuda:
            self.cache = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
            self.flush_seconds = 1e-3
            self.flush_seconds = statistics.median(self.sample(self.cache.zero_, lambda: None, 20)) / 1e3

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def sample(self, call: Callable, restore: Callable[[], None], milliseconds: float) -> list[float]:
        """Milliseconds of single calls, for about that long; of the device alone, where it is a GPU."""
        restore()
        self.synchronize()
        start = time.perf_counter()
        call()
        host = time.perf_counter() - start
        self.synchronize()
        estimate = (time.perf_counter() - start) * 1000
        for _ in range(int(min(100, milliseconds * WARM_UP_MS / REPEAT_MS / estimate))):
            restore()
            call()
        repetitions = max(3, int(min(100, milliseconds / estimate)))
        return [after - before for before, after in self._marks(call, restore, repetitions, host)]

    def _marks(
        self, call: Callable, restore: Callable[[], None], repetitions: int, host: float
    ) -> Iterator[tuple[float, float]]:
        if not self.cuda:
            for _ in range(repetitions):
                restore()
                start = time.perf_counter()
                call()
                yield start * 1000, time.perf_counter() * 1000
            return
        # A write, so that evicting its lines costs the call what the call's own, left in L2, save it. Repeated
        # until the host has had the time to launch the call behind it: then the device never waits.
        flushes = min(8, 2 + int(host / self.flush_seconds))
        events = []
        for _ in range(repetitions):
            restore()
            for _ in range(flushes):
                self.cache.zero_()
            pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            pair[0].record()
            call()
            pair[1].record()
            events.append(pair)
        self.synchronize()
        yield from ((0.0, start.elapsed_time(end)) for start, end in events)

    def extra_megabytes(self, call: Callable) -> float | None:
        if not self.cuda:
            return None
        gc.collect()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 1e6

    def host_microseconds(self, call: Callable) -> float:
        """Of the host, per call, never waiting for the device."""
        count = HOST_CALLS if self.cuda else 5
        for _ in range(count // 5):
            call()
        self.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            call()
        spent = time.perf_counter() - start
        self.synchronize()
        return spent / count * 1e6


def limits(clock: Clock) -> dict[str, float]:
    """What the device can do: bytes read and written a second by a copy, and matrix products in bf16."""
    count, n = (2**31, 8192) if clock.cuda else (2**26, 512)
    with torch.device(clock.device):
        source, target = (torch.randint(100, (count,), dtype=torch.int8) for _ in range(2))
        a, b = leaf(n, n).detach(), leaf(n, n).detach()
    copy = statistics.median(clock.sample(lambda: target.copy_(source), lambda: None, 100))
    product = statistics.median(clock.sample(lambda: torch.mm(a, b), lambda: None, 100))
    return {
        "copy_bytes_per_second": 2 * count / copy * 1e3,
        "matmul_flops_per_second": 2 * n**3 / product * 1e3,
    }


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
        expected = truth(case) if peers else []
        for peer in peers:
            if self.late(case.op, case.shape, [peer]):
                continue
            try:
                calls = prepare(load(case.op, peer), case, peer in IN_PLACE)
                error = check(calls.both(), expected, TOLERANCE if peer == "ligerfx" else PEER_TOLERANCE)
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
        facts: dict[str, dict[str, Any]] = {}
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
        if case.flops and "floor" in self.peers:
            for rows in FLOOR_ROWS:
                timed[f"floor {rows}", "total"] = floor(case, rows), lambda: None
        samples: dict[tuple[str, str], list[float]] = defaultdict(list)
        for _ in range(ROUNDS):
            for key, (call, restore) in list(timed.items()):
                try:
                    samples[key] += self.clock.sample(call, restore, REPEAT_MS / ROUNDS)
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


def number(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None else format(value, form)


BANDWIDTH_COLUMNS = {
    "fwd ms": ("forward_ms", ".3f"),
    "bwd ms": ("backward_ms", ".3f"),
    "fwd of copy": ("forward_copy_share", ".0%"),
    "bwd of copy": ("backward_copy_share", ".0%"),
    "extra MB": ("extra_mb", ".0f"),
}
LOSS_COLUMNS = {
    "fwd+bwd ms": ("total_ms", ".2f"),
    "x floor": ("times_floor", ".2f"),
    "of matmul": ("matmul_share", ".0%"),
    "extra MB": ("extra_mb", ".0f"),
}


def show(console: Console, op: str, results: list[dict[str, Any]]) -> None:
    """Device times and memory of one op."""
    if not results:
        return
    columns = LOSS_COLUMNS if op == "linear_cross_entropy" else BANDWIDTH_COLUMNS
    table = Table(title=op)
    table.add_column("shape", no_wrap=True)
    table.add_column("peer", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right")
    for shape in dict.fromkeys(result["shape"] for result in results):
        table.add_section()
        for row, result in enumerate(result for result in results if result["shape"] == shape):
            values = (number(result.get(key), form) for key, form in columns.values())
            table.add_row("" if row else shape, result["peer"], *values)
    console.print(table)


def show_host(console: Console, host: list[dict[str, Any]], peers: list[str]) -> None:
    table = Table("op", title="host overhead of forward + backward, us a call")
    for peer in peers:
        table.add_column(peer, justify="right")
    for op in dict.fromkeys(result["op"] for result in host):
        values = {r["peer"]: r["microseconds"] for r in host if r["op"] == op}
        table.add_row(op, *(number(values.get(peer), ".0f") for peer in peers))
    console.print(table)


def show_missing(console: Console, missing: list[dict[str, Any]]) -> None:
    """What was not measured, and why; what has one reason together."""
    places: dict[tuple[str, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for miss in missing:
        places[miss["peer"], miss["reason"]][miss["op"]].append(miss["shape"])
    for (peer, reason), shapes in places.items():
        where = "; ".join(f"{op} {', '.join(dict.fromkeys(found))}" for op, found in shapes.items())
        console.print(f"{peer} not measured: {reason}: {where}", style="red", markup=False)


def versions(device: str) -> dict[str, Any]:
    found = environment()
    if device == "cpu":
        found["device"] = "cpu"
    try:
        found["cut-cross-entropy"] = importlib.metadata.version("cut-cross-entropy")
    except importlib.metadata.PackageNotFoundError:
        found["cut-cross-entropy"] = "not installed"
    return found


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
    parser.add_argument("--time-limit", type=float, default=360, help="seconds after which nothing new starts")
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()
    ops = chosen(parser, arguments.ops, OPS)
    peers = chosen(parser, arguments.peers, PEERS)

    console = Console()
    clock = Clock(arguments.device)
    report: dict[str, Any] = {"environment": versions(arguments.device) | limits(clock)}
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
    show_host(console, run.host, [peer for peer in peers if peer != "floor"])
    show_missing(console, run.missing)
    bandwidth, rate = (run.limits[key] for key in ("copy_bytes_per_second", "matmul_flops_per_second"))
    console.print(f"copy {bandwidth / 1e12:.2f} TB/s, matmul {rate / 1e12:.0f} TFLOP/s", style="dim")
    console.print(", ".join(f"{k} {v}" for k, v in report["environment"].items() if isinstance(v, str)), style="dim")
    if any(miss["peer"] == "ligerfx" and miss["reason"] != "time limit" for miss in run.missing):
        sys.exit("ligerfx failed")


if __name__ == "__main__":
    main()
