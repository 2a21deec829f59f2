"""Shapes of unknown length within other sequences: ``(*x.shape[:-1], -1, d)``, ``y.view(*x.shape[:2], -1)``.

Where the rank of ``x`` is not known, such a sequence is read with one ``Rest`` in the place of all elements of the
shape, and becomes a sum of sequences in the graph. Whether the code looks at the sequence in any other way, such as by
its length or its second element, shows when the forward is read once more for each of several ranks, where every
sequence has its elements: all of these readings must be what the first one is for that rank.
"""

import dis
import operator
from collections.abc import Iterator
from types import FrameType
from typing import Any, Final, final

import torch
from torch import fx
from torch.fx.proxy import TraceError

ITERATED: Final = "a value is iterated over, and its length depends on the input"
WHOLE: Final = ("LIST_EXTEND", "CALL_FUNCTION_EX", "CALL", "PRECALL", "CALL_KW")
VARIADIC: Final = frozenset(
    ["expand", "new_empty", "new_full", "new_ones", "new_zeros", "permute", "repeat", "reshape", "tile", "view"]
)
MAKING: Final = (torch.empty, torch.ones, torch.rand, torch.randn, torch.zeros)


@final
class Rest:
    """Stands in a sequence for all elements of a traced one; whatever else is done with it is an error."""

    __slots__ = ("whole",)

    def __init__(self, whole: fx.Proxy) -> None:
        self.whole = whole


def has_rest(items: Any) -> bool:
    """Whether a sequence holds elements whose number is not known."""
    return any(type(item) is Rest for item in items)


def rests(whole: Any, frame: FrameType) -> Iterator[Any] | None:
    """Elements of a traced sequence for code that iterates over it; None where no ``Rest`` can stand for them."""
    at = next((i for i in dis.get_instructions(frame.f_code) if i.offset == frame.f_lasti), None)
    if at is None:
        return None
    if at.opname == "UNPACK_EX":
        before, behind = at.arg & 0xFF, at.arg >> 8  # type: ignore[operator]  # it has one
        middle = Rest(whole[before : -behind or None])
        return iter([*(whole[i] for i in range(before)), middle, *(whole[i] for i in range(-behind, 0))])
    return iter([Rest(whole)]) if at.opname in WHOLE else None


def joined(tracer: Any, items: Any) -> Any:
    """A traced sequence of the elements of another one, each ``Rest`` among them put in."""
    if any(isinstance(item, fx.Proxy) and not item.node.meta.get("plain") for item in items):
        raise TraceError(ITERATED)
    parts: list[Any] = []
    for item in items:
        if type(item) is Rest:
            parts.append(tracer.create_proxy("call_function", tuple, (item.whole,), {}))
        elif parts and type(parts[-1]) is tuple:
            parts[-1] = (*parts[-1], item)
        else:
            parts.append((item,))
    total = parts[0]
    for part in parts[1:]:
        total = tracer.create_proxy("call_function", operator.add, (total, part), {})
    return tracer.create_proxy("call_function", list, (total,), {}) if isinstance(items, list) else total


def with_joined(tracer: Any, target: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments of a call, with one sequence in the place of sizes of unknown number."""
    if not has_rest(args):
        return args
    first = 1 if target in VARIADIC else 0 if target in MAKING else None
    if first is None or has_rest(args[:first]):
        raise TraceError(ITERATED)
    return (*args[:first], joined(tracer, args[first:]))
