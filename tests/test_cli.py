"""The command line: what it prints, what it writes, and errors that are one line."""

import json
import subprocess
import sys

import pytest
import torch

from ligerfx import cli
from ligerfx.bench import compare
from models import make

TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command line; gives (exit code, stdout, stderr)."""

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["ligerfx", *map(str, args)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capsys.readouterr()
        return stopped.value.code or 0, out, err

    return call


@pytest.fixture
def config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    return tmp_path / "config.json"


def test_inspect_from_a_file_and_a_folder(run, config, tmp_path):
    code, out, err = run("inspect", config, "--html", tmp_path / "r.html", "--json", tmp_path / "r.json")
    assert code == 0 and err == ""
    assert "5/5 RMSNorm, 2/2 RoPE, 2/2 GLU, 1/1 logits + loss" in out
    assert "add_rms_norm_rounded_first_silu_glu_mlp" in out  # not cut off
    assert "0.00B parameters, none of them loaded" in out
    data = json.loads((tmp_path / "r.json").read_text())
    assert data["rewrites"][0]["inputs"]["x"] == "bfloat16 [s0, s1, 64]"
    assert (tmp_path / "r.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert run("inspect", config.parent, "--layers", 1)[1].startswith("LlamaForCausalLM: 3/3 RMSNorm")


def test_inspect_estimates_for_a_batch(run, config, tmp_path):
    """The table is the report's cost times the tokens."""
    _, out, _ = run("inspect", config, "--batch", 16, "--sequence", 4096, "--json", tmp_path / "r.json")
    rewrites = json.loads((tmp_path / "r.json").read_text())["rewrites"]
    tokens = 16 * 4096
    for key in (f"{what}_{when}" for what in ("moved", "written", "kept") for when in ("before", "after")):
        number = sum(r["cost"][key] for r in rewrites) * tokens
        assert f"{number / 2**20:.1f} MiB" in out or f"{number / 2**30:.1f} GiB" in out, key
    assert "16 x 4096 tokens, bfloat16" in out
    single = run("inspect", config, "--batch", 1, "--sequence", 1, "--dtype", "float32")[1]
    assert "1 x 1 tokens, float32" in single and "GiB" not in single


def test_inspect_a_vision_language_model(run, tmp_path):
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings = {
        "model_type": "llava",
        "text_config": TINY,
        "vision_config": vision | {"model_type": "clip_vision_model"},
    }
    (tmp_path / "config.json").write_text(json.dumps(settings))
    code, out, _ = run("inspect", tmp_path)
    assert code == 0 and out.startswith("LlavaForConditionalGeneration: 5/5 RMSNorm, 2/2 RoPE, 2/2 GLU, 1/1 logits")


def test_inspect_explains_a_module(run, config):
    code, out, _ = run("inspect", config, "--module", "model.layers.1.mlp")
    assert (
        code == 0
        and "model.layers.1.mlp: LlamaMLP" in out
        and "rewritten: add_rms_norm_rounded_first_silu_glu_mlp" in out
    )
    assert "estimated from shapes" not in out


def test_inspect_low_memory_keeps_less_of_the_gated_unit(run, config, tmp_path):
    kept = []
    for options in ([], ["--low-memory"]):
        run("inspect", config, "--json", tmp_path / "r.json", *options)
        kept.append(sum(r["cost"]["kept_after"] for r in json.loads((tmp_path / "r.json").read_text())["rewrites"]))
    assert kept == [2 * 3 * 128 * 2, 2 * 2 * 128 * 2]  # layers; gate, up and their product; width, bytes


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["inspect", "lama"], "no model type, did you mean 'llama'?"),
        (["inspect", "{tmp}/broken.json"], "pass a config.json or its folder, a model type such as llama"),
        (["inspect", "{tmp}/foreign.json"], "has no model_type that transformers knows: 'alien'"),
        (["inspect", "{tmp}/missing.json"], "missing.json': pass a config.json, or the folder that holds one"),
        (["inspect", "{tmp}/odd.json"], "builds no model of type 'llama' from this configuration"),
        (["inspect", "{tmp}/config.json", "--html", "{tmp}/none/r.html"], "/none"),
        (["inspect", "t5"], "no causal or vision-language model of type 't5'"),
        (["inspect", "{tmp}/config.json", "--dtype", "int8"], "must be float32, bfloat16 or float16, not 'int8'"),
        (["inspect", "{tmp}/config.json", "--batch", "0"], "'--batch'"),
        (["inspect", "{tmp}/config.json", "--module", "model.layer.0"], "did you mean 'model.layers.0'?"),
        (["inspect"], "`ligerfx inspect --help` shows"),
        (["inspct"], "No such command 'inspct'"),
        (["env", "--all"], "--all"),
    ],
)
def test_errors_are_one_line(run, config, tmp_path, arguments, said):
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "foreign.json").write_text('{"model_type": "alien"}')
    (tmp_path / "odd.json").write_text(json.dumps(TINY | {"hidden_act": "none of these"}))
    code, _, err = run(*(a.replace("{tmp}", str(tmp_path)) for a in arguments))
    assert code == 1
    assert err.startswith("ligerfx: ") and err.count("\n") == 1 and said in err


def test_a_hub_that_cannot_be_reached(run, monkeypatch):
    import transformers

    def unreachable(name):
        raise OSError("We couldn't connect to the hub\nand more")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", unreachable)
    code, _, err = run("inspect", "owner/model")
    assert code == 1 and err.count("\n") == 1 and "We couldn't connect to the hub" in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_bench_without_a_gpu_says_what_it_needs(run):
    code, _, err = run("bench")
    assert code == 1 and "bench measures on a CUDA device" in err and err.count("\n") == 1


def test_bench_trains_both_from_the_same_weights(references):
    model = make("llama")
    table = compare(model, batch=2, sequence=8, steps=4)
    columns = [list(column.cells) for column in table.columns]
    assert columns[0] == ["original", "optimised"]
    first, second = map(float, columns[4])
    assert first == pytest.approx(second, rel=1e-5)
    assert columns[1] == ["", ""]  # nothing was timed on a CPU


def test_env(run):
    code, out, _ = run("env")
    assert code == 0
    assert f"torch: {torch.__version__.partition('+')[0]}" in out
    assert "kernels: " in out and "python: 3." in out


def test_help_lists_the_commands(run):
    for arguments in ([], ["--help"]):
        code, out, _ = run(*arguments)
        assert code == 0 and all(command in out for command in ("inspect", "demo", "bench", "env"))


def test_installed_as_a_module(config):
    done = subprocess.run([sys.executable, "-m", "ligerfx", "inspect", "lama"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip().endswith("did you mean 'llama'?")
