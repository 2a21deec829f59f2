"""What collections and plain objects of a module hold, to see whether a forward changes it, and to undo that."""

import sys
from collections import deque
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, Final, final

import torch
from torch import Tensor, nn
from torch.fx.proxy import TraceError

_DEPTH: Final = 4
_SIMPLE: Final = (bool, int, float, complex, str, bytes, tuple, type(None))
_ATOMS: Final = frozenset([bool, int, float, str, type(None), tuple, torch.Size, torch.dtype, torch.device])
_OBJECTS: Final[dict[type, bool]] = {}
OWN: Final = frozenset(nn.Module().__dict__)


def same(a: Any, b: Any) -> bool:
    """Whether two attributes are one object, or equal plain values."""
    return a is b or (type(a) is type(b) and isinstance(a, _SIMPLE) and bool(a == b))


@final
class OutOfReach:
    """Stands for an iterator while a forward is read, for what it has given could not be put back.

    Args:
        name: of the attribute or variable that holds the iterator.
    """

    def __init__(self, name: str) -> None:
        self.__dict__["_reparam_name"] = name

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Any:
        raise TraceError(f"advances {self.__dict__['_reparam_name']}")

    def __getattr__(self, name: str) -> Any:
        raise TraceError(f"uses {self.__dict__['_reparam_name']}, which holds its place")


def is_iterator(value: Any) -> bool:
    """Whether a value gives something else each time that it is asked."""
    return hasattr(type(value), "__next__")


@final
class Contents:
    """What one collection or object held.

    Args:
        name: of the attribute that leads to it.
        holder: the collection or object.
    """

    def __init__(self, name: str, holder: Any) -> None:
        self.name = name
        self.holder = holder
        self.before = _items(holder)

    def restore(self) -> str:
        """Undo every change; says whether it was ``changed``, or only ``filled``, or neither (an empty string)."""
        now = _items(self.holder)
        if len(now) == len(self.before) and all(_same_item(a, b) for a, b in zip(now, self.before, strict=True)):
            return ""
        kept = len(now) > len(self.before) and all(_same_item(a, b) for a, b in zip(now, self.before, strict=False))
        _refill(self.holder, self.before)
        return "filled" if kept else "changed"


def contents(module: nn.Module) -> Iterator[Contents]:
    """Of all collections and plain objects that a module holds, and those within them."""
    seen: set[int] = set()
    for name, value in vars(module).items():
        if name not in OWN:
            yield from _below(name, value, seen, _DEPTH)


def contents_of(name: str, value: Any) -> Iterator[Contents]:
    """Of one collection or plain object, and those within it."""
    return _below(name, value, set(), _DEPTH)


def _below(name: str, value: Any, seen: set[int], depth: int) -> Iterator[Contents]:
    if not depth or id(value) in seen or not holds(value):
        return
    seen.add(id(value))
    found = Contents(name, value)
    yield found
    if isinstance(value, torch.Generator):
        return
    for item in found.before:
        yield from _below(name, item[1] if isinstance(item, tuple) and _is_keyed(value) else item, seen, depth - 1)


def _is_keyed(value: Any) -> bool:
    return isinstance(value, dict) or _is_object(value)


def holds(value: Any) -> bool:
    """Whether a value is a collection or an object whose contents a forward may change."""
    kind = type(value)
    if kind in _ATOMS:
        return False
    return isinstance(value, dict | list | set | deque | torch.Generator) or _is_object(value)


def _is_object(value: Any) -> bool:
    """Whether a value is made of attributes alone, and of a class that neither torch nor Python brings along."""
    kind = type(value)
    if kind not in _OBJECTS:
        home = kind.__module__.partition(".")[0]
        plain = home not in sys.stdlib_module_names and home not in ("torch", "numpy", "reparam", "functorch")
        known = issubclass(kind, type | Tensor | nn.Module | tuple | dict | list | set | deque)
        _OBJECTS[kind] = kind is SimpleNamespace or ((plain or home == "__main__") and not known)
    return _OBJECTS[kind] and type(getattr(value, "__dict__", None)) is dict


def _items(holder: Any) -> list[Any]:
    if isinstance(holder, torch.Generator):
        return [holder.get_state()]
    if isinstance(holder, dict):
        return list(holder.items())
    return list(vars(holder).items()) if _is_object(holder) else list(holder)


def _same_item(a: Any, b: Any) -> bool:
    if type(a) is tuple and type(b) is tuple and len(a) == len(b):
        return all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, Tensor) and a.dtype == torch.uint8 and isinstance(b, Tensor):
        return a is b or torch.equal(a, b)
    return same(a, b)


def _refill(holder: Any, before: list[Any]) -> None:
    if isinstance(holder, torch.Generator):
        holder.set_state(before[0])
    elif _is_object(holder):
        vars(holder).clear()
        vars(holder).update(before)
    elif isinstance(holder, dict | set):
        holder.clear()
        holder.update(before)
    else:
        holder.clear()
        holder.extend(before)
