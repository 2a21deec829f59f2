"""Read a model from its root; parts that are opaque become roots of their own."""

import operator
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, Final

import torch
from torch import fx, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from reparam.graph.apart import taken_apart
from reparam.graph.arguments import HOLE, default_arguments
from reparam.graph.constants import put_constants
from reparam.graph.examples import Call, Examples
from reparam.graph.hooked import used_by_hooks
from reparam.graph.items import read_before
from reparam.graph.leaves import CLOSED, SHARED, hooks, is_leaf
from reparam.graph.likeness import Likeness
from reparam.graph.net import Declared, Frame, Net, Reading, Value
from reparam.graph.outcomes import settled
from reparam.graph.sharing import can_be_shared, of_its_like
from reparam.graph.signatures import signature_of
from reparam.graph.structures import NOTHING, key_of, pick, resolve, spec_of, values_in
from reparam.graph.trace import Trace, trace
from reparam.graph.unread import Unread

SET_BY_HOOK: Final = "its forward reads what a hook sets"
WRAPPERS: Final = (nn.DataParallel, DistributedDataParallel, AveragedModel)  # they call one child as it is


class _Reader:
    """Opens a model from its root; parts that are opaque become roots of their own."""

    def __init__(
        self, model: nn.Module, calls: Mapping[str, list[Call]] | None, declared: Mapping[Any, Declared]
    ) -> None:
        self.model = model
        self.calls = calls
        self.declared = declared
        self.traces: dict[Any, Trace | Unread] = {}
        self.shared: set[int] = set()
        self.sites: set[tuple[int, int, str]] = set()  # one call in a module that is itself called twice is one
        self.unread: dict[str, Unread] = {}
        self.tried: dict[str, Unread] = {}  # why a call could not be read with the arguments that it is given
        self.opaque: dict[str, str] = {}
        self.branching: dict[str, str] = {}
        self.pending: list[tuple[nn.Module, str]] = []
        self.kept: list[Any] = []
        self.likeness = Likeness(model)
        self.hooked = used_by_hooks(model)
        self.alike: dict[Any, Trace] = {}

    def read(self) -> Reading:
        while True:
            reading, calls = self._read_all()
            repeated = {key for key, count in calls.items() if count > 1} - self.shared
            if not repeated:
                return reading
            self.shared |= repeated

    def _read_all(self) -> tuple[Reading, Counter[int]]:
        self.unread, self.opaque, self.branching, self.sites = {}, {}, {}, set()
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
            if isinstance(module, WRAPPERS):
                self._children_later(module, path)
                continue
            arguments = default_arguments(module)
            result = self._trace_root(module, path, arguments) if isinstance(arguments, dict) else arguments
            if isinstance(result, Unread):
                holds = any(True for _ in module.children()) or any(True for _ in module.parameters())
                if holds and _has_forward(module):
                    self.unread[path] = self.tried.get(path, result)
                kinds = {type(module.get_submodule(name)) for name in result.written}
                self._children_later(module, path, kinds)
                continue
            if result.several:
                self.branching[path] = result.several
            nets.append(self._open(module, path, result, calls))
        return Reading(tuple(nets), dict(self.unread), dict(self.opaque), dict(self.branching), self.hooked), calls

    def _children_later(self, module: nn.Module, path: str, written: Collection[type] = ()) -> None:
        """Children of what cannot be read are read on their own, but for classes whose attributes it sets."""
        if isinstance(module, (*CLOSED, torch.jit.ScriptModule)):
            return
        for name, child in module.named_children():
            below = f"{path}.{name}" if path else name
            if type(child) in written:
                self.opaque[below] = f"its attributes are set by the forward of {path or 'the model'}"
            elif written and any(type(descendant) in written for descendant in child.modules()):
                self._children_later(child, below, written)
            elif path in self.unread and not is_leaf(child) and taken_apart(module, name):
                if not isinstance(child, nn.ModuleList | nn.ModuleDict):
                    self.opaque[below] = f"the forward of {path or 'the model'} takes it apart"
                self._children_later(child, below)
            else:
                self.pending.append((child, below))

    def _trace_root(self, module: nn.Module, path: str, arguments: Mapping[str, Any]) -> Trace | Unread:
        """Read a forward with its required arguments, or with one of the optional ones where it asks for one."""
        result = self._trace(module, path, arguments)
        if isinstance(result, Unread) and (result.raised or "NoneType" in result.reason):
            for name in (name for name, value in arguments.items() if value is None):
                traced = self._trace(module, path, {**arguments, name: HOLE})
                if isinstance(traced, Trace):
                    return traced
        return result

    def _trace(self, module: nn.Module, path: str, arguments: Mapping[str, Any]) -> Trace | Unread:
        key = (id(module), key_of(arguments))
        if key not in self.traces:
            traced = self._of_its_like(module, arguments)
            if isinstance(traced, Unread) and self.calls is not None:
                traced = trace(module, arguments, Examples(self.calls, path))
            if isinstance(traced, Trace) and traced.otherwise:
                traced = settled(traced, lambda net, frame: self._run(net, frame, Counter()))
            if isinstance(traced, Trace) and id(module) in self.hooked.forwards:
                traced = replace(traced, doubtful=SET_BY_HOOK)
            self.traces[key] = traced
            self.kept.append(module)
        return self.traces[key]

    def _of_its_like(self, module: nn.Module, arguments: Mapping[str, Any]) -> Trace | Unread:
        """The trace of a module: that of another one which is alike, if it was read and computed with no tensor."""
        number = self.likeness.number(module)
        key = (number, key_of(arguments))
        other = None if number is None else self.alike.get(key)
        if other is not None:
            return of_its_like(other, module)
        traced = trace(module, arguments)
        if isinstance(traced, Trace) and number is not None and can_be_shared(traced):
            self.alike[key] = traced
        return traced

    def _open(self, module: nn.Module, path: str, traced: Trace, calls: Counter[int]) -> Net:
        root = Frame(module, path, traced)
        net = Net(root, [], [root], None)
        for node in traced.inputs.values():
            self._add(net, root, Value(len(net.values), root, node))
        net.result = self._run(net, root, calls)
        for value in values_in(net.result):
            value.returned = True
        put_constants(net)
        whole = {id(value.module) for value in net.values if value.module is not None}
        self._uncalled_later(module, path, {id(frame.module) for frame in net.frames} | whole, whole)
        return net

    def _uncalled_later(self, module: nn.Module, path: str, called: set[int], whole: set[int]) -> None:
        """Children that the forward does not reach are read on their own: heads used in training, entry points.

        What is ``whole`` is one operation of the net, and its children are read with it.
        """
        for name, child in module.named_children():
            below = f"{path}.{name}" if path else name
            if is_leaf(child) or id(child) in whole:
                continue
            if any(id(descendant) in called for descendant in child.modules()):
                self._uncalled_later(child, below, called, whole)
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
                return resolve(node.args[0], frame.env)
            if node.op == "get_attr":
                frame.env[node] = frame.trace.tensors[node.target]
                continue
            args, kwargs = resolve(node.args, frame.env), resolve(node.kwargs, frame.env)
            picked = pick(node, args)
            if picked is NOTHING and node.target is operator.getitem:
                picked = read_before(net, frame, node, args) or NOTHING
            if picked is not NOTHING:
                self._bind(frame, node, picked)
                continue
            module = frame.module.get_submodule(node.target) if node.op == "call_module" else None
            if module is not None:
                opened = self._enter(net, frame, node, module, args, kwargs, calls)
                if opened is not NOTHING:
                    self._bind(frame, node, opened)
                    continue
            value = Value(len(net.values), frame, node, args, kwargs, module)
            value.inputs = tuple(dict.fromkeys(values_in((args, kwargs))))
            value.declared = self.declared.get(node.target if module is None else type(module))
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
        """Open a call of a child; returns its result, or ``NOTHING`` if it stays one operation."""
        stateful = any(True for _ in module.parameters()) or any(True for _ in module.buffers())
        site = (id(module), id(frame.module), node.name)
        if stateful and site not in self.sites:
            self.sites.add(site)
            calls[id(module)] += 1
        path = f"{frame.path}.{node.target}" if frame.path else str(node.target)
        if is_leaf(module) or type(module) in self.declared:
            return NOTHING
        if frame.trace.several:  # its call may be another one
            self.pending.append((module, path))
            return NOTHING
        reason = hooks(module)
        if id(module) in self.shared:
            reason = SHARED
        if reason:
            self.opaque[path] = reason
            self.pending.append((module, path))
            return NOTHING
        bound = _bind_arguments(module, args, kwargs)
        if isinstance(bound, Unread):
            traced: Trace | Unread = bound
        else:
            traced = self._trace(module, path, {name: spec_of(value) for name, value in bound.items()})
        if isinstance(traced, Unread):
            self.tried.setdefault(path, traced)
        if isinstance(traced, Unread) or traced.several:
            self.pending.append((module, path))
            return NOTHING
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


def _has_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward if hasattr(type(module), "forward") else False


def _bind_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any] | Unread:
    try:
        bound = signature_of(module).bind(*args, **kwargs)
    except (TypeError, ValueError) as error:
        return Unread(f"{type(error).__name__}: {error}")
    bound.apply_defaults()
    return dict(bound.arguments)


def read(
    model: nn.Module, calls: Mapping[str, list[Call]] | None = None, declared: Mapping[Any, Declared] | None = None
) -> Reading:
    """Read a model; must run inside ``reading()``.

    Args:
        model: the model.
        calls: the sizes of one run.
        declared: by type of module, or operator: what is one operation, whatever it is made of.
    """
    return _Reader(model, calls, declared or {}).read()
