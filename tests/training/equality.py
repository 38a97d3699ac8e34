"""Equality of an optimised model and its original, to the bit."""

import torch
from test_equivalence import run


def assert_same(model, optimised, inputs):
    """Asserts that loss, logits and all gradients of two models are the same bits; gives the loss."""
    loss, logits, gradients = run(model, inputs)
    loss_, logits_, gradients_ = run(optimised, inputs)
    assert torch.equal(loss, loss_), f"{loss_} instead of {loss}"
    assert logits.dtype == logits_.dtype and torch.equal(logits, logits_)
    assert gradients.keys() == gradients_.keys()
    for name, gradient in gradients.items():
        assert (gradient is None) == (gradients_[name] is None), name
        assert gradient is None or torch.equal(gradient, gradients_[name]), name
    return loss
