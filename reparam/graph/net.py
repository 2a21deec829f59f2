"""A model as one list of values: the traces of its modules, put into each other where they are called.

A *frame* is one call of a module whose forward was read; a *value* is the result of one operation in a frame. A module
that cannot be read, is shared, or has hooks is one opaque operation of its caller, and a net of its own below that.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, final

from torch import Tensor, fx, nn

from reparam.graph.hooked import Hooked
from reparam.graph.methods import Method
from reparam.graph.sharing import with_own_graph
from reparam.graph.space import Space
from reparam.graph.trace import Trace
from reparam.graph.unread import Unread


class Declared(Protocol):
    """What a user says about an operation that would not be read as linear."""

    def spaces(self, value: "Value", source: Space | None) -> tuple[Space | None, Space | None]:
        """Spaces of the input and of the result, of which the first may be known already."""


@final
@dataclass(eq=False, slots=True)
class Frame:
    """One call of a module that was read; its ``methods`` are those that are generated with its forward."""

    module: nn.Module
    path: str
    trace: Trace
    parent: "Frame | None" = None
    call: fx.Node | None = None
    env: dict[fx.Node, Any] = field(default_factory=dict)
    locals: "dict[Value, fx.Node]" = field(default_factory=dict)
    repeated: bool = False
    mode: tuple[Any, ...] = ()
    values: "list[Value]" = field(default_factory=list)
    children: "list[Frame]" = field(default_factory=list)
    methods: dict[str, Method] = field(default_factory=dict)

    def below(self) -> "Iterator[Value]":
        """All values of this call and of the calls within it."""
        yield from self.values
        for child in self.children:
            yield from child.below()

    def upwards(self) -> "Iterator[Frame]":
        """The call, its caller, and so on up to the root."""
        frame: Frame | None = self
        while frame is not None:
            yield frame
            frame = frame.parent

    def own_graph(self) -> fx.Graph:
        """The graph of the call, to be changed: a copy if other modules have the same."""
        if self.trace.sharers:
            self.trace, copies = with_own_graph(self.trace)
            self.env = {copies[node]: known for node, known in self.env.items()}
            self.locals = {value: copies[node] for value, node in self.locals.items()}
            for value in self.values:
                value.node = copies[value.node]
            for child in self.children:
                child.call = None if child.call is None else copies[child.call]
            self.methods = {name: method.with_copies(copies) for name, method in self.methods.items()}
        return self.trace.graph

    def generates(self, value: "Value") -> bool:
        """Whether all methods that compute a value are generated where the forward is."""
        return all(name in self.methods for name, _ in self.trace.within.get(self.locals[value], ()))

    def local(self, value: "Value") -> fx.Node | None:
        """The node by which this frame knows a value."""
        return self.locals.get(value)


@final
@dataclass(eq=False, slots=True)
class Value:
    """The result of one operation.

    Args:
        index: position in the order of execution.
        frame: the call in which it stands.
        node: its node there.
        args: arguments with values, tensors and constants in place of nodes.
        kwargs: keyword arguments alike.
        module: the child that is called, if the operation is a call of a module.
        inputs: the values among the arguments.
        users: values that have it among their arguments.
        returned: whether it is part of the result of the net.
        shared: whether the module that is called is called elsewhere, too.
        rank: of its inputs, that its constants are made for; None: they hold for every one.
        declared: what a user declared of it, if it is linear by declaration; then it only computes its result.
    """

    index: int
    frame: Frame
    node: fx.Node
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    module: nn.Module | None = None
    inputs: "tuple[Value, ...]" = ()
    users: "list[Value]" = field(default_factory=list)
    returned: bool = False
    shared: bool = False
    rank: int | None = None
    declared: "Declared | None" = None

    @property
    def mode(self) -> tuple[Any, ...]:
        """Autocast and gradient modes under which it runs, as far as forwards change them."""
        changed = self.frame.trace.modes.get(self.node)
        return self.frame.mode if changed is None else (*self.frame.mode, changed)

    def tensors(self) -> Iterator[Tensor]:
        """Parameters and buffers of the module that is called, and tensors among the arguments."""
        if self.module is not None:
            yield from self.module.parameters()
            yield from self.module.buffers()
        for argument in (*self.args, *self.kwargs.values()):
            if isinstance(argument, Tensor) and argument.dim():
                yield argument

    @property
    def path(self) -> str:
        """Dotted path of the module that is called, or of the module in whose forward the operation stands."""
        if self.module is None:
            return self.frame.path
        return f"{self.frame.path}.{self.node.target}" if self.frame.path else str(self.node.target)

    @property
    def name(self) -> str:
        """What the operation is, in words for a reader."""
        if self.module is not None:
            return type(self.module).__name__
        if self.node.op == "placeholder":
            return f"input {self.node.target}"
        target = self.node.target
        return target if isinstance(target, str) else getattr(target, "__name__", str(target))

    def __repr__(self) -> str:
        return f"{self.name}@{self.path or '.'}"


@final
@dataclass(eq=False, slots=True)
class Net:
    """All values below one module, in order of execution."""

    root: Frame
    values: list[Value]
    frames: list[Frame]
    result: Any

    def calls(self) -> Counter[int]:
        """How often each module is called, by identity."""
        return Counter(id(v.module) for v in self.values if v.module is not None) + Counter(
            id(frame.module) for frame in self.frames
        )


@final
@dataclass(frozen=True, slots=True)
class Reading:
    """What was read of a model.

    Args:
        nets: the parts that were read, each with its root module.
        unread: module paths that could not be read, with the reason.
        opaque: paths of modules that were not opened, with the reason.
        branching: paths of modules whose forward may do something else than what was read, with the reason.
        hooked: what hooks use.
    """

    nets: tuple[Net, ...]
    unread: Mapping[str, Unread]
    opaque: Mapping[str, str]
    branching: Mapping[str, str]
    hooked: Hooked
