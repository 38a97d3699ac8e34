"""The pattern library: one idiom a file. `default_patterns()` lists them in the order in which they are tried."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ligerfx.pattern import Pattern


def default_patterns(low_memory: bool = False) -> list[Pattern]:
    """All patterns of the library. Those that cover more come first.

    Args:
        low_memory: whether kernels save memory where that takes a little time (see `optimize`).

    Returns:
        What `optimize(model)` looks for, for `optimize(model, patterns=..., defaults=False)` with some of them alone.

    Examples:
        >>> from ligerfx.patterns import default_patterns
        >>> [pattern.name for pattern in default_patterns() if "cross_entropy" in pattern.idioms]
        ['loss', ...]
    """
    from . import glu, layer_norm, logits_loss, norm, norm_linear, norm_mlp, rotary

    return [
        *logits_loss.patterns(low_memory),
        *norm_mlp.patterns(low_memory),
        *norm_linear.PATTERNS,
        *norm.PATTERNS,
        *layer_norm.PATTERNS,
        *rotary.PATTERNS,
        *glu.patterns(low_memory),
    ]
