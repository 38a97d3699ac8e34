"""Benchmarks against peers, each run from the repository root as `python -m benchmarks.<name>`.

train    time and memory of a training step: eager, Liger-Kernel, ligerfx, torch.compile
curves   loss curves on real text, original beside optimised
"""
