"""Plots of what `benchmarks.kernels` or `benchmarks.memory` measured.

    python -m benchmarks.plots RESULTS.json -o docs/benchmarks

Of kernels, writes kernels.png (the memory-bound ones: share of the copy bandwidth) and loss.png (linear layer and
cross entropy: time and memory); of memory, memory-seq.png and memory-vocab.png. Each if the file has such results.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)
from matplotlib.axes import Axes  # noqa: E402

COLOURS = {
    "ligerfx": "tab:red",
    "ligerfx-bf16": "tab:pink",
    "ligerfx-low": "tab:pink",
    "eager": "tab:gray",
    "liger": "tab:blue",
    "copy": "lightgray",
    "inductor": "tab:orange",
    "aten": "tab:green",
    "cce": "tab:purple",
    "compile": "tab:orange",
}
LOSS = "linear_cross_entropy"
AXES = {"seq": "sequence length", "vocab": "vocabulary"}

Result = dict[str, Any]


def bars(axes: Axes, results: list[Result], key: str, scale: float, form: str) -> None:
    """Groups of bars, one for each op and shape, of a bar for each peer; what was not measured has none."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result["op"], result["shape"]), []).append(result)
    labelled: set[str] = set()
    left, centres = 0.0, []
    for group in groups.values():
        for place, result in enumerate(group):
            value = result.get(key)
            peer = result["peer"]
            bar = axes.bar(
                left + place,
                0 if value is None else value * scale,
                width=1,
                color=COLOURS[peer],
                label=None if peer in labelled else peer,
            )
            labelled.add(peer)
            axes.bar_label(
                bar, ["-" if value is None else format(value * scale, form)], fontsize=7, padding=1, rotation=90
            )  # fmt: skip
        centres.append(left + (len(group) - 1) / 2)
        left += len(group) + 1
    labels = [f"{op}\n{shape}" if op != LOSS else shape.replace(", ", "\n") for op, shape in groups]
    axes.set_xticks(centres, labels, fontsize=8)
    axes.margins(x=0.01, y=0.15)


def kernels(results: list[Result], conditions: str, path: Path) -> None:
    """Forward above backward, in several rows if there are many shapes."""
    ops = sorted({result["op"] for result in results} - {"rms_norm"})
    rows = [[r for r in results if r["op"] in ops], [r for r in results if r["op"] == "rms_norm"]]
    rows = [row for row in rows if row]
    panels = [(row, part) for row in rows for part in ("forward", "backward")]
    figure, all_axes = plt.subplots(len(panels), squeeze=False, figsize=(18, 3.2 * len(panels)))
    for (row, part), axes in zip(panels, all_axes.flat, strict=True):
        bars(axes, row, f"{part}_copy_share", 100, ".0f")
        axes.axhline(100, color="black", linewidth=0.8, linestyle="--")
        axes.set_ylabel(f"{part}: % of copy bandwidth")
    save(figure, f"Memory-bound kernels, device time\n{conditions}", path)


def loss(results: list[Result], conditions: str, path: Path) -> None:
    figure, (time, memory) = plt.subplots(1, 2, figsize=(15, 5))
    peers = [result for result in results if result["peer"] != "floor"]
    if len(peers) < len(results):
        bars(time, peers, "times_floor", 1, ".2f")
        time.axhline(1, color="black", linewidth=0.8, linestyle="--")
        time.set_ylabel("time / time of the three matrix products")
    else:  # the floor was not measured
        bars(time, peers, "total_ms", 1, ".1f")
        time.set_ylabel("ms")
    bars(memory, peers, "extra_mb", 1e-3, ".2f")
    memory.set_ylabel("peak extra memory, GB (gradients included)")
    save(figure, f"Linear layer and cross entropy, forward and backward\n{conditions}", path)


