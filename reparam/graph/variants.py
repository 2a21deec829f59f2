"""What a forward, or another method, does for other values of its arguments than those with which it was read."""

import operator
from collections.abc import Iterator
from typing import Final, TypeGuard

from torch import fx, nn

from reparam.graph.arguments import HOLE, ArgumentSpec, default_arguments, has_hole, others
from reparam.graph.leaves import is_leaf
from reparam.graph.net import Frame, Value
from reparam.graph.signatures import parameters_of
from reparam.graph.source import same_graph
from reparam.graph.trace import Trace, trace
from reparam.graph.unread import Unread

UNKNOWN: Final = "it may be of a class that is not known"


def variants(frame: Frame, method: str = "forward") -> Iterator[tuple[str, Trace | Unread]]:
    """What a method, also one of a child, does for another value of one argument, where that is something else.

    Each optional argument is tried, and each for which a caller gives a constant; None for the others but the first.
    """
    of_forward = method == "forward"
    owner, _, method = method.rpartition(".")
    module = frame.module.get_submodule(owner)
    parameters = parameters_of(module, method)
    spec = frame.trace.arguments if of_forward else default_arguments(module, method)
    if isinstance(spec, Unread):
        return
    usual = frame.trace if of_forward else trace(module, spec, method=method)
    if isinstance(usual, Trace) and usual.typed:
        yield from _of_other_kinds(module, usual, spec, method, frame if of_forward else None)
    first = next(iter(parameters), "")
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and (name not in spec or has_hole(spec[name])):
            without = None if name == first else _if_none(module, spec, name, method)
            if without is not None and isinstance(usual, Trace) and not _same_for_none(without, usual, name):
                yield name, without
            continue
        value = spec.get(name, parameter.default)
        other = not value if isinstance(value, bool) else (HOLE if not has_hole(value) else parameter.default)
        traced = trace(module, {**spec, name: other}, method=method)
        if isinstance(traced, Unread) and traced.raised and has_hole(value):
            continue  # it asks for this one
        if not _same(traced, usual):
            yield name, traced
            continue
        kinds = traced.typed.get(name, ()) if isinstance(traced, Trace) else ()
        for given in others(kinds):
            unknown = given is None
            traced = Unread(UNKNOWN) if unknown else trace(module, {**spec, name: given}, method=method)
            if not (isinstance(traced, Unread) and traced.raised) and not _same(traced, usual):
                yield name, traced
                break


def _same(traced: Trace | Unread, usual: Trace | Unread) -> bool:
    return _has_one_outcome(usual) and _has_one_outcome(traced) and same_graph(traced.graph, usual.graph)


def _of_other_kinds(
    module: nn.Module, usual: Trace, spec: ArgumentSpec, method: str, frame: Frame | None
) -> Iterator[tuple[str, Trace | Unread]]:
    """What a method, or the forward of a frame, does for an argument of another class, where it asks for that."""
    for name, kinds in usual.typed.items():
        if frame is not None and not _may_be_another(frame, usual, name):
            continue
        for other in others(kinds):
            traced: Trace | Unread = Unread(UNKNOWN)
            if other is not None:
                traced = trace(module, {**spec, name: other}, method=method)
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
    if name not in spec:
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
