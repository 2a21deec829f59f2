"""Errors that the library raises; each message says what was expected, what was found, where, and what to do."""


class ReparamError(ValueError):
    """Base class of every error raised by this library."""


class TrainingModeError(ReparamError):
    """The model is in training mode, where batch norms use the statistics of the batch and cannot be folded."""


class CheckError(ReparamError):
    """A rewritten model did not compute what the original one computes."""
