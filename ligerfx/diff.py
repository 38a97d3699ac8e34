"""`diff`: what a rewrite did to the generated code."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from torch import nn

from .errors import LigerfxError
from .listing import Line, listing
from .module import OptimizedModule


@dataclass(frozen=True, repr=False)
class Diff:
    """A unified diff. Prints as text, and shows coloured in a notebook."""

    text: str

    def __str__(self) -> str:
        return self.text

    __repr__ = __str__

    def _repr_html_(self) -> str:
        from .html import diff_html

        return diff_html(self)


def diff(model: nn.Module, module: str | None = None, *, context: int = 3) -> Diff:
    """The unified diff between the code that was captured and the code that runs now.

    Equal layers share their code, so it is shown once for all of them. Parameters that the captured code has, and
    nothing uses, are left out, as is what torch.fx adds to free values.

    Args:
        model: what `optimize` returned, or a module in it.
        module: path of one module in it; None shows all whose code was changed.
        context: how many unchanged lines are shown around a change.

    Returns:
        The diff: prints as text, and shows in colours in a notebook.

    Raises:
        LigerfxError: the model, or the module, has no captured code.

    Examples:
        >>> import torch, ligerfx
        >>> print(ligerfx.diff(ligerfx.optimize(torch.nn.Sequential(torch.nn.RMSNorm(64)), torch.randn(2, 64)), "0"))
        --- 0 (captured)
        +++ 0 (rewritten)
        @@ -1,4 +1,4 @@
         def forward(self, x):
             weight = self.weight
        -    rms_norm = torch.nn.functional.rms_norm(x, (64,), weight = weight, eps = None)
        -    return rms_norm
        +    rms_norm_1 = ligerfx_kernels_rms_norm(x, weight, eps = 1.1920928955078125e-07)
        +    return rms_norm_1
    """
    modules = {path: m for path, m in model.named_modules() if isinstance(m, OptimizedModule)}
    if module is not None:
        if module not in modules:
            raise LigerfxError(
                f"{module or type(model).__name__!r} has no rewritten code: it is no optimised module. "
                "Those with code are the instances of ligerfx.OptimizedModule"
            )
        modules = {module: modules[module]}
    elif not modules:
        raise LigerfxError(f"{type(model).__name__} has no rewritten code: pass what ligerfx.optimize returned")
    elsewhere = {
        ".".join(p for p in (path, inner) if p) for path, m in modules.items() for inner in m._ligerfx_program.dissolved
    }
    places: dict[int, list[str]] = {}
    for path, m in modules.items():
        if path not in elsewhere:  # shown where it runs
            places.setdefault(id(m._ligerfx_program), []).append(path)
    parts = []
    for paths in places.values():
        program = modules[paths[0]]._ligerfx_program
        more = f" and {len(paths) - 1} alike" if len(paths) > 1 else ""
        name = (paths[0] or "(model)") + more
        after = _text(listing(program.capture.graph, program.code)) if program.code else []
        if after:
            parts += _unified(_text(program.before), after, name, context)
    return Diff("\n".join(parts))


def _text(lines: tuple[Line, ...]) -> list[str]:
    return [line.text if line.text.startswith("def ") else "    " + line.text for line in lines]


def _unified(before: list[str], after: list[str], name: str, context: int) -> list[str]:
    labels = f"{name} (captured)", f"{name} (rewritten)"
    return list(difflib.unified_diff(before, after, *labels, n=context, lineterm=""))
