"""The documentation's Python snippets and notebooks run, page by page and in order, and the pages can be built."""

import json
import linecache
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
SNIPPET = re.compile(r"```python\n(.*?)```", re.DOTALL)


@pytest.mark.parametrize("page", ["guide", "inspect", "patterns", "kernels"])
def test_snippets_run(page, references, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    snippets = SNIPPET.findall((DOCS / f"{page}.md").read_text())
    assert snippets
    namespace = {"__name__": page}
    for number, snippet in enumerate(snippets):
        exec(compile(snippet, f"{page}.md, snippet {number + 1}", "exec"), namespace)


@pytest.mark.parametrize("notebook", sorted(DOCS.glob("notebooks/*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_run_and_hold_their_outputs(notebook, references, monkeypatch, tmp_path, capsys):
    """What they print is what the cells print now, to three digits."""
    monkeypatch.chdir(tmp_path)
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    namespace = {"__name__": "__main__"}
    capsys.readouterr()
    for number, cell in enumerate(cells):
        source, filename = "".join(cell["source"]), f"/ipykernel_{notebook.stem}/{number}.py"
        monkeypatch.setitem(linecache.cache, filename, (len(source), None, source.splitlines(True), filename))
        exec(compile(source, filename, "exec"), namespace)
        assert cell["execution_count"] == number + 1
        assert not any(output["output_type"] == "error" for output in cell["outputs"])
        held = "".join("".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream")
        assert _to_three_digits(capsys.readouterr().out) == _to_three_digits(held)
    assert any("text/html" in output.get("data", {}) for cell in cells for output in cell["outputs"])


def _to_three_digits(text):
    return re.sub(r"\d+\.\d{4,}", lambda number: f"{float(number[0]):.3f}", text)


def test_pages_build(tmp_path):
    """Links and anchors that lead nowhere, and docstrings that cannot be read, are errors."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=DOCS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    api = (tmp_path / "api" / "index.html").read_text()
    assert all(f'id="ligerfx.{name}"' in api for name in ("optimize.optimize", "explain.explain", "pattern.pattern"))
    assert "ligerfx_kernels_glu_linear" in (tmp_path / "notebooks" / "inspect" / "index.html").read_text()
