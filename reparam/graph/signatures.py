"""Signatures of methods, asked for once for each function."""

import inspect
from collections.abc import Mapping
from functools import lru_cache
from types import FunctionType

from torch import nn

from reparam.graph.bytecode import MOST


def parameters_of(module: nn.Module, method: str = "forward") -> Mapping[str, inspect.Parameter]:
    """Parameters of a method, without ``self``.

    Raises:
        TypeError: it cannot be called.
        ValueError: it has no signature.

    Example:
        >>> list(parameters_of(nn.Linear(1, 1)))
        ['input']
    """
    return signature_of(module, method).parameters


def signature_of(module: nn.Module, method: str = "forward") -> inspect.Signature:
    """Signature of a method, without ``self``; raises as ``inspect.signature`` does."""
    bound = getattr(module, method)
    function = getattr(bound, "__func__", None)
    plain = type(function) is FunctionType and not function.__dict__  # it is no wrapper and states no other signature
    return _without_self(function) if plain and bound.__self__ is module else inspect.signature(bound)


def forget_signatures() -> None:
    """Forget what is remembered: the defaults of functions may have been replaced since."""
    _without_self.cache_clear()


@lru_cache(maxsize=MOST)
def _without_self(function: FunctionType) -> inspect.Signature:
    return inspect.signature(function.__get__(object()))
