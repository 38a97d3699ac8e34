"""Random numbers that Python code draws, and torch does not know of: `random` and numpy's global generator.

A graph would have what was drawn during capture, in each call.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator
from typing import Any


def state() -> tuple:
    """What both generators will give next, to be compared."""
    return random.getstate(), _numpy_state()


def _numpy_state() -> Any:
    if "numpy" not in sys.modules:
        return None
    name, keys, *rest = sys.modules["numpy"].random.get_state()
    return name, keys.tobytes(), *rest


@contextlib.contextmanager
def put_back() -> Iterator[None]:
    """Afterwards both go on from where they were before."""
    python, numpy = random.getstate(), sys.modules.get("numpy")
    before = None if numpy is None else numpy.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(before)
