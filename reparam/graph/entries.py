"""Other entry points of a module than its forward.

A method that the forward calls and that a user can call, too (``forward_features``, ``embed``) computes a part of the
net. No rewrite may reach across its ends, and where the forward is generated anew, so is the method.
"""

import itertools
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import final

from torch import fx

from reparam.graph.arguments import default_arguments
from reparam.graph.entry_methods import is_entry_point
from reparam.graph.joined import may_take_apart
from reparam.graph.methods import Method, number_of_calls, paired
from reparam.graph.net import Frame
from reparam.graph.proxy import PLAIN
from reparam.graph.source import fixed_signature
from reparam.graph.spelling import unspoken
from reparam.graph.trace import Trace, trace
from reparam.graph.unread import Unread
from reparam.graph.used import join
from reparam.graph.variants import variants


@final
class EntryPoints:
    """For every operation of a frame: the public methods in which it is computed."""

    def __init__(self) -> None:
        self._variants: dict[tuple[Frame, str], list[tuple[str, Trace | Unread]]] = {}
        self._names: dict[Frame, frozenset[str]] = {}
        self._methods: set[tuple[Frame, str]] = set()
        self._uncalled: dict[tuple[Frame, str], Trace | Unread] = {}

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

    def uncalled(self, frame: Frame, method: str, steps: Mapping[Frame, Collection[fx.Node]]) -> str:
        """Why operations do not always follow each other in a method that the forward does not call; empty if they do.

        Args:
            frame: a call of the module of the method.
            method: its name.
            steps: operations by the call, this one or others, in whose forward they stand.
        """
        inside = [(below, nodes) for below, nodes in steps.items() if frame in below.upwards()]
        links = [link for below, nodes in inside for link in _links(nodes, frame, below)]
        links = [(a, b) for a, b in links if "call_module" in (a[0], b[0])]
        if not links:
            return ""
        if (frame, method) not in self._uncalled:
            spec = default_arguments(frame.module, method)
            read = spec if isinstance(spec, Unread) else trace(frame.module, spec, method=method)
            self._uncalled[frame, method] = read
        called = [(_called(first), _called(second)) for first, second in links]
        named = f"the method {method} of {frame.path or 'the model'}"
        for traced in (self._uncalled[frame, method], *(traced for _, traced in self._variants_of(frame, method))):
            if isinstance(traced, Trace):
                if traced.doubtful or not all(_joined(way, links) for way in (traced, *traced.otherwise)):
                    return f"{named} uses some of them"
            elif not traced.raised and may_take_apart(frame.module, method, called):
                return f"{named} may use some of them; it cannot be read: {traced}"
        return ""

    def apart(self, frame: Frame, entries: Sequence[str], nodes: Sequence[fx.Node]) -> str:
        """Why ``nodes`` do not always follow each other.

        The forward, and the methods in which they stand, may have optional arguments, and conditions on their input;
        for each other value of one, and each other outcome, every node must still be read by its successor alone, which
        reads nothing else.

        Returns:
            The reason, or an empty string.
        """
        links = _links(nodes, frame)
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


def _links(
    nodes: Collection[fx.Node], frame: Frame, below: Frame | None = None
) -> list[tuple[tuple[str, str], tuple[str, str]]]:
    """The operations among some that read each other: names of each pair, in ``frame``, which calls ``below``."""
    inside = set(nodes)
    start = "" if below is None or below is frame else below.path[len(frame.path) + 1 if frame.path else 0 :]
    return [(_name(a, start), _name(b, start)) for b in nodes for a in b.all_input_nodes if a in inside]


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


def _joined(traced: Trace, links: Sequence[tuple[tuple[str, str], tuple[str, str]]]) -> bool:
    """Whether each module of a pair is called on the result of the other one alone, which nothing else reads."""
    after, before = dict(links), {b: a for a, b in links}
    for node in traced.graph.nodes:
        name = _name(node)
        if node.op != "call_module":
            continue
        if name in after and {_name(user) for user in node.users} != {after[name]}:
            return False
        if name in before and {_name(source) for source in node.all_input_nodes} != {before[name]}:
            return False
    return True


def _consecutive(traced: Trace, links: Sequence[tuple[tuple[str, str], tuple[str, str]]]) -> bool:
    """Whether nothing is computed between the two of each pair."""
    steps = [_name(node) for node in traced.graph.nodes if not node.meta.get(PLAIN) and node.op != "get_attr"]
    following = set(itertools.pairwise(steps))
    return all(pair in following for pair in links if pair[0] in steps)


def _name(node: fx.Node, path: str = "") -> tuple[str, str]:
    """What an operation is; one that calls a module does so by its name below ``path``."""
    return node.op, join(path, str(node.target)) if node.op == "call_module" else str(node.target)


def _called(name: tuple[str, str]) -> str:
    """The path of the module that an operation calls; empty if it calls none."""
    return name[1] if name[0] == "call_module" else ""


def _below(name: tuple[str, str], start: int) -> tuple[str, str]:
    """The name of an operation in a method of a child, whose path and dot are so long."""
    return (name[0], name[1][start:]) if name[0] == "call_module" else name
