"""Which parameters an operation computes with: its module's, its arguments, and those that an argument is made from."""

from collections.abc import Iterator
from operator import attrgetter
from typing import final

from torch import Tensor, nn

from reparam.graph.net import Frame, Net, Value

Parameters = dict[int, nn.Parameter]


@final
class WeightsRead:
    """Parameters of the operations of one net, by identity."""

    def __init__(self, net: Net) -> None:
        self._made: dict[Frame, Parameters] = {}
        self._elsewhere: set[int] = set()  # read by an operation as they are
        for value in net.values:
            self._elsewhere.update(_as_they_are(value))

    def of(self, value: Value) -> Parameters:
        """The parameters of an operation; those that a forward makes a weight from count for what uses the weight."""
        found = _as_they_are(value)
        for tensor in _tensors(value):
            frame = _maker(value, tensor)
            if frame is not None:
                found |= self._made_from(frame)
        return found

    def _made_from(self, frame: Frame) -> Parameters:
        if frame not in self._made:
            read = [attrgetter(name)(frame.module) for name in frame.trace.read.values() if _exists(frame.module, name)]
            self._made[frame] = {id(p): p for p in read if isinstance(p, nn.Parameter) and id(p) not in self._elsewhere}
        return self._made[frame]


def _as_they_are(value: Value) -> Parameters:
    if value.module is not None:
        return {id(p): p for p in value.module.parameters()}
    whole = [tensor if tensor._base is None else tensor._base for tensor in _tensors(value)]
    return {id(p): p for p in whole if isinstance(p, nn.Parameter)}


def _tensors(value: Value) -> Iterator[Tensor]:
    pending = [*value.args, *value.kwargs.values()]
    while pending:
        argument = pending.pop()
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, list | tuple):
            pending += argument


def _maker(value: Value, tensor: Tensor) -> Frame | None:
    """The call in whose forward a tensor was computed; None if it was only read there."""
    frame: Frame | None = value.frame
    while frame is not None:
        name = frame.trace.read.get(id(tensor))
        if name is not None:
            return frame if name.startswith("_constant") else None
        frame = frame.parent
    return None


def _exists(module: nn.Module, name: str) -> bool:
    try:
        attrgetter(name)(module)
    except AttributeError:
        return False
    return True
