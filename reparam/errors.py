"""Errors that the library raises; each message says what was expected, what was found, where, and what to do."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reparam.verification.result import Verification


class ReparamError(ValueError):
    """Base class of every error raised by this library."""


class TrainingModeError(ReparamError):
    """The model is in training mode, where batch norms use the statistics of the batch and cannot be folded."""


class CheckError(ReparamError):
    """A rewritten model did not compute what the original one computes.

    Args:
        message: what was compared and what was found.
        verification: the comparison, with the cause and the place.
    """

    def __init__(self, message: str, verification: "Verification") -> None:
        super().__init__(message)
        self.verification = verification

    def __reduce__(self) -> tuple[type["CheckError"], tuple[str, "Verification"]]:
        return CheckError, (str(self), self.verification)


class BlockError(ReparamError):
    """A block of several branches does not compute what the convolution did that it replaces."""


class MissingPackageError(ReparamError):
    """A package is needed that is not among those installed with this library; the message names the extra."""

    @classmethod
    def of(cls, package: str, purpose: str, extra: str) -> "MissingPackageError":
        """The error for a package that cannot be imported."""
        return cls(f"expected the package {package}, which {purpose}, found none: pip install 'reparam[{extra}]'")
