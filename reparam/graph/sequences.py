"""Readings of a forward for several ranks of its values, where every shape has its elements.

A forward that was read without ranks, see ``reparam.graph.splices``, is what these are: operation by operation, with
its sequences written out for the same ranks. Then it did nothing else with a shape than to put it into others.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol, final

import torch
from torch import Tensor, fx

from reparam.graph.splices import MAKING, VARIADIC

RANKS: Final = range(1, 8)
STEPS: Final = (0, 1, -1)  # between the ranks of several values


@final
class Ranks:
    """Assumed ranks of the values whose rank or shape a forward asks for, in the order in which it first does.

    Args:
        first: of the first one.
        step: from one to the next.
    """

    def __init__(self, first: int, step: int = 0) -> None:
        self.first, self.step = first, step
        self.of: dict[fx.Graph, dict[fx.Node, int]] = {}
        self.sequences = Sequences(self.rank)

    def rank(self, source: fx.Node) -> int:
        """The rank of a value."""
        found = self.of.setdefault(source.graph, {})
        return found.setdefault(source, max(self.first + self.step * len(found), 1))

    def length(self, node: fx.Node) -> int | None:
        """The length of a shape, or of a sequence made of shapes; None for anything else."""
        found = self.sequences.value(node)
        return len(found) if isinstance(found, tuple | list) else None


@final
@dataclass(frozen=True, slots=True)
class Symbol:
    """What is not known about a value of a graph: what it is made from."""

    made: Any


class _Key(NamedTuple):
    name: str
    parts: Any


@final
class Sequences:
    """Values of plain operations, as far as ranks fix them.

    Args:
        rank: of a node.
    """

    def __init__(self, rank: Callable[[fx.Node], int]) -> None:
        self.rank = rank
        self.known: dict[fx.Node, Any] = {}

    def value(self, node: fx.Node) -> Any:
        """Numbers, and sequences of numbers and symbols; a symbol for all else."""
        if node not in self.known:
            self.known[node] = self._value(node)
        return self.known[node]

    def _value(self, node: fx.Node) -> Any:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        first = node.args[0] if node.args else None
        if name == "getattr" and isinstance(first, fx.Node) and node.args[1] in ("shape", "ndim"):
            rank = self.rank(first)
            return self._sizes(first, rank) if node.args[1] == "shape" else rank
        if name in ("dim", "ndimension") and isinstance(first, fx.Node):
            return self.rank(first)
        if name == "size" and isinstance(first, fx.Node) and len(node.args) + len(node.kwargs) <= 2:
            axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
            if axis is None:
                return self._sizes(first, self.rank(first))
            if isinstance(axis, int):
                return self._sizes(first, self.rank(first))[axis]
        args, kwargs = self.filled((node.args, dict(node.kwargs)))
        if node.op == "call_function" and getattr(node.target, "__module__", "") in ("_operator", "builtins", "math"):
            whole = name in ("getitem", "len", "tuple", "list") or (name in ("add", "mul") and _holds_sequence(args))
            if not any(isinstance(a, Symbol) for a in args) and (whole or not _symbols(args)):
                function: Any = node.target
                return function(*args, **kwargs)
        return Symbol(_Key(name, _frozen((args, kwargs))))

    def _sizes(self, source: fx.Node, rank: int) -> tuple[Symbol, ...]:
        found = self.known.get(source, source)
        return tuple(Symbol(_Key("size", (found, axis))) for axis in range(rank))

    def filled(self, argument: Any) -> Any:
        """An argument with values in the place of nodes."""
        if isinstance(argument, fx.Node):
            return self.value(argument)
        if isinstance(argument, tuple | list):
            items = [self.filled(item) for item in argument]
            return items if isinstance(argument, list) else tuple(items)
        if isinstance(argument, Mapping):
            return {key: self.filled(item) for key, item in argument.items()}
        if isinstance(argument, slice):
            return slice(self.filled(argument.start), self.filled(argument.stop), self.filled(argument.step))
        return argument


def _holds_sequence(args: tuple[Any, ...]) -> bool:
    return any(isinstance(argument, tuple | list) for argument in args)


def _symbols(argument: Any) -> bool:
    if isinstance(argument, tuple | list):
        return any(map(_symbols, argument))
    return isinstance(argument, Symbol)


def holds(spliced: "Reading", counted: "Callable[[Ranks], Reading | bool]") -> bool:
    """Whether what was read without ranks is what is read for all of several ranks that are no error.

    Args:
        spliced: without ranks.
        counted: reads for ranks; True: they are an error, False: it cannot be read.
    """
    answers = []
    for step, first in itertools.product(STEPS, RANKS):
        ranks = Ranks(first, step)
        found = counted(ranks)
        answer = (None if found else False) if isinstance(found, bool) else agree(spliced, found, ranks)
        if answer is False:
            return False
        answers.append(answer)
    return any(answers)


def agree(spliced: "Reading", counted: "Reading", ranks: Ranks) -> bool | None:
    """Whether a forward that was read without ranks does for some ranks what was read with them.

    Args:
        spliced: without ranks.
        counted: for ``ranks``.
        ranks: what was assumed.

    Returns:
        The answer; None if what was read without ranks is an error for them.
    """
    wanted, found = _Operations(counted), _Operations(spliced)
    try:
        wanted.run(ranks.rank)
        known = {wanted.symbols[node]: rank for node, rank in ranks.of.get(counted.graph, {}).items()}
        found.run(lambda node: known.get(found.symbols[node], ranks.first))
    except (IndexError, ValueError):
        return None
    return found.steps == wanted.steps


class Reading(Protocol):
    """What is compared of a forward that was read."""

    @property
    def graph(self) -> fx.Graph:
        """Its operations."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """What its ``get_attr`` nodes read."""

    @property
    def modes(self) -> Mapping[fx.Node, tuple[bool, ...]]:
        """Modes under which nodes run."""


@final
class _Operations:
    """The operations of a graph, with sequences written out."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self.steps: list[Any] = []
        self.symbols: dict[fx.Node, Symbol] = {}

    def run(self, rank: Callable[[fx.Node], int]) -> None:
        """Go through the graph."""
        sequences = Sequences(rank)
        for node in self.reading.graph.nodes:
            if node.meta.get("plain"):
                continue
            if node.op == "get_attr":
                held = _Held(self.reading.tensors[str(node.target)])
                self.symbols[node] = sequences.known[node] = Symbol(held)
                continue
            target = node.target
            args, kwargs = sequences.filled((node.args, dict(node.kwargs)))
            first = 1 if target in VARIADIC else 0
            if (first or target in MAKING) and len(args) == first + 1 and isinstance(args[first], tuple | list):
                args = (*args[:first], *args[first])
            if target in VARIADIC and _of_constant(args):
                constant = getattr(args[0].made.tensor, str(target))(*args[1:], **kwargs)
                self.symbols[node] = sequences.known[node] = Symbol(_Held(constant))
                continue
            self.steps.append((node.op, target, _frozen(args), _frozen(kwargs), self.reading.modes.get(node)))
            self.symbols[node] = sequences.known[node] = Symbol(_Key("step", len(self.steps)))


