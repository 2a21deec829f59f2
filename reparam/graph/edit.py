"""The new forward of one module."""

import operator
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, final

from torch import fx, nn

from reparam.graph.effects import pure
from reparam.graph.entry_methods import uncalled
from reparam.graph.generated import base_class, generated_class, rebuild
from reparam.graph.guard import require_rank
from reparam.graph.modules import Fused
from reparam.graph.net import Frame, Value
from reparam.graph.net_plan import NetPlan
from reparam.graph.own_weights import call_own_weights, holds_weights_of
from reparam.graph.source import forward_source
from reparam.graph.statistic_norms import bare_call
from reparam.graph.swap import delete, holds_tensors, replace_module
from reparam.graph.used import Used, join, makers

STOCK: Final = (nn.modules.batchnorm._NormBase, nn.modules.conv._ConvNd, nn.Linear)
_NEW: Final = "_reparam_new_"


def _rank_taken_for_granted(fused: Fused) -> int | None:
    """The rank of the inputs of a region, if operations that vanish without a trace depend on it.

    All operations without spatial axes keep the rank, so that of the norm's input is that of the region's.
    """
    operations, passed = fused.plan.operations, fused.place.passed
    ranks = [operations[v].rank_if_gone for v in fused.plan.absorbed(fused.value) if v not in passed]
    if fused.value not in passed:
        ranks.append(operations[fused.value].assumed_rank)
    return next((rank for rank in ranks if rank is not None), None)


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
    old_targets: set[str] = field(default_factory=set)
    new_targets: set[str] = field(default_factory=set)

    def run(self, unread: Collection[Value] = ()) -> None:
        """Rewrite the graph of the frame; what it returns is None in place of values that are ``unread``."""
        graph = self.frame.own_graph()
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
                node = self.frame.locals[step.place.at]
                with graph.inserting_before(node):
                    new = self._total(graph, step, current)
            else:
                plan, value = step
                node = value.node
                if node in replaced:  # another region shares it
                    continue
                new = current(next(iter(plan.operations[value].terms)))  # all of them hand on the same value
                rank = plan.operations[value].rank_if_gone
                if rank is not None:
                    with graph.inserting_before(node):
                        new = graph.call_function(require_rank, (new, rank))
            node.replace_all_uses_with(new)
            replaced[node] = new
        for norm in self.bared:
            bare_call(norm.node)
        nothing = {node for node, known in self.frame.env.items() if isinstance(known, Value) and known in unread}
        output = graph.output_node()
        output.args = fx.map_arg(output.args, lambda node: None if node in nothing else node)
        inside = {value.node: value for value in self.frame.values}
        calls = {child.call: child for child in self.frame.children}
        for call in calls:
            if self.idle and call is not None:
                call.args, call.kwargs = fx.map_arg((call.args, call.kwargs), self._unless_idle)
        had_users |= self._tainted(inside, calls) | replaced.keys()
        for node in reversed(list(graph.nodes)):
            if not node.users and node in had_users and _erasable(node, inside, calls):
                graph.erase_node(node)
        self.new_targets = self._targets() - set(self.added)
        for node, fused, root in self.created:
            module = self.added.pop(str(node.target))
            node.target = self._name(fused, root)
            self.added[node.target] = module
        self.new_targets |= set(self.added)

    def _unless_idle(self, node: fx.Node) -> fx.Node | None:
        known = self.frame.env.get(node)
        return None if isinstance(known, Value) and known in self.idle else node

    def _tainted(self, inside: Mapping[fx.Node, Value], calls: Mapping[fx.Node | None, Frame]) -> set[fx.Node]:
        """Discarded results and assertions about values that vanish."""
        gone: set[Value] = set()
        for plan in {fused.plan for fused in self.regions}:
            gone |= plan.inlined.keys() | plan.handed.keys()
        tainted: set[fx.Node] = set()
        for node in self.frame.trace.graph.nodes:
            known = [self.frame.env.get(source) for source in node.all_input_nodes]
            vanished = any(isinstance(v, Value) and v in gone for v in known)
            if not vanished and not any(source in tainted for source in node.all_input_nodes):
                continue
            values = [inside[node]] if node in inside else [*calls[node].below()] if node in calls else None
            if values is not None and all(any(v in fused.plan.dead for fused in self.regions) for v in values):
                tainted.add(node)
        return tainted

    def _targets(self) -> set[str]:
        return {str(node.target) for node in self.frame.trace.graph.nodes if node.op in ("call_module", "get_attr")}

    def _total(self, graph: fx.Graph, fused: Fused, current: Any) -> fx.Node:
        total: fx.Node | None = None
        rank = _rank_taken_for_granted(fused)
        for root, module in fused.modules.items():
            source = current(fused.place.stands_for[root])
            if rank is not None:
                source = graph.call_function(require_rank, (source, rank))
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
        read_elsewhere = any(best.partition(".")[0] in names for names in uncalled(type(self.frame.module)).values())
        name = "fused" if read_elsewhere or not best else best
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
        source = forward_source(self.frame)
        if isinstance(module, STOCK) and not self.regions and self.frame.parent is not None:
            replace_module(homes, module, self._rest(source))
        else:
            base = base_class(module)
            kind = generated_class(base, source)  # type: ignore[arg-type]  # a class is hashable
            object.__setattr__(module, "__class__", kind)  # whatever the class says of attributes that are set

    def _keep_own_weights(self, used: Used) -> None:
        """Let a convolution whose forward does more, such as to pad, hold its new weights itself."""
        module, (path, names) = self.frame.module, (self.frame.path, ("weight", "bias"))
        if len(self.created) != 1 or any(n in self.new_targets or used.below(join(path, n)) for n in names):
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
        beside = {name for names in uncalled(type(self.frame.module)).values() for name in names}
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


def _erasable(node: fx.Node, values: Mapping[fx.Node, Value], calls: Mapping[fx.Node | None, Frame]) -> bool:
    """Whether an operation without users does nothing but compute its result."""
    if node.op in ("placeholder", "output"):
        return False
    if node in calls:
        return all(pure(value) for value in calls[node].below())
    return pure(values[node]) if node in values else True
