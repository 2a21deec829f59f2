"""Slices of spatial axes: crops and strided identities."""

from reparam.algebra import Refusal
from reparam.algebra.sources import window
from reparam.graph.lift.base import Known, Lifted, full
from reparam.graph.net import Value
from reparam.graph.operation import Operation
from reparam.graph.spaces import name_of


def spatial_slice(value: Value, known: Known) -> Lifted:
    """``x[..., a:b:s]`` on spatial axes: crops and strided identities."""
    if name_of(value) != "getitem" or not isinstance(value.args[0], Value):
        return None
    source, index = value.args
    space = known.space(source)
    index = index if isinstance(index, tuple) else (index,)
    if not all(isinstance(i, slice) or i is Ellipsis for i in index):
        return None
    if any(isinstance(part, Value) for i in index if isinstance(i, slice) for part in (i.start, i.stop, i.step)):
        return Refusal("slice", "its ends depend on the input", "give example_inputs")
    if space is None:
        return Refusal("slice", "the rank of the value is not known", "give example_inputs")
    if Ellipsis in index:
        at = index.index(Ellipsis)
        spatial = index[at + 1 :]
        if at > 0 or len(spatial) > space.axes:
            return None
        spatial = (slice(None),) * (space.axes - len(spatial)) + spatial
    else:
        if len(index) != space.axes + 2 or any(i != slice(None) for i in index[:2]):
            return None
        spatial = index[2:]
    lo, hi, stride = [], [], []
    for part in spatial:
        start, stop, step = part.start or 0, part.stop, part.step or 1
        if start < 0 or step < 1 or (stop is not None and stop >= 0):
            return Refusal("slice", "it counts from the far end, so it depends on the size", "give example_inputs")
        lo.append(-start)
        hi.append(0 if stop is None else stop)
        stride.append(step)
    conv = window(space.channels, tuple(lo), tuple(hi), tuple(stride))
    return Operation("slice", {source: conv.structure}, {} if conv.identity else {source: full(space.channels, 1.0)})
