"""Every model of a mapping of the installed transformers, tiny and random: what is captured, what is rewritten, and
whether loss, logits and gradients are the same.

    python -m benchmarks.zoo                 # all of them; writes docs/coverage.md and docs/coverage.json
    python -m benchmarks.zoo llama gpt_oss   # some, to the terminal
    python -m benchmarks.zoo --again         # those that were not right, complete and without near misses the last time
    python -m benchmarks.zoo --mapping image-text-to-text    # of another mapping of transformers

Each model has a process of its own, which ends after a time limit: a crash costs one row.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import coverage

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "coverage.md"
ZOOS = {"causal-lm": "zoo", "image-text-to-text": "zoo_vision", "text-encoders": "zoo_encoders"}
"""The modules in tests/ that build the models of each mapping."""


def data_file(mapping: str) -> Path:
    return ROOT / "docs" / ("coverage.json" if mapping == "causal-lm" else f"coverage-{mapping}.json")


def prepare() -> None:
    """Imports, and the work that is done once in a process: every fork then starts where it ends."""
    os.environ.setdefault("TRITON_INTERPRET", "0")
    sys.path.insert(0, str(ROOT / "tests"))
    import torch
    import transformers
    import zoo_check

    from ligerfx.patterns import default_patterns

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    for pattern in default_patterns():
        _ = pattern.variants
    zoo_check.check("llama")


def work(name: str, mapping: str, results: Connection) -> None:
    import warnings

    import zoo_check

    zoo = importlib.import_module(ZOOS[mapping])

    warnings.simplefilter("ignore")
    try:
        model = zoo.build(name)
        model(**zoo.example(model)).loss.sum().backward()
    except Exception as error:
        results.send({"not built": f"{type(error).__name__}: {str(error).strip()[:300]}"})
        return
    try:
        results.send(zoo_check.check(name, zoo))
    except Exception as error:
        results.send({"crashed": f"{type(error).__name__}: {str(error).strip()[:500]}"})


def sweep(
    names: list[str],
    mapping: str,
    jobs: int,
    limit: float,
    console: Console,
    keep: Callable[[dict[str, Any]], None],
) -> dict[str, dict[str, Any]]:
    fork = multiprocessing.get_context("fork")
    waiting, running, found = list(names), {}, {}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("models", total=len(names))
        while waiting or running:
            while waiting and len(running) < jobs:
                name = waiting.pop(0)
                ours, theirs = fork.Pipe(duplex=False)
                process = fork.Process(target=work, args=(name, mapping, theirs))
                process.start()
                theirs.close()
                running[ours] = name, process, time.monotonic()
            progress.update(task, description=" ".join(name for name, *_ in running.values()))
            ready = wait(list(running), timeout=0.5)
            for connection, (name, process, start) in list(running.items()):
                if connection in ready:
                    try:
                        found[name] = connection.recv()
                    except EOFError:
                        process.join()
                        found[name] = {"crashed": f"the process ended with {process.exitcode}"}
                elif time.monotonic() - start > limit:
                    found[name] = {"crashed": f"took more than {limit:.0f} s"}
                else:
                    continue
                process.kill()
                process.join()
                del running[connection]
                progress.advance(task)
                keep(found)
                progress.console.print(coverage.line(name, found[name]), highlight=False, soft_wrap=True)
    return {name: found[name] for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="model types; default: all, and the results are written")
    parser.add_argument("--again", action="store_true", help="those that the written results show something amiss with")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--limit", type=float, default=120, help="seconds for each model")
    parser.add_argument("--write", action="store_true", help="also write the results of selected models")
    parser.add_argument("--mapping", choices=ZOOS, default="causal-lm", help="which models")
    options = parser.parse_args()
    prepare()
    zoo = importlib.import_module(ZOOS[options.mapping])

    console = Console()
    data = data_file(options.mapping)
    known: dict[str, Any] = json.loads(data.read_text())["models"] if data.exists() else {}
    if options.again:
        names = [name for name, result in known.items() if not coverage.is_complete(result)]
    else:
        names = options.names or list(zoo.NAMES)
    unbuildable = {name: {"not built": zoo.UNBUILDABLE[name]} for name in names if name in zoo.UNBUILDABLE}
    kept = not options.names or options.write

    def merged(found: dict[str, Any]) -> dict[str, Any]:
        """The results in the order of the names, those of other models as they were."""
        found = known | unbuildable | found
        return {name: found[name] for name in zoo.NAMES if name in found}

    def keep(found: dict[str, Any]) -> None:  # of a run that ends early, too
        if kept:
            coverage.write_data(data, merged(found), len(zoo.NAMES))

    start = time.monotonic()
    buildable = [name for name in names if name not in unbuildable]
    found = sweep(buildable, options.mapping, options.jobs, options.limit, console, keep)
    console.print(coverage.summary({name: unbuildable.get(name) or found[name] for name in names}))
    console.print(f"{time.monotonic() - start:.0f} s")
    if kept:
        coverage.write_data(data, merged(found), len(zoo.NAMES))
        coverage.write_page(TABLE, {mapping: data_file(mapping) for mapping in ZOOS})


if __name__ == "__main__":
    main()
