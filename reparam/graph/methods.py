"""Methods that a forward calls, read by themselves, so that they can change with it.

A forward that is generated holds the operations of the methods that it called. One that is still to be right when it is
called by itself is generated, too: from its own graph, in which every operation has a twin in that of the forward.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self, final

import torch
from torch import fx

from reparam.graph.trace import Trace


@final
@dataclass(frozen=True, slots=True, eq=False)
class Method:
    """A method that a forward calls once.

    Args:
        name: of the method.
        graph: what it does.
        twins: for its operations, and for what it is given, as nodes of the forward's graph, the nodes of its own.
        inside: its operations as nodes of the forward's graph.
    """

    name: str
    graph: fx.Graph
    twins: Mapping[fx.Node, fx.Node]
    inside: frozenset[fx.Node]

    def with_copies(self, copies: Mapping[fx.Node, fx.Node]) -> Self:
        """The method of a forward whose graph was copied."""
        twins = {copies[node]: twin for node, twin in self.twins.items()}
        return replace(self, twins=twins, inside=frozenset(copies[node] for node in self.inside))


def number_of_calls(forward: Trace, name: str) -> int:
    """How often a forward calls one of its methods."""
    return len({call for calls in forward.within.values() for call in calls if call[0] == name})


def paired(forward: Trace, method: Trace, name: str) -> Method | None:
    """A method beside the forward that calls it once; None if they do not do the same, operation by operation."""
    if number_of_calls(forward, name) != 1:
        return None
    inside = [node for node, calls in forward.within.items() if any(call[0] == name for call in calls)]
    pairing = _Pairing(forward, method)
    theirs = [node for node in method.graph.nodes if node.op not in ("placeholder", "output", "get_attr")]
    ours = [node for node in inside if node.op != "get_attr"]
    if len(ours) != len(theirs) or not all(map(pairing.add, ours, theirs)):
        return None
    twins = pairing.twins
    given = [node for node in twins if node not in inside]
    if len({twins[node] for node in given}) != len(given):
        return None
    for node, target in pairing.constants.items():
        node.target = target
    return Method(name, method.graph, twins, frozenset(ours))


@final
class _Pairing:
    """Operations of a forward and those of its method that are the same."""

    def __init__(self, forward: Trace, method: Trace) -> None:
        self.forward = forward
        self.method = method
        self.twins: dict[fx.Node, fx.Node] = {}
        self.constants: dict[fx.Node, str] = {}

    def add(self, ours: fx.Node, theirs: fx.Node) -> bool:
        """Note that two operations are the same; False if they are not."""
        same = ours.op == theirs.op and ours.target == theirs.target
        same = same and self.forward.modes.get(ours) == self.method.modes.get(theirs)
        if not (same and self._same(ours.args, theirs.args) and self._same(ours.kwargs, theirs.kwargs)):
            return False
        self.twins[ours] = theirs
        return True

    def _same(self, ours: Any, theirs: Any) -> bool:
        """Whether two arguments are the same, given what is known of the operations before."""
        if isinstance(theirs, fx.Node):
            return isinstance(ours, fx.Node) and self._same_node(ours, theirs)
        if type(ours) is not type(theirs):
            return False
        if isinstance(ours, dict):
            return ours.keys() == theirs.keys() and all(self._same(ours[key], theirs[key]) for key in ours)
        if isinstance(ours, list | tuple):
            return len(ours) == len(theirs) and all(map(self._same, ours, theirs))
        if isinstance(ours, slice):
            return self._same((ours.start, ours.stop, ours.step), (theirs.start, theirs.stop, theirs.step))
        return bool(ours is theirs or ours == theirs)

    def _same_node(self, ours: fx.Node, theirs: fx.Node) -> bool:
        if theirs.op == "placeholder":
            return self.twins.setdefault(ours, theirs) is theirs
        if theirs.op != "get_attr" or ours.op != "get_attr":
            return self.twins.get(ours) is theirs
        a, b = self.forward.tensors[str(ours.target)], self.method.tensors[str(theirs.target)]
        if str(theirs.target).startswith("_constant") and a is not b:
            self.constants[theirs] = str(ours.target)
            return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
        return a is b
