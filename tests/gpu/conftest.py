"""A tokenizer and texts made in code, as the tests of training libraries on the CPU have them."""

from training.conftest import text, tokenizer  # noqa: F401
