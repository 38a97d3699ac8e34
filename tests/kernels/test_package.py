import os
import subprocess
import sys

import pytest

import ligerfx.kernels as kernels


def _python(code: str, **environment: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | environment)


def test_import_loads_neither_torch_nor_triton():
    # By its path, because the parent package imports torch.
    _python(
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('kernels', {kernels.__file__!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "dir(module)\n"
        "assert not {'torch', 'triton'} & set(sys.modules)"
    )


def test_import_through_the_parent_loads_no_kernel_and_functions_survive_those_of_the_modules():
    _python(
        "import sys, ligerfx.kernels\n"
        "assert not [name for name in sys.modules if name.startswith('ligerfx.kernels.')]\n"
        "import ligerfx.kernels.rmsnorm, ligerfx.kernels.crossentropy\n"
        "import ligerfx.kernels.linear_crossentropy, ligerfx.kernels.rotary, ligerfx.kernels.gated\n"
        "import ligerfx.kernels as k\n"
        "assert all(callable(getattr(k, name)) for name in k.__all__)\n"
        "from ligerfx.kernels import rms_norm\n"
        "assert rms_norm is ligerfx.kernels.rmsnorm.rms_norm"
    )


def test_runs_without_triton():
    _python(
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from ligerfx.kernels import __all__ as names\n"
        "from ligerfx.kernels import rms_norm, rms_norm_reference\n"
        "import ligerfx.kernels as k\n"
        "for name in names: getattr(k, name)\n"
        "x, w = torch.randn(3, 8), torch.randn(8)\n"
        "assert torch.equal(rms_norm(x, w), rms_norm_reference(x, w))"
    )


def test_names():
    assert set(kernels.__all__) <= set(dir(kernels))
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        kernels.nothing_of_the_kind  # noqa: B018


def test_one_compilation_serves_any_number_of_rows():
    pytest.importorskip("triton", reason="Triton is not installed")
    _python(
        "import torch\n"
        "from triton.backends.compiler import GPUTarget\n"
        "from triton.runtime.driver import driver\n"
        "from ligerfx.kernels.rmsnorm import _sum_rows_kernel\n"
        "class WithoutGPU:\n"
        "    get_current_target = lambda self: GPUTarget('cuda', 90, 32)\n"
        "    get_current_device = get_current_stream = lambda self, *_: 0\n"
        "driver.set_active(WithoutGPU())\n"
        "def compiled(n_rows, n_cols):\n"
        "    arguments = (torch.float32, torch.float32, n_rows, n_cols, 256, 16)\n"
        "    return _sum_rows_kernel.kernel.warmup(*arguments, grid=(1,), num_warps=8)\n"
        "first = compiled(512, 64)\n"
        "assert compiled(509, 64) is compiled(1, 64) is first is not compiled(512, 65)",
        TRITON_INTERPRET="0",
    )
