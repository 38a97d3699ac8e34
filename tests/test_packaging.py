"""The installed package, and the trap of a top-level folder named `kernels`."""

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(code: str, cwd: Path | None = None) -> str:
    """Standard output of `code` in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_after(statement: str) -> set[str]:
    """The top-level modules that `statement` loads."""
    names = run(f"{statement}; import json, sys; print(json.dumps(list(sys.modules)))").splitlines()[-1]
    return {name.split(".")[0] for name in json.loads(names)}


def test_transformers_works_beside_our_kernels_folder():
    """`python -c` in the repository root has transformers find our folder for HuggingFace's `kernels`."""
    code = """
import sys
assert sys.path[0] == "", sys.path

import torch, transformers
from transformers.utils import is_kernels_available

assert not is_kernels_available(), "transformers takes our kernels/ for the HuggingFace package"

config = transformers.LlamaConfig(
    hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
)
ids = torch.arange(6)[None]
print(transformers.LlamaForCausalLM(config)(input_ids=ids, labels=ids).loss.isfinite().item())
"""
    assert run(code, cwd=ROOT).split()[-1] == "True"


def test_hf_kernels_is_not_shadowed():
    """Where HuggingFace's `kernels` is installed too, tests must not get our folder in its place."""
    try:
        importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the HuggingFace package `kernels` is not installed")
    origin = importlib.util.find_spec("kernels").origin
    assert origin != str(ROOT / "kernels" / "__init__.py"), "run `pytest`, not `python -m pytest`, from here"


def test_kernels_under_the_wrong_name_is_harmless():
    """transformers may import our folder as `kernels`: it must not pass for a version, nor do anything."""
    code = """
import sys
import kernels
assert kernels.__file__.endswith("kernels/__init__.py"), kernels
assert not hasattr(kernels, "__version__")
heavy = ("torch", "triton", "transformers", "ligerfx")
assert not [name for name in sys.modules if name.startswith("kernels.") or name.split(".")[0] in heavy]
"""
    run(code, cwd=ROOT)


def test_importing_is_light():
    """transformers, which ligerfx does not need, and Triton, which a machine may lack, stay unimported."""
    loaded = loaded_after("import ligerfx, ligerfx.kernels, ligerfx.patterns")
    assert not loaded & {"transformers", "triton"}


def test_package_list_matches_the_folders():
    """Packages are listed by hand: a new folder with an `__init__.py` has to be added to pyproject.toml."""
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    listed = {setuptools["package-dir"][name] for name in setuptools["packages"]}
    assert set(setuptools["package-dir"]) == set(setuptools["packages"])
    assert listed == {
        str(init.parent.relative_to(ROOT))
        for top in ("ligerfx", "kernels", "patterns")
        for init in (ROOT / top).rglob("__init__.py")
    }
    assert (ROOT / "ligerfx" / "py.typed").exists()
