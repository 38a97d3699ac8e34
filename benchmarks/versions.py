"""Models like Llama with other versions of transformers, each in a virtual environment of its own: what is captured and
rewritten there, and whether loss, logits and gradients are the same.

    python -m benchmarks.versions 5.0.0 5.23.0
    python -m benchmarks.versions latest --keep /tmp/environments

torch, triton and all else are those of this interpreter; run it with another one for another torch. Needs a package
index.
"""

import argparse
import json
import os
import site
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from . import coverage

ROOT = Path(__file__).resolve().parent.parent


def environment(folder: Path, version: str) -> Path:
    """The interpreter of an environment with that version, made where it is not there yet."""
    python = folder / version / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder / version)], check=True)
        packages = next((folder / version).glob("lib/python*/site-packages"))
        shared = [path for path in (*site.getsitepackages(), *sys.path) if path.endswith("site-packages")]
        lines = [f"import site; site.addsitedir({path!r})" for path in dict.fromkeys(shared)]
        (packages / "shared.pth").write_text("\n".join(lines) + "\n")
        wanted = "transformers" if version == "latest" else f"transformers=={version}"
        # Others that it needs come in the versions that it wants, before those of this interpreter.
        subprocess.run([str(python), "-m", "pip", "install", "-q", "--upgrade", wanted], check=True)
    return python


def run(python: Path, console: Console) -> dict[str, coverage.Result]:
    paths = os.pathsep.join([str(ROOT / "tests")])
    command = [str(python), "-P", str(ROOT / "tests" / "zoo_versions.py")]
    found = {}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": paths}
    ) as process:
        for line in process.stdout:
            result = json.loads(line)
            found[result["name"]] = result
            console.print(coverage.line(result["name"], result), highlight=False, soft_wrap=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="+", help="of transformers, or: latest")
    parser.add_argument("--keep", type=Path, help="where the environments stay; default: nowhere")
    options = parser.parse_args()
    console = Console()
    wrong = 0
    with tempfile.TemporaryDirectory() as temporary:
        for version in options.versions:
            python = environment((options.keep or Path(temporary)).resolve(), version)
            report = "import torch, transformers as t; print('transformers', t.__version__, 'torch', torch.__version__)"
            console.print(subprocess.run([python, "-P", "-c", report], capture_output=True, text=True).stdout.strip())
            found = run(python, console)
            console.print(coverage.summary(found))
            wrong += sum("crashed" in r or not coverage.is_right(r) or not r["captured"] for r in found.values())
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
