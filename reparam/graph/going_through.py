"""Notices where a forward goes through all of a module: its children, its parameters, or both of all within it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple, Protocol, final

from torch import nn

from reparam.graph.bytecode import names
from reparam.graph.callers import asked_by_user
from reparam.graph.code import Code

_REGISTRIES: Final = ("_parameters", "_buffers", "_modules")
_ATTRIBUTES: Final = frozenset(("__dict__", "vars"))
_OF_DICTS: Final = ("__contains__", "__iter__", "__len__", "items", "keys", "values")
_LISTINGS: Final = ((nn.Sequential, ("__getitem__", "__iter__", "__len__")), (nn.ModuleDict, _OF_DICTS))


class Survey(NamedTuple):
    """What a forward went through: the children or tensors of a module, or of all within it."""

    path: str
    deep: bool
    tensors: bool


@final
class GoingThrough:
    """What one forward went through.

    Args:
        path: the dotted path of a descendant; None for a stranger.
        read: told of every tensor that is read.
    """

    def __init__(self, path: Callable[[nn.Module], str | None], read: Callable[[nn.Module, str, Any], None]) -> None:
        self._path = path
        self._read = read
        self._surveys: set[Survey] = set()
        self._counted: list[tuple[str, set[int]]] = []

    def note(self, module: nn.Module, *, deep: bool, tensors: bool) -> None:
        """Remember that the forward went through the children or tensors of a module."""
        path = self._path(module)
        if path is not None:
            self._surveys.add(Survey(path, deep, tensors))

    def note_registry(self, module: nn.Module, name: str, registry: Mapping[str, Any]) -> None:
        """Remember that the forward looked into a registry of a module, or into all of its attributes."""
        own = self._path(module) == ""
        if name != "_modules" and not own:
            self.note(module, deep=False, tensors=True)
        if name == "_modules" or (name == "__dict__" and not own):
            self.note(module, deep=False, tensors=False)
        for key, value in registry.items() if name in ("_parameters", "_buffers") else ():
            self._read(module, key, value)

    def note_parameters(self, module: nn.Module, parameters: set[int]) -> None:
        """Remember that the forward came upon the last parameter of a module: it may only count them."""
        path = self._path(module)
        if path is not None and parameters:
            self._counted.append((path, parameters))

    def all(self, asked: set[int]) -> frozenset[Survey]:
        """What it went through; its parameters only if the forward has asked nothing of them."""
        counted = (Survey(path, True, True) for path, parameters in self._counted if parameters.isdisjoint(asked))
        return frozenset((*self._surveys, *counted))


class _Tracer(Protocol):
    going_through: GoingThrough


@contextmanager
def noting_all(active: Sequence[_Tracer]) -> Iterator[None]:
    """While it lasts, the tracer at work hears of what goes through all of a module."""
    plain: list[tuple[type, str, Callable[..., Any]]] = []

    def noting(kind: type, name: str, *tensors: bool, deep: bool = False) -> None:
        function: Callable[..., Any] = vars(kind)[name]
        plain.append((kind, name, function))

        def noted(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            for kinds in tensors if active and asked_by_user(2) else ():
                active[-1].going_through.note(module, deep=deep, tensors=kinds)
            return function(module, *args, **kwargs)

        setattr(kind, name, noted)

    for name in ("children", "named_children"):
        noting(nn.Module, name, False)
    for name in ("modules", "named_modules"):
        noting(nn.Module, name, False, deep=True)
    noting(nn.Module, "state_dict", True, deep=True)
    noting(nn.Module, "__dir__", False, True)
    for listing, methods in _LISTINGS:
        for name in methods:
            noting(listing, name, False)
    for name in _REGISTRIES:
        setattr(nn.Module, name, _registry(name, active))
    try:
        yield
    finally:
        for kind, name, function in plain:
            setattr(kind, name, function)
        for name in _REGISTRIES:
            delattr(nn.Module, name)


def _registry(name: str, active: Sequence[_Tracer]) -> property:
    """A registry of all modules, which says when the code of a user looks into it."""

    def get(module: nn.Module) -> Any:
        try:
            found = module.__dict__[name]
        except KeyError:
            raise AttributeError(name) from None
        if active and asked_by_user(2):
            active[-1].going_through.note_registry(module, name, found)
        return found

    return property(get, lambda module, value: module.__dict__.update({name: value}))


@contextmanager
def noting_attributes(code: Code, tracer: _Tracer) -> Iterator[None]:
    """While it lasts, reads of all attributes of a module in the code of a user are noticed, if there are some."""
    if all(_ATTRIBUTES.isdisjoint(names(function.__code__)) for function in code.functions):
        yield
        return

    def noted(module: nn.Module, name: str) -> Any:
        found = object.__getattribute__(module, name)
        if name == "__dict__" and asked_by_user(2):
            tracer.going_through.note_registry(module, name, found)
        return found

    nn.Module.__getattribute__ = noted  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del nn.Module.__getattribute__
