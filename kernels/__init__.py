"""Fused Triton kernels for transformer models, each with a plain PyTorch reference and an exact backward.

Every public function runs its Triton kernels on CUDA tensors of dtype float32, bfloat16 or float16 (and on
CPU tensors while Triton's interpreter is on) and falls back to its ``<op>_reference`` everywhere else.
(`rows_that_count` is no operation of its own but an early start of `linear_cross_entropy`.)

Importing this package imports neither PyTorch nor Triton: the functions are loaded on first access.
"""

import importlib

# No submodule shares its name with a function: importing a submodule binds its name in this package, and
# would hide the function behind the module.
_MODULE_OF = {
    "rms_norm": "rmsnorm",
    "rms_norm_reference": "rmsnorm",
    "add_rms_norm": "rmsnorm",
    "add_rms_norm_reference": "rmsnorm",
    "glu": "gated",
    "glu_reference": "gated",
    "packed_glu": "gated",
    "packed_glu_reference": "gated",
    "clamped_glu": "clamped",
    "clamped_glu_reference": "clamped",
    "packed_clamped_glu": "clamped",
    "packed_clamped_glu_reference": "clamped",
    "glu_linear": "gated_linear",
    "glu_linear_reference": "gated_linear",
    "packed_glu_linear": "gated_linear",
    "packed_glu_linear_reference": "gated_linear",
    "glu_mlp": "gated_mlp",
    "glu_mlp_reference": "gated_mlp",
    "packed_glu_mlp": "gated_mlp",
    "packed_glu_mlp_reference": "gated_mlp",
    "rms_norm_linear": "rmsnorm_linear",
    "rms_norm_linear_reference": "rmsnorm_linear",
    "rms_norm_mlp": "rmsnorm_mlp",
    "rms_norm_mlp_reference": "rmsnorm_mlp",
    "rope": "rotary",
    "rope_reference": "rotary",
    "norm_rope": "normed_rotary",
    "norm_rope_reference": "normed_rotary",
    "cross_entropy": "crossentropy",
    "cross_entropy_reference": "crossentropy",
    "linear_cross_entropy": "linear_crossentropy",
    "linear_cross_entropy_reference": "linear_crossentropy",
    "rows_that_count": "counted_rows",
}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    function = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    function.__module__ = __name__  # its public home, and its name in generated code: ligerfx_kernels_glu
    globals()[name] = function
    return function


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
