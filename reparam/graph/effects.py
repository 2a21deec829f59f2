"""Which values share memory, and where that memory is written.

An in-place operation may be read as a pure one iff nobody looks at the old content afterwards. Otherwise it stays what
it is, and no reading of that memory may be moved across it.
"""

import inspect
from collections.abc import Container, Iterable
from functools import lru_cache
from typing import Any, Final, final

import torch
from torch import nn

from reparam.graph.in_place import IN_PLACE, VIEWS
from reparam.graph.leaves import is_leaf
from reparam.graph.net import Net, Value
from reparam.graph.proxy import PLAIN, assign

VIEW_MODULES: Final = (
    nn.Identity,
    nn.Flatten,
    nn.Unflatten,
    nn.modules.dropout._DropoutNd,
)


@lru_cache(maxsize=4096)
def _inplace_position(function: Any) -> int | None:
    """Position of the parameter ``inplace`` of a function, if it has one."""
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return None
    return names.index("inplace") if "inplace" in names else None


def _name(value: Value) -> str:
    target = value.node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.partition("::")[2]
    return target if isinstance(target, str) else getattr(target, "__name__", "")


def _is_torch(function: Any) -> bool:
    home = getattr(function, "__module__", None) or ""
    return home.split(".")[0] in ("torch", "_operator", "operator", "math", "builtins", "") or isinstance(
        function, torch._ops.OpOverload | torch._ops.OpOverloadPacket
    )


def _in_place_name(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def written(value: Value) -> tuple[Value, ...]:
    """Inputs whose memory the operation writes, or may write."""
    first = tuple(v for v in value.args[:1] if isinstance(v, Value))
    if value.node.op == "placeholder" or value.declared is not None:
        return ()
    if value.module is not None:
        if isinstance(value.module, nn.modules.dropout._DropoutNd) and not value.module.training:
            return ()
        if getattr(value.module, "inplace", False):
            return first
        return () if is_leaf(value.module) else value.inputs
    name = _name(value)
    if value.node.op == "call_method":
        return first if _in_place_name(name) or name == "__setitem__" else ()
    if value.node.target in IN_PLACE:
        return first
    if not _is_torch(value.node.target):
        return value.inputs
    if "out" in value.kwargs:
        return tuple(v for v in (value.kwargs["out"],) if isinstance(v, Value))
    if _in_place_name(name):
        return first
    if isinstance(value.node.target, torch._ops.OpOverload) and value.node.target._schema.is_mutable:
        return value.inputs
    if "dropout" in name and value.kwargs.get("training", value.args[2:3] == (True,)) is False:
        return ()
    inplace = value.kwargs.get("inplace", False)
    position = _inplace_position(value.node.target)
    if position is not None and len(value.args) > position:
        inplace = value.args[position]
    return first if inplace is True else ()


def aliased(value: Value) -> tuple[Value, ...]:
    """Inputs whose memory the result may share."""
    writes = written(value)
    if writes:
        return writes
    if value.declared is not None:
        return value.inputs
    first = tuple(v for v in value.args[:1] if isinstance(v, Value))
    if value.module is not None:
        if is_leaf(value.module):
            return first if isinstance(value.module, VIEW_MODULES) else ()
        return value.inputs
    if value.node.op == "placeholder":
        return ()
    name = _name(value)
    if name in VIEWS:
        return first
    if value.node.op == "call_function" and not _is_torch(value.node.target):
        return value.inputs
    return ()


def pure(value: Value) -> bool:
    """Whether an operation does nothing but compute its result (an assertion counts as such)."""
    if value.declared is not None:
        return True
    if value.node.op == "placeholder" or (value.module is not None and not is_leaf(value.module)):
        return False
    if value.module is None and value.node.op == "call_function" and not _is_torch(value.node.target):
        return value.node.target is assign
    return value.node.target in IN_PLACE or not written(value)


def unused(net: Net) -> set[Value]:
    """Assertions, and sizes and the like that only assertions look at."""
    dead: set[Value] = set()
    for value in reversed(net.values):
        looks = value.node.meta.get(PLAIN) or getattr(value.node.target, "__name__", "") == "_assert"
        if looks and not value.returned and all(user in dead for user in value.users):
            dead.add(value)
    return dead


@final
class Effects:
    """Memory of the values of a net, as classes of values that may share it."""

    def __init__(self, net: Net) -> None:
        self._parent: dict[Value, Value] = {}
        writers: list[Value] = []
        for value in net.values:
            self._parent[value] = value
            for source in aliased(value):
                self._join(source, value)
            if written(value):
                writers.append(value)
        inputs = [value for value in net.values if value.node.op == "placeholder"]
        for value in inputs[1:]:
            self._join(inputs[0], value)  # a caller may give one tensor twice
        self._members: dict[Value, list[Value]] = {}
        for value in net.values:
            self._members.setdefault(self.memory(value), []).append(value)
        self.pure: set[Value] = set()
        self._writes: dict[Value, list[Value]] = {}
        for value in writers:
            if value.node.target in IN_PLACE and value.module is None and self._may_be_pure(value):
                self.pure.add(value)
            for target in written(value):
                self._writes.setdefault(self.memory(target), []).append(value)

    def memory(self, value: Value) -> Value:
        """The representative of all values that may share memory with ``value``."""
        while self._parent[value] is not value:
            self._parent[value] = self._parent[self._parent[value]]
            value = self._parent[value]
        return value

    def sharing(self, value: Value) -> list[Value]:
        """All values that may share memory with ``value``, itself among them."""
        return self._members[self.memory(value)]

    def _join(self, a: Value, b: Value) -> None:
        self._parent[self.memory(b)] = self.memory(a)

    def _may_be_pure(self, value: Value) -> bool:
        """Nobody reads the old content after the write, and it is not the caller's."""
        members = self._members[self.memory(value)]
        for member in members:
            if member.node.op == "placeholder" or (member.module is not None and not is_leaf(member.module)):
                return False
            if member.index < value.index and (
                member.returned or any(user.index > value.index for user in member.users)
            ):
                return False
        return True

    def stable(self, values: Iterable[Value], after: int, before: int, gone: Container[Value] = ()) -> bool:
        """Whether no operation with ``after < index < before`` writes the memory of ``values``.

        Operations in ``gone`` do not count: they are absorbed, and then write nothing.
        """
        return self.writer(values, after, before, gone) is None

    def writer(self, values: Iterable[Value], after: int, before: int, gone: Container[Value] = ()) -> Value | None:
        """The operation that is in the way of ``stable``; None if none is."""
        found = (
            writer
            for value in values
            for writer in self._writes.get(self.memory(value), ())
            if after < writer.index < before and writer not in gone
        )
        return next(found, None)
