"""ligerfx: a compiler pass that rewrites HuggingFace models onto fused Triton kernels.

model = ligerfx.optimize(model)
print(model.report)
"""

from .bisect import Culprit, bisect
from .check import check_pattern
from .deferred import DeferredTensor
from .errors import LigerfxError, OptimizeError, PatternError
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
    "LigerfxError",
    "OptimizeError",
    "OptimizedModule",
    "Pattern",
    "PatternError",
    "Report",
    "Verified",
    "bisect",
    "check_pattern",
    "generated_glu",
    "optimize",
    "pattern",
    "register",
]
