"""Which variant of a kernel a launch takes, without a GPU: what Triton would compile anew has one of its own."""

import threading
import types

import pytest
import torch

from ligerfx.kernels import _runtime
from ligerfx.kernels._ahead import rehearsal


class Kernel:
    """Stands for a Triton kernel: notes how often it compiles, and what its variants are launched with."""

    __name__ = "stub"
    params = [types.SimpleNamespace(is_constexpr=constant) for constant in (False, False, False, True)]

    def __init__(self):
        self.compiled, self.launched, self.ahead = [], [], []

    def __getitem__(self, grid):
        def compile(*args, num_warps, enable_fp_fusion):
            assert enable_fp_fusion is True
            number = len(self.compiled)
            self.compiled.append((grid, args, num_warps))
            run = lambda *given: self.launched.append((number, *given))  # noqa: E731
            return types.SimpleNamespace(run=run, function="function", packed_metadata="metadata")

        return compile

    def warmup(self, *args, grid, num_warps, enable_fp_fusion):
        assert enable_fp_fusion is True
        self.ahead.append((grid, args, num_warps))
        return types.SimpleNamespace(result=lambda ignore_errors: self.ahead.append("waited for"))


@pytest.fixture
def launch(monkeypatch):
    monkeypatch.setattr(_runtime, "_OPTIONS", {"enable_fp_fusion": True})  # as where the user says nothing of it
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 70 + device, raising=False)
    kernel = Kernel()
    launched = _runtime._Kernel(lambda: None, types.SimpleNamespace(jit=lambda function, **_: kernel))

    def launch(*args, grid=(3, 2), device=0, num_warps=4):
        monkeypatch.setattr(_runtime, "_current_device", lambda: device)
        launched[grid](*args, num_warps=num_warps)
        return len(kernel.compiled)

    launch.kernel = kernel
    return launch


def test_a_launch_hands_on_addresses(launch):
    x = torch.zeros(8)
    launch(x, None, 5, "c")
    assert launch.kernel.compiled == [((3, 2), (x, None, 5, "c"), 4)]
    launch(x, None, 7, "c", device=0)
    assert launch.kernel.launched == [
        (0, 3, 2, 1, 70, "function", "metadata", None, None, None, x.data_ptr(), None, 7, "c")
    ]


@pytest.mark.parametrize(
    ("change", "compiles"),
    [
        (lambda x: (x.clone(), None, 5, "c"), False),
        (lambda x: (torch.nn.Parameter(x[:16]), None, 5, "c"), True),  # has a launcher of its own
        (lambda x: (x, None, 7, "c"), False),
        (lambda x: (x, None, 16, "c"), True),
        (lambda x: (x, None, 1, "c"), True),
        (lambda x: (x, None, 2**31 + 1, "c"), True),
        (lambda x: (x, None, 5, "d"), True),
        (lambda x: (x, None, 5, None), True),
        (lambda x: (x.half(), None, 5, "c"), True),
        (lambda x: (x[1:], None, 5, "c"), True),  # no longer at a multiple of 16 bytes
        (lambda x: (x, x, 5, "c"), True),
        (lambda x: (x, 2.5, 5, "c"), True),
        (lambda x: (x, (x, x), 5, "c"), True),
    ],
)
def test_variants(launch, change, compiles):
    x = torch.zeros(64)
    launch(x, None, 5, "c")
    assert launch(*change(x)) == 1 + compiles
    assert launch(*change(x)) == 1 + compiles


def test_tuples_are_looked_into(launch):
    x = torch.zeros(64)
    y = x.clone()
    assert launch(x, (x, x), 5, "c") == launch(x, (x, y), 5, "c") == 1
    assert launch.kernel.launched[0][-3:] == ((x.data_ptr(), y.data_ptr()), 5, "c")
    assert launch(x, (x, x[1:]), 5, "c") == 2
    assert launch(x, (x, x.half()), 5, "c") == 3
    assert launch(x, (x, 3), 5, "c") == launch(x, (x, 5), 5, "c") == 4
    assert launch(x, (x, 16), 5, "c") == 5
    assert launch(x, (x, None), 5, "c") == launch(x, (x, None), 5, "c") == 6
    assert launch(x, ((x, 3),), 5, "c") == launch(x, ((y, 3),), 5, "c") == 7
    assert launch(x, (), 5, "c") == 8


def test_warps_and_devices(launch):
    x = torch.zeros(64)
    assert launch(x, None, 5, "c") == 1
    assert launch(x, None, 5, "c", num_warps=8) == 2
    assert launch(x, None, 5, "c", device=1) == 3
    assert launch(x, None, 5, "c", grid=(1,)) == 3


def test_a_rehearsal_compiles_and_the_first_launch_waits_for_it(launch, monkeypatch):
    x, kernel = torch.zeros(8), launch.kernel
    monkeypatch.setattr(rehearsal, "active", True)
    launch(x, None, 5, "c")
    assert kernel.ahead == [((3, 2), (x, None, 5, "c"), 4)]
    assert not kernel.compiled and not kernel.launched
    monkeypatch.setattr(rehearsal, "active", False)
    launch(x, None, 5, "c")
    assert kernel.ahead[1:] == ["waited for"]
    assert kernel.compiled == [((3, 2), (x, None, 5, "c"), 4)]
    launch(x, None, 5, "c")
    assert len(kernel.ahead) == 2 and len(kernel.launched) == 1


def test_a_rehearsal_is_of_its_thread(launch, monkeypatch):
    monkeypatch.setattr(rehearsal, "active", True)
    other = threading.Thread(target=launch, args=(torch.zeros(8), None, 5, "c"))
    other.start()
    other.join()
    assert not launch.kernel.ahead and len(launch.kernel.compiled) == 1
