"""Each measurement in a process of its own, because Liger patches transformers' modules (rotary embedding, class
names) for the whole process, even when it is given one model.

A worker answers in lines of JSON on its stdout, by `answer`; `answers` starts it and reads them.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Answer = dict[str, Any]


def answer(result: Answer) -> None:
    print(json.dumps(result), flush=True)


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def answers(module: str, options: list[str], caches: Path, timeout: float) -> Iterator[Answer]:
    """What `python -m module options` answers, as it does; {"error": reason} last if it dies or is too slow.

    Args:
        caches: the folder for what it compiles.
        timeout: seconds after which it is killed.
    """
    environment = {"TRITON_CACHE_DIR": str(caches / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor")}
    command = [sys.executable, "-m", module, *options]
    late = threading.Event()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | environment) as process:

        def stop() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(timeout, stop)
        timer.start()
        try:
            for line in process.stdout:
                if line.startswith("{"):  # libraries print, too
                    yield json.loads(line)
        finally:
            timer.cancel()
            process.kill()
    if late.is_set():
        yield {"error": f"timeout: {timeout:.0f} s"}
    elif process.returncode:
        yield {"error": f"exit status {process.returncode}"}
