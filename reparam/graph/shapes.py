"""Shapes of values in one run on example inputs, where that run saw them: at the calls of modules."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from reparam.graph.examples import Call
from reparam.graph.net import Net, Value
from reparam.graph.proxy import EXAMPLE

Shape = tuple[int, ...]


def shapes_of(net: Net, calls: Mapping[str, list[Call]] | None) -> dict[Value, Shape]:
    """Shapes of the values that enter or leave a module that is called once; empty without examples."""
    shapes: dict[Value, Shape] = {}

    def note(value: Any, found: Any) -> None:
        if isinstance(value, Value) and isinstance(found, Tensor):
            shapes.setdefault(value, tuple(found.shape))

    for value in net.values:
        note(value, value.node.meta.get(EXAMPLE))
    if not calls:
        return shapes
    for frame in net.frames:
        call = _only(calls, frame.path)
        if call is None:
            continue
        for name, placeholder in frame.trace.inputs.items():
            note(frame.env.get(placeholder), call.arguments.get(name))
        note(net.result if frame.parent is None else frame.parent.env.get(frame.call), call.result)  # type: ignore[arg-type]
    for value in net.values:
        call = _only(calls, value.path) if value.module is not None else None
        if call is not None:
            note(value, call.result)
            for argument, found in zip(value.args, call.arguments.values(), strict=False):
                note(argument, found)
    return shapes


def _only(calls: Mapping[str, list[Call]], path: str) -> Call | None:
    found = calls.get(path, [])
    return found[0] if len(found) == 1 else None
