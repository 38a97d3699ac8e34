"""DDP, FSDP2 and FSDP1 around an optimised model, two processes on the CPU: the bits of one process.

The checks are in `_workers.py`, each under the name of its test here.
"""

import pytest
import torch
from training.processes import by_themselves, failure, run_workers

pytestmark = by_themselves

CHECKS = [
    "ddp",
    "ddp_tied_with_unused_parameters_looked_for",
    "ddp_logits_used",
    "ddp_no_sync",
    "ddp_of_an_optimised_part",
    "fsdp2",
    "fsdp2_tied",
    "fsdp2_mixed_precision",
    "fsdp2_accumulation",
    "fsdp2_with_a_unit_of_norm_and_head",
    "fsdp2_with_a_last_unit_tied",
    "fsdp2_with_a_last_unit_in_bf16",
    "fsdp2_with_a_last_unit_that_reshards",
    "fsdp2_of_accelerate",
    "fsdp2_state_dicts",
    "fsdp2_logits",
    "fsdp1",
    "fsdp1_with_original_parameters",
    "fsdp1_tied",
    "fsdp1_no_sync_and_mixed_precision",
    "tensor_parallel",
    "optimize_after_wrapping",
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    if not torch.distributed.is_available():
        pytest.skip("this build of torch has no torch.distributed")
    return run_workers("_workers.py", tmp_path_factory.mktemp("workers"), CHECKS)


@pytest.mark.parametrize("check", CHECKS)
def test_two_processes(outcomes, check):
    assert not failure(outcomes[check])
