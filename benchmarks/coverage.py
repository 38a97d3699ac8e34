"""What `benchmarks.zoo` found, as a line, a summary, and the page docs/coverage.md beside the data."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from .environment import environment

SITES = {"rms_norm": "RMSNorm", "glu": "GLU", "rope": "RoPE", "loss": "loss"}
Result = dict[str, Any]


def is_right(result: Result) -> bool:
    return _is_right_in_fp32(result) and not result["bf16"].get("wrong")


def _is_right_in_fp32(result: Result) -> bool:
    others = result["other_shape"], result.get("text_alone", {})
    return not result["fp32"] and all(isinstance(other, str) or not other for other in others)


def is_complete(result: Result) -> bool:
    """Whether nothing is amiss with a model: all of it captured, every site rewritten, the numbers right."""
    if "sites" not in result or result["opaque"] or not is_right(result):
        return False
    return all(result["rewritten"][site] >= count for site, count in result["sites"].items())


def line(name: str, result: Result) -> str:
    """One model in the terminal."""
    for problem in ("not built", "crashed"):
        if problem in result:
            return f"{name:28} {problem.upper()} {result[problem][:150]}"
    sites = "  ".join(f"{title} {_share(result, site)}" for site, title in SITES.items())
    verdict = "right" if is_right(result) else f"WRONG {_wrong(result)}"
    unexplained = f"UNEXPLAINED {result['unexplained']}  " if result["unexplained"] else ""
    return f"{name:28} {sites}  {result['seconds']:.1f} s  {verdict}  {unexplained}{_opaque(result)}"


def summary(results: dict[str, Result]) -> str:
    ran = [result for result in results.values() if "sites" in result]
    captured = sum(result["captured"] for result in ran)
    whole = sum(not result["opaque"] for result in ran)
    parts = [
        f"{len(ran)} of {len(results)} models built and run, {captured} captured ({whole} of them whole), "
        f"{sum(not is_right(result) for result in ran)} wrong, "
        f"{sum('crashed' in result for result in results.values())} crashed; rewritten:"
    ]
    for site, title in SITES.items():
        total = sum(result["sites"][site] for result in ran)
        done = sum(min(result["rewritten"][site], result["sites"][site]) for result in ran)
        parts.append(f"{title} {done} of {total} ({done / max(total, 1):.0%}),")
    missing = sum(len(places) for result in ran for places in result.get("unexplained", {}).values())
    parts.append(f"{missing} sites neither rewritten nor explained,")
    slowest = max(ran, key=lambda result: result["seconds"], default=None)
    seconds = sorted(result["seconds"] for result in ran)
    if slowest:
        parts.append(
            f"optimize takes {seconds[len(seconds) // 2]:.1f} s in the median, {slowest['seconds']:.1f} s at most"
        )
    return " ".join(parts)


def write_data(data: Path, results: dict[str, Result], entries: int) -> None:
    """`entries` is how many the mapping has: a run that ended early has results of fewer."""
    found = {"environment": environment(), "entries": entries, "models": results}
    data.write_text(json.dumps(found, indent=1, sort_keys=False) + "\n")


def write_page(table: Path, files: dict[str, Path]) -> None:
    """The page, from the results of all mappings that there are."""
    page = HEAD
    for mapping, file in files.items():
        if file.exists():
            found = json.loads(file.read_text())
            left = found.get("entries", len(found["models"])) - len(found["models"])
            page = page + _section(mapping, found["models"], found["environment"], left)
    table.write_text("\n".join(page) + "\n")


HEAD = [
    "# Coverage",
    "",
    "<!-- Written by `python -m benchmarks.zoo`. -->",
    "",
    "Every entry of mappings of transformers, as a tiny random model on the CPU, where the plain PyTorch references of "
    "the kernels run.",
    "",
    "Sites are counted without ligerfx, by the classes of the modules that run and by the functions that the "
    "model's own code calls: a module that is an RMSNorm, one that multiplies an activation with something, one "
    "that rotates q and k, a call of cross entropy. A column shows how many of them were rewritten; of each of the "
    "others a near miss, or a module that stays as it is, gives the reason. *fp32* says whether loss, logits and "
    "every gradient are within 1e-5 of the original's, at the shape of the capture and at another one; *bf16* whether "
    "they are as far from fp32 as the original's: over random models and batches, until the mean ratio of the two "
    "errors is surely below 1.25 (of the loss, which is one number a batch, 1.5), or it is surely above 1.1. "
    "*s* is the time of `optimize`.",
]

TITLES = {
    "causal-lm": ("Causal language models", ""),
    "image-text-to-text": (
        "Vision-language models",
        "Each row of a batch has an image and text; then the same optimised model is called with text alone, which "
        "*fp32* takes in. What looks at the data (where the features of an image go, a loop over its grid) stays as it "
        "is; *captured* says whether the model's own forward was, and the loss with it. ",
    ),
    "text-encoders": (
        "Encoders and encoder-decoders",
        "The mappings of masked language models and of sequence-to-sequence models, called with text. ",
    ),
}


def _section(mapping: str, results: dict[str, Result], versions: dict[str, str], left: int) -> list[str]:
    title, note = TITLES[mapping]
    if left:
        note += f"{left} further entries of the mapping were not run. "
    page = [
        "",
        f"## {title}",
        "",
        f"{note}transformers {versions['transformers']}, torch {versions['torch']}: {summary(results)}.",
        "",
        "| model | captured | RMSNorm | GLU | RoPE | loss | fp32 | bf16 | s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        if "sites" not in result:
            continue
        captured = "no" if not result["captured"] else "in part" if result["opaque"] else "yes"
        shares = [_share(result, site) for site in SITES]
        fp32 = "equal" if _is_right_in_fp32(result) else "WRONG"
        bf16 = "WRONG" if result["bf16"].get("wrong") else "equal"
        page.append(f"| {name} | {captured} | {' | '.join(shares)} | {fp32} | {bf16} | {result['seconds']:.1f} |")
    page += _list("Not built", {n: r["not built"] for n, r in results.items() if "not built" in r})
    page += _list("Crashed", {n: r["crashed"] for n, r in results.items() if "crashed" in r})
    page += _list(
        "Sites neither rewritten nor explained",
        {n: _unexplained(r) for n, r in results.items() if r.get("unexplained")},
    )
    page += _list("Modules that stay as they are", {n: _opaque(r) for n, r in results.items() if r.get("opaque")})
    misses = Counter((pattern, reason) for r in results.values() for pattern, _, _, reason in r.get("near_misses", ()))
    if misses:
        page += ["", "### Near misses", "", "| models | pattern | why not |", "|---|---|---|"]
        page += [f"| {n} | {pattern} | {_cell(reason)} |" for (pattern, reason), n in misses.most_common()]
    return page


def _list(title: str, items: dict[str, str]) -> list[str]:
    rows = [f"- {name}: {_cell(text)}" for name, text in items.items()]
    return ["", f"### {title}", "", *rows] if rows else []


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


def _share(result: Result, site: str) -> str:
    done, count = result["rewritten"][site], result["sites"][site]
    return "-" if not done and not count else f"{done}/{count}"


def _opaque(result: Result) -> str:
    reasons: dict[str, list[str]] = {}
    for path, reason in result["opaque"].items():
        reasons.setdefault(reason, []).append(path)
    return "; ".join(
        f"{paths[0]}{f' and {len(paths) - 1} more' * (len(paths) > 1)}: {r}" for r, paths in reasons.items()
    )


def _unexplained(result: Result) -> str:
    return "; ".join(f"{SITES[site]} in {', '.join(places)}" for site, places in result.get("unexplained", {}).items())


def _wrong(result: Result) -> str:
    return json.dumps({key: result[key] for key in ("fp32", "other_shape", "text_alone", "bf16") if key in result})[
        :300
    ]
