"""The command line: `ligerfx inspect`, `demo`, `bench` and `env`."""

from __future__ import annotations

import difflib
import json
import logging
import platform
import sys
import time
import warnings
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .errors import LigerfxError

app = typer.Typer(
    help="Rewrites HuggingFace models onto fused Triton kernels, and shows what it did.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

_USAGE_ERROR: type = typer.BadParameter.__base__  # of which typer exports only this kind

NameOrConfig = Annotated[
    str, typer.Argument(help="a config.json or its folder, a model type such as llama, or a name on the hub")
]
Batch = Annotated[int, typer.Option(min=1, help="sequences in a batch")]
Sequence = Annotated[int, typer.Option(min=1, help="tokens in a sequence")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16")]
Layers = Annotated[int | None, typer.Option(min=1, help="use so many layers instead of those of the config")]
LowMemory = Annotated[bool, typer.Option("--low-memory", help="as optimize(low_memory=True)")]


@app.command()
def inspect(
    model: NameOrConfig,
    batch: Batch = 8,
    sequence: Sequence = 2048,
    dtype: Dtype = "bfloat16",
    layers: Layers = None,
    low_memory: LowMemory = False,
    module: Annotated[str | None, typer.Option(help="explain this module, as model.layers.0.mlp")] = None,
    html: Annotated[Path | None, typer.Option(help="write the report as a page to this file")] = None,
    as_json: Annotated[Path | None, typer.Option("--json", help="write the report as JSON to this file")] = None,
) -> None:
    """Show what would be rewritten in a model, from its configuration alone: no weights, no GPU."""
    from .explain import explain
    from .optimize import optimize

    for path in (html, as_json):
        if path is not None and not path.parent.is_dir():
            raise LigerfxError(f"cannot write {path}: there is no folder {path.parent}")
    start = time.perf_counter()
    config = load_config(model, layers)
    built = build(config, dtype, "meta")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        gm = optimize(built, low_memory=low_memory)
    seconds = time.perf_counter() - start
    console = Console() if sys.stdout.isatty() else Console(width=120)
    for warning in {str(w.message): None for w in said if "rewritten" in str(w.message)}:
        Console(stderr=True).print(f"ligerfx: {warning}", style="yellow", markup=False)
    console.print(gm.report)
    if module is not None:
        console.print(explain(gm, module))
    elif gm.report.rewrites:
        console.print(estimate_table(gm.report.cost * (batch * sequence), batch, sequence, dtype))
    parameters = sum(p.numel() for p in built.parameters())
    console.print(f"{parameters / 1e9:.2f}B parameters, none of them loaded; {seconds:.1f} s", style="dim")
    for path, write in ((html, gm.report.to_html), (as_json, gm.report.to_json)):
        if path is not None:
            write(path)
            console.print(f"wrote {path}", style="dim")


@app.command()
def demo() -> None:
    """Optimise a small random Llama, show what was rewritten, and train it beside the original."""
    from .demo import main as run

    run()


@app.command()
def bench(
    model: NameOrConfig = "llama",
    batch: Batch = 4,
    sequence: Sequence = 1024,
    dtype: Dtype = "bfloat16",
    layers: Layers = None,
    low_memory: LowMemory = False,
    steps: Annotated[int, typer.Option(min=4, help="training steps of each; the first three are not timed")] = 12,
) -> None:
    """Train a model with random weights, as it is and optimised: time, memory and losses. Needs a CUDA device."""
    import torch

    from .bench import compare

    if not torch.cuda.is_available():
        raise LigerfxError(
            "bench measures on a CUDA device, and PyTorch sees none: `ligerfx inspect` estimates without one"
        )
    Console().print(compare(build(load_config(model, layers), dtype, "cuda"), batch, sequence, steps, low_memory))


@app.command()
def env() -> None:
    """Show the versions and devices that an issue report needs."""
    import torch

    from .kernels._runtime import HAS_TRITON, INTERPRET

    rows = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("ligerfx", "torch", "triton", "transformers", "accelerate", "peft", "trl", "liger-kernel"):
        try:
            rows[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            rows[package] = "not installed"
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    rows["CUDA devices"] = ", ".join(devices) or "none"
    if HAS_TRITON and devices:
        rows["kernels"] = "Triton"
    elif HAS_TRITON and INTERPRET:
        rows["kernels"] = "Triton's interpreter (TRITON_INTERPRET=1)"
    else:
        rows["kernels"] = "plain PyTorch (no CUDA device)" if HAS_TRITON else "plain PyTorch (Triton is not installed)"
    for name, value in rows.items():
        print(f"{name}: {value}")


def load_config(name: str, layers: int | None = None) -> Any:
    """The configuration of a model: from a file or folder, of a model type with its defaults, or from the hub.

    Raises:
        LigerfxError: there is none.
    """
    try:
        from transformers import CONFIG_MAPPING, AutoConfig
    except ImportError as error:
        raise LigerfxError("models are built with transformers: pip install 'ligerfx[transformers]'") from error
    path = Path(name)
    try:
        if path.exists():
            file = path / "config.json" if path.is_dir() else path
            settings = json.loads(file.read_text())
            if settings.get("model_type") not in CONFIG_MAPPING:
                raise LigerfxError(f"{file} has no model_type that transformers knows: {settings.get('model_type')!r}")
            config = AutoConfig.from_pretrained(file)
        elif name in CONFIG_MAPPING:
            config = AutoConfig.for_model(name)
        elif name.endswith(".json") or name.startswith(("/", ".", "~")):
            raise LigerfxError(f"there is no file or folder {name!r}: pass a config.json, or the folder that holds one")
        elif "/" not in name:
            near = difflib.get_close_matches(name, CONFIG_MAPPING, n=1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            raise LigerfxError(f"{name!r} is no file, no name on the hub (owner/model) and no model type{hint}")
        else:
            logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # which tells of each attempt
            config = AutoConfig.from_pretrained(name)
    except LigerfxError:
        raise
    except Exception as error:
        raise LigerfxError(
            f"no configuration {name!r}: pass a config.json or its folder, a model type such as llama, or a name that "
            f"the hub has ({_first_line(error)})"
        ) from error
    if layers is not None:
        _shorten(config.get_text_config(), layers)
    return config


def _first_line(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text[:160]}"


def _shorten(config: Any, layers: int) -> None:
    config.num_hidden_layers = layers
    if isinstance(getattr(config, "layer_types", None), list):
        config.layer_types = config.layer_types[:layers]


def build(config: Any, dtype: str, device: str) -> Any:
    """A causal or vision-language model of this configuration with random weights, in training mode.

    Raises:
        LigerfxError: there is no such model, or no such dtype.
    """
    import torch
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        auto_class = AutoModelForCausalLM
    elif type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        auto_class = AutoModelForImageTextToText
    else:
        raise LigerfxError(
            f"transformers has no causal or vision-language model of type {config.model_type!r}: for another kind, "
            "build it in Python, and call ligerfx.optimize(model, example_inputs)"
        )
    if dtype not in ("float32", "bfloat16", "float16"):
        raise LigerfxError(f"--dtype must be float32, bfloat16 or float16, not {dtype!r}")
    try:
        with torch.device(device):
            return auto_class.from_config(config, dtype=getattr(torch, dtype)).train()
    except torch.OutOfMemoryError as error:
        raise LigerfxError("the model does not fit into the device's memory: use --layers to build a part") from error
    except Exception as error:
        raise LigerfxError(
            f"transformers builds no model of type {config.model_type!r} from this configuration ({_first_line(error)})"
        ) from error


def estimate_table(cost: Any, batch: int, sequence: int, dtype: str) -> Table:
    """What the replaced code costs in all, before and after."""
    table = Table(
        "",
        "original",
        "rewritten",
        title=f"replaced code, {batch} x {sequence} tokens, {dtype}: estimated from shapes",
        title_justify="left",
    )
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("read and written by a forward pass", _gib(cost.moved_before), _gib(cost.moved_after))
    table.add_row("of that: intermediate results, written", _gib(cost.written_before), _gib(cost.written_after))
    table.add_row("kept inside it for the backward pass", _gib(cost.kept_before), _gib(cost.kept_after))
    return table


def _gib(number: int) -> str:
    if not number:
        return "0"
    return f"{number / 2**30:,.1f} GiB" if number >= 2**30 else f"{number / 2**20:,.1f} MiB"


def main() -> None:
    """Runs the command line. Errors are one line that says what to do, with exit code 1."""
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], prog_name="ligerfx", standalone_mode=False))
    except LigerfxError as error:
        text = str(error)
    except _USAGE_ERROR as error:
        text = f"{error.format_message()} (`{error.ctx.command_path} --help` shows what there is)"
    print(f"ligerfx: {text}", file=sys.stderr)
    sys.exit(1)
