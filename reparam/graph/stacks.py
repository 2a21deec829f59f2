"""Sums and means of values that were stacked for it: ``torch.stack([a, b, ...]).sum(0)``."""

from collections.abc import Mapping

from reparam.graph.calls import argument, name_of
from reparam.graph.net import Value
from reparam.graph.rank_rules import UNKNOWN, Rank, permutation


def stack_of(value: Value) -> tuple[Value, ...]:
    """The stack that an operation reads, behind another order of its axes perhaps; empty if it reads none."""
    source = value.args[0] if value.args else None
    found: list[Value] = []
    if isinstance(source, Value) and name_of(source) == "permute":
        found, source = [source], source.args[0]
    return (*found, source) if isinstance(source, Value) and name_of(source) == "stack" else ()


def summands(value: Value, ranks: Mapping[Value, Rank]) -> tuple[Value, ...]:
    """The values that a sum or mean over the axis of a stack adds up; empty for other operations.

    An axis counted from the front and one counted from behind are the same for one rank only, which must be known.
    """
    within = stack_of(value)
    if name_of(value) not in ("sum", "mean") or not within:
        return ()
    stacked = within[-1]
    if value.kwargs.get("dtype") is not None or argument(value, 2, "keepdim", False) or "out" in stacked.kwargs:
        return ()
    items, at = argument(stacked, 0, "tensors"), argument(stacked, 1, "dim", 0)
    dim = argument(value, 1, "dim", value.kwargs.get("axis"))
    dim = dim[0] if isinstance(dim, list | tuple) and len(dim) == 1 else dim
    if len(within) > 1:  # einops puts the axis that it sums over last
        order = permutation(within[0], None) or ()
        summed = order[dim] if isinstance(dim, int) and -len(order) <= dim < len(order) else None
        rest = [axis for axis in order if axis != summed]
        dim = summed if rest == sorted(rest) else None
    if not isinstance(at, int) or not isinstance(dim, int) or not isinstance(items, list | tuple):
        return ()
    if not all(isinstance(item, Value) for item in items):
        return ()
    rank = ranks.get(stacked, UNKNOWN).exact
    same = at == dim if (at < 0) == (dim < 0) else rank is not None and (at - dim) % rank == 0
    return tuple(items) if same else ()
