"""Slices of spatial axes: crops and strided identities.

``x[..., a : x.size(d) - b : s]`` crops ``a`` before and ``b`` behind and keeps every ``s``-th element, for every size.
"""

from typing import Any, Final

from reparam.algebra import Refusal
from reparam.algebra.sources import window
from reparam.graph.calls import argument, name_of
from reparam.graph.lift.base import Known, Lifted, full, passed
from reparam.graph.net import Value
from reparam.graph.operation import Operation
from reparam.graph.sizes import Size, readings, size_of
from reparam.graph.space import Space

WHOLE: Final = slice(None)
ENDLESS: Final = 2**62  # ``aten.slice`` has a large end where the code has none
CHANNELS: Final = Refusal("slice", "the channels of the value are not known", "give example_inputs")
RANK: Final = Refusal("slice", "the rank of the value is not known", "index all axes, or count them from behind")
FAR_END: Final = Refusal("slice", "where it ends depends on the size of the input", "count its end from behind")


def spatial_slice(value: Value, known: Known) -> Lifted:
    """``x[:, :, a:b:s]``, ``x[..., a:b:s]``, ``x.narrow(dim, a, n)``, ``aten.slice``."""
    source, name = value.args[0] if value.args else None, name_of(value)
    if name not in ("getitem", "narrow", "slice") or not isinstance(source, Value):
        return None
    space, rank = known.space(source), known.rank(source).exact
    if name == "getitem":
        index = value.args[1] if isinstance(value.args[1], tuple) else (value.args[1],)
        if not all(isinstance(i, slice) or i is Ellipsis for i in index):
            return None
        parts = _spatial(index, space, rank)
    else:
        named = _of_one_axis(value, name)
        parts = None if named is None else _one_of_all(*named, space, rank)
    if parts is None or isinstance(parts, Refusal):
        return parts
    if all(part == WHOLE for part in parts):
        return passed(source, known)
    assert space is not None
    lo, hi, stride = [], [], []
    for axis, part in enumerate(parts):
        ends = _ends(part, axis, source, space, known)
        if isinstance(ends, Refusal):
            return ends
        lo.append(-ends[0])
        hi.append(-ends[1])
        stride.append(ends[2])
    conv = window(space.channels, tuple(lo), tuple(hi), tuple(stride))
    weights = {} if conv.identity else {source: full(space.channels, 1.0)}
    return Operation("slice", {source: conv.structure}, weights, covers=readings(value.args[1:], value), copies=True)


def _of_one_axis(value: Value, name: str) -> tuple[int, slice] | None:
    """``narrow(dim, start, length)`` and ``aten.slice(dim, start, end, step)`` as an axis and its slice."""
    dim, start = argument(value, 1, "dim", 0), argument(value, 2, "start")
    if not isinstance(dim, int):
        return None
    start = None if start == 0 else start
    if name == "slice":
        end, step = argument(value, 3, "end"), argument(value, 4, "step", 1)
        end = None if isinstance(end, int) and end > ENDLESS else end
        return dim, slice(start, end, None if step == 1 else step)
    length = argument(value, 3, "length")
    whole = size_of(length)
    if whole is not None and (start is None or isinstance(start, int)):
        length = Size(whole.source, whole.axis, whole.more + (start or 0))
    return dim, slice(start, length)


Parts = list[slice] | Refusal | None


def _spatial(index: tuple[Any, ...], space: Space | None, rank: int | None) -> Parts:
    """The slices of the spatial axes; None if channels or images are taken apart."""
    if all(i == WHOLE or i is Ellipsis for i in index):
        return []
    if space is None:
        return CHANNELS
    axes = space.axes
    if Ellipsis in index:
        at = index.index(Ellipsis)
        if index[:at] != (WHOLE,) * at or len(index) - at - 1 > axes:
            return None
        behind = index[at + 1 :]
        return [WHOLE] * (axes - len(behind)) + list(behind)
    if index[:2] != (WHOLE,) * 2 or len(index) > axes + 2:
        return None
    if len(index) < axes + 2 and rank != axes + 2:
        return RANK
    return list(index[2:]) + [WHOLE] * (axes + 2 - len(index))


def _one_of_all(dim: int, part: slice, space: Space | None, rank: int | None) -> Parts:
    if part == WHOLE:
        return []
    if space is None:
        return CHANNELS
    axes = space.axes
    if dim >= 2 and rank != axes + 2:
        return RANK
    place = dim + axes if dim < 0 else dim - 2
    if not 0 <= place < axes:
        return None
    return [part if axis == place else WHOLE for axis in range(axes)]


def _ends(part: slice, axis: int, source: Value, space: Space, known: Known) -> tuple[int, int, int] | Refusal:
    """How much a slice takes away before and behind, and its step."""
    start, stop, step = part.start or 0, part.stop, part.step or 1
    size = stop if isinstance(stop, Size) else size_of(stop)
    if size is not None and size.source is source:
        if size.spatial(space.axes, known.rank(source)) != axis:
            return Refusal("slice", "its end is computed from the size of another axis, or the rank is not known")
        stop = min(size.more, 0) or None
    if not all(isinstance(number, int) for number in (start, step)) or not isinstance(stop, int | None):
        return Refusal("slice", "its ends depend on the input", "compute them from the size of the sliced value")
    if start < 0 or step < 1 or (stop is not None and stop >= 0):
        return FAR_END
    return start, -(stop or 0), step
