"""Put the fused operations into the model: all at once, or nothing."""

import operator
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, final

import torch
from torch import Tensor, fx, nn

from reparam.algebra import Affine, Conv, Refusal
from reparam.graph.build import build
from reparam.graph.effects import pure
from reparam.graph.entries import EntryPoints
from reparam.graph.net import Frame, Net, Value
from reparam.graph.placing import Mode, Place
from reparam.graph.plan_net import NetPlan
from reparam.graph.source import forward_source
from reparam.graph.generated import base_class, generated_class, rebuild


@final
@dataclass(frozen=True, slots=True, eq=False)
class Fused:
    """One region, ready to enter the model.

    Args:
        plan: plan of its net.
        value: the value that is replaced.
        place: where.
        modules: per root, the module that computes the term; None: the root itself.
        error: measured error of the region.
    """

    plan: NetPlan
    value: Value
    place: Place
    modules: Mapping[Value, nn.Module | None]
    error: float | None = None


def number_of_convs(formula: Affine) -> int:
    """Convolutions that a formula needs."""
    return sum(not conv.identity for conv in formula.terms.values())


def mixed(plan: NetPlan, value: Value) -> Refusal | None:
    """Why the weights of a region cannot be put together: several data types or devices."""
    members = (*plan.absorbed(value), value)
    kinds = {tensor.dtype for member in members for tensor in _weights(plan, member)}
    if len(kinds) > 1:
        return Refusal("dtype", f"weights of several data types: {sorted(map(str, kinds))}", "use one data type")
    devices = {tensor.device for member in members for tensor in _tensors(member)}
    if len(devices) > 1:
        return Refusal("device", f"weights on several devices: {sorted(map(str, devices))}", "use one device")
    return None


def _tensors(value: Value) -> Iterator[Tensor]:
    if value.module is not None:
        yield from value.module.parameters()
        yield from value.module.buffers()
    for argument in (*value.args, *value.kwargs.values()):
        if isinstance(argument, Tensor) and argument.dim():
            yield argument


def modules_of(plan: NetPlan, value: Value, formula: Affine) -> dict[Value, nn.Module | None] | Refusal:
    """The modules that compute a formula; the bias goes with the first."""
    weights = [tensor for member in (*plan.absorbed(value), value) for tensor in _weights(plan, member)]
    if not weights:
        return Refusal("dtype", "no weight fixes the data type of the result")
    trainable = any(tensor.requires_grad for tensor in weights)
    dtype, device = weights[0].dtype, weights[0].device
    bias = formula.bias
    modules: dict[Value, nn.Module | None] = {}
    terms = sorted(formula.terms.items(), key=lambda term: term[1].identity)
    for root, conv in terms:
        assert isinstance(root, Value)
        if conv.identity and bias is None and len(terms) > 1:
            modules[root] = None
            continue
        modules[root] = build(conv, bias, dtype=dtype, device=device, trainable=trainable)
        bias = None
    return {root: modules[root] for root in formula.terms if isinstance(root, Value)}


def _weights(plan: NetPlan, value: Value) -> Iterator[Tensor]:
    """Floating-point weights of the convolutions and linear layers among the operations of a region."""
    operation = plan.operations[value]
    if operation.norm or all(conv.diagonal for conv in operation.terms.values()):
        return
    if value.module is not None:
        weight = getattr(value.module, "weight", None)
        if isinstance(weight, Tensor):
            yield weight
        return
    for argument in (*value.args, *value.kwargs.values()):
        if isinstance(argument, Tensor) and argument.is_floating_point() and argument.dim() > 1:
            yield argument


