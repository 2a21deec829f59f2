"""A model as one list of values: the traces of its modules, put into each other where they are called.

A *frame* is one call of a module whose forward was read; a *value* is the result of one operation in a frame. A module that
cannot be read, is shared, or has hooks is one opaque operation of its caller, and a net of its own below that.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, final

import torch
from torch import Tensor, fx, nn

from reparam.graph.examples import Call, Examples
from reparam.graph.trace import HOLE, Trace, Unread, default_arguments, trace


@final
@dataclass(eq=False, slots=True)
class Frame:
    """One call of a module that was read."""

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

    def below(self) -> "Iterator[Value]":
        """All values of this call and of the calls within it."""
        yield from self.values
        for child in self.children:
            yield from child.below()

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

    @property
    def mode(self) -> tuple[Any, ...]:
        """Autocast and gradient modes under which it runs, as far as forwards change them."""
        changed = self.frame.trace.modes.get(self.node)
        return self.frame.mode if changed is None else (*self.frame.mode, changed)

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
    """

    nets: tuple[Net, ...]
    unread: Mapping[str, Unread]
    opaque: Mapping[str, str]


SHARED: Final = "it is called in several places"
CLOSED: Final = (
    nn.MultiheadAttention,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
    nn.RNNBase,
    nn.RNNCellBase,
)


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is an operation of torch itself, known by its type."""
    kind = type(module)
    if kind in (nn.Sequential, nn.ModuleList, nn.ModuleDict):
        return False
    home = kind.__module__
    if home.startswith(("torch.nn.modules.", "torch.ao.", "torch.nn.quantized", "torch.nn.qat", "torch.nn.intrinsic")):
        return True
    return home == "torch.nn.utils.parametrize" and torch.nn.utils.parametrize.is_parametrized(module)


def hooks(module: nn.Module) -> str:
    """Names of the hooks that a module has, other than those that generate its weights."""
    from torch.nn.utils.spectral_norm import SpectralNorm
    from torch.nn.utils.weight_norm import WeightNorm

    known = (WeightNorm, SpectralNorm)
    found = []
    if module._forward_hooks:
        found.append("forward hook")
    if any(not isinstance(hook, known) for hook in module._forward_pre_hooks.values()):
        found.append("forward pre-hook")
    if module._backward_hooks or module._backward_pre_hooks:
        found.append("backward hook")
    return ", ".join(found)


class _Reader:
    """Opens a model from its root; parts that are opaque become roots of their own."""

    def __init__(self, model: nn.Module, calls: Mapping[str, list[Call]] | None) -> None:
        self.model = model
        self.calls = calls
        self.traces: dict[Any, Trace | Unread] = {}
        self.shared: set[int] = set()
        self.unread: dict[str, Unread] = {}
        self.opaque: dict[str, str] = {}
        self.pending: list[tuple[nn.Module, str]] = []
        self.kept: list[Any] = []

    def read(self) -> Reading:
        while True:
            reading, calls = self._read_all()
            repeated = {key for key, count in calls.items() if count > 1} - self.shared
            if not repeated:
                return reading
            self.shared |= repeated

    def _read_all(self) -> tuple[Reading, Counter[int]]:
        self.unread, self.opaque = {}, {}
        calls: Counter[int] = Counter()
        nets: list[Net] = []
        seen: set[int] = set()
        self.pending = [(self.model, "")]
        while self.pending:
            module, path = self.pending.pop()
            if id(module) in seen:
                continue
            seen.add(id(module))
            if is_leaf(module):
                continue
            arguments = default_arguments(module)
            result = self._trace(module, path, arguments) if isinstance(arguments, dict) else arguments
            if isinstance(result, Unread):
                if any(True for _ in module.children()) or any(True for _ in module.parameters()):
                    if _has_forward(module):
                        self.unread[path] = result
                self._children_later(module, path)
                continue
            nets.append(self._open(module, path, result, calls))
        return Reading(tuple(nets), dict(self.unread), dict(self.opaque)), calls

    def _children_later(self, module: nn.Module, path: str) -> None:
        if isinstance(module, CLOSED) or isinstance(module, torch.jit.ScriptModule):
            return
        for name, child in module.named_children():
            self.pending.append((child, f"{path}.{name}" if path else name))

    def _trace(self, module: nn.Module, path: str, arguments: Mapping[str, Any]) -> Trace | Unread:
        key = (id(module), _key(arguments))
        if key not in self.traces:
            traced = trace(module, arguments)
            if isinstance(traced, Unread) and self.calls is not None:
                traced = trace(module, arguments, Examples(self.calls, path))
            self.traces[key] = traced
            self.kept.append(module)
        return self.traces[key]

    def _open(self, module: nn.Module, path: str, traced: Trace, calls: Counter[int]) -> Net:
        root = Frame(module, path, traced)
        net = Net(root, [], [root], None)
        for node in traced.inputs.values():
            self._add(net, root, Value(len(net.values), root, node))
        net.result = self._run(net, root, calls)
        for value in _values(net.result):
            value.returned = True
        called = {id(frame.module) for frame in net.frames} | {
            id(value.module) for value in net.values if value.module is not None
        }
        self._uncalled_later(module, path, called)
        return net

    def _uncalled_later(self, module: nn.Module, path: str, called: set[int]) -> None:
        """Children that the forward does not reach are read on their own (heads used in training, other entry points)."""
        for name, child in module.named_children():
            below = f"{path}.{name}" if path else name
            if is_leaf(child):
                continue
            if any(id(descendant) in called for descendant in child.modules()):
                self._uncalled_later(child, below, called)
            else:
                self.pending.append((child, below))

    def _add(self, net: Net, frame: Frame, value: Value) -> Value:
        net.values.append(value)
        frame.values.append(value)
        frame.env[value.node] = value
        frame.locals.setdefault(value, value.node)
        for source in value.inputs:
            source.users.append(value)
        return value

    def _run(self, net: Net, frame: Frame, calls: Counter[int]) -> Any:
        for node in frame.trace.graph.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                return _resolve(node.args[0], frame.env)
            if node.op == "get_attr":
                frame.env[node] = frame.trace.tensors[node.target]
                continue
            args, kwargs = _resolve(node.args, frame.env), _resolve(node.kwargs, frame.env)
            picked = _pick(node, args)
            if picked is not _NOTHING:
                self._bind(frame, node, picked)
                continue
            module = frame.module.get_submodule(node.target) if node.op == "call_module" else None
            if module is not None:
                opened = self._enter(net, frame, node, module, args, kwargs, calls)
                if opened is not _NOTHING:
                    self._bind(frame, node, opened)
                    continue
            value = Value(len(net.values), frame, node, args, kwargs, module)
            value.inputs = tuple(dict.fromkeys(_values((args, kwargs))))
            value.shared = frame.repeated or (module is not None and id(module) in self.shared)
            self._add(net, frame, value)
        raise AssertionError("a graph without an output")

    def _bind(self, frame: Frame, node: fx.Node, result: Any) -> None:
        frame.env[node] = result
        if isinstance(result, Value):
            frame.locals.setdefault(result, node)

    def _enter(
        self,
        net: Net,
        frame: Frame,
        node: fx.Node,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        calls: Counter[int],
    ) -> Any:
        """Open a call of a child; returns its result, or ``_NOTHING`` if it stays one operation."""
        stateful = any(True for _ in module.parameters()) or any(True for _ in module.buffers())
        if stateful:
            calls[id(module)] += 1
        path = f"{frame.path}.{node.target}" if frame.path else str(node.target)
        if is_leaf(module):
            return _NOTHING
        reason = hooks(module)
        if id(module) in self.shared:
            reason = SHARED
        if reason:
            self.opaque[path] = reason
            self.pending.append((module, path))
            return _NOTHING
        bound = _bind_arguments(module, args, kwargs)
        if isinstance(bound, Unread):
            traced: Trace | Unread = bound
        else:
            traced = self._trace(module, path, {name: _spec(value) for name, value in bound.items()})
        if isinstance(traced, Unread):
            self.pending.append((module, path))
            return _NOTHING
        assert isinstance(bound, dict)
        changed = frame.trace.modes.get(node)
        mode = frame.mode if changed is None else (*frame.mode, changed)
        child = Frame(module, path, traced, frame, node, repeated=frame.repeated, mode=mode)
        if not stateful:
            child.repeated = child.repeated or any(f.module is module for f in net.frames)
            for other in net.frames:
                if other.module is module:
                    other.repeated = True
        net.frames.append(child)
        frame.children.append(child)
        for name, placeholder in traced.inputs.items():
            self._bind(child, placeholder, bound[name])
        return self._run(net, child, calls)


_NOTHING: Final = object()


def _has_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward if hasattr(type(module), "forward") else False


def _bind_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any] | Unread:
    import inspect

    try:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
    except (TypeError, ValueError) as error:
        return Unread(f"{type(error).__name__}: {error}")
    bound.apply_defaults()
    return dict(bound.arguments)


def _spec(value: Any) -> Any:
    if isinstance(value, Value | Tensor | fx.Node):
        return HOLE
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_spec(v) for v in value))
    if isinstance(value, list | tuple):
        return type(value)(_spec(v) for v in value)
    if isinstance(value, Mapping):
        return {k: _spec(v) for k, v in value.items()}
    return value


def _key(value: Any) -> Any:
    if isinstance(value, Mapping):
        return ("dict", *((k, _key(v)) for k, v in value.items()))
    if isinstance(value, list | tuple):
        return (type(value).__name__, *(_key(v) for v in value))
    if isinstance(value, slice):
        return ("slice", _key((value.start, value.stop, value.step)))
    try:
        hash(value)
    except TypeError:
        return ("id", id(value))
    return (type(value).__name__, value)


def _resolve(argument: Any, env: Mapping[fx.Node, Any]) -> Any:
    """An argument of a node with what its nodes stand for."""
    if isinstance(argument, fx.Node):
        return env[argument]
    if isinstance(argument, tuple):
        items = [_resolve(a, env) for a in argument]
        return type(argument)(*items) if hasattr(argument, "_fields") else tuple(items)
    if isinstance(argument, list):
        return [_resolve(a, env) for a in argument]
    if isinstance(argument, Mapping):
        return {k: _resolve(v, env) for k, v in argument.items()}
    if isinstance(argument, slice):
        return slice(_resolve(argument.start, env), _resolve(argument.stop, env), _resolve(argument.step, env))
    return argument


def _values(structure: Any) -> Iterator[Value]:
    if isinstance(structure, Value):
        yield structure
    elif isinstance(structure, Mapping):
        for item in structure.values():
            yield from _values(item)
    elif isinstance(structure, list | tuple):
        for item in structure:
            yield from _values(item)
    elif isinstance(structure, slice):
        yield from _values((structure.start, structure.stop, structure.step))


def _pick(node: fx.Node, args: tuple[Any, ...]) -> Any:
    """The element that ``structure[index]`` names, if the structure is known."""
    import operator

    if node.op == "call_function" and node.target is operator.getitem and isinstance(args[0], list | tuple | Mapping):
        try:
            return args[0][args[1]]
        except (KeyError, IndexError, TypeError):
            return _NOTHING
    return _NOTHING


def read(model: nn.Module, calls: Mapping[str, list[Call]] | None = None) -> Reading:
    """Read a model; must run inside ``reading()``; ``calls`` holds the sizes of one run."""
    return _Reader(model, calls).read()
