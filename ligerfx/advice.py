"""What to write so that a pattern that nearly matched does match."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .report import Miss

# Reasons as the matcher words them, and what to write: {0} is the first group of the reason.
_ADVICE = [
    (
        r"`(\w+)` has a second user, `\w+` at (\S+)",
        "Compute `{0}` again for {1}: a fused call does not give it out.",
    ),
    (
        r"`(\w+)` has a second user, `(\w+)`",
        "Compute `{0}` again for `{1}`: a fused call does not give it out.",
    ),
    (
        r"(?:input|output) `(\w+)` is changed in place at (\S+)",
        "Write {1} without working in place (`x = x + y` for `x += y`): the kernel needs `{0}` as it was.",
    ),
    (
        r"`\w+` works in place at ([^\s,]+)",
        "Write {0} without working in place (`x = x + y` for `x += y`, `F.silu(x)` for `F.silu(x, inplace=True)`).",
    ),
    (
        r"`(\w+)` is used before the last input is there",
        "Compute all inputs of the idiom before `{0}` is used: one call has to give all its results.",
    ),
    (
        r"its input `\w+` has no later use",
        "Nothing needs to be done: {pattern} is for an input that is used again, as in a residual stream.",
    ),
    (
        r"(\w+): expected a constant",
        "Make `{0}` a Python number, such as an attribute of the module, and neither a tensor nor left out.",
    ),
    (
        r"rounds at another place",
        "Cast to another dtype where {pattern} does, if other bits are welcome; "
        "else write a pattern of your own that rounds as the model does.",
    ),
    (
        r"(\w+): expected (?:shape|size) (.*), found (.*)",
        "Give `{0}` the shape that the pattern's annotation asks for: {1}, and not {2}.",
    ),
    (
        r"expected a result in torch\.(\S+), found torch\.(\S+)",
        "Let the code at {source} give {0} instead of {1}: see which operand has another dtype.",
    ),
    (
        r"(?s)\bexpected (.*) as well",
        "A part is missing at {source}: the pattern has {0} as well.",
    ),
    (
        r"(?s)found (.*) besides",
        "Apply {0} before or after the idiom, where it can be a step of its own: the pattern does not have it. Inside, "
        "it makes another function, which needs a pattern of its own.",
    ),
    (
        r"(?s)((?:\w+: )?)\bexpected (.*), found (.*)",
        "Where {source} has {0}{2}, the pattern has {0}{1}. These are different values: write it so only if the model "
        "should compute that, and else give what it computes a pattern of its own.",
    ),
]
_OTHERWISE = "Write {source} as {pattern} has it, or write a pattern of your own for what the model computes."


def advice(miss: Miss) -> str:
    """What to change in the model at a near miss, and that it changes what the model computes where it does.

    Examples:
        >>> from ligerfx.report import Miss
        >>> advice(Miss("silu_glu", "mlp", ("glu",), "model.py:7", "`silu` has a second user, `mean` at model.py:8"))
        'Compute `silu` again for model.py:8: a fused call does not give it out.'
    """
    for reason, text in _ADVICE:
        if found := re.search(reason, miss.reason):
            return text.format(*found.groups(), source=miss.source, pattern=miss.pattern)
    return _OTHERWISE.format(source=miss.source, pattern=miss.pattern)


def opaque_advice(reason: str) -> str:
    """What to do about a module that could not be captured."""
    if "branches on the values of a tensor" in reason:
        return (
            "Decide by shapes or Python values instead of the values of a tensor, or with torch.where; or move that "
            "part into a module of its own, so that the rest is captured."
        )
    if "replaced on the instance" in reason:
        return "Call ligerfx.optimize before the tool that replaces forward."
    if "may depend on the data" in reason:
        return "Pass example_inputs with which the model takes the usual way (an attention mask, say)."
    return (
        "Move the line that is named into a module of its own, so that the rest is captured, or pass example_inputs "
        "with which the model takes another way."
    )