def memory(report: dict[str, Any], axis: str, path: Path) -> None:
    """Peak memory, a line for each variant; a cross on top at the smallest size that did not fit."""
    figure, axes = plt.subplots(figsize=(9, 5.5))
    points = [point for point in report["points"] if point["axis"] == axis and "size" in point]
    fitting = [point for point in points if point["fits"] and point["peak_gib"]]
    card = None if all(point["fits"] for point in points) else report["card_gib"]
    top = card or max(point["peak_gib"] for point in fitting)
    for variant in dict.fromkeys(point["variant"] for point in points):
        mine = sorted((p["size"], p["peak_gib"]) for p in fitting if p["variant"] == variant)
        sizes, peaks = [size for size, _ in mine], [peak for _, peak in mine]
        axes.plot(sizes, peaks, marker="o", markersize=4, color=COLOURS[variant], label=variant)
        if too_large := [p["size"] for p in points if p["variant"] == variant and not p["fits"]]:
            axes.plot(min(too_large), top, "x", markersize=9, color=COLOURS[variant])
    if card:
        axes.axhline(top, color="black", linewidth=0.8, linestyle="--")
        place = {"xycoords": axes.get_yaxis_transform(), "va": "bottom", "fontsize": 8}
        axes.annotate("memory of the card; x: does not fit", (0.01, top), **place)
    ticks = [size for size in sorted({point["size"] for point in points}) if size & (size - 1) == 0]
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{size // 1024}k" if size >= 1024 else str(size) for size in ticks])
    axes.set_ylim(0, top * 1.1)
    axes.set_xlabel(f"{AXES[axis]}, tokens")
    axes.set_ylabel("peak memory, GiB")
    axes.grid(alpha=0.3)
    fixed = {"seq": f"vocabulary {report['config']['vocab_size']}", "vocab": f"sequence {report['seq_of_vocabs']}"}
    environment = report["environment"]
    versions = ", ".join(f"{name} {environment[name]}" for name in ("torch", "transformers", "liger-kernel"))
    where = (
        f"{report['model']} shape, batch 1, {fixed[axis]}, bf16, SDPA, weights and gradients included, no optimizer\n"
        f"{environment['device']}, {versions}"
    )
    save(figure, f"Peak memory of one forward and backward pass\n{where}", path)


def save(figure: plt.Figure, title: str, path: Path) -> None:
    axes = figure.axes[0]
    axes.legend(ncols=len(COLOURS), fontsize=8, loc="lower right", bbox_to_anchor=(1, 1.01), frameon=False)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def conditions(environment: dict[str, Any]) -> str:
    versions = ("torch", "triton", "liger-kernel", "cut-cross-entropy")
    return (
        f"{environment['device']}, bf16, medians, peers alternating in one run, "
        f"copy {environment['copy_bytes_per_second'] / 1e12:.2f} TB/s, "
        f"matmul {environment['matmul_flops_per_second'] / 1e12:.0f} TFLOP/s\n"
        + ", ".join(f"{name} {environment[name]}" for name in versions)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="what `benchmarks.kernels` or `benchmarks.memory` wrote")
    parser.add_argument("-o", "--out", type=Path, default=Path("docs/benchmarks"), help="folder to write to")
    arguments = parser.parse_args()

    report = json.loads(arguments.results.read_text())
    arguments.out.mkdir(parents=True, exist_ok=True)
    if "points" in report:
        for axis in dict.fromkeys(point["axis"] for point in report["points"]):
            path = arguments.out / f"memory-{axis}.png"
            memory(report, axis, path)
            print(path)
        return
    title = conditions(report["environment"])
    losses = [result for result in report["results"] if result["op"] == LOSS]
    products = {result["op"] for result in report["results"] if result["matmul_share"]}
    others = [result for result in report["results"] if result["op"] not in products]
    for results, draw in ((others, kernels), (losses, loss)):
        if results:
            path = arguments.out / f"{draw.__name__}.png"
            draw(results, title, path)
            print(path)


if __name__ == "__main__":
    main()
