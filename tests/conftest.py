"""Fixtures for every test, and the switch to Triton's interpreter on machines without a GPU."""

import os

import torch

# Triton reads this when a kernel is decorated, so it has to be set before anything imports Triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from pathlib import Path

import interpreter
import pytest

import ligerfx.kernels
from ligerfx.kernels._runtime import INTERPRET

if INTERPRET:
    interpreter.quicken()

# Tensors are tiny here: where others use the cores too, threads cost a hundred times the work.
torch.set_num_threads(1)

GPU_TESTS = Path(__file__).parent / "gpu"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") or GPU_TESTS in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def kernels_at_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under compilers, too, which else get the plain operations of tensors as small as those of the tests."""
    monkeypatch.setattr("ligerfx.kernels._runtime.SMALL", 0)


@pytest.fixture
def references(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPU tensors the plain PyTorch references run, not the kernels in Triton's interpreter."""
    for name in ligerfx.kernels.__all__:  # imported later, kernels would be made for a GPU
        getattr(ligerfx.kernels, name)
    monkeypatch.setattr("ligerfx.kernels._runtime.INTERPRET", False)


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
