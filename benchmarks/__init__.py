"""Benchmarks against peers, each run from the repository root as `python -m benchmarks.<name>`.

kernels  time, memory and host overhead of each kernel: ligerfx, eager, Liger-Kernel, torch.compile and more
plots    figures of what `kernels` measured
train    time and memory of a training step: eager, Liger-Kernel, ligerfx, torch.compile
curves   loss curves on real text, original beside optimised
"""
