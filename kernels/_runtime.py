"""What the kernels share: Triton (or a stand-in for it), the choice of path, layouts and launching."""

import contextlib
import functools
import os
import types
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from ._ahead import rehearsal
from ._autograd import is_transforming

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
    # Triton reads this flag when a function is decorated, so the value at import is the one that counts.
    INTERPRET = bool(triton.knobs.runtime.interpret)
except ImportError:
    # Enough of Triton for the kernel definitions to be read; `use_triton` keeps them from being launched.
    triton = types.SimpleNamespace(jit=lambda function: function)
    tl = types.SimpleNamespace(constexpr=lambda value: value)
    HAS_TRITON = False
    INTERPRET = False

_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
# A tensor subclass (DTensor, quantised weights) need not have the memory a kernel would read.
PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})
WITHOUT_MEMORY = frozenset({FakeTensor, FunctionalTensor})  # on which compilers run a model: see _operators.py


SMALL = 2**22
"""Numbers up to which a compiler gets the plain operations: those of a layer's activations, or of a loss's logits.

A layer of 4096 tokens of 1024 numbers, or 2048 of 2048, takes an H100 little more than a millisecond. About as long
takes the host to launch what a compiler makes of it; with our operators, up to twice as long.
"""


def use_triton(*tensors: torch.Tensor | None, numbers: int | None = None) -> bool:
    """Whether the Triton kernels are to take these tensors (None is skipped); otherwise the reference must.

    They can if all are plain, non-empty float32/bfloat16/float16 tensors on one device, and that device is a
    GPU, or the CPU while Triton's interpreter is on. Where a compiler is at work they need not if the work is small.
    Nor can they be transformed (`torch.func`), or have forward-mode derivatives.

    Args:
        numbers: how large the work is; None: as the first tensor is.
    """
    if not HAS_TRITON or (not INTERPRET and tensors[0].is_cpu):
        return False
    if torch.compiler.is_compiling():
        if _is_small(tensors[0].numel() if numbers is None else numbers):
            return False
    elif is_transforming():
        return False
    device = None
    for tensor in tensors:
        if tensor is None:
            continue
        kind = type(tensor)
        if tensor.dtype not in _DTYPES or not (kind in PLAIN or kind in WITHOUT_MEMORY) or tensor.numel() == 0:
            return False
        if device is None:
            device = tensor.device
        elif tensor.device != device:
            return False
    return device is not None and (device.type == "cuda" or (device.type == "cpu" and INTERPRET))


def _is_small(numbers: int) -> bool:
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # which the compiler has imported

    # A size that varies is not small: nothing is checked of it, so that nothing is compiled again.
    return statically_known_true(numbers <= SMALL)


_WITH_AUTOCAST = frozenset(kind for kind in ("cuda", "cpu", "xpu", "mps") if torch.amp.is_autocast_available(kind))


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast gives matrix products on this device now; None where it is off."""
    if device_type in _WITH_AUTOCAST and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


_here = contextlib.nullcontext()
# What torch.cuda.current_device comes to once CUDA is initialised, as it is where a tensor lies on a GPU.
_current_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)


def launch_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Make the tensor's GPU current: Triton launches on the current device, whatever its arguments are."""
    index = tensor.get_device()
    return _here if index < 0 or index == _current_device() else torch.cuda.device(index)


# Parameters that change with the batch and only tell where its rows end. Triton would compile for multiples of 16, for
# other numbers and for 1, and come to (nearly) the same instructions each time.
_COUNTS = ("n_rows", "n_tokens", "all_tokens", "col_blocks")


# As up to Triton 3.9, unless the user has said otherwise: from 3.10 on a * b + c would be two instructions, and round
# twice. (3.9 warns those who leave it open.)
_OPTIONS = {} if "TRITON_DEFAULT_FP_FUSION" in os.environ else {"enable_fp_fusion": True}


class _Kernel:
    """A compiled-once Triton kernel whose launch costs less than half the host time of Triton's own.

    Triton looks at each argument anew, in all the generality of its language, to find which compiled variant
    serves the call. Here the arguments are tensors, numbers, None, tuples and descriptors of them, and constants, so a
    short key does. Launches that somebody observes (profiler hooks) or traces (torch.compile) take Triton's way.
    """

    def __init__(self, function: Callable, language: Any) -> None:
        self.kernel = language.jit(function, do_not_specialize=_COUNTS)
        self.is_constant = [parameter.is_constexpr for parameter in self.kernel.params]
        self.launchers: dict[tuple, Callable] = {}  # by _types_of the arguments
        self.compiled_ahead: list[Any] = []  # perhaps still being compiled
        functools.update_wrapper(self, function)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        if torch.compiler.is_compiling():
            return self.kernel[grid]
        return functools.partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *args: Any, num_warps: int) -> None:
        if rehearsal.active:
            self.compiled_ahead.append(self.kernel.warmup(*args, grid=grid, num_warps=num_warps, **_OPTIONS))
            return
        runtime = triton.knobs.runtime
        if runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls:
            self.kernel[grid](*args, num_warps=num_warps, **_OPTIONS)
            return
        types = tuple(map(type, args))
        if tuple in types:
            types = _types_of(args)
        launcher = self.launchers.get(types)
        if launcher is None:
            launcher = self.launchers[types] = _launcher(self, types)
        launcher(grid, _current_device(), num_warps, *args)

    def launch_first(self, grid: tuple[int, ...], *args: Any, num_warps: int) -> Any:
        """Launches by way of Triton, which compiles what has not been, and gives the compiled variant."""
        while self.compiled_ahead:
            variant = self.compiled_ahead.pop()
            if hasattr(variant, "result"):
                variant.result(ignore_errors=True)  # the launch meets the error again
        return self.kernel[grid](*args, num_warps=num_warps, **_OPTIONS)


