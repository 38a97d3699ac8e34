"""Triton's interpreter without what it does in vain, which is most of its time."""

import functools


def quicken() -> None:
    """Change nothing in what kernels compute, nor in what is asserted. Another Triton than 3.7 is left as it is."""
    import triton
    from triton.runtime import interpreter

    if not triton.__version__.startswith("3.7."):
        return

    # The sum, difference or product of two integers is computed a second time in 64 bits, to be compared with the
    # bounds of 32; only in debug mode, which is off, is the result of that asserted.
    object.__setattr__(interpreter.interpreter_builder.options, "sanitize_overflow", False)

    # A launch puts the interpreter's functions into triton.language, as a file knows it; and so does each call of a
    # function that a kernel makes. Once a file and launch is enough.
    patch, patched = interpreter._patch_lang, set()

    def patch_for_a_launch(function):
        patched.clear()
        patched.add(id(function.__globals__))
        return patch(function)

    def call(self, *args, **kwargs):
        if id(self.fn.__globals__) not in patched:
            patched.add(id(self.fn.__globals__))
            patch(self.fn)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter._patch_lang = patch_for_a_launch
    interpreter.InterpretedFunction.__call__ = call

    # For each operation, a table of all types is made.
    look_up, pointer = functools.cache(interpreter._get_np_dtype), interpreter.np.dtype("uint64")
    interpreter._get_np_dtype = lambda type: pointer if type.scalar.is_ptr() else look_up(type.scalar)

    _share_shapes(triton.language.core, triton.language.semantic.TritonSemantic)


def _share_shapes(core, semantic) -> None:
    """Each operation makes types and tensors, and for each a shape out of many objects. Make equal ones once."""
    of_types, of_tensors = {}, {}  # the latter by the identity of those of types, which are kept
    make_type, make_tensor, broadcast = core.block_type.__init__, core.tensor.__init__, semantic.broadcast_impl_value

    def block_type(self, element_ty, shape):
        sizes = tuple(size.value if isinstance(size, core.constexpr) else size for size in shape)
        if sizes not in of_types:
            make_type(self, element_ty, shape)
            of_types[sizes] = self.shape, self.numel, str(self.shape)
        self.element_ty = element_ty
        self.shape, self.numel, shown = of_types[sizes]
        self.name = f"<{shown}, {element_ty}>"

    def tensor(self, handle, type):
        shape = type.shape if type.is_block() else None
        if id(shape) not in of_tensors:
            make_tensor(self, handle, type)
            of_tensors[id(shape)] = self.shape, self.numel, shape
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel, _ = of_tensors[id(shape)]

    def broadcast_impl_value(self, lhs, rhs):
        if lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape is rhs.type.shape:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    core.block_type.__init__, core.tensor.__init__ = block_type, tensor
    semantic.broadcast_impl_value = broadcast_impl_value
