"""ligerfx: a compiler pass that rewrites HuggingFace models onto fused Triton kernels.

model = ligerfx.optimize(model)
print(model.report)
"""

from .deferred import DeferredTensor
from .errors import LigerfxError, OptimizeError, PatternError
from .module import OptimizedModule
from .optimize import optimize
from .pattern import Pattern, pattern
from .report import Report

__all__ = [
    "DeferredTensor",
    "LigerfxError",
    "OptimizeError",
    "OptimizedModule",
    "Pattern",
    "PatternError",
    "Report",
    "optimize",
    "pattern",
]
