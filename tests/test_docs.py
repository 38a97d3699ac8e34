"""The documentation's Python snippets and notebooks run, page by page and in order, and the pages can be built."""

import inspect
import json
import linecache
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ligerfx
from ligerfx import kernels

DOCS = Path(__file__).parent.parent / "docs"
SNIPPET = re.compile(r"```python\n(.*?)```(?:\n\n```(?:text|diff)\n(.*?)```)?", re.DOTALL)


@pytest.mark.parametrize("page", ["guide", "inspect", "patterns", "kernels"])
def test_snippets_run(page, references, monkeypatch, tmp_path, capsys):
    """What a page shows behind a snippet is what it prints."""
    monkeypatch.chdir(tmp_path)
    text, filename = (DOCS / f"{page}.md").read_text(), f"/{page}.py"
    monkeypatch.setitem(linecache.cache, filename, (len(text), None, text.splitlines(True), filename))
    namespace = {"__name__": "__main__"}
    capsys.readouterr()
    snippets = list(SNIPPET.finditer(text))
    assert snippets
    for snippet in snippets:
        line = text.count("\n", 0, snippet.start(1))
        exec(compile("\n" * line + snippet[1], filename, "exec"), namespace)
        printed = capsys.readouterr().out
        assert snippet[2] is None or _comparable(printed) == _comparable(snippet[2]), f"line {line}"


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
        assert _comparable(capsys.readouterr().out) == _comparable(held)
    assert any("text/html" in output.get("data", {}) for cell in cells for output in cell["outputs"])


def _comparable(text):
    """Numbers to three digits; without what depends on the version of transformers, the names and lines of its files,
    and so without the widths of tables."""
    text = re.sub(r"\d+\.\d{4,}", lambda number: f"{float(number[0]):.3f}", text)
    text = re.sub(r"\b[a-z_]+\.py:\d+(-\d+)?", "", text)
    return re.sub(r"[\s\u2500-\u257f]+", " ", text).strip()  # lines, and lines of boxes


def test_pages_build(tmp_path):
    """Links and anchors that lead nowhere, and docstrings that cannot be read, are errors."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=DOCS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    api = (tmp_path / "api" / "index.html").read_text()
    for name in [*ligerfx.__all__, *(n for n in kernels.__all__ if not n.endswith("_reference"))]:
        assert re.search(rf'id="[\w.]+\.{name}"', api), name
    assert "ligerfx_kernels_glu_linear" in (tmp_path / "notebooks" / "inspect" / "index.html").read_text()


@pytest.mark.parametrize("name", [n for n in kernels.__all__ if not n.endswith("_reference")])
def test_the_page_of_kernels_has_each_with_all_its_arguments(name):
    text = (DOCS / "kernels.md").read_text()
    sections = [s for s in text.split("\n## ") if re.search(rf"\b{name}\b", s.partition("\n")[0])]
    assert len(sections) == 1
    call = re.search(rf"^    {name}\((.*?)\)( ->.*)?$", sections[0], re.MULTILINE | re.DOTALL)
    named = [re.match(r"\s*(\w+)", part)[1] for part in re.sub(r"\*,", "", call[1]).split(",")]
    assert named == list(inspect.signature(getattr(kernels, name)).parameters)
    assert [a for a in named if not re.search(rf"`([^`]*\W)?{a}\b", text)] == []
