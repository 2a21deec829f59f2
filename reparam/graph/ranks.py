"""How many axes values have, as far as the code alone fixes it: an interval for each value."""

from collections.abc import Mapping
from typing import Final

from torch import Tensor, fx, nn

from reparam.graph.calls import ACTIVATIONS, DROPOUTS, argument, name_of, stock, tensor_input
from reparam.graph.matrices import product, subscripts
from reparam.graph.net import Net, Value
from reparam.graph.proxy import PLAIN
from reparam.graph.rank_rules import (
    RULES,
    SPATIAL_MODULES,
    UNKNOWN,
    Rank,
    flattened,
    of,
    of_letters,
    permutation,
    spatial_axes,
)
from reparam.graph.shapes import Shape
from reparam.graph.sizes import size_of

BATCHED: Final[Mapping[type, Rank]] = {
    nn.BatchNorm1d: Rank(2, 3), nn.BatchNorm2d: Rank(4, 4), nn.BatchNorm3d: Rank(5, 5), nn.SyncBatchNorm: Rank(2),
}  # fmt: skip
KEEPING: Final = frozenset(
    [
        *ACTIVATIONS, *DROPOUTS, "softmax", "contiguous", "clone", "alias", "detach", "neg", "abs", "exp", "sqrt", "to",
        "float", "half", "double", "type_as", "pad", "constant_pad_nd", "batch_norm", "instance_norm", "group_norm",
        "layer_norm", "normalize", "roll", "flip", "transpose", "swapaxes", "narrow", "slice", "linear", "zeros_like",
    ]
)  # fmt: skip


def infer_ranks(net: Net, shapes: Mapping[Value, Shape] | None = None) -> dict[Value, Rank]:
    """Ranks of the values of a net; absent: anything, or no tensor.

    Args:
        net: the net.
        shapes: of some values, in an example.
    """
    ranks = {value: Rank(len(shape), len(shape)) for value, shape in (shapes or {}).items()}
    facts = [(value, _demanded(value), tensor_input(value) if keeps_rank(value) else None) for value in net.values]
    for _ in range(3):
        before = dict(ranks)
        for value, (source, demanded), _ in facts:
            _note(ranks, value, _forward(value, ranks))
            if source is not None:
                _note(ranks, source, demanded)
        for value, _, kept in reversed(facts):
            if kept is not None and value in ranks:
                _note(ranks, kept, ranks[value])
        if ranks == before:
            break
    return ranks


def _note(ranks: dict[Value, Rank], value: Value, rank: Rank) -> None:
    rank = rank.both(ranks.get(value, UNKNOWN))
    if rank != UNKNOWN and rank.least <= rank.most and not value.node.meta.get(PLAIN):
        ranks[value] = rank


def keeps_rank(value: Value) -> bool:
    """Whether the result has the rank of the input."""
    if value.module is not None:
        kind = stock(value.module)
        if kind is None or kind is nn.MultiheadAttention or getattr(value.module, "return_indices", False):
            return False
        return (
            kind in BATCHED or issubclass(kind, (*SPATIAL_MODULES, nn.Linear)) or kind.__module__.endswith("activation")
        )
    return name_of(value) in KEEPING or spatial_axes(value) > 0


def _demanded(value: Value) -> tuple[Value | None, Rank]:
    """What an operation accepts: its input, and the ranks that do not raise."""
    source, axes = tensor_input(value), spatial_axes(value)
    parsed = subscripts(value)
    if parsed is not None:
        return parsed[0], of_letters(parsed[1])
    if axes:
        return source, Rank(axes + 1, axes + 2)
    size = size_of(value)
    if size is not None and not size.more:
        return size.source, Rank(size.axis + 1 if size.axis >= 0 else -size.axis)
    if name_of(value) == "getitem" and isinstance(value.args[1], tuple):
        return source, Rank(sum(part is not None and part is not Ellipsis for part in value.args[1]))
    if name_of(value) in ("transpose", "swapaxes"):
        dims = [d for d in (argument(value, 1, "dim0"), argument(value, 2, "dim1")) if isinstance(d, int)]
        return source, Rank(max((d + 1 if d >= 0 else -d for d in dims), default=0))
    if name_of(value) == "permute":
        order = permutation(value, None)
        return source, UNKNOWN if order is None else Rank(len(order), len(order))
    if name_of(value) == "mm":
        return source, Rank(2, 2)
    found = product(value)
    if name_of(value) == "addmm" and found is not None:
        return found.source, Rank(2, 2)
    kind = stock(value.module)
    return source, BATCHED.get(kind, UNKNOWN) if kind is not None else UNKNOWN


def _forward(value: Value, ranks: Mapping[Value, Rank]) -> Rank:
    source = tensor_input(value)
    known = of(source, ranks) if source is not None else UNKNOWN
    if value.node.op == "placeholder":
        return _placeholder(value)
    if value.module is not None and (kind := stock(value.module)) is not None:
        if kind in BATCHED:
            return known.both(BATCHED[kind])
        if kind is nn.Flatten:
            return flattened(known, int(value.module.start_dim), int(value.module.end_dim))  # type: ignore[arg-type]
    axes = spatial_axes(value)
    if axes:
        return known.both(Rank(axes + 1, axes + 2))
    if keeps_rank(value):
        return known
    rule = RULES.get(name_of(value))
    return UNKNOWN if rule is None else rule(value, known, ranks)


def _placeholder(value: Value) -> Rank:
    """The rank that an exported program was made for."""
    module = value.frame.module
    if isinstance(module, fx.GraphModule):
        for node in module.graph.nodes:
            if (
                node.op == "placeholder"
                and node.target == value.node.target
                and isinstance(node.meta.get("val"), Tensor)
            ):
                return Rank(node.meta["val"].dim(), node.meta["val"].dim())
    return UNKNOWN
