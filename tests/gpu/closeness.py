"""An optimised model beside its original, and how close training leaves them: a GPU adds in another order."""

import copy

import ligerfx


def pair(model, **arguments):
    return model, ligerfx.optimize(copy.deepcopy(model), **arguments)


def assert_close_parameters(model, optimised, start):
    """The way that each trained parameter has gone since `start` is the same, within 1e-3 of its own length."""
    for (name, p), q, before in zip(model.named_parameters(), optimised.parameters(), start, strict=True):
        if p.requires_grad:
            way = (p - before).norm().item()
            assert way > 0, name
            assert (p - q).norm().item() < 1e-3 * way, name
