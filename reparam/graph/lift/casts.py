"""Casts to a type that a value has already: ``conv(x).to(x.dtype)``, ``conv(x).type_as(x)``.

A convolution, a linear layer and a batch norm give the type and device of their input, or raise; so do sums of values
of one type. Under autocast they do not, so nothing in a forward that turns it on counts.
"""

from dataclasses import replace
from typing import Any, Final

from torch import nn

from reparam.graph.calls import name_of, stock, tensor_input
from reparam.graph.kinds import CONVS, SUMS, TRANSPOSED_CONVS
from reparam.graph.leaves import hooks
from reparam.graph.lift.base import Known, Lifted, passed
from reparam.graph.net import Value
from reparam.graph.sizes import readings

FLAGS: Final = ("non_blocking", "copy")
KEEPING: Final = frozenset([*CONVS, *TRANSPOSED_CONVS, "linear", "batch_norm", "relu", "contiguous", "clone"])
LAYERS: Final = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.Linear, nn.Identity, nn.ReLU)


def cast(value: Value, known: Known) -> Lifted:
    """``to`` and ``type_as`` where they return their input."""
    source = tensor_input(value)
    if source is None or name_of(value) not in ("to", "type_as") or value.node.op != "call_method":
        return None
    wanted = [*value.args[1:], *(option for name, option in value.kwargs.items() if name not in FLAGS)]
    flags = [option for name, option in value.kwargs.items() if name in FLAGS]
    if not wanted or not all(isinstance(flag, bool) for flag in flags):
        return None
    typed = [_typed(part) for part in wanted]
    if not all(part is not None and _origin(part) is _origin(source) for part in typed):
        return None
    return replace(passed(source, known), covers=readings(wanted, value))


def _typed(argument: Any) -> Value | None:
    """The value whose type or device an argument is; itself if it is a tensor."""
    if not isinstance(argument, Value):
        return None
    if name_of(argument) == "getattr":
        return argument.args[0] if argument.args[1] in ("dtype", "device") else None
    return argument


def _origin(value: Value) -> Value:
    """The first of the values behind ``value`` that all have its type and device."""
    while not any(any(mode[2:]) for mode in value.mode):
        source = tensor_input(value)
        if name_of(value) in SUMS and not value.kwargs:
            origins = {_origin(part) if isinstance(part, Value) else part for part in value.args}
            return origins.pop() if len(origins) == 1 else value
        if source is None or not _keeps_type(value):
            break
        value = source
    return value


def _keeps_type(value: Value) -> bool:
    kind = stock(value.module)
    if value.module is not None:
        return kind is not None and issubclass(kind, LAYERS) and not hooks(value.module)
    return name_of(value) in KEEPING