def _types_of(arguments: tuple) -> tuple:
    """Their types; of a tuple, those of its items."""
    return tuple([_types_of(argument) if type(argument) is tuple else type(argument) for argument in arguments])


def _launcher(kernel: _Kernel, types: tuple) -> Callable:
    """A function of (grid, device, num_warps, *args) that launches the kernel with arguments of these types.

    It is written out for them. Tensors are handed on as addresses: their alignment has been asked for already, and
    Triton would ask the driver about each.
    """
    reads = []
    kinds = []  # what of the arguments Triton compiles for besides their types

    def handed(name: str, kind: type | tuple, constant: bool = False) -> str:
        """How the argument of that name and type is handed on."""
        if constant:
            kinds.append(name)
        elif isinstance(kind, tuple):
            items = [f"{name}_{i}" for i in range(len(kind))]
            reads.append(f"[{', '.join(items)}] = {name}")
            return f"({''.join(f'{handed(*item)}, ' for item in zip(items, kind, strict=True))})"
        elif kind in PLAIN:
            address = f"{name}_address"
            reads.append(f"{address} = {name}.data_ptr()")
            kinds.extend([f"{name}.dtype", f"{address} % 16 == 0"])
            return address
        elif kind is int:
            kinds.extend([f"{name} == 1", f"{name} % 16 == 0", f"{name}.bit_length() > 31"])
        elif kind is not float and kind is not type(None):
            kinds.extend([f"{name}.base.dtype", f"*{name}.block_shape"])  # a descriptor
        return name

    names = [f"a{i}" for i in range(len(types))]
    arguments = [handed(*argument) for argument in zip(names, types, kernel.is_constant, strict=True)]
    code = f"""
def launch(grid, device, num_warps, {", ".join(names)}):
    {"; ".join(reads)}
    key = (device, num_warps, {", ".join(kinds)})
    variant = variants.get(key)
    if variant is None:
        variants[key] = launch_first(grid, {", ".join(names)}, num_warps=num_warps)
        return
    x, y, z = (*grid, 1, 1)[:3]
    variant.run(
        x, y, z, stream_of(device), variant.function, variant.packed_metadata, None, None, None, {", ".join(arguments)}
    )
"""
    stream_of = torch._C._cuda_getCurrentRawStream
    space = {"launch_first": kernel.launch_first, "variants": {}, "stream_of": stream_of}
    exec(compile(code, f"<ligerfx launch of {kernel.__name__}>", "exec"), space)
    return space["launch"]


def jit(function: Callable, language: Any = triton) -> Any:
    """`triton.jit` for kernels that are launched, as `kernel[grid](*arguments, num_warps=...)`; or another's `jit`."""
    return triton.jit(function) if INTERPRET or not HAS_TRITON else _Kernel(function, language)


@functools.cache
def _sm_count(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def num_sms(tensor: torch.Tensor) -> int:
    """Number of multiprocessors of the tensor's GPU; 1 in the interpreter, where programs run one by one."""
    return _sm_count(tensor.get_device()) if tensor.is_cuda else 1


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up. (Triton's own takes the host microseconds.)"""
    return -(-a // b)


def is_dense_with_rows(x: torch.Tensor) -> bool:
    """Whether x fills its memory without gaps, in any order of the leading dims, with contiguous last dim.

    Its rows can then be walked in memory order, and `torch.empty_like(x)` has the same strides.
    """
    if x.is_contiguous():
        return True
    expected = 1
    if x.shape[-1] != 1 and x.stride(-1) != 1:
        return False
    dims = [d for d in range(x.dim()) if x.shape[d] != 1]
    while dims:  # from the innermost one on; not sorted, which torch.compile cannot with sizes that vary
        inner = [d for d in dims if x.stride(d) == expected]
        if not inner:
            return False
        expected *= x.shape[inner[0]]
        dims.remove(inner[0])
    return True


def with_layout_of(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The tensor itself if it has the strides of the dense tensor `like`, else a copy that has them."""
    if like.is_contiguous():
        return tensor.contiguous()
    if tensor.stride() == like.stride():
        return tensor
    return torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """x as [rows, last dim] with contiguous rows: a view where one row stride can express it, else a copy."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


@triton.jit
def tanh(x):
    """tanh of a float32 value to a few units in the last place; the interpreter lacks libdevice's."""
    size = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    # 1 - 2/(e^2x + 1) cancels near zero; the polynomial there is the one of Cephes' tanhf.
    z = x * x
    p = (((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1) * z
    near = x + x * z * (p - 3.33332819422e-1)
    return tl.where(size < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def log1p(x):
    """log(1 + x) of a float32 value, exact for small x, too (Kahan); the interpreter lacks libdevice's."""
    y = 1.0 + x
    return tl.where(y == 1.0, x, tl.log(y) * (x / tl.where(y == 1.0, 1.0, y - 1.0)))
