"""What collections and plain objects of a module hold, to see whether a forward changes it, and to undo that."""

from collections import deque
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, Final, final

import torch
from torch import Tensor, nn

_DEPTH: Final = 4
_SIMPLE: Final = (bool, int, float, complex, str, bytes, tuple, type(None))
OWN: Final = frozenset(nn.Module().__dict__)


def same(a: Any, b: Any) -> bool:
    """Whether two attributes are one object, or equal plain values."""
    return a is b or (type(a) is type(b) and isinstance(a, _SIMPLE) and bool(a == b))


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


def _below(name: str, value: Any, seen: set[int], depth: int) -> Iterator[Contents]:
    if not depth or id(value) in seen or not _holds(value):
        return
    seen.add(id(value))
    found = Contents(name, value)
    yield found
    if isinstance(value, torch.Generator):
        return
    for item in found.before:
        yield from _below(name, item[1] if isinstance(item, tuple) and _is_keyed(value) else item, seen, depth - 1)


def _is_keyed(value: Any) -> bool:
    return isinstance(value, dict | SimpleNamespace)


def _holds(value: Any) -> bool:
    return isinstance(value, dict | list | set | deque | SimpleNamespace | torch.Generator)


def _items(holder: Any) -> list[Any]:
    if isinstance(holder, torch.Generator):
        return [holder.get_state()]
    if isinstance(holder, SimpleNamespace):
        return list(vars(holder).items())
    return list(holder.items()) if isinstance(holder, dict) else list(holder)


def _same_item(a: Any, b: Any) -> bool:
    if type(a) is tuple and type(b) is tuple and len(a) == len(b):
        return all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, Tensor) and a.dtype == torch.uint8 and isinstance(b, Tensor):
        return a is b or torch.equal(a, b)
    return same(a, b)


def _refill(holder: Any, before: list[Any]) -> None:
    if isinstance(holder, torch.Generator):
        holder.set_state(before[0])
    elif isinstance(holder, SimpleNamespace):
        vars(holder).clear()
        vars(holder).update(before)
    elif isinstance(holder, dict | set):
        holder.clear()
        holder.update(before)
    else:
        holder.clear()
        holder.extend(before)
