"""Where a step's device time goes: by kernel and by category.

The floor of a training step is what no kernel replaces: matrix products, attention and the optimizer. A kernel that
computes more than a product has a category of its own, so the floor is that of a variant without such kernels.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

STEPS = 2
TOP = 25
FLOOR = ("matmul", "attention", "optimizer")
FUSED = "matmul and more"
# Parts of kernels' names, lower case, looked for in this order: attention kernels are built with CUTLASS, too.
CATEGORIES = {
    FUSED: ("_gated_product_kernel", "_product_gradients_kernel", "_exponentials_kernel"),
    "attention": ("flash", "fmha", "sdpa"),
    "optimizer": ("multi_tensor", "fusedadam", "fused_adam"),
    "matmul": ("gemm", "gemv", "cutlass", "nvjet", "xmma", "cublas", "splitk"),
}


def category(kernel: str) -> str:
    name = kernel.lower()
    # Inductor names a kernel after the operations that it replaces, and those around it.
    if name.startswith("triton_"):
        return "matmul" if name.startswith("triton_tem_") else "other"
    return next((kind for kind, parts in CATEGORIES.items() if any(part in name for part in parts)), "other")


def profile(step: Callable[[], None]) -> dict[str, Any]:
    """Milliseconds a step: "profile" by category, "kernels" the longest ones. Without a GPU, of ATen's operations."""
    cuda = torch.cuda.is_available()
    activity, device = (ProfilerActivity.CUDA, DeviceType.CUDA) if cuda else (ProfilerActivity.CPU, DeviceType.CPU)
    with torch.profiler.profile(activities=[activity]) as profiler:
        for _ in range(STEPS):
            step()
        if cuda:
            torch.cuda.synchronize()
    categories = dict.fromkeys((*CATEGORIES, "other"), 0.0)
    kernels = []
    for event in profiler.key_averages():
        if event.device_type != device or event.is_user_annotation:
            continue
        milliseconds = (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1000 / STEPS
        categories[category(event.key)] += milliseconds
        kernels.append({"name": event.key, "milliseconds": milliseconds, "calls": event.count / STEPS})
    kernels.sort(key=lambda kernel: -kernel["milliseconds"])
    return {"profile": categories, "kernels": kernels[:TOP]}
