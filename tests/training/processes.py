"""Two processes that run the checks of a script."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent

by_themselves = pytest.mark.skipif(
    "LIGERFX_PROCESSES" not in os.environ, reason="two processes: make test-processes, which sets LIGERFX_PROCESSES"
)


def run_workers(script, folder, checks):
    """What each check ended in, by process: "", a traceback, or None if an earlier one failed."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(FOLDER.parent)}
    environment.pop("TRITON_INTERPRET", None)  # the subject is not the kernels: their references run
    command = [sys.executable, str(FOLDER / script)]
    logs = [folder / f"log{rank}" for rank in range(2)]
    processes = []
    for rank in range(2):
        with logs[rank].open("w") as log:
            arguments = [*command, str(rank), str(folder), *checks]
            processes.append(subprocess.Popen(arguments, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        for process in processes:
            process.wait(timeout=600)
    finally:
        for process in processes:
            process.kill()
    files = [folder / f"outcomes{rank}.json" for rank in range(2)]
    assert all(file.exists() for file in files), "\n".join(log.read_text()[-3000:] for log in logs)
    outcomes = [json.loads(file.read_text()) for file in files]
    return {check: [outcome.get(check) for outcome in outcomes] for check in checks}


def failure(outcome):
    """What to say of one check's outcome; "" if it passed in both processes."""
    if None in outcome and not any(outcome):
        return "did not run, since a check before it failed"
    return "\n".join(filter(None, outcome))
