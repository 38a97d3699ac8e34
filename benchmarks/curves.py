"""Loss curves on real text: a small Llama and a small Gemma-2, original beside optimised.

    python -m benchmarks.curves                                     # a few minutes on a CPU
    python -m benchmarks.curves --device cuda --dtype bfloat16

A third run shows what rounding alone does over the steps: the original again, with its embedding moved by one
unit in the last place. Writes curves.png and curves.json to docs/benchmarks. The text is the help that Python ships
(`pydoc_data.topics`, about 700 kB), tokenised by bytes, so nothing has to be downloaded.
"""

import argparse
import copy
import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import matplotlib
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

import ligerfx

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)

BATCH, SEQ = 8, 128

SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 256,
    "max_position_embeddings": SEQ,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def build(name: str) -> nn.Module:
    if name == "Llama":
        return LlamaForCausalLM(LlamaConfig(**SHAPE))
    # Sliding and full attention alternate; a window shorter than the sequence makes the difference felt.
    return Gemma2ForCausalLM(Gemma2Config(**SHAPE, sliding_window=SEQ // 2, query_pre_attn_scalar=32))


def text_batches(steps: int, device: str) -> list[Tensor]:
    """Random windows of the text as byte ids, (BATCH, SEQ) each."""
    text = "\n".join(topics[name] for name in sorted(topics))
    data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
    starts = torch.randint(len(data) - SEQ, (steps, BATCH, 1))
    return list(data[starts + torch.arange(SEQ)].to(device))


def train(model: nn.Module, batches: list[Tensor], description: str) -> list[float]:
    """The loss of each step of AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for ids in track(batches, description):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def compare(name: str, steps: int, device: str, dtype: torch.dtype) -> dict[str, list[float]]:
    """Train the original, the optimised and a minutely moved original on the same batches."""
    torch.manual_seed(0)
    model = build(name).to(device, dtype)
    original = copy.deepcopy(model)  # `optimize` shares the parameters of the model that it is given
    moved = copy.deepcopy(model)
    with torch.no_grad():
        moved.get_input_embeddings().weight.mul_(1 + torch.finfo(dtype).eps)
    batches = text_batches(steps, device)
    return {
        "original": train(original, batches, f"{name}, original"),
        "optimised": train(ligerfx.optimize(model), batches, f"{name}, optimised"),
        "original moved by one ulp": train(moved, batches, f"{name}, moved"),
    }


def plot(curves: dict[str, dict[str, list[float]]], title: str, path: Path) -> None:
    """Per model: both curves on top of each other, and below them how far apart they are."""
    figure, axes = plt.subplots(2, len(curves), figsize=(5 * len(curves), 6), sharex=True, sharey="row")
    for (name, curve), (losses, gap) in zip(curves.items(), axes.T, strict=True):
        losses.plot(curve["original"], color="tab:blue", linewidth=4, alpha=0.35, label="original")
        losses.plot(curve["optimised"], color="tab:red", linewidth=1, label="ligerfx")
        losses.set_title(name)
        losses.set_ylabel("loss")
        losses.legend()
        for other, marker, color in (
            ("optimised", ".", "tab:red"),
            ("original moved by one ulp", "x", "tab:gray"),
        ):
            difference = [abs(a - b) for a, b in zip(curve["original"], curve[other], strict=True)]
            gap.plot(difference, marker, color=color, markersize=4, label=other)
        gap.set_yscale("symlog", linthresh=1e-8)  # logarithmic, with room for an exact zero
        gap.set_ylim(0, 1)
        gap.set_ylabel("absolute difference to the original")
        gap.set_xlabel("step")
        gap.legend()
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"), help="folder to write to")
    arguments = parser.parse_args()

    dtype = getattr(torch, arguments.dtype)
    curves = {name: compare(name, arguments.steps, arguments.device, dtype) for name in ("Llama", "Gemma-2")}
    where = torch.cuda.get_device_name(arguments.device) if "cuda" in arguments.device else arguments.device
    title = f"{arguments.steps} steps of AdamW on text, {arguments.dtype}, {where}"

    arguments.out.mkdir(parents=True, exist_ok=True)
    plot(curves, title, arguments.out / "curves.png")
    (arguments.out / "curves.json").write_text(json.dumps({"title": title, "losses": curves}, indent=1) + "\n")
    for name, curve in curves.items():
        optimised, moved = (
            max(abs(a - b) for a, b in zip(curve["original"], curve[other], strict=True))
            for other in ("optimised", "original moved by one ulp")
        )
        first, last = curve["original"][0], curve["original"][-1]
        Console().print(
            f"{name}: loss {first:.4f} -> {last:.4f}, largest difference {optimised:.1e}, "
            f"of the original moved by one ulp {moved:.1e}"
        )


if __name__ == "__main__":
    main()
