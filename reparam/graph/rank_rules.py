"""The rank of a result from those of the inputs, one operation of torch at a time."""

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from torch import Tensor, nn

from reparam.graph.calls import argument, name_of, stock, tensor_input
from reparam.graph.kinds import ADDED_PRODUCTS, PRODUCTS, SUMS, operands
from reparam.graph.matrices import subscripts
from reparam.graph.net import Value


class Rank(NamedTuple):
    """The rank lies between ``least`` and ``most``."""

    least: int = 0
    most: int = 64

    def both(self, other: "Rank") -> "Rank":
        """The rank fulfils this and the other."""
        return Rank(max(self.least, other.least), min(self.most, other.most))

    def plus(self, axes: int) -> "Rank":
        """The rank after ``axes`` axes were added (or removed)."""
        return Rank(max(self.least + axes, 0), max(self.most + axes, 0))

    @property
    def exact(self) -> int | None:
        """The rank, if only one is possible."""
        return self.least if self.least == self.most else None


UNKNOWN: Final = Rank()
SPATIAL: Final = ("conv", "conv_transpose", "avg_pool", "max_pool", "lp_pool", "adaptive_avg_pool")
TUPLES: Final = ("chunk", "split", "split_with_sizes", "tensor_split", "unbind", "_native_batch_norm_legit_no_training")
SPATIAL_MODULES: Final = (
    nn.modules.conv._ConvNd, nn.modules.pooling._AvgPoolNd, nn.modules.pooling._MaxPoolNd, nn.modules.pooling._LPPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd, nn.modules.instancenorm._InstanceNorm,
    nn.modules.padding._ConstantPadNd, nn.modules.padding._ReflectionPadNd, nn.modules.padding._ReplicationPadNd,
    nn.modules.padding._CircularPadNd, nn.modules.dropout._DropoutNd,
)  # fmt: skip


def of(argument: Any, ranks: Mapping[Value, Rank]) -> Rank:
    """The rank of an argument; 0 for numbers."""
    if isinstance(argument, Value):
        return ranks.get(argument, UNKNOWN)
    return Rank(argument.dim(), argument.dim()) if isinstance(argument, Tensor) else Rank(0, 0)


def of_letters(letters: str) -> Rank:
    """The rank of an operand of ``einsum``."""
    return Rank(len(letters) - 1) if "." in letters else Rank(len(letters), len(letters))


def permutation(value: Value, rank: int | None) -> tuple[int, ...] | None:
    """The order of axes that ``permute`` or ``transpose`` gives a value of a known rank; None for other operations."""
    name = name_of(value)
    if name == "permute":
        dims = argument(value, 1, "dims")
        dims = tuple(dims) if isinstance(dims, list | tuple) else value.args[1:]
        found = all(isinstance(d, int) for d in dims) and rank in (None, len(dims))
        return tuple(d % len(dims) for d in dims) if found and dims else None
    if name in ("transpose", "swapaxes") and rank is not None:
        first, second = argument(value, 1, "dim0"), argument(value, 2, "dim1")
        if not isinstance(first, int) or not isinstance(second, int) or not {first, second} <= set(range(-rank, rank)):
            return None
        axes = list(range(rank))
        axes[first], axes[second] = axes[second], axes[first]
        return tuple(axes)
    return None


def spatial_axes(value: Value) -> int:
    """Axes over which a convolution or pooling runs; 0 for other operations."""
    name, kind = name_of(value), stock(value.module)
    if value.module is not None:
        if kind is None or not issubclass(kind, SPATIAL_MODULES) or getattr(value.module, "return_indices", False):
            return 0
        return int(kind.__name__[-2]) if kind.__name__[-2].isdigit() else 0
    if name == "convolution":
        weight = argument(value, 1, "weight")
        return weight.dim() - 2 if isinstance(weight, Tensor) else 0
    return int(name[-2]) if name[:-2] in SPATIAL and name[-2:-1].isdigit() else 0


def flattened(known: Rank, start: Any, end: Any) -> Rank:
    """The rank after the axes from ``start`` to ``end``, which may depend on the input, became one."""
    if not isinstance(start, int) or not isinstance(end, int):
        return UNKNOWN
    if start >= 0 and end == -1:
        return Rank(start + 1, start + 1)
    if (start < 0) == (end < 0):
        return known.plus(start - end)
    return UNKNOWN


def _number_of_sizes(value: Value) -> Rank:
    """``view(a, b)``, ``reshape([a, b])``, ``permute(0, 2, 1)``: one entry per axis."""
    rest = value.args[1:]
    if len(rest) == 1 and isinstance(rest[0], list | tuple):
        rest = tuple(rest[0])
    elif (len(rest) == 1 and not isinstance(rest[0], int)) or not rest:
        return UNKNOWN
    return Rank(len(rest), len(rest))


