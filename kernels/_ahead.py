"""Compiling kernels before they are needed.

Triton compiles a kernel when it is launched first, and the first step of a model launches a dozen of them one after the
other: the device waits for each. What will be launched is known before, so threads can compile all of it at once.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import torch

try:
    from triton import knobs
    from triton.runtime import driver
    from triton.runtime._async_compile import AsyncCompileMode, active_mode
    from triton.runtime.cache import triton_key

    CAN_COMPILE_AHEAD = not knobs.runtime.interpret
except ImportError:
    CAN_COMPILE_AHEAD = False


class _Rehearsal(threading.local):
    active = False


rehearsal = _Rehearsal()
"""While `active`, in this thread, kernels are only compiled, and each operation runs with its backward."""


class _Loading(Executor):
    """Threads that load onto the current device what they have compiled."""

    def __init__(self, threads: ThreadPoolExecutor) -> None:
        self.threads = threads

    def submit(self, compile: Callable[[], Any]) -> Future:
        device = torch.cuda.current_device()

        def compile_and_load() -> Any:
            torch.cuda.set_device(device)
            kernel = compile()
            kernel._init_handles()  # which compiles its launcher
            return kernel

        return self.threads.submit(compile_and_load)


def start_triton() -> None:
    """Does in a thread, and once, what Triton does before it compiles its first kernel: it compiles its driver, and
    reads all its files for a key of its cache."""

    def start() -> None:
        with contextlib.suppress(Exception):  # what is wrong will show when a kernel is compiled
            driver.active.get_current_target()
            triton_key()

    if CAN_COMPILE_AHEAD:
        threading.Thread(target=start, name="ligerfx", daemon=True).start()


def can_rehearse() -> bool:
    """Whether Triton can compile beforehand, and nobody captures what is launched or compiles beforehand already."""
    return CAN_COMPILE_AHEAD and active_mode.get() is None and not torch.cuda.is_current_stream_capturing()


@contextlib.contextmanager
def rehearsing() -> Iterator[None]:
    """Launches of the kernels here start to compile them, and launch nothing. What is launched afterwards, by any
    thread, waits for that kernel alone.

    What operations return is of the right shapes, with no values of any meaning.
    """
    threads = ThreadPoolExecutor(min(16, os.cpu_count() or 1), thread_name_prefix="ligerfx")
    before = active_mode.set(AsyncCompileMode(_Loading(threads)))
    rehearsal.active = True
    try:
        yield
    finally:
        rehearsal.active = False
        active_mode.reset(before)
        threads.shutdown(wait=False)
