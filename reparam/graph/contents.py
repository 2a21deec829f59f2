"""What collections and plain objects of a module hold, to see whether a forward changes it, and to undo that."""

import sys
from collections import deque
from collections.abc import Iterator
from types import CellType, FunctionType, SimpleNamespace
from typing import Any, Final, final

import torch
from torch import Tensor, nn
from torch.fx.proxy import TraceError

from reparam.graph.states import has_state, put_back, state_of

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


def put_out_of_reach(name: str, collection: list[Any] | dict[Any, Any]) -> None:
    """Let no element of a list or dict be used any more, which would hold others than while it is read."""
    if isinstance(collection, dict):
        collection.update(dict.fromkeys(collection or [name], OutOfReach(name)))
    else:
        collection[:] = [OutOfReach(name)] * max(len(collection), 1)


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
        self.hidden = list(_hidden(name, holder))

    def restore(self) -> str:
        """Undo every change; says whether it was ``changed``, or only ``filled``, or neither (an empty string)."""
        for key, stand_in, value in self.hidden:
            if _at(self.holder, key) is stand_in:
                self.holder[key] = value
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
    if has_state(value):
        return
    for item in found.before:
        yield from _below(name, item[1] if isinstance(item, tuple) and _is_keyed(value) else item, seen, depth - 1)


def _hidden(name: str, holder: Any) -> Iterator[tuple[Any, OutOfReach, Any]]:
    """The iterators in a list or dict, each with its place and what stands there from now on."""
    if isinstance(holder, dict | list):
        for key, value in list(holder.items() if isinstance(holder, dict) else enumerate(holder)):
            if is_iterator(value):
                holder[key] = OutOfReach(name)
                yield key, holder[key], value


def _at(holder: Any, key: Any) -> Any:
    """What stands at a place of a list or dict; None if nothing does."""
    if isinstance(holder, dict):
        return holder.get(key)
    return holder[key] if key < len(holder) else None


def _is_keyed(value: Any) -> bool:
    return isinstance(value, dict) or _is_object(value)


def holds(value: Any) -> bool:
    """Whether a value is a collection or an object whose contents a forward may change."""
    kind = type(value)
    if kind in _ATOMS:
        return False
    if kind is FunctionType:
        return value.__closure__ is not None
    return isinstance(value, dict | list | set | deque) or _is_object(value) or has_state(value)


def _is_object(value: Any) -> bool:
    """Whether a value is made of attributes alone, and of a class that neither torch nor Python brings along."""
    kind = type(value)
    if kind not in _OBJECTS:
        home = kind.__module__.partition(".")[0]
        plain = home not in sys.stdlib_module_names and home not in ("torch", "numpy", "reparam", "functorch")
        known = issubclass(kind, type | Tensor | nn.Module | tuple | dict | list | set | deque)
        _OBJECTS[kind] = kind is SimpleNamespace or ((plain or home == "__main__") and not known)
    return _OBJECTS[kind] and type(getattr(value, "__dict__", {})) is dict


def _fields(holder: Any) -> dict[str, Any]:
    """The attributes of an object, also those for which its class has slots."""
    names = [name for base in type(holder).__mro__ for name in _names(vars(base).get("__slots__", ()))]
    slots = {name: getattr(holder, name) for name in names if hasattr(holder, name)} if names else {}
    return {**getattr(holder, "__dict__", {}), **slots}


def _names(slots: Any) -> tuple[str, ...]:
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in names if not name.startswith("__"))


def _items(holder: Any) -> list[Any]:
    if type(holder) is FunctionType:
        return [content(cell) for cell in holder.__closure__ or ()]
    if has_state(holder):
        return [state_of(holder)]
    if isinstance(holder, dict):
        return list(holder.items())
    return list(_fields(holder).items()) if _is_object(holder) else list(holder)


def content(cell: CellType) -> Any:
    """What a variable of a function holds; the cell itself if it holds nothing yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return cell


def _same_item(a: Any, b: Any) -> bool:
    if type(a) is tuple and type(b) is tuple and len(a) == len(b):
        return all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, Tensor) and a.dtype == torch.uint8 and isinstance(b, Tensor):
        return a is b or torch.equal(a, b)
    return same(a, b)


def _refill(holder: Any, before: list[Any]) -> None:
    if type(holder) is FunctionType:
        for cell, value in zip(holder.__closure__ or (), before, strict=True):
            if value is not cell:
                cell.cell_contents = value
    elif has_state(holder):
        put_back(holder, before[0])
    elif _is_object(holder):
        for name in _fields(holder).keys() - dict(before).keys():
            object.__delattr__(holder, name)
        for name, value in before:
            object.__setattr__(holder, name, value)
    elif isinstance(holder, dict | set):
        holder.clear()
        holder.update(before)
    else:
        holder.clear()
        holder.extend(before)
