"""The pattern library: one idiom a file. `default_patterns()` lists them in the order in which they are tried."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ligerfx.pattern import Pattern


def default_patterns() -> list[Pattern]:
    """All patterns of the library. Those that cover more come first."""
    from . import glu, logits_loss, norm, rotary

    return [*logits_loss.PATTERNS, *norm.PATTERNS, *rotary.PATTERNS, *glu.PATTERNS]
