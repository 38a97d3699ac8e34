"""What a pattern needs, it finds in what computes it: the test that turns most values away turns no match away."""

import pytest

from ligerfx.graph_view import View
from ligerfx.pattern import Pattern
from ligerfx.patterns import default_patterns
from ligerfx.proofs import _results


@pytest.mark.parametrize("pattern", default_patterns(), ids=lambda pattern: pattern.name)
@pytest.mark.parametrize("cut", [False, True])
def test_outputs_are_made_of_what_the_pattern_needs(pattern: Pattern, cut: bool) -> None:
    for variant in pattern.variants:
        view = View(variant.graph, cut=cut)
        for node, needed in zip(_results(variant.graph), variant.needed, strict=True):
            assert needed <= view.made_of(view.computed[node])


def test_values_lack_what_others_need() -> None:
    variants = {pattern.name: pattern.variants[0] for pattern in default_patterns()}
    assert variants["silu_glu"].needed[0] and not variants["silu_glu"].needed[0] & {"mean"}
    assert "mean" in variants["rms_norm_rounded_first"].needed[0]
