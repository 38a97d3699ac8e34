"""The documentation's Python snippets run, page by page and in order."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
SNIPPET = re.compile(r"```python\n(.*?)```", re.DOTALL)


@pytest.mark.parametrize("page", ["guide", "patterns", "kernels"])
def test_snippets_run(page, references, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    snippets = SNIPPET.findall((DOCS / f"{page}.md").read_text())
    assert snippets
    namespace = {"__name__": page}
    for number, snippet in enumerate(snippets):
        exec(compile(snippet, f"{page}.md, snippet {number + 1}", "exec"), namespace)
