"""Timing of single calls on a device, and what the device itself can do."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator

import torch

from benchmarks.cases import leaf

WARM_UP_MS, REPEAT_MS = 20, 60  # of every measurement, over all rounds
# Of matrix products, which bring a card to its power limit: its clock then takes some tenths of a second to settle.
PRODUCTS_WARM_UP_MS, PRODUCTS_REPEAT_MS = 900, 600
HOST_CALLS = 100  # a round
FLUSH_BYTES = 256 * 2**20  # several times the L2 of any GPU


class Clock:
    """Times calls on a device."""

    def __init__(self, device: str):
        self.device = device
        self.cuda = device == "cuda"
        if self.cuda:
            self.cache = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
            self.flush_seconds = 1e-3
            self.flush_seconds = statistics.median(self.sample(self.cache.zero_, lambda: None, 20)) / 1e3

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def sample(
        self, call: Callable, restore: Callable[[], None], milliseconds: float, warm_up: float | None = None
    ) -> list[float]:
        """Milliseconds of single calls, for about that long; of the device alone, where it is a GPU.

        Calls go on for warm_up milliseconds before, or a third of the time.
        """
        warm_up = milliseconds * WARM_UP_MS / REPEAT_MS if warm_up is None else warm_up
        restore()
        self.synchronize()
        start = time.perf_counter()
        call()
        host = time.perf_counter() - start
        self.synchronize()
        estimate = (time.perf_counter() - start) * 1000
        for _ in range(int(min(100, warm_up / estimate))):
            restore()
            call()
        repetitions = max(3, int(min(100, milliseconds / estimate)))
        return [after - before for before, after in self._marks(call, restore, repetitions, host)]

    def _marks(
        self, call: Callable, restore: Callable[[], None], repetitions: int, host: float
    ) -> Iterator[tuple[float, float]]:
        if not self.cuda:
            for _ in range(repetitions):
                restore()
                start = time.perf_counter()
                call()
                yield start * 1000, time.perf_counter() * 1000
            return
        # A write, so that evicting its lines costs the call what the call's own, left in L2, save it. Repeated
        # until the host has had the time to launch the call behind it: then the device never waits.
        flushes = min(8, 2 + int(host / self.flush_seconds))
        events = []
        for _ in range(repetitions):
            restore()
            for _ in range(flushes):
                self.cache.zero_()
            pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            pair[0].record()
            call()
            pair[1].record()
            events.append(pair)
        self.synchronize()
        yield from ((0.0, start.elapsed_time(end)) for start, end in events)

    def extra_megabytes(self, call: Callable) -> float | None:
        if not self.cuda:
            return None
        gc.collect()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 1e6

    def host_microseconds(self, call: Callable) -> float:
        """Of the host, per call, never waiting for the device."""
        count = HOST_CALLS if self.cuda else 5
        for _ in range(count // 5):
            call()
        self.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            call()
        spent = time.perf_counter() - start
        self.synchronize()
        return spent / count * 1e6


def limits(clock: Clock) -> dict[str, float]:
    """What the device can do: bytes read and written a second by a copy, and matrix products in bf16."""
    count, n = (2**31, 8192) if clock.cuda else (2**26, 512)
    with torch.device(clock.device):
        source, target = (torch.randint(100, (count,), dtype=torch.int8) for _ in range(2))
        a, b = leaf(n, n).detach(), leaf(n, n).detach()
    copy = statistics.median(clock.sample(lambda: target.copy_(source), lambda: None, 100))
    product = statistics.median(clock.sample(lambda: torch.mm(a, b), lambda: None, 100))
    return {
        "copy_bytes_per_second": 2 * count / copy * 1e3,
        "matmul_flops_per_second": 2 * n**3 / product * 1e3,
    }
