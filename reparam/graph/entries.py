"""Other entry points of a module than its forward.

A method that the forward calls and that a user can call, too (``forward_features``, ``embed``) computes a part of the
net. No rewrite may reach across its ends, and where the forward is generated anew, so is the method. A method that the
forward does not call must find the children that it uses as they are, or fused in the same way.
"""

import itertools
import operator
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TypeGuard, final

from torch import fx, nn

from reparam.graph.arguments import HOLE, ArgumentSpec, default_arguments, has_hole, others
from reparam.graph.entry_methods import is_entry_point, uncalled
from reparam.graph.leaves import is_leaf
from reparam.graph.methods import Method, number_of_calls, paired
from reparam.graph.net import Frame, Value
from reparam.graph.placing import Mode, Place
from reparam.graph.proxy import PLAIN
from reparam.graph.signatures import parameters_of
from reparam.graph.source import fixed_signature, same_graph
from reparam.graph.spelling import unspoken
from reparam.graph.trace import Trace, trace
from reparam.graph.unread import Unread


@final
class EntryPoints:
    """For every operation of a frame: the public methods in which it is computed."""

    def __init__(self) -> None:
        self._variants: dict[tuple[Frame, str], list[tuple[str, Trace | Unread]]] = {}
        self._names: dict[Frame, frozenset[str]] = {}
        self._methods: set[tuple[Frame, str]] = set()

    def of(self, frame: Frame, node: fx.Node) -> tuple[str, ...]:
        """Names of the entry points that compute ``node``, outermost first; none for the forward itself."""
        calls = frame.trace.within.get(node, ())
        if not calls:
            return ()
        if frame not in self._names:
            self._names[frame] = _entry_points(frame.trace)
        return tuple(name for name, _ in calls if name in self._names[frame])

    def fixed(self, frame: Frame, node: fx.Node) -> str:
        """The entry point that computes ``node`` and cannot be generated together with the forward; empty if none."""
        for name in {name for calls in frame.trace.within.values() for name, _ in calls}:
            self._method(frame, name)
        return next((name for name in self.of(frame, node) if name not in frame.methods), "")

    def _method(self, frame: Frame, name: str) -> None:
        """Note the method of a frame if it can be generated together with its forward."""
        if (frame, name) not in self._methods:
            self._methods.add((frame, name))
            found = self._read(frame, name)
            if found is not None:
                frame.methods[name] = found

    def _read(self, frame: Frame, name: str) -> Method | None:
        if "." in name:  # that of a child
            return None
        spec = default_arguments(frame.module, name)
        if isinstance(spec, Unread) or fixed_signature(frame.module, name) or number_of_calls(frame.trace, name) != 1:
            return None
        traced = trace(frame.module, spec, method=name)
        if isinstance(traced, Unread) or traced.otherwise or traced.specialised or traced.fixed_type or traced.cache:
            return None
        if traced.doubtful or traced.recast or traced.modes or unspoken(traced.graph) or self._variants_of(frame, name):
            return None
        return paired(frame.trace, traced, name)

    def _variants_of(self, frame: Frame, method: str) -> list[tuple[str, Trace | Unread]]:
        key = (frame, method)
        if key not in self._variants:
            self._variants[key] = list(variants(frame, method))
        return self._variants[key]

    def apart(self, frame: Frame, entries: Sequence[str], nodes: Sequence[fx.Node]) -> str:
        """Why ``nodes`` do not always follow each other.

        The forward, and the methods in which they stand, may have optional arguments, and conditions on their input;
        for each other value of one, and each other outcome, every node must still be read by its successor alone, which
        reads nothing else.

        Returns:
            The reason, or an empty string.
        """
        inside = set(nodes)
        links = [(_name(a), _name(b)) for b in nodes for a in b.all_input_nodes if a in inside]
        for method in ("forward", *entries):
            start = method.rfind(".") + 1
            below = [(_below(a, start), _below(b, start)) for a, b in links]
            for name, traced in self._variants_of(frame, method):
                if isinstance(traced, Unread) or not (_linked(traced, below) and _always(traced, below)):
                    return f"{method} of {frame.path or 'the model'} may do otherwise for another {name}"
        if not _always(frame.trace, links):
            return f"the forward of {frame.path or 'the model'} branches on its input"
        return ""


