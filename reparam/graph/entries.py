"""Other entry points of a module than its forward.

A method that the forward calls and whose name says that it computes a part of the net (``forward_features``,
``get_...``, ``encode``) can be called by a user, too. No rewrite may reach across its ends, and a forward that is
generated anew would leave it behind.
"""

import itertools
import operator
from collections.abc import Iterator, Sequence
from typing import TypeGuard, final

from torch import fx, nn

from reparam.graph.arguments import HOLE, ArgumentSpec, default_arguments, has_hole, others
from reparam.graph.leaves import is_leaf
from reparam.graph.net import Frame, Value
from reparam.graph.proxy import PLAIN
from reparam.graph.signatures import parameters_of
from reparam.graph.source import same_graph
from reparam.graph.trace import Trace, trace
from reparam.graph.unread import Unread


@final
class EntryPoints:
    """For every operation of a frame: the public method in which it is computed."""

    def __init__(self) -> None:
        self._variants: dict[tuple[Frame, str], list[tuple[str, Trace | Unread]]] = {}

    def of(self, frame: Frame, node: fx.Node) -> str:
        """Name of the outermost public method that computes ``node``; empty for the forward itself."""
        return frame.trace.entries.get(node, "")

    def apart(self, frame: Frame, entry: str, nodes: Sequence[fx.Node]) -> str:
        """Why ``nodes`` do not always follow each other.

        The method in which they stand may have optional arguments, and conditions on its input; for each other value of
        one, and each other outcome, every node must still be read by its successor alone, which reads nothing else.

        Returns:
            The reason, or an empty string.
        """
        method = entry or "forward"
        key = (frame, method)
        if key not in self._variants:
            self._variants[key] = list(variants(frame, method))
        if not self._variants[key] and not frame.trace.otherwise:
            return ""
        inside = set(nodes)
        links = [(_name(a), _name(b)) for b in nodes for a in b.all_input_nodes if a in inside]
        for name, traced in self._variants[key]:
            if isinstance(traced, Unread) or not (_linked(traced, links) and _always(traced, links)):
                return f"{method} of {frame.path or 'the model'} may do otherwise for another {name}"
        if not _always(frame.trace, links):
            return f"the forward of {frame.path or 'the model'} branches on its input"
        return ""


def _always(traced: Trace, links: Sequence[tuple[tuple[str, str], tuple[str, str]]]) -> bool:
    """Whether all other outcomes of its conditions link each pair, too, with nothing between."""
    return all(_linked(other, links) and _consecutive(other, links) for other in traced.otherwise)


def _linked(traced: Trace, links: Sequence[tuple[tuple[str, str], tuple[str, str]]]) -> bool:
    """Whether the first of each pair is only read by the second, which reads nothing else."""
    after, before = dict(links), {b: a for a, b in links}
    for node in traced.graph.nodes:
        name = _name(node)
        if name in after and (node.op != "call_module" or {_name(user) for user in node.users} != {after[name]}):
            return False
        if name in before and {_name(source) for source in node.all_input_nodes} != {before[name]}:
            return False
    return True


def _consecutive(traced: Trace, links: Sequence[tuple[tuple[str, str], tuple[str, str]]]) -> bool:
    """Whether nothing is computed between the two of each pair."""
    steps = [_name(node) for node in traced.graph.nodes if not node.meta.get(PLAIN) and node.op != "get_attr"]
    following = set(itertools.pairwise(steps))
    return all(pair in following for pair in links if pair[0] in steps)


def _name(node: fx.Node) -> tuple[str, str]:
    return node.op, str(node.target)


def variants(frame: Frame, method: str = "forward") -> Iterator[tuple[str, Trace | Unread]]:
    """What a method does for another value of one of its arguments, where that is something else.

    Each optional argument is tried, and None for each required one but the first.
    """
    module = frame.module
    parameters = parameters_of(module, method)
    spec = frame.trace.arguments if method == "forward" else default_arguments(module, method)
    if isinstance(spec, Unread):
        return
    usual = frame.trace if method == "forward" else trace(module, spec, method=method)
    if isinstance(usual, Trace) and usual.typed:
        yield from _of_other_kinds(frame, usual, spec, method)
    first = next(iter(parameters), "")
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty:
            without = None if name == first else _if_none(module, spec, name, method)
            if without is not None and isinstance(usual, Trace) and not _same_for_none(without, usual, name):
                yield name, without
            continue
        value = spec.get(name, parameter.default)
        other = not value if isinstance(value, bool) else (HOLE if not has_hole(value) else parameter.default)
        traced = trace(module, {**spec, name: other}, method=method)
        if isinstance(traced, Unread) and traced.raised and has_hole(value):
            continue  # it asks for this one
        if not (_has_one_outcome(usual) and _has_one_outcome(traced) and same_graph(traced.graph, usual.graph)):
            yield name, traced


def _of_other_kinds(
    frame: Frame, usual: Trace, spec: ArgumentSpec, method: str
) -> Iterator[tuple[str, Trace | Unread]]:
    """What a method does for an argument of another class than a tensor, where it asks for that."""
    for name, kinds in usual.typed.items():
        if method == "forward" and not _may_be_another(frame, usual, name):
            continue
        for other in others(kinds):
            traced: Trace | Unread = Unread("it may be of a class that is not known")
            if other is not None:
                traced = trace(frame.module, {**spec, name: other}, method=method)
            if not (isinstance(traced, Unread) and traced.raised):
                yield name, traced
                break


def _may_be_another(frame: Frame, usual: Trace, name: str) -> bool:
    """Whether an argument may be something else than a tensor: it comes from a user, or from a module of theirs."""
    value = frame.env.get(usual.inputs[name])
    if not isinstance(value, Value) or value.node.op == "placeholder" or value.node.target is operator.getitem:
        return True
    return value.module is not None and not is_leaf(value.module)


def _if_none(module: nn.Module, spec: ArgumentSpec, name: str, method: str) -> Trace | None:
    """What a method does if a required argument is None; None if that was not read: it asks for a value then."""
    if name not in spec or not has_hole(spec[name]):
        return None
    traced = trace(module, {**spec, name: None}, method=method)
    return None if isinstance(traced, Unread) else traced


def _same_for_none(traced: Trace, usual: Trace, name: str) -> bool:
    """Whether a method does with None in place of an argument what it does with the argument."""
    given = usual.inputs.get(name)
    copies: dict[fx.Node, fx.Node] = {}
    graph = fx.Graph()
    result = graph.graph_copy(usual.graph, copies)
    graph.output(result)
    gone = None if given is None else copies[given]
    for node in graph.nodes:
        node.args, node.kwargs = fx.map_arg(
            (node.args, node.kwargs), lambda source: source if source is not gone else None
        )
    return len(traced.otherwise) == len(usual.otherwise) and same_graph(traced.graph, graph)


def _has_one_outcome(traced: Trace | Unread) -> TypeGuard[Trace]:
    return isinstance(traced, Trace) and not traced.otherwise
