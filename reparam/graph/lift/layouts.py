"""Another order of the axes: ``permute``, ``transpose``."""

from reparam.algebra import permuted
from reparam.graph.calls import tensor_input
from reparam.graph.lift.base import Known, Lifted, full
from reparam.graph.net import Value
from reparam.graph.operation import Operation
from reparam.graph.rank_rules import permutation


def order_of_axes(value: Value, known: Known) -> Lifted:
    """A permutation of the axes that takes the channels along; none of torch's layers sees other axes change places."""
    source = tensor_input(value)
    inner, outer = known.space(source), known.space(value)
    if source is None or inner is None or outer is None or inner.channels != outer.channels:
        return None
    axes = permutation(value, known.rank(source).exact)
    if axes is None:
        return None
    rank = len(axes)
    before, after = rank - 1 - inner.axes, rank - 1 - outer.axes
    if before < 0 or after < 0 or axes[after] != before or inner.channels == 0:
        return None
    if axes == tuple(range(rank)):
        return None
    return Operation(
        "permute", {source: permuted(inner.channels, inner.axes, axes)}, {source: full(inner.channels, 1.0)}
    )
