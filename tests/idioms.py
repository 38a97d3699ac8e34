"""Small modules: one that is what a pattern describes, and ones that nearly are, wrong in one way that is known."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ALMOST_INPUT = torch.zeros(2, 5, 64)


class RMSNorm(nn.Module):
    """Written out; for tests of anything but the pattern."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64))


class EpsOutsideTheRoot(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x / (x.pow(2).mean(-1, keepdim=True).sqrt() + 1e-6))


class MeanOverAnotherDim(Norm):
    def forward(self, x: Tensor) -> Tensor:
        variance = x.pow(2).mean(1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + 1e-6))


class GateIsUsedTwice(Norm):
    def forward(self, x: Tensor) -> Tensor:
        act = F.silu(self.weight * x)
        return act * x + act.mean()


class BranchesOnValues(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight if x.sum() > 0 else x


def almost() -> nn.Module:
    """One module for each of the near misses."""
    return nn.Sequential(EpsOutsideTheRoot(), MeanOverAnotherDim(), GateIsUsedTwice())


def llama(x, w, eps):
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return w * h.to(x.dtype)


def rounded_last(x, w, eps):
    h = x.float()
    return (w.float() * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps))).to(x.dtype)


def gemma(x, w, eps):
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps) * (1.0 + w.float())).type_as(x)


KINDS_OF_NORM = {
    llama: ("rms_norm_rounded_first", {}),
    rounded_last: ("rms_norm_rounded_last", {"cast": "after_weight"}),
    gemma: ("rms_norm_one_plus_weight", {"cast": "after_weight", "offset": 1.0}),
}
"""Functions that compute RMSNorm of x, weight and eps -> the pattern, and what it fixes in the kernel."""
