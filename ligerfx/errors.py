"""Errors that ligerfx raises. Each message says what was expected, what was found, and what to do."""


class LigerfxError(Exception):
    """Base class of every error that ligerfx raises on purpose."""


class OptimizeError(LigerfxError):
    """`optimize` was given something that it cannot work with; the model is unchanged."""


class CaptureError(LigerfxError):
    """A module's forward cannot be written as a graph. Never reaches the user: the report gives the reason."""


class PatternError(LigerfxError):
    """A pattern is not usable: wrong signature, wrong annotation, or not traceable."""
