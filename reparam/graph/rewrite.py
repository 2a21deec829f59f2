"""Fused operations in the place of those that they replace, in the graph of a forward or of a method that it calls."""

import operator
from collections.abc import Collection, Iterable, Mapping
from typing import Final, final

from torch import fx

from reparam.graph.effects import pure
from reparam.graph.guard import require_rank
from reparam.graph.modules import Fused
from reparam.graph.net import Frame, Value
from reparam.graph.net_plan import NetPlan
from reparam.graph.statistic_norms import bare_call

_NEW: Final = "_reparam_new_"


@final
class Rewrite:
    """Rewrites one graph.

    Args:
        frame: the call whose forward changes.
        graph: that of the forward, or of one of its methods.
        regions: what stands in it from now on.
        passed: values that hand on their input from now on.
        twins: for nodes of the forward, those of the graph that stand for the same; None if it is the forward's.
        names: of the children that compute the terms of the regions; new ones get names for a while.
    """

    def __init__(
        self,
        frame: Frame,
        graph: fx.Graph,
        regions: Iterable[Fused],
        passed: Iterable[tuple[NetPlan, Value]],
        twins: Mapping[fx.Node, fx.Node] | None = None,
        names: Mapping[tuple[Fused, Value], str] | None = None,
    ) -> None:
        self.frame = frame
        self.graph = graph
        self.regions = list(regions)
        self.passed = list(passed)
        self.twins = {node: node for node in graph.nodes} if twins is None else twins
        self.names = names
        self.created: list[tuple[fx.Node, Fused, Value]] = []
        self.replaced: dict[fx.Node, fx.Node] = {}

    def run(self, bared: Iterable[Value] = (), idle: Collection[Value] = (), unread: Collection[Value] = ()) -> None:
        """Put the regions in, and drop what nothing reads any more.

        Args:
            bared: norms of which nothing but the statistics is left.
            idle: values that nothing below needs any more.
            unread: values of which None is returned.
        """
        graph = self.graph
        had_users = {node for node in graph.nodes if node.users}
        steps: list[tuple[int, Value, Fused | NetPlan]] = [
            *((fused.place.at.index, fused.place.at, fused) for fused in self.regions),
            *((value.index, value, plan) for plan, value in self.passed),
        ]
        for _, value, step in sorted(steps, key=lambda item: item[0]):
            node = self.twins.get(self.frame.locals[value])
            if node is None or (node in self.replaced and not isinstance(step, Fused)):  # another region shares it
                continue
            with graph.inserting_before(node):
                new = self._total(step) if isinstance(step, Fused) else self._source(value, step)
            node.replace_all_uses_with(new)
            self.replaced[node] = new
        for norm in bared:
            if norm.node in self.twins:
                bare_call(self.twins[norm.node])
        origins = {twin: node for node, twin in self.twins.items()}
        known = {node: self.frame.env.get(origins[node]) for node in graph.nodes if node in origins}
        output = graph.output_node()
        output.args = fx.map_arg(output.args, lambda node: None if _is_in(known.get(node), unread) else node)
        inside = {self.twins[v.node]: v for v in self.frame.values if v.node in self.twins}
        calls = {self.twins[c.call]: c for c in self.frame.children if c.call is not None and c.call in self.twins}
        for call in calls if idle else ():
            call.args, call.kwargs = fx.map_arg(
                (call.args, call.kwargs), lambda node: None if _is_in(known.get(node), idle) else node
            )
        had_users |= self._tainted(known, inside, calls) | self.replaced.keys()
        for node in reversed(list(graph.nodes)):
            if not node.users and node in had_users and _erasable(node, inside, calls):
                graph.erase_node(node)

    def _current(self, value: Value) -> fx.Node:
        node = self.twins[self.frame.locals[value]]
        while node in self.replaced:
            node = self.replaced[node]
        return node

    def _source(self, value: Value, plan: NetPlan) -> fx.Node:
        """What a value hands on."""
        operation = plan.operations[value]
        source = self._current(next(iter(operation.terms)))  # all of them hand on the same value
        rank = operation.rank_if_gone
        return source if rank is None else self.graph.call_function(require_rank, (source, rank))

    def _total(self, fused: Fused) -> fx.Node:
        """The sum of the terms of a region."""
        total: fx.Node | None = None
        rank = _rank_taken_for_granted(fused)
        for root, module in fused.modules.items():
            term = self._current(fused.place.stands_for[root])
            if rank is not None:
                term = self.graph.call_function(require_rank, (term, rank))
            if module is not None:
                name = f"{_NEW}{len(self.created)}" if self.names is None else self.names[fused, root]
                term = self.graph.create_node("call_module", name, (term,), {})
                self.created.append((term, fused, root))
            total = term if total is None else self.graph.call_function(operator.add, (total, term))
        assert total is not None
        return total

    def _tainted(
        self, known: Mapping[fx.Node, object], inside: Mapping[fx.Node, Value], calls: Mapping[fx.Node, Frame]
    ) -> set[fx.Node]:
        """Discarded results and assertions about values that vanish."""
        gone: set[Value] = set()
        for plan in {fused.plan for fused in self.regions}:
            gone |= plan.inlined.keys() | plan.handed.keys()
        for fused in self.regions:
            members = (fused.value, *fused.plan.absorbed(fused.value))
            gone.update(part for member in members for part in fused.plan.operations[member].covers)
        tainted: set[fx.Node] = set()
        for node in self.graph.nodes:
            sources = node.all_input_nodes
            vanished = any(_is_in(known.get(source), gone) for source in sources)
            if not vanished and not any(source in tainted for source in sources):
                continue
            values = [inside[node]] if node in inside else [*calls[node].below()] if node in calls else None
            if values is not None and all(any(v in fused.plan.dead for fused in self.regions) for v in values):
                tainted.add(node)
        return tainted


def _rank_taken_for_granted(fused: Fused) -> int | None:
    """The rank of the inputs of a region, if operations that vanish without a trace depend on it.

    All operations without spatial axes keep the rank, so that of the norm's input is that of the region's.
    """
    operations, passed = fused.plan.operations, fused.place.passed
    ranks = [operations[v].rank_if_gone for v in fused.plan.absorbed(fused.value) if v not in passed]
    if fused.value not in passed:
        ranks.append(operations[fused.value].assumed_rank)
    return next((rank for rank in ranks if rank is not None), None)


def _is_in(known: object, values: Collection[Value]) -> bool:
    return isinstance(known, Value) and known in values


def _erasable(node: fx.Node, values: Mapping[fx.Node, Value], calls: Mapping[fx.Node | None, Frame]) -> bool:
    """Whether an operation without users does nothing but compute its result."""
    if node.op in ("placeholder", "output"):
        return False
    if node in calls:
        return all(pure(value) for value in calls[node].below())
    return pure(values[node]) if node in values else True
