"""State beside a module that its forward may change: global variables, and attributes of its classes."""

from collections.abc import Iterator
from types import FunctionType
from typing import Any, Final, final

from torch import nn

from reparam.graph.code import code_of
from reparam.graph.contents import Contents, OutOfReach, contents_of, holds, is_iterator

_MISSING: Final = object()
_NAMED: Final[dict[type, list[tuple[dict[str, Any], str]]]] = {}


def forget_state() -> None:
    """Forget which variables classes use."""
    _NAMED.clear()


@final
class Beside:
    """Variables that the code of a class names, and the attributes of the class and its bases, as they were.

    Args:
        kind: the class.
    """

    def __init__(self, kind: type) -> None:
        self._bound = [(scope, name, scope.get(name, _MISSING)) for scope, name in code_of(kind).written]
        self._classes = [(base, dict(vars(base))) for base in _own_bases(kind)]
        self.contents: list[Contents] = []
        self._hidden: list[tuple[dict[str, Any], str, Any]] = []
        for scope, name in _named(kind):
            value = scope.get(name)
            if is_iterator(value):
                self._hidden.append((scope, name, value))
                scope[name] = OutOfReach(name)
            elif holds(value):
                self.contents += contents_of(name, value)
        for function in code_of(kind).functions:
            if function.__closure__ is not None:
                self.contents += contents_of(f"what {function.__name__} holds", function)
        for _, attributes in self._classes:
            for name, value in attributes.items():
                if type(value) is not FunctionType and not name.startswith("_abc_") and holds(value):
                    self.contents += contents_of(name, value)

    def restore(self) -> str:
        """Undo every change; says what was changed, or nothing."""
        changed = ""
        for scope, name, value in self._hidden:
            scope[name] = value
        for scope, name, value in self._bound:
            if scope.get(name, _MISSING) is value:
                continue
            changed = f"forward sets the variable {name}"
            if value is _MISSING:
                del scope[name]
            else:
                scope[name] = value
        for base, attributes in self._classes:
            for name in _changed(vars(base), attributes):
                changed = f"forward sets {name} of the class {base.__name__}"
                if name in attributes:
                    type.__setattr__(base, name, attributes[name])
                else:
                    type.__delattr__(base, name)
        return changed


def _changed(now: Any, before: dict[str, Any]) -> list[str]:
    """Names of what a class has otherwise than before, apart from what Python itself puts there."""
    if len(now) == len(before) and all(now.get(name, _MISSING) is value for name, value in before.items()):
        return []
    names = {**now, **before}
    differ = [name for name in names if now.get(name, _MISSING) is not before.get(name, _MISSING)]
    return [name for name in differ if not name.startswith(("__", "_abc_"))]


def _own_bases(kind: type) -> Iterator[type]:
    """A class and its bases that are not torch's."""
    bases = (base for base in kind.__mro__ if base not in (nn.Module, object))
    return (base for base in bases if not base.__module__.startswith(("torch.", "abc", "typing")))


def _named(kind: type) -> list[tuple[dict[str, Any], str]]:
    """Global variables that the code of a forward names and that hold something which can change, or an iterator."""
    if kind not in _NAMED:
        found: dict[tuple[int, str], tuple[dict[str, Any], str]] = {}
        for scope, name in code_of(kind).named:
            value = scope.get(name)
            if holds(value) or is_iterator(value):
                found[id(scope), name] = (scope, name)
        _NAMED[kind] = list(found.values())
    return _NAMED[kind]