@final
class Emitter:
    """Collects the changes of all regions of a model and makes them."""

    def __init__(self, model: nn.Module, nets: Iterable[Net]) -> None:
        self.model = model
        self.nets = list(nets)
        self.swaps: list[tuple[nn.Module, nn.Module]] = []
        self.edited: dict[Frame, _Edit] = {}

    def add(self, fused: Fused) -> None:
        """Note the changes that a region needs; nothing is changed yet."""
        where = fused.place
        if where.mode is Mode.EDIT:
            self._edit(where.at.frame).regions.append(fused)
        for value in where.passed:
            if value.module is None:
                self._edit(value.frame).passed.append((fused.plan, value))

    def _edit(self, frame: Frame) -> "_Edit":
        return self.edited.setdefault(frame, _Edit(frame))

    def apply(self, regions: Iterable[Fused]) -> None:
        """Make all changes, or none."""
        before = [_State(module) for module in self.model.modules()]
        try:
            self._apply(list(regions))
        except BaseException:
            for state in before:
                state.restore()
            raise

    def _apply(self, regions: list[Fused]) -> None:
        for fused in regions:
            self.add(fused)
        homes = _homes(self.model)
        for fused in regions:
            where = fused.place
            for value in where.passed:
                if value.module is None:
                    continue
                if value.frame in self.edited:
                    self.edited[value.frame].passed.append((fused.plan, value))
                else:
                    nothing = nn.Identity().train(value.module.training)
                    _carry_attributes(value.module, nothing)
                    _replace(homes, value.module, nothing)
            if where.mode is not Mode.EDIT:
                (module,) = fused.modules.values()
                assert module is not None
                old = where.at.module if where.mode is Mode.SWAP else where.container and where.container.module
                assert isinstance(old, nn.Module)
                _carry_attributes(old, module)
                _replace(homes, old, module)
        for edit in self.edited.values():
            edit.run()
        used = _Used(self.nets, self.edited)
        for edit in self.edited.values():
            edit.install(used, homes)


@final
class _State:
    """What a module consists of, to put it back."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.kind = module, type(module)
        self.attributes = dict(module.__dict__)
        self.registered = [
            (registry, dict(registry.items())) for registry in (module._parameters, module._buffers, module._modules)
        ]

    def restore(self) -> None:
        if type(self.module) is not self.kind:
            object.__setattr__(self.module, "__class__", self.kind)
        self.module.__dict__.clear()
        self.module.__dict__.update(self.attributes)
        for registry, entries in self.registered:
            if list(registry.items()) != list(entries.items()):
                registry.clear()
                registry.update(entries)


def _homes(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Where each module is registered."""
    homes: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None:
                homes.setdefault(id(child), []).append((parent, name))
    return homes


def _replace(homes: Mapping[int, list[tuple[nn.Module, str]]], old: nn.Module, new: nn.Module) -> None:
    for parent, name in homes[id(old)]:
        parent._modules[name] = new


def _carry_attributes(old: nn.Module, new: nn.Module) -> None:
    """Plain attributes that were set on a replaced module go along; those that a convolution has itself stay its own."""
    for name, value in carried(old).items():
        if not hasattr(new, name):
            new.__dict__[name] = value


def carried(module: nn.Module) -> dict[str, Any]:
    """Plain attributes of a module: neither torch's own nor parameters, buffers and children."""
    own = nn.Module().__dict__.keys() | {"forward"}
    return {name: value for name, value in module.__dict__.items() if name not in own}


@final
class _Used:
    """Dotted paths of what the forwards of a model read."""

    def __init__(self, nets: Iterable[Net], edited: Mapping[Frame, "_Edit"]) -> None:
        paths: set[str] = set()
        for net in nets:
            for frame in net.frames:
                if frame in edited or not _called(frame):
                    continue
                names = {str(n.target) for n in frame.trace.graph.nodes if n.op in ("call_module", "get_attr")}
                paths |= {_join(frame.path, name) for name in names | set(frame.trace.read.values())}
                paths |= {_join(frame.path, name) for name in frame.trace.touched}
        self._above = {path[:at] for path in paths for at in (*(i for i, c in enumerate(path) if c == "."), len(path))}

    def below(self, path: str) -> bool:
        """Whether ``path`` or something below it is read."""
        return path in self._above


def _called(frame: Frame) -> bool:
    """Whether the call of a frame is still there."""
    while frame.parent is not None and frame.call is not None:
        if frame.call._erased:
            return False
        frame = frame.parent
    return True


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


