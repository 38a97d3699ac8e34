"""ligerfx: a compiler pass that rewrites HuggingFace models onto fused Triton kernels.

model = ligerfx.optimize(model)
print(model.report)
"""

from .deferred import DeferredTensor
from .diff import Diff, diff
from .drawing import Drawing, draw
from .errors import LigerfxError, OptimizeError, PatternError
from .explain import Explanation, explain
from .module import OptimizedModule
from .optimize import optimize
from .pattern import Pattern, pattern
from .report import Report

__all__ = [
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
    "diff",
    "draw",
    "explain",
    "optimize",
    "pattern",
]
