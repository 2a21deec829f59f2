"""Shapes that depend on the rank of a value: ``g.view(1, -1, *[1] * (y.dim() - 2))``, where ``g`` is a parameter.

The rank of ``y`` is known from the code, or it is that of images with or without a batch, as a convolution takes both.
Then it is taken for one with a batch, and a forward that is fused asks for that.
"""

from collections.abc import Container, Iterable, Mapping
from functools import cached_property
from typing import Any, Final, NamedTuple, final

from torch import Tensor

from reparam.graph.calls import name_of, tensor_input
from reparam.graph.kinds import operands
from reparam.graph.net import Net, Value
from reparam.graph.proxy import assign
from reparam.graph.rank_rules import UNKNOWN, Rank
from reparam.graph.ranks import infer_ranks, keeps_rank
from reparam.graph.sizes import is_plain, whole_shape

OPEN: Final = object()  # a size that is not known
PURE: Final = frozenset(["add", "sub", "mul", "floordiv", "getitem", "len", "list", "neg", "tuple"])


@final
class Shaped(NamedTuple):
    """Arguments without values, and the values of one rank that they hold for; no rank: it is known from the code."""

    arguments: Any
    sources: tuple[Value, ...]
    rank: int | None


@final
class Shapes:
    """Shapes of the constants of a net."""

    def __init__(self, net: Net) -> None:
        self._net = net

    @cached_property
    def _ranks(self) -> Mapping[Value, Rank]:
        return infer_ranks(self._net)

    def of(self, arguments: Any) -> Shaped | None:
        """Arguments that depend on ranks alone, for the rank that they are made for; None for others."""
        sources: dict[Value, None] = {}
        if not _collect(arguments, sources) or not sources:
            return None
        found = {self._ranks.get(source, UNKNOWN) for source in sources}
        least, most = max(r.least for r in found), min(r.most for r in found)
        if not (most == least or (most == least + 1 and 3 < most < 6)) or len(found) > 1:
            return None
        try:
            filled = _with_one_open(_filled(arguments, most))
        except (IndexError, TypeError, ValueError):
            return None
        if filled is None:
            return None
        return Shaped(filled, tuple(sources), None if most == least else most)

    def reach(self, shaped: Shaped, operands: Iterable[Value], others: Container[Value]) -> bool:
        """Whether some operands have the rank of the values that a shape was made for; so have ``others``."""
        chains = [set(_of_one_rank(value, shaped.rank or 0, others)) for value in (*shaped.sources, *operands)]
        return shaped.rank is None or bool(set.intersection(*chains))


def _with_one_open(filled: Any) -> Any:
    """Sizes of which one is that of a value: it is what the number of elements leaves; None if there are more."""
    sizes = filled[0] if len(filled) == 1 and isinstance(filled[0], list | tuple) else filled
    sizes = [size for size in sizes if size is OPEN or size == -1]
    if len(sizes) > 1 and OPEN in sizes:
        return None
    return _replaced(filled)


def _replaced(argument: Any) -> Any:
    if isinstance(argument, tuple | list):
        return type(argument)(_replaced(part) for part in argument)
    return -1 if argument is OPEN else argument


def _of_one_rank(value: Value, rank: int, others: Container[Value]) -> list[Value]:
    """A value, and those in front of it that have its rank."""
    found = [value]
    while (source := tensor_input(value) if keeps_rank(value) else _met(value, rank, others)) is not None:
        found.append(source)
        value = source
    return found


def _met(value: Value, rank: int, others: Container[Value]) -> Value | None:
    """The one operand that decides the rank of a sum or product."""
    found = operands(value)
    met = [operand for operand in found if isinstance(operand, Value) and operand not in others]
    narrow = all(operand.dim() < rank for operand in found if isinstance(operand, Tensor))
    return met[0] if len(met) == 1 and narrow else None


def asks_rank(value: Value) -> bool:
    """Whether an operation reads the rank of its input."""
    name = name_of(value)
    return name in ("dim", "ndimension") or (name == "getattr" and value.args[1] == "ndim")


def computes(value: Value) -> bool:
    """Whether an operation computes numbers or sequences of them from others."""
    return name_of(value) in PURE and is_plain(value)


def _collect(argument: Any, sources: dict[Value, None]) -> bool:
    """Note the values whose rank an argument depends on; False if it depends on more."""
    if isinstance(argument, Value):
        if whole_shape(argument) or asks_rank(argument):
            if isinstance(argument.args[0], Value):
                sources[argument.args[0]] = None
            return isinstance(argument.args[0], Value)
        if argument.node.target is assign or computes(argument):
            return not argument.kwargs and all(_collect(part, sources) for part in argument.args)
        return False
    if isinstance(argument, tuple | list):
        return all(_collect(part, sources) for part in argument)
    if isinstance(argument, slice):
        return _collect((argument.start, argument.stop, argument.step), sources)
    return argument is None or isinstance(argument, int)


def _filled(argument: Any, rank: int) -> Any:
    """An argument for values of a rank."""
    if isinstance(argument, Value):
        if whole_shape(argument):
            return (OPEN,) * rank
        if asks_rank(argument):
            return rank
        function: Any = argument.node.target
        return function(*(_filled(part, rank) for part in argument.args))
    if isinstance(argument, tuple | list):
        return type(argument)(_filled(part, rank) for part in argument)
    if isinstance(argument, slice):
        return slice(_filled(argument.start, rank), _filled(argument.stop, rank), _filled(argument.step, rank))
    return argument
