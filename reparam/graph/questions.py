"""What forwards ask about classes other than by ``isinstance``: ``type(child)``, and ``child.__class__``."""

import builtins
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, Final, final

from torch import Tensor, nn

from reparam.graph.bytecode import names
from reparam.graph.code import Code
from reparam.graph.proxy import PLAIN, Traced, kind_of_plain
from reparam.graph.tracer import Kinds, Tracer

_CONTAINERS: Final = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@final
class Exactly(type):
    """A class of classes each of which has one subclass, itself: for a question that a subclass answers otherwise."""

    kind: type

    def __subclasscheck__(cls, other: type) -> bool:
        """Whether it is the class itself."""
        return other is cls.kind


def exactly(kind: type) -> type:
    """A stand-in for a class that has no other subclass than the class itself."""
    return Exactly(kind.__name__, (), {"kind": kind})


def asks_classes_of(module: nn.Module, touched: Collection[str]) -> Iterator[Kinds]:
    """Questions for the classes of all children, of what stands in containers, and of what was looked at."""
    pending = [*module._modules.items(), *((path, module.get_submodule(path)) for path in touched)]
    while pending:
        path, child = pending.pop()
        if child is None:
            continue
        yield path, exactly(type(child)), True
        if isinstance(child, _CONTAINERS):
            pending += [(f"{path}.{name}", below) for name, below in child._modules.items()]


@contextmanager
def asking_types(code: Code, tracer: Tracer) -> Iterator[None]:
    """While it lasts, ``type(value)`` in the code of a forward is noticed; a traced tensor is a ``Tensor``."""
    scopes = {id(f.__globals__): f.__globals__ for f in code.functions if "type" in names(f.__code__)}
    scopes = {key: scope for key, scope in scopes.items() if "type" not in scope}
    for scope in scopes.values():
        scope["type"] = _Type(tracer)
    try:
        yield
    finally:
        for scope in scopes.values():
            del scope["type"]


@final
class _Type:
    """Stands for ``type`` in the code of a forward."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        if len(args) != 1 or keywords:
            return builtins.type(*args, **keywords)
        (value,) = args
        kind: type = builtins.type(value)
        if kind is Traced and not value.node.meta.get(PLAIN):
            self._tracer.on_question(value.node, None)
            return Tensor
        if kind is Traced:
            return kind_of_plain(value.node) or kind
        if isinstance(value, nn.Module):
            self._tracer.on_kind(value, exactly(kind), True)
        return kind

    def __instancecheck__(self, value: object) -> bool:
        return isinstance(value, type)

    def __subclasscheck__(self, kind: type) -> bool:
        return issubclass(kind, type)

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type]:
        return (type,)

    def __eq__(self, other: object) -> bool:
        return other is self or other is type

    def __hash__(self) -> int:
        return hash(type)

    def __getitem__(self, item: Any) -> Any:
        return type[item]

    def __or__(self, other: Any) -> Any:
        return type | other

    def __ror__(self, other: Any) -> Any:
        return other | type

    def __getattr__(self, name: str) -> Any:
        return getattr(type, name)
