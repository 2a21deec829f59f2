"""Sizes as plain numbers: ``x.size(2) - 1``, ``x.shape[-1]``, and the like."""

from dataclasses import dataclass
from typing import Any, Final, final

from reparam.graph.calls import name_of
from reparam.graph.net import Value
from reparam.graph.proxy import PLAIN
from reparam.graph.rank_rules import Rank


@final
@dataclass(frozen=True, slots=True)
class Size:
    """``source.size(axis) + more``."""

    source: Value
    axis: int
    more: int = 0

    def spatial(self, axes: int, rank: Rank) -> int | None:
        """Which of the ``axes`` last axes it is the size of; None if that is not known."""
        if self.axis < 0:
            return self.axis + axes if -axes <= self.axis else None
        place = self.axis - 2
        return place if rank.exact == axes + 2 and 0 <= place < axes else None


SIZE_CALLS: Final = frozenset(["size", "sym_size"])


def is_plain(value: Value) -> bool:
    """Whether a value is a size, a data type or the like, not a tensor."""
    return bool(value.node.meta.get(PLAIN)) or name_of(value) in SIZE_CALLS


def is_idle(value: Value) -> bool:
    """Whether a value is a size, or the like, from which nothing but others of the kind is computed."""
    return is_plain(value) and not value.returned and all(is_idle(user) for user in value.users)


def whole_shape(value: Value) -> bool:
    """Whether an operation reads all sizes of its input: ``x.shape``, ``x.size()``."""
    name = name_of(value)
    return (name == "size" and len(value.args) == 1) or (name == "getattr" and value.args[1] == "shape")


def batch_only(value: Value) -> bool:
    """Whether an operation reads nothing but the first size of its input."""
    if whole_shape(value):
        return all(name_of(user) == "getitem" and user.args[1] == 0 for user in value.users)
    return name_of(value) in SIZE_CALLS and len(value.args) == 2 and value.args[1] == 0


def of_sizes_alone(value: Value) -> bool:
    """Whether a value depends on the input by sizes alone, as a weight that is made for ``x.shape[1]`` channels."""
    pending, seen = [value], {value}
    while pending:
        current = pending.pop()
        if current.node.op == "placeholder":
            return False
        if not is_plain(current):
            new = [source for source in current.inputs if source not in seen]
            seen.update(new)
            pending += new
    return True


def size_of(number: Any) -> Size | None:
    """The size that a number is, up to a constant."""
    more = 0
    while isinstance(number, Value) and number.module is None:
        name, args = name_of(number), number.args
        if name in SIZE_CALLS and len(args) == 2 and isinstance(args[0], Value) and isinstance(args[1], int):
            return Size(args[0], args[1], more)
        if name == "getitem" and isinstance(args[1], int):
            whole = _entry(args[0], args[1])
            return None if whole is None else Size(whole.source, whole.axis, more)
        if name not in ("add", "sub") or len(args) != 2:
            return None
        first, second = args
        if name == "add" and isinstance(first, int):
            first, second = second, first
        if not isinstance(second, int):
            return None
        number, more = first, more + (second if name == "add" else -second)
    return None


def _entry(shape: Any, index: int) -> Size | None:
    """``shape[index]``, where the shape may itself be a part of a shape that reaches to its end."""
    if not isinstance(shape, Value) or shape.module is not None:
        return None
    if name_of(shape) == "getitem" and isinstance(shape.args[1], slice):
        part = shape.args[1]
        start = 0 if part.start is None else part.start
        if part.stop is not None or part.step not in (None, 1) or not isinstance(start, int):
            return None
        return _entry(shape.args[0], index if index < 0 else index + start)
    args = shape.args
    if whole_shape(shape):
        return Size(args[0], index) if isinstance(args[0], Value) else None
    return None


def spatial_sizes(sizes: Any, source: Value, axes: int, rank: Rank) -> bool:
    """Whether ``sizes`` are those of all spatial axes of ``source``."""
    if isinstance(sizes, Value) and name_of(sizes) == "getitem" and isinstance(sizes.args[1], slice):
        part = sizes.args[1]
        whole = _entry(sizes.args[0], 0)
        at = part.start if isinstance(part.start, int) and part.stop is None and part.step in (None, 1) else 0
        return whole is not None and whole.source is source and (at == -axes or (at == 2 and rank.exact == axes + 2))
    if not isinstance(sizes, list | tuple) or len(sizes) != axes:
        return False
    found = [size_of(size) for size in sizes]
    return all(
        s is not None and s.source is source and not s.more and s.spatial(axes, rank) == i for i, s in enumerate(found)
    )


def readings(numbers: Any, by: Value) -> tuple[Value, ...]:
    """The plain values from which numbers are computed, if nothing but ``by`` needs them; none otherwise."""
    found: dict[Value, None] = {}

    def collect(number: Any) -> None:
        if isinstance(number, Value) and is_plain(number):
            found[number] = None
            for argument in number.args:
                collect(argument)
        elif isinstance(number, list | tuple):
            for item in number:
                collect(item)
        elif isinstance(number, slice):
            collect((number.start, number.stop, number.step))

    collect(numbers)
    inside = {*found, by}
    used = {user for value in found for user in value.users if user.users or not is_plain(user)}
    return tuple(found) if used <= inside else ()
