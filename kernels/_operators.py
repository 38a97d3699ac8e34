"""What compilers see of the kernels: each launch is one operator, `torch.ops.ligerfx.<name>`, and they look no further.

torch.compile and everything else that runs a model on tensors without memory needs to know what comes out, not how.
Ordinary calls do not take this way: a call through the dispatcher costs the host more than the launch itself.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from ._runtime import PLAIN

_library = torch.library.Library("ligerfx", "FRAGMENT")


def operator(schema: str, fake: Callable, tags: tuple = (), **fixed: Any) -> Callable[[Callable], Callable]:
    """Makes a function of tensors an operator, too, that is used where its first argument is no ordinary tensor.

    Args:
        schema: name, arguments and results, in the language of torch.library. Results are fresh tensors.
        fake: makes empty results of the right shapes, strides and dtypes from the same arguments.
        tags: of torch.Tag: what compilers must know of it besides.
        fixed: further arguments of the function when it is called as an operator.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=tags)

    def decorate(function: Callable) -> Callable:
        _library.impl(name, functools.partial(function, **fixed), "CompositeExplicitAutograd")
        torch.library.register_fake(f"ligerfx::{name}", fake, lib=_library)
        overload = getattr(torch.ops.ligerfx, name).default

        @functools.wraps(function)
        def call(x: torch.Tensor, *args: Any) -> Any:
            if torch.compiler.is_compiling() or type(x) not in PLAIN:
                return overload(x, *args)
            return function(x, *args)

        return call

    return decorate
