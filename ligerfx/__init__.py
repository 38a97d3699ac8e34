"""ligerfx: a compiler pass that rewrites HuggingFace models onto fused Triton kernels.

model = ligerfx.optimize(model)
print(model.report)
"""

from typing import TYPE_CHECKING, Any

from .bisect import Culprit, bisect
from .check import check_pattern
from .deferred import DeferredTensor
from .diff import Diff, diff
from .drawing import Drawing, draw
from .errors import LigerfxError, OptimizeError, PatternError
from .explain import Explanation, explain
from .generate import generated_glu
from .module import OptimizedModule
from .numerics import Verified
from .optimize import optimize
from .pattern import Pattern, pattern
from .registry import register
from .report import Report

__all__ = [
    "Culprit",
    "DeferredTensor",
    "Diff",
    "Drawing",
    "Explanation",
    "LigerfxError",
    "OptimizeError",
    "OptimizedModule",
    "Pattern",
    "PatternError",
    "Report",
    "Verified",
    "bisect",
    "check_pattern",
    "compiled_reports",
    "generated_glu",
    "diff",
    "draw",
    "explain",
    "optimize",
    "pattern",
    "register",
]

if TYPE_CHECKING:
    from .backend import compiled_reports


def __getattr__(name: str) -> Any:
    if name != "compiled_reports":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .backend import compiled_reports  # which imports the compiler

    return compiled_reports
