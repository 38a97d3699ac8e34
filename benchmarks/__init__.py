"""Benchmarks against peers, each run from the repository root as `python -m benchmarks.<name>`.

kernels  time, memory and host overhead of each kernel: ligerfx, eager, Liger-Kernel, torch.compile and more
train    time and memory of a training step, of the host alone, and where the device's time goes
memory   peak memory against sequence length and vocabulary, and the longest sequence that fits
plots    figures of what `kernels` and `memory` measured
curves   loss curves on real text, original beside optimised
capture  how long `optimize` takes

The other files are parts of these: `cases`, `peers`, `clock` and `tables` of kernels; `models`, `workers` and
`breakdown` of train and memory.
"""
