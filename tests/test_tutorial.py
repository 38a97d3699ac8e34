"""The tutorial "Write your own pattern", followed to the letter: it runs, and prints what it says."""

import re
from pathlib import Path

import ligerfx

PAGE = Path(__file__).parent.parent / "docs" / "patterns.md"
BLOCK = re.compile(r"```(python|text)\n(.*?)```", re.DOTALL)


def test_the_tutorial(references, capsys):
    text = PAGE.read_text()
    section = text[text.index("## Write your own pattern") : text.index("## A worked example")]
    blocks = BLOCK.findall(section)
    script = "\n".join(block for kind, block in blocks if kind == "python")
    names = {"__name__": "tutorial"}
    exec(compile(script, "tutorial.py", "exec"), names)
    assert capsys.readouterr().out == "".join(block for kind, block in blocks if kind == "text")
    # The library alone does not cover the model.
    alone = ligerfx.optimize(names["model"], (names["ids"],)).report.idioms
    assert "glu" not in alone and names["gm"].report.idioms["glu"] == 2
