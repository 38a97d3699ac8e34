"""Which rows of a target count in a loss, found before the loss needs to know."""

import torch

from ._operators import operator
from ._runtime import PLAIN, WITHOUT_MEMORY

WORTH_GATHERING = 0.98
"""The share of rows that count above which gathering and scattering them would take longer than computing all."""


class CountedRows:
    """Which rows of a target count in a loss: the result of `rows_that_count`, perhaps still on its way.

    Attributes:
        size: rows in the target.
        ignore_index: the target of rows that do not count.
        n_valid: how many rows count, an int64 scalar on the target's device.
    """

    def __init__(self, target: torch.Tensor, ignore_index: int):
        target = target.reshape(-1)
        counts = target != ignore_index
        self.size, self.ignore_index, self.n_valid = target.numel(), ignore_index, counts.sum()
        self._counts = self._n_valid = self._arrived = None
        # How many rows are kept decides the shapes, which a CUDA graph could not follow.
        if not capturing(target):
            self._counts = counts
            if target.is_cuda:
                self._n_valid = torch.empty((), dtype=torch.int64, pin_memory=True)
                self._n_valid.copy_(self.n_valid, non_blocking=True)
                self._arrived = torch.cuda.Event()
                self._arrived.record(torch.cuda.current_stream(target.device))
            else:
                self._n_valid = self.n_valid

    def kept(self) -> torch.Tensor | None:
        """The indices of the rows that count, ascending, int64; None if all of them are to be computed, since all or
        nearly all count. Waits until the device has them."""
        if self._counts is None:
            return None
        if self._arrived is not None:
            self._arrived.synchronize()
        n_valid = int(self._n_valid)
        if n_valid > self.size * WORTH_GATHERING:
            return None
        # Those that count come first, in order. (nonzero() would wait for the device, to count them itself.)
        return self._counts.argsort(descending=True, stable=True)[:n_valid]


def capturing(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


# A CUDA graph could not count anew in each replay.
@operator(
    "rows_that_count(Tensor target, int ignore_index) -> Tensor",
    lambda target, _: torch.empty(0, device=target.device),
    (torch.Tag.cudagraph_unsafe,),
)
def _holding_rows(target: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """An empty tensor that holds the rows that count as an attribute."""
    holder = torch.empty(0, device=target.device)
    holder.rows = CountedRows(target, ignore_index)
    return holder


def rows_that_count(target: torch.Tensor, ignore_index: int = -100) -> CountedRows | torch.Tensor | None:
    """Start to find the rows of target that are not ignored, for `linear_cross_entropy(..., rows=...)`.

    `linear_cross_entropy` must know their number before it can queue its matrix products. Called where the target
    first exists, such as at the start of a model's forward, this queues the search and a copy of the number to the
    host, and returns at once; the loss then waits for what was queued before this call, not for the forward pass.

    Args:
        target: int64, any shape.
        ignore_index: the target of rows that do not count.

    Returns:
        Under torch.compile, whose graphs know tensors only, an empty one that holds them. None for a tensor subclass:
        the loss then looks for itself.

    Raises:
        TypeError: if target is not int64.

    Examples:
        >>> import torch
        >>> from ligerfx.kernels import rows_that_count
        >>> target = torch.tensor([[1, 5, -100], [2, -100, -100]])
        >>> rows = rows_that_count(target)
        >>> rows.size, rows.n_valid
        (6, tensor(3))
    """
    if target.dtype != torch.int64:
        raise TypeError(f"rows_that_count: target must be int64, got {target.dtype}")
    if type(target) not in PLAIN | WITHOUT_MEMORY:
        return None
    if torch.compiler.is_compiling() or type(target) in WITHOUT_MEMORY:
        return _holding_rows(target, ignore_index)
    return CountedRows(target, ignore_index)
