"""Where in the model's own code something happened."""

from __future__ import annotations

import linecache
import sys
import types

from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from .errors import CaptureError


def call_site() -> tuple[str, str]:
    """`file:line` and the source text of the model code that is being recorded."""
    frame = sys._getframe(1)
    while frame is not None:
        if _is_model_code(frame):
            filename, number = frame.f_code.co_filename, frame.f_lineno
            lines = linecache.getline(filename, number).strip()
            return f"{file_name(filename)}:{number}", lines
        frame = frame.f_back
    return "?", ""


def file_name(path: str) -> str:
    """A file without its folder; a cell of a notebook, whose file has a meaningless name, is "cell"."""
    folder, _, name = path.rpartition("/")
    return "cell" if folder.rpartition("/")[2].startswith("ipykernel_") else name


def describe_error(error: Exception) -> str:
    """Why a capture ended, on one line."""
    asks_meta = isinstance(error, RuntimeError) and "cannot be called on meta tensors" in str(error)
    unknown = GuardOnDataDependentSymNode, DataDependentOutputException, DynamicOutputShapeException
    if asks_meta or isinstance(error, unknown):
        return f"its Python code branches on the values of a tensor ({_raised_at(error)})"
    text = str(error).strip().split("\n")[0]
    return text if isinstance(error, CaptureError) else f"{type(error).__name__}: {text} ({_raised_at(error)})"


def _raised_at(error: Exception) -> str:
    """`file:line` of the innermost model code that an error came through."""
    site = "?"
    trace = error.__traceback__
    while trace is not None:
        if _is_model_code(trace.tb_frame):
            site = f"{file_name(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno}"
        trace = trace.tb_next
    return site


def _is_model_code(frame: types.FrameType) -> bool:
    return frame.f_globals.get("__name__", "").split(".")[0] not in (
        "torch",
        "ligerfx",
        "sympy",
        "contextlib",
    )