@final
@dataclass(eq=False)
class _Edit:
    """The new forward of one module."""

    frame: Frame
    regions: list[Fused] = field(default_factory=list)
    passed: list[tuple[NetPlan, Value]] = field(default_factory=list)
    added: dict[str, nn.Module] = field(default_factory=dict)
    created: list[tuple[fx.Node, Fused, Value]] = field(default_factory=list)
    old_targets: set[str] = field(default_factory=set)
    new_targets: set[str] = field(default_factory=set)

    def run(self) -> None:
        """Rewrite the graph of the frame."""
        graph = self.frame.trace.graph
        self.old_targets = self._targets()
        had_users = {node for node in graph.nodes if node.users}
        replaced: dict[fx.Node, fx.Node] = {}

        def current(value: Value) -> fx.Node:
            node = self.frame.locals[value]
            while node in replaced:
                node = replaced[node]
            return node

        steps: list[tuple[int, Fused | tuple[NetPlan, Value]]] = [
            *((fused.place.at.index, fused) for fused in self.regions),
            *((value.index, (plan, value)) for plan, value in self.passed),
        ]
        for _, step in sorted(steps, key=lambda item: item[0]):
            if isinstance(step, Fused):
                node = step.place.at.node
                with graph.inserting_before(node):
                    new = self._total(graph, step, current)
            else:
                plan, value = step
                node = value.node
                (source,) = plan.operations[value].terms
                new = current(source)
            node.replace_all_uses_with(new)
            replaced[node] = new
        inside = {value.node: value for value in self.frame.values}
        calls = {child.call: child for child in self.frame.children}
        had_users |= self._tainted(inside) | replaced.keys()
        for node in reversed(list(graph.nodes)):
            if not node.users and node in had_users and _erasable(node, inside, calls):
                graph.erase_node(node)
        self.new_targets = self._targets() - set(self.added)
        for node, fused, root in self.created:
            module = self.added.pop(str(node.target))
            node.target = self._name(fused, root)
            self.added[node.target] = module
        self.new_targets |= set(self.added)

    def _tainted(self, inside: Mapping[fx.Node, Value]) -> set[fx.Node]:
        """Discarded results and assertions about values that vanish."""
        gone: set[Value] = set()
        for plan in {fused.plan for fused in self.regions}:
            gone |= set(plan.inlined)
        tainted: set[fx.Node] = set()
        for node in self.frame.trace.graph.nodes:
            value = inside.get(node)
            known = [self.frame.env.get(source) for source in node.all_input_nodes]
            if value is not None and any(value in fused.plan.dead for fused in self.regions):
                if any(source in tainted for source in node.all_input_nodes) or any(v in gone for v in known if isinstance(v, Value)):
                    tainted.add(node)
        return tainted

    def _targets(self) -> set[str]:
        return {str(node.target) for node in self.frame.trace.graph.nodes if node.op in ("call_module", "get_attr")}

    def _total(self, graph: fx.Graph, fused: Fused, current: Any) -> fx.Node:
        total: fx.Node | None = None
        for root, module in fused.modules.items():
            source = current(fused.place.stands_for[root])
            if module is None:
                term = source
            else:
                name = f"{_NEW}{len(self.created)}"
                self.added[name] = module
                term = graph.create_node("call_module", name, (source,), {})
                self.created.append((term, fused, root))
            total = term if total is None else graph.call_function(operator.add, (total, term))
        assert total is not None
        return total

    def _name(self, fused: Fused, root: Value) -> str:
        """The name of the child that held the largest kernel of the term."""
        plan = fused.plan
        best, size = "", (-1, -1)
        for value in (*plan.absorbed(fused.value), fused.value):
            operation = plan.operations[value]
            if all(conv.diagonal for conv in operation.terms.values()) and best:
                continue
            target = self._child(value)
            conv = max(operation.terms.values(), key=lambda c: c.taps)
            weight = (conv.taps, conv.in_channels * conv.out_channels // max(conv.groups, 1))
            reads = root in operation.terms or root in _roots(plan, value)
            if target and reads and weight > size and target not in self.added:
                best, size = target, weight
        read_elsewhere = any(best.partition(".")[0] in names for names in EntryPoints().beside(self.frame).values())
        name = "fused" if read_elsewhere or not best else best
        count, unique = 0, name
        while unique in self.added or unique in self.new_targets or (unique != best and hasattr(self.frame.module, unique)):
            count += 1
            unique = f"fused_{count}" if "." in name else f"{name}_{count}"  # a list holds numbered children only
        return unique

    def _child(self, value: Value) -> str:
        """The child of this frame's module through which a value is computed."""
        frame, node = value.frame, value.node
        while frame is not self.frame:
            if frame.parent is None or frame.call is None:
                return ""
            frame, node = frame.parent, frame.call
        return str(node.target) if node.op == "call_module" else ""

    def install(self, used: _Used, homes: Mapping[int, list[tuple[nn.Module, str]]]) -> None:
        """Give the module its new children and its new forward, and drop what nothing reads any more."""
        module, trace = self.frame.module, self.frame.trace
        for target in sorted(self.old_targets - self.new_targets | set(self.added)):
            if not used.below(_join(self.frame.path, target)) or target in self.added:
                _delete(module, target)
        for name in self.new_targets:
            if name.startswith("_constant") and name in trace.tensors and not hasattr(module, name):
                module.register_buffer(name, trace.tensors[name].detach())
        for name, child in self.added.items():
            parent = module.get_submodule(name.rpartition(".")[0])
            parent._modules[name.rpartition(".")[2]] = child
        for name in sorted(set(trace.read.values()) - self.new_targets):
            if "." not in name and not name.startswith("_constant") and not used.below(_join(self.frame.path, name)):
                _delete(module, name)
        self._shorten_lists(used)
        if isinstance(module, fx.GraphModule):
            module.graph = trace.graph
            return
        source = forward_source(self.frame)
        if isinstance(module, STOCK) and not self.regions and self.frame.parent is not None:
            _replace(homes, module, self._rest(source))
        else:
            module.__class__ = generated_class(base_class(module), source)

    def _shorten_lists(self, used: _Used) -> None:
        """Drop the placeholders at the end of lists that were emptied."""
        for path in {target.rpartition(".")[0] for target in self.old_targets} - {""}:
            try:
                parent = self.frame.module.get_submodule(path)
            except AttributeError:
                continue
            while isinstance(parent, nn.ModuleList) and len(parent):
                last = f"{path}.{len(parent) - 1}"
                if last in self.new_targets or used.below(_join(self.frame.path, last)) or last not in self.old_targets:
                    break
                del parent[-1]

    def _rest(self, source: str) -> nn.Module:
        """What is left of a norm or convolution with more than torch's own forward: no longer an instance of its class."""
        module, graph = self.frame.module, self.frame.trace.graph
        steps = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
        sources = [next(iter(self.frame.trace.inputs.values())), *steps]
        chain = all(
            node.op == "call_module" and node.args == (source,) and not node.kwargs
            for node, source in zip(steps, sources, strict=False)
        )
        if chain and len(self.frame.trace.inputs) == 1 and self.frame.trace.graph.output_node().args[0] is sources[-1]:
            named = {str(node.target): module.get_submodule(str(node.target)) for node in steps}
            if not any("." in name for name in named):
                return nn.Sequential(OrderedDict(named)).train(module.training)
        rest = rebuild(nn.Module, source)
        rest.__dict__.update(module.__dict__)
        return rest


STOCK: Final = (nn.modules.batchnorm._NormBase, nn.modules.conv._ConvNd, nn.Linear)
_NEW: Final = "_reparam_new_"


def _roots(plan: NetPlan, value: Value) -> set[Value]:
    return {root for root in plan.formulas[value].terms if isinstance(root, Value)}


def _erasable(node: fx.Node, values: Mapping[fx.Node, Value], calls: Mapping[fx.Node | None, Frame]) -> bool:
    """Whether an operation without users does nothing but compute its result."""
    if node.op in ("placeholder", "output"):
        return False
    if node in calls:
        return all(pure(value) for value in calls[node].below())
    return pure(values[node]) if node in values else True


def _delete(module: nn.Module, target: str) -> None:
    """Remove a child, parameter or buffer; a list keeps the positions of the others."""
    parent_path, _, name = target.rpartition(".")
    try:
        parent = module.get_submodule(parent_path)
    except AttributeError:
        return
    if name in parent._modules:
        if isinstance(parent, nn.ModuleList | nn.Sequential):
            parent._modules[name] = nn.Identity()
        else:
            del parent._modules[name]
    elif name in parent._parameters:
        parent._parameters[name] = None
    elif name in parent._buffers:
        parent._buffers[name] = None
