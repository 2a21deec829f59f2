"""The new forward of one module."""

from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Final, cast, final

from torch import fx, nn

from reparam.graph.entry_methods import uncalled
from reparam.graph.generated import base_class, generated_class, rebuild
from reparam.graph.methods import Method
from reparam.graph.modules import Fused
from reparam.graph.net import Frame, Value
from reparam.graph.net_plan import NetPlan
from reparam.graph.own_weights import call_own_weights, holds_weights_of
from reparam.graph.rewrite import Rewrite
from reparam.graph.source import source_of
from reparam.graph.swap import delete, holds_tensors, replace_module
from reparam.graph.used import Used, join, makers

STOCK: Final = (nn.modules.batchnorm._NormBase, nn.modules.conv._ConvNd, nn.Linear)


@final
@dataclass(eq=False)
class Edit:
    """The new forward of one module."""

    frame: Frame
    regions: list[Fused] = field(default_factory=list)
    passed: list[tuple[NetPlan, Value]] = field(default_factory=list)
    bared: list[Value] = field(default_factory=list)
    idle: set[Value] = field(default_factory=set)
    added: dict[str, nn.Module] = field(default_factory=dict)
    created: list[tuple[fx.Node, Fused, Value]] = field(default_factory=list)
    methods: list[Method] = field(default_factory=list)
    old_targets: set[str] = field(default_factory=set)
    new_targets: set[str] = field(default_factory=set)

    def run(self, unread: Collection[Value] = ()) -> None:
        """Rewrite the graph of the frame; what it returns is None in place of values that are ``unread``."""
        graph = self.frame.own_graph()
        self.old_targets = _targets(graph)
        methods = [] if unread or self.idle else [m for m in self.frame.methods.values() if self._changes(m)]
        forward = Rewrite(self.frame, graph, self.regions, self.passed)
        forward.run(self.bared, self.idle, unread)
        self.created = forward.created
        self.new_targets = _targets(graph) - {str(node.target) for node, *_ in self.created}
        for node, fused, root in self.created:
            node.target = self._name(fused, root)
            self.added[node.target] = cast(nn.Module, fused.modules[root])
        self.new_targets |= set(self.added)
        names = {(fused, root): str(node.target) for node, fused, root in self.created}
        for method in methods:
            Rewrite(self.frame, method.graph, self.regions, self.passed, method.twins, names).run(self.bared)
            self.new_targets |= _targets(method.graph)
            self.methods.append(method)

    def _changes(self, method: Method) -> bool:
        """Whether a method changes, and no region reaches across its ends."""
        changes = any(self.frame.locals[value] in method.inside for _, value in self.passed)
        for fused in self.regions:
            values = {*fused.plan.weighing(fused.value), *fused.place.passed, fused.place.at}
            nodes = {self.frame.locals[value] for value in values if value in self.frame.locals}
            if nodes & method.inside:
                changes = True
                if not nodes <= method.inside:
                    return False
        return changes

    def _name(self, fused: Fused, root: Value) -> str:
        """The name of the child that held the largest kernel of the term."""
        plan = fused.plan
        best, size = "", (-1, -1)
        meant = plan.aliases.get(root, root)
        for value in plan.part(fused.value, root):
            operation = plan.operations[value]
            if operation.label == "identity" or (best and all(conv.diagonal for conv in operation.terms.values())):
                continue
            target = self._child(value)
            conv = max(operation.terms.values(), key=lambda c: c.taps)
            weight = (conv.taps, conv.in_channels * conv.out_channels // max(conv.groups, 1))
            reads = meant in operation.terms or meant in _roots(plan, value)
            if target and reads and weight > size and target not in self.added:
                best, size = target, weight
        name = best or "fused"
        count, unique = 0, name
        while (
            unique in self.added
            or unique in self.new_targets
            or (unique != best and hasattr(self.frame.module, unique))
        ):
            count += 1
            unique = f"fused_{count}" if "." in name else f"{name}_{count}"  # a list holds numbered children only
        return unique

    def _child(self, value: Value) -> str:
        """The child of this frame's module through which a value is computed."""
        frame: Frame | None = value.frame
        node: fx.Node | None = value.node
        while frame is not None and frame is not self.frame:
            node, frame = frame.call, frame.parent
        return str(node.target) if frame is not None and node is not None and node.op == "call_module" else ""

    def install(self, used: Used, homes: Mapping[int, list[tuple[nn.Module, str]]]) -> None:
        """Give the module its new children and its new forward, and drop what nothing reads any more."""
        module, trace = self.frame.module, self.frame.trace
        self._keep_own_weights(used)
        for target in sorted(self.old_targets - self.new_targets | set(self.added)):
            if not used.below(join(self.frame.path, target)) or target in self.added:
                delete(module, target)
        for name in self.new_targets:
            if name.startswith("_constant") and name in trace.tensors and not hasattr(module, name):
                module.register_buffer(name, trace.tensors[name].detach())
        for name, child in self.added.items():
            parent = module.get_submodule(name.rpartition(".")[0])
            parent._modules[name.rpartition(".")[2]] = child
        for name in sorted(set(trace.read.values()) - self.new_targets):
            if "." not in name and not name.startswith("_constant") and not used.below(join(self.frame.path, name)):
                delete(module, name)
        self._drop_makers(used)
        self._shorten_lists(used)
        if isinstance(module, fx.GraphModule):
            module.graph = trace.graph
            return
        source = source_of(self.frame, self.methods)
        if isinstance(module, STOCK) and not self.regions and self.frame.parent is not None:
            replace_module(homes, module, self._rest(source))
        else:
            base = base_class(module)
            kind = generated_class(base, source)  # type: ignore[arg-type]  # a class is hashable
            object.__setattr__(module, "__class__", kind)  # whatever the class says of attributes that are set

    def _keep_own_weights(self, used: Used) -> None:
        """Let a convolution whose forward does more, such as to pad, hold its new weights itself."""
        module, (path, names) = self.frame.module, (self.frame.path, ("weight", "bias"))
        if (
            self.methods
            or len(self.created) != 1
            or any(n in self.new_targets or used.below(join(path, n)) for n in names)
        ):
            return
        ((node, fused, root),) = self.created
        name = str(node.target)
        child = self.added[name]
        if holds_weights_of(module, child):
            call_own_weights(self.frame.trace.graph, node, child)
            module._parameters.update(child._parameters)
            fused.modules[root] = module
            del self.added[name]
            self.new_targets = self.new_targets - {name} | set(names)

    def _drop_makers(self, used: Used) -> None:
        """Drop the children whose parameters only made weights that are constants now, and what is empty then."""
        module = self.frame.module
        beside = {path.partition(".")[0] for paths in uncalled(type(self.frame.module)).values() for path in paths}
        for maker in sorted(makers([self.frame]), key=len, reverse=True):
            name = maker[len(self.frame.path) + 1 :] if self.frame.path else maker
            while name and name.partition(".")[0] not in beside:
                kept = used.below(join(self.frame.path, name)) or any(
                    target == name or target.startswith(name + ".") for target in self.new_targets
                )
                if kept:
                    break
                delete(module, name)
                name = name.rpartition(".")[0]
                if holds_tensors(module, name):
                    break

    def _shorten_lists(self, used: Used) -> None:
        """Drop the placeholders at the end of lists that were emptied."""
        for path in {target.rpartition(".")[0] for target in self.old_targets} - {""}:
            try:
                parent = self.frame.module.get_submodule(path)
            except AttributeError:
                continue
            while isinstance(parent, nn.ModuleList) and len(parent):
                last = f"{path}.{len(parent) - 1}"
                if last in self.new_targets or used.below(join(self.frame.path, last)) or last not in self.old_targets:
                    break
                del parent[-1]

    def _rest(self, source: str) -> nn.Module:
        """What is left of a norm or convolution with more than torch's own forward: no instance of its class."""
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


def _roots(plan: NetPlan, value: Value) -> set[Value]:
    return {root for root in plan.formulas[value].terms if isinstance(root, Value)}


def _targets(graph: fx.Graph) -> set[str]:
    return {str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")}
