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