def _reduced(value: Value, known: Rank) -> Rank:
    """``mean``, ``sum``, ...: the axes that are named vanish."""
    dim = argument(value, 1, "dim", value.kwargs.get("axis"))
    keep = argument(value, 2, "keepdim", False)
    if keep:
        return known if keep is True else UNKNOWN
    if dim is None:
        return Rank(0, 0)
    if isinstance(dim, list | tuple):
        return known.plus(-len(dim)) if dim else Rank(0, 0)
    return known.plus(-1) if isinstance(dim, int) else UNKNOWN


def _indexed(value: Value, known: Rank, ranks: Mapping[Value, Rank]) -> Rank:
    source, index = value.args[0], value.args[1]
    maker = name_of(source) if isinstance(source, Value) else ""
    if maker in TUPLES:
        whole = of(source.args[0], ranks)
        return whole.plus(-1) if maker == "unbind" else whole
    if not isinstance(source, Value) or source not in ranks:
        return UNKNOWN
    change = 0
    for part in index if isinstance(index, tuple) else (index,):
        if isinstance(part, int) and not isinstance(part, bool):
            change -= 1
        elif part is None:
            change += 1
        elif not isinstance(part, slice) and part is not Ellipsis:
            return UNKNOWN
    return known.plus(change)


def _squeezed(value: Value, known: Rank) -> Rank:
    dim = argument(value, 1, "dim")
    if isinstance(dim, int) and dim < 0 and _is_one(value, dim):
        return known.plus(-1)
    fewer = 1 if isinstance(dim, int) else len(dim) if isinstance(dim, list | tuple) else 64
    return Rank(max(known.least - fewer, 0), known.most)


def _is_one(value: Value, dim: int) -> bool:
    """Whether a global pooling left one element on an axis, counted from behind."""
    source = tensor_input(value)
    while source is not None and name_of(source) == "squeeze" and argument(source, 1, "dim") == -1:
        source, dim = tensor_input(source), dim - 1
    if source is None or -dim > spatial_axes(source):
        return False
    if isinstance(source.module, nn.modules.pooling._AdaptiveAvgPoolNd | nn.modules.pooling._AdaptiveMaxPoolNd):
        size: Any = source.module.output_size
    else:
        size = argument(source, 1, "output_size") if name_of(source).startswith("adaptive") else None
    sizes = (size,) * -dim if isinstance(size, int) else tuple(size or ())
    return len(sizes) >= -dim and sizes[dim] == 1


def _broadcast(value: Value, ranks: Mapping[Value, Rank]) -> Rank:
    found = [of(operand, ranks) for operand in operands(value)]
    return Rank(max(r.least for r in found), max(r.most for r in found)) if len(found) > 1 else UNKNOWN


def _einsum(value: Value, known: Rank, ranks: Mapping[Value, Rank]) -> Rank:
    parsed = subscripts(value)
    return UNKNOWN if parsed is None else of_letters(parsed[4])


def _joined(value: Value, known: Rank, ranks: Mapping[Value, Rank]) -> Rank:
    parts = value.args[0] if value.args else ()
    found = [of(part, ranks) for part in parts] if isinstance(parts, list | tuple) else []
    rank = UNKNOWN
    for part in found:
        rank = rank.both(part)
    return rank.plus(1) if name_of(value) == "stack" and rank != UNKNOWN else rank


def _matmul(value: Value, known: Rank, ranks: Mapping[Value, Rank]) -> Rank:
    """``x @ W`` with a matrix ``W`` keeps the rank of ``x``."""
    constant = argument(value, 1, "other")
    return known if isinstance(constant, Tensor) and constant.dim() == 2 else UNKNOWN


Rule = Callable[[Value, Rank, Mapping[Value, Rank]], Rank]
RULES: Final[Mapping[str, Rule]] = {
    **dict.fromkeys(("view", "reshape", "permute"), lambda v, known, ranks: _number_of_sizes(v)),
    **dict.fromkeys(("mean", "sum", "amax", "amin"), lambda v, known, ranks: _reduced(v, known)),
    **dict.fromkeys((*SUMS, *PRODUCTS, *ADDED_PRODUCTS), lambda v, known, ranks: _broadcast(v, ranks)),
    **dict.fromkeys(("cat", "concat", "stack"), _joined),
    "flatten": lambda v, known, ranks: flattened(known, argument(v, 1, "start_dim", 0), argument(v, 2, "end_dim", -1)),
    "squeeze": lambda v, known, ranks: _squeezed(v, known),
    "unsqueeze": lambda v, known, ranks: known.plus(1),
    "select": lambda v, known, ranks: known.plus(-1),
    "getitem": _indexed,
    "einsum": _einsum,
    "matmul": _matmul,
    **dict.fromkeys(("mm", "addmm"), lambda v, known, ranks: Rank(2, 2)),
}
