"""Operations that hand on every channel by itself: layout changes, means over space or over windows of it, resizing,
concatenation of channels.

They commute with one scale and shift per channel, so a norm behind one may go into the convolutions in front of it, and
a norm in front of one into the convolution or linear layer behind it. Where channels are concatenated, the norm is
split.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

from torch import nn

from reparam.graph.average_pools import average_pool
from reparam.graph.calls import argument, name_of, stock, tensor_input
from reparam.graph.net import Value
from reparam.graph.operation import Operation
from reparam.graph.space import Space

Spaces = Mapping[Value, Space]


def parts(value: Value, spaces: Spaces) -> list[tuple[Value, int]] | None:
    """Inputs whose channels ``value`` hands on, with the position of their first channel; None if it does not."""
    space = spaces.get(value)
    if space is None or space.channels == 0:
        return None
    if name_of(value) in ("cat", "concat", "concatenate"):
        return _concatenated(value, space, spaces)
    source = tensor_input(value)
    inner = spaces.get(source) if source is not None else None
    if source is None or inner is None or inner.channels != space.channels:
        return None
    return [(source, 0)] if carried(value, inner, space) == space else None


def lets_through(value: Value, spaces: Spaces, operations: Mapping[Value, Operation]) -> bool:
    """Whether a linear operation is none that could take over a scale and shift, but hands them on."""
    return operations[value].carries or (operations[value].pool and parts(value, spaces) is not None)


def _concatenated(value: Value, space: Space, spaces: Spaces) -> list[tuple[Value, int]] | None:
    items, dim = argument(value, 0, "tensors"), argument(value, 1, "dim", 0)
    if not isinstance(items, list | tuple) or not all(isinstance(item, Value) for item in items):
        return None
    if dim != -(space.axes + 1) and not (dim == 1 and space.axes > 0):
        return None
    found, start = [], 0
    for item in items:
        inner = spaces.get(item)
        if inner is None or inner.axes != space.axes:
            return None
        found.append((item, start))
        start += inner.channels
    return found if start == space.channels else None


def carried(value: Value, inner: Space, outer: Space | None) -> Space | None:
    """Space of a result that has the channels of the input, or None.

    Args:
        value: an operation with one input.
        inner: space of the input.
        outer: space of the result as its readers fix it, if they do.
    """
    name = _kind(value)
    rule = RULES.get(name)
    return None if rule is None else rule(value, inner, outer)


def _kind(value: Value) -> str:
    if value.module is None:
        return name_of(value)
    kind = stock(value.module)
    if kind is nn.Flatten:
        return "flatten"
    if kind in (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d):
        return "avg_pool"
    if isinstance(value.module, nn.modules.pooling._AdaptiveAvgPoolNd | nn.Upsample) and kind is not None:
        return "interpolate"
    return ""


Rule = Callable[[Value, Space, Space | None], Space | None]


def _resize(value: Value, inner: Space, outer: Space | None) -> Space | None:
    return inner


def _average(value: Value, inner: Space, outer: Space | None) -> Space | None:
    pool = average_pool(value)
    return inner if pool is not None and pool.axes == inner.axes and pool.keeps_constants else None


def _rank(space: Space) -> int | None:
    return space.axes + 2 if space.axes else None


def _permute(value: Value, inner: Space, outer: Space | None) -> Space | None:
    dims: Any = value.args[1:]
    dims = dims[0] if len(dims) == 1 and isinstance(dims[0], list | tuple) else dims
    dims = dims or value.kwargs.get("dims", ())
    if not dims or not all(isinstance(d, int) for d in dims) or _rank(inner) not in (None, len(dims)):
        return None
    order = [d % len(dims) for d in dims]
    at = order.index(1 if inner.axes else len(dims) - 1)
    if at == len(dims) - 1:
        return Space(inner.channels, 0)
    return Space(inner.channels, len(dims) - 2) if at == 1 and order[0] == 0 else None


def _transpose(value: Value, inner: Space, outer: Space | None) -> Space | None:
    dims = {argument(value, 1, "dim0"), argument(value, 2, "dim1")}
    if inner.axes == 1 and dims in ({1, 2}, {-1, -2}, {1, -1}, {2, -2}):
        return Space(inner.channels, 0)
    if inner.axes == 0 and dims in ({-1, -2}, {1, 2}, {1, -1}) and outer is not None and outer.axes == 1:
        return Space(inner.channels, 1)
    return None


def _flatten(value: Value, inner: Space, outer: Space | None) -> Space | None:
    first: Any
    last: Any
    if value.module is not None:
        first, last = value.module.start_dim, value.module.end_dim
    else:
        first, last = argument(value, 1, "start_dim", 0), argument(value, 2, "end_dim", -1)
    rank = _rank(inner)
    if first == 2 and inner.axes and last in (-1, rank and rank - 1):
        return Space(inner.channels, 1)
    if first == 1 and last in (-1, rank and rank - 1) and inner.axes and outer == Space(inner.channels, 0):
        return outer  # one position only, or its reader would see more features
    if inner.axes == 0 and (first, last) == (0, 1):
        return Space(inner.channels, 0)  # of two axes, one would be left, which no layer with channels takes
    return None


def _reshape(value: Value, inner: Space, outer: Space | None) -> Space | None:
    if inner.axes or outer != inner:
        return None
    if name_of(value) in ("reshape_as", "view_as"):
        return inner
    sizes: Any = value.args[1:]
    sizes = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], list | tuple) else sizes
    return inner if sizes and sizes[-1] == inner.channels else None


def _mean(value: Value, inner: Space, outer: Space | None) -> Space | None:
    dims = argument(value, 1, "dim")
    dims = (dims,) if isinstance(dims, int) else dims
    keep = argument(value, 2, "keepdim", False)
    if not isinstance(dims, list | tuple) or value.kwargs.get("dtype") is not None or not isinstance(keep, bool):
        return None
    if inner.axes == 0:
        tokens = all(isinstance(d, int) and d == 1 for d in dims)
        return inner if tokens and not keep and outer == inner else None
    rank = inner.axes + 2
    if {d % rank for d in dims} != set(range(2, rank)):
        return None
    return inner if keep else Space(inner.channels, 0)


def _pick(value: Value, inner: Space, outer: Space | None) -> Space | None:
    index = value.args[1]
    token = isinstance(index, tuple) and len(index) == 2 and index[0] == slice(None) and isinstance(index[1], int)
    return inner if inner.axes == 0 and token and outer == inner else None


RULES: Final[Mapping[str, Rule]] = {
    "permute": _permute,
    "transpose": _transpose,
    "swapaxes": _transpose,
    "flatten": _flatten,
    "reshape": _reshape,
    "view": _reshape,
    "reshape_as": _reshape,
    "view_as": _reshape,
    "mean": _mean,
    "getitem": _pick,
    "interpolate": _resize,
    "avg_pool": _average,
    "avg_pool1d": _average,
    "avg_pool2d": _average,
    "avg_pool3d": _average,
    "adaptive_avg_pool1d": _resize,
    "adaptive_avg_pool2d": _resize,
    "adaptive_avg_pool3d": _resize,
}


def spread(values: list[Value], spaces: dict[Value, Space]) -> bool:
    """Give passages the space that follows from their input; whether anything new was found."""
    found = False
    for value in values:
        if value in spaces:
            continue
        if name_of(value) in ("cat", "concat", "concatenate"):
            space = _total(value, spaces)
        else:
            source = tensor_input(value)
            inner = spaces.get(source) if source is not None else None
            space = None if inner is None else carried(value, inner, _as_read(value, inner))
        if space is not None:
            spaces[value] = space
            found = True
    return found


def _as_read(value: Value, inner: Space) -> Space | None:
    """The space that the readers of a transposed value imply: these take channels in front of one axis."""
    takes = (nn.AvgPool1d, nn.BatchNorm1d, nn.SyncBatchNorm, nn.Conv1d)
    if any(stock(user.module) in takes for user in value.users):
        return Space(inner.channels, 1)
    return None


def _total(value: Value, spaces: Spaces) -> Space | None:
    items: Any = argument(value, 0, "tensors")
    dim = argument(value, 1, "dim", 0)
    if not isinstance(items, list | tuple) or not items:
        return None
    inner = [spaces.get(item) if isinstance(item, Value) else None for item in items]
    known = [space for space in inner if space is not None]
    if len(known) < len(inner) or len({space.axes for space in known}) != 1:
        return None
    axes = known[0].axes
    if dim != -(axes + 1) and not (dim == 1 and axes > 0):
        return None
    return Space(sum(space.channels for space in known), axes)