@final
class _Held:
    """A constant, which equals those that another reading made in the same way."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Held):
            return False
        a, b = self.tensor, other.tensor
        if a is b or (_base(a) is _base(b) and _geometry(a) == _geometry(b)):
            return True
        return not a.is_meta and (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device) and torch.equal(a, b)

    def __hash__(self) -> int:
        return hash(tuple(self.tensor.shape))


def _base(tensor: Tensor) -> Tensor:
    return tensor if tensor._base is None else tensor._base


def _geometry(tensor: Tensor) -> Any:
    return tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype


def _of_constant(args: tuple[Any, ...]) -> bool:
    """Whether a method is called on a constant, with numbers."""
    constant = isinstance(args[0], Symbol) and isinstance(args[0].made, _Held)
    return constant and all(isinstance(argument, int) for argument in args[1:])


def _frozen(argument: Any) -> Any:
    """An argument as something that can be compared, with the kinds of its numbers."""
    if isinstance(argument, tuple | list):
        return (type(argument).__name__, *(_frozen(item) for item in argument))
    if isinstance(argument, Mapping):
        return {key: _frozen(item) for key, item in argument.items()}
    if isinstance(argument, slice):
        return ("slice", _frozen((argument.start, argument.stop, argument.step)))
    return (type(argument).__name__, argument)
