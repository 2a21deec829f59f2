"""One item that is read twice: ``batch["image"]`` in two branches, or the same slice of a value, is one value.

The second reading is the first one iff nothing in between may have changed what it is read from: neither an operation
that writes its memory, nor a method of a container. Only keys that give a view of a tensor count: a list of positions
gives a copy, which may be written by itself.
"""

from types import EllipsisType
from typing import Any, Final

from torch import Tensor, fx

from reparam.graph.calls import name_of
from reparam.graph.channels import SPLITS
from reparam.graph.effects import Effects, written
from reparam.graph.net import Frame, Net, Value
from reparam.graph.proxy import PLAIN
from reparam.graph.structures import key_of

PLAIN_KEYS: Final = (int, str, EllipsisType, type(None))
CHANGING: Final = frozenset(["setitem", "delitem", "setattr", "delattr"])


def read_before(net: Net, frame: Frame, node: fx.Node, args: tuple[Any, ...]) -> Value | None:
    """The value of an earlier ``source[key]`` in the same call which is what ``node`` reads now; None if there is none.

    Args:
        net: what was read so far.
        frame: the call in which ``node`` stands.
        node: the operation.
        args: its arguments.
    """
    source = args[0] if len(args) == 2 else None
    if not isinstance(source, Value) or node.meta.get(PLAIN) or not source.users:
        return None
    if name_of(source) in SPLITS or not _gives_a_view(args[1]):
        return None
    before = [v for v in source.users if v.frame is frame and v.node.target is node.target and v.args[0] is source]
    key = key_of(args[1]) if before else None
    first = next((value for value in reversed(before) if key_of(value.args[1]) == key), None)
    return first if first is not None and _untouched(net, source, first) else None


def _gives_a_view(key: Any) -> bool:
    """Whether a key consists of names, numbers and slices."""
    parts = key if isinstance(key, tuple) else (key,)
    ends = (end for part in parts for end in (_ends(part) if isinstance(part, slice) else (part,)))
    return all(type(end) in PLAIN_KEYS for end in ends)


def _ends(part: slice) -> tuple[Any, ...]:
    return part.start, part.stop, part.step


def _untouched(net: Net, source: Value, first: Value) -> bool:
    """Whether nothing since the first reading may have changed what it read from."""
    if not any(written(value) or _may_change(value) for value in net.values[first.index + 1 :]):
        return True
    effects, now = Effects(net), len(net.values)
    return effects.stable([source], first.index, now) and not any(
        user.index > first.index and _may_change(user) for member in effects.sharing(source) for user in member.users
    )


def _may_change(value: Value) -> bool:
    """Whether an operation may put other items into a list, a dict, or what else is no tensor."""
    if value.node.op != "call_method":
        return name_of(value) in CHANGING
    name = str(value.node.target)
    of_container = any(hasattr(kind, name) for kind in (dict, list)) and name != "__getitem__"
    return of_container or not hasattr(Tensor, name)
