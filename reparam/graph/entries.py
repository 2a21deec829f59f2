"""Other entry points of a module than its forward.

A method that the forward calls and that a user can call, too (``forward_features``, ``embed``) computes a part of the
net. No rewrite may reach across its ends, and where the forward is generated anew, so is the method.
"""

import itertools
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import final

from torch import fx

from reparam.graph.arguments import default_arguments
from reparam.graph.entry_methods import is_entry_point
from reparam.graph.methods import Method, number_of_calls, paired
from reparam.graph.net import Frame
from reparam.graph.proxy import PLAIN
from reparam.graph.source import fixed_signature
from reparam.graph.spelling import unspoken
from reparam.graph.trace import Trace, trace
from reparam.graph.unread import Unread
from reparam.graph.variants import variants

Name = tuple[str, str]  # kind and target of an operation


@final
class EntryPoints:
    """For every operation of a frame: the public methods in which it is computed."""

    def __init__(self) -> None:
        self._variants: dict[tuple[Frame, str], list[tuple[str, Trace | Unread]]] = {}
        self._names: dict[Frame, frozenset[str]] = {}
        self._private: dict[Frame, str] = {}
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
        entries = (*self.of(frame, node), *self.private(frame, node))
        return next((name for name in entries if name not in frame.methods), "")

    def private(self, frame: Frame, node: fx.Node) -> tuple[str, ...]:
        """The private method that computes ``node`` if it does all that the forward does, by its own defaults."""
        calls = frame.trace.within.get(node, ())
        if calls and frame not in self._private:
            name = _private(frame.trace)
            spec = default_arguments(frame.module, name) if name else Unread("")
            traced = spec if isinstance(spec, Unread) else trace(frame.module, spec, method=name)
            same = isinstance(traced, Trace) and paired(frame.trace, traced, name) is not None
            self._private[frame] = name if same else ""
        return tuple(name for name, _ in calls if name == self._private[frame])

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
        links = [(name_of(a), name_of(b)) for a, b in links_among(nodes)]
        for method in ("forward", *entries):
            start = method.rfind(".") + 1
            below = [(_below(a, start), _below(b, start)) for a, b in links]
            for name, traced in self._variants_of(frame, method):
                if isinstance(traced, Unread) or not (_linked(traced, below) and _always(traced, below)):
                    return f"{method} of {frame.path or 'the model'} may do otherwise for another {name}"
        if not _always(frame.trace, links):
            return f"the forward of {frame.path or 'the model'} branches on its input"
        return ""


def _private(traced: Trace) -> str:
    """A private method that a forward calls once, whose inputs and results are those of the forward; empty if none."""
    results = [traced.within.get(source, ()) for source in traced.graph.output_node().all_input_nodes]
    for call, inputs in _given(traced).items():
        whole = all(call in calls for calls in results) and number_of_calls(traced, call[0]) == 1
        if whole and call[0].startswith("_") and all(source.op in ("placeholder", "get_attr") for source in inputs):
            return call[0]
    return ""


def _given(traced: Trace) -> dict[tuple[str, int], list[fx.Node]]:
    """For every call of a method: what it reads that is computed outside of it."""
    given: dict[tuple[str, int], list[fx.Node]] = {}
    for node, calls in traced.within.items():
        for call in calls:
            sources = (source for source in node.all_input_nodes if call not in traced.within.get(source, ()))
            given.setdefault(call, []).extend(sources)
    return given


def _entry_points(traced: Trace) -> frozenset[str]:
    """Methods that a forward calls and that may be called by a user, too.

    One whose name does not say so is one if it is given what the forward is given, or the result of another one, and
    not what the forward has computed on the way.
    """
    counted = Counter(name for name, _ in {call for calls in traced.within.values() for call in calls})
    found: set[str] = set()
    for (name, _), inputs in _given(traced).items():
        outer = all(
            source.op in ("placeholder", "get_attr")
            or source.meta.get(PLAIN)
            or any(other in found for other, _ in traced.within.get(source, ()))
            for source in inputs
        )
        if is_entry_point(name, counted[name], outer):
            found.add(name)
    return frozenset(found)


def links_among(nodes: Collection[fx.Node]) -> Iterator[tuple[fx.Node, fx.Node]]:
    """The operations among some that read each other."""
    inside = set(nodes)
    return ((source, node) for node in nodes for source in node.all_input_nodes if source in inside)


def _always(traced: Trace, links: Sequence[tuple[Name, Name]]) -> bool:
    """Whether all other outcomes of its conditions link each pair, too, with nothing between."""
    return all(_linked(other, links) and _consecutive(other, links) for other in traced.otherwise)


def _linked(traced: Trace, links: Sequence[tuple[Name, Name]]) -> bool:
    """Whether the first of each pair is only read by the second, which reads nothing else."""
    after, before = dict(links), {b: a for a, b in links}
    for node in traced.graph.nodes:
        name = name_of(node)
        if name in after and (node.op != "call_module" or {name_of(user) for user in node.users} != {after[name]}):
            return False
        if name in before and {name_of(source) for source in node.all_input_nodes} != {before[name]}:
            return False
    return True


def _consecutive(traced: Trace, links: Sequence[tuple[Name, Name]]) -> bool:
    """Whether nothing is computed between the two of each pair."""
    steps = [name_of(node) for node in traced.graph.nodes if not node.meta.get(PLAIN) and node.op != "get_attr"]
    following = set(itertools.pairwise(steps))
    return all(pair in following for pair in links if pair[0] in steps)


def name_of(node: fx.Node) -> Name:
    """Kind and target of an operation."""
    return node.op, str(node.target)


def _below(name: Name, start: int) -> Name:
    """The name of an operation in a method of a child, whose path and dot are so long."""
    return (name[0], name[1][start:]) if name[0] == "call_module" else name