def _entry_points(traced: Trace) -> frozenset[str]:
    """Methods that a forward calls and that may be called by a user, too.

    One whose name does not say so is one if it is given what the forward is given, or the result of another one, and
    not what the forward has computed on the way.
    """
    counted = Counter(name for name, _ in {call for calls in traced.within.values() for call in calls})
    given: dict[tuple[str, int], list[fx.Node]] = {}
    for node, calls in traced.within.items():
        for call in calls:
            sources = (source for source in node.all_input_nodes if call not in traced.within.get(source, ()))
            given.setdefault(call, []).extend(sources)
    found: set[str] = set()
    for (name, _), inputs in given.items():
        outer = all(
            source.op in ("placeholder", "get_attr")
            or source.meta.get(PLAIN)
            or any(other in found for other, _ in traced.within.get(source, ()))
            for source in inputs
        )
        if is_entry_point(name, counted[name], outer):
            found.add(name)
    return frozenset(found)


@final
class Beside:
    """Methods that no forward calls, by the calls of the modules that have some."""

    def __init__(self, frames: Iterable[Frame]) -> None:
        self._methods = {frame: methods for frame in frames if (methods := uncalled(type(frame.module)))}

    def using_a_part(self, frame: Frame, values: Iterable[Value]) -> str:
        """A method of the module of ``frame`` that uses some of the modules that values call; empty if none does."""
        methods = self._methods.get(frame)
        if methods is None:
            return ""
        start = len(frame.path) + 1 if frame.path else 0
        below = {value.path[start:] for value in values if value.module is not None}
        for method, used in methods.items():
            if 0 < sum(_covers(used, path) for path in below) < len(below):
                return f"the method {method} of {frame.path or 'the model'} uses some of them"
        return ""

    def missing(self, value: Value, where: Place) -> str:
        """A method that would miss a child which goes with the rewrite of a forward; empty if none would."""
        home = where.frame if where.mode is Mode.EDIT else where.container
        if home is None:
            return ""
        for frame in (value.frame if where.mode is Mode.EDIT else home).upwards():
            if frame not in self._methods or frame is where.container:
                continue
            start = len(frame.path) + 1 if frame.path else 0
            for method, used in self._methods[frame].items():
                whole = len(home.path) > start and _covers(used, home.path[start:])
                if not whole and _covers(used, value.path[start:]):
                    return f"the method {method} of {frame.path or 'the model'} uses {value.path}"
        return ""


def _covers(used: Collection[str], path: str) -> bool:
    """Whether a path, or one above it, is among some."""
    while path and path not in used:
        path = path.rpartition(".")[0]
    return bool(path)


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


def _below(name: tuple[str, str], start: int) -> tuple[str, str]:
    """The name of an operation in a method of a child, whose path and dot are so long."""
    return (name[0], name[1][start:]) if name[0] == "call_module" else name


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
        if not (_has_one_outcome(usual) and _has_one_outcome(traced) and same_graph(traced.graph, usual.graph)):
            yield name, traced


def _of_other_kinds(
    module: nn.Module, usual: Trace, spec: ArgumentSpec, method: str, frame: Frame | None
) -> Iterator[tuple[str, Trace | Unread]]:
    """What a method, or the forward of a frame, does for an argument of another class, where it asks for that."""
    for name, kinds in usual.typed.items():
        if frame is not None and not _may_be_another(frame, usual, name):
            continue
        for other in others(kinds):
            traced: Trace | Unread = Unread("it may be of a class that is not known")
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
