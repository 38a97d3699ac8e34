"""What `benchmarks.kernels` measured, as tables."""

import sys
from collections import defaultdict
from typing import Any

from rich.console import Console
from rich.table import Table


def wide_console() -> Console:
    """As wide as the terminal, or wide enough for the tables where there is none."""
    return Console(width=None if sys.stdout.isatty() else 130)


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
