"""Sums and means of values that were stacked for it: ``torch.stack([a, b, ...]).sum(0)``."""

from collections.abc import Mapping

from reparam.graph.calls import argument, name_of
from reparam.graph.net import Value
from reparam.graph.rank_rules import UNKNOWN, Rank


def summands(value: Value, ranks: Mapping[Value, Rank]) -> tuple[Value, ...]:
    """The values that a sum or mean over the axis of a stack adds up; empty for other operations.

    An axis counted from the front and one counted from behind are the same for one rank only, which must be known.
    """
    stacked = value.args[0] if value.args else None
    if name_of(value) not in ("sum", "mean") or not isinstance(stacked, Value) or name_of(stacked) != "stack":
        return ()
    if value.kwargs.get("dtype") is not None or argument(value, 2, "keepdim", False) or "out" in stacked.kwargs:
        return ()
    items, at = argument(stacked, 0, "tensors"), argument(stacked, 1, "dim", 0)
    dim = argument(value, 1, "dim", value.kwargs.get("axis"))
    dim = dim[0] if isinstance(dim, list | tuple) and len(dim) == 1 else dim
    if not isinstance(at, int) or not isinstance(dim, int) or not isinstance(items, list | tuple):
        return ()
    if not all(isinstance(item, Value) for item in items):
        return ()
    rank = ranks.get(stacked, UNKNOWN).exact
    same = at == dim if (at < 0) == (dim < 0) else rank is not None and (at - dim) % rank == 0
    return tuple(items) if same else ()
