"""DeepSpeed's ZeRO around an optimised model, two processes on the CPU: the bits of the original in the same engine.

The checks are in `_deepspeed_workers.py`, each under the name of its test here.
"""

import importlib.util

import pytest
from training.processes import by_themselves, failure, run_workers

pytestmark = by_themselves

CHECKS = ["zero2", "zero3", "zero3_logits", "zero3_head_with_a_hook", "zero3_built_in_shards", "zero_checkpoints"]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    if importlib.util.find_spec("deepspeed") is None:  # not imported here: it takes hold of the process
        pytest.skip("deepspeed is not installed")
    return run_workers("_deepspeed_workers.py", tmp_path_factory.mktemp("deepspeed"), CHECKS)


@pytest.mark.parametrize("check", CHECKS)
def test_two_processes(outcomes, check):
    assert not failure(outcomes[check])
