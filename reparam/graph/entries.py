"""Other entry points of a module than its forward.

A method that the forward calls and whose name says that it computes a part of the net (``forward_features``,
``get_...``, ``encode``) can be called by a user, too. No rewrite may reach across its ends, and a forward that is
generated anew would leave it behind.
"""

import dis
import inspect
import itertools
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import CodeType, FrameType, FunctionType
from typing import Final, TypeGuard, final

from torch import fx, nn

from reparam.graph.arguments import HOLE, default_arguments, has_hole
from reparam.graph.net import Frame
from reparam.graph.proxy import PLAIN
from reparam.graph.source import same_graph
from reparam.graph.trace import Trace, trace
from reparam.graph.unread import Unread

ENTRY_NAMES: Final = ("forward_", "get_", "extract", "encode", "decode", "features")
OWN: Final = frozenset(name for name in dir(nn.Module)) | {"forward"}
AFTER_FUSING: Final = re.compile("forward.*(fus|deploy|reparam)|(fus|deploy|reparam).*forward")


@final
class EntryPoints:
    """For every operation of a frame: the public method in which it is computed."""

    def __init__(self) -> None:
        self._methods: dict[type, frozenset[str]] = {}
        self._variants: dict[tuple[Frame, str], list[tuple[str, Trace | Unread]]] = {}
        self._beside: dict[type, Mapping[str, frozenset[str]]] = {}
        self._entries: dict[Frame, Mapping[fx.Node, str]] = {}

    def of(self, frame: Frame, node: fx.Node) -> str:
        """Name of the outermost public method that computes ``node``; empty for the forward itself."""
        kind = type(frame.module)
        if kind not in self._methods:
            self._methods[kind] = frozenset(_called(kind))
        if not self._methods[kind]:
            return ""
        if frame not in self._entries:
            self._entries[frame] = self._read(frame, self._methods[kind])
        return self._entries[frame].get(node, "")

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

    def beside(self, frame: Frame) -> Mapping[str, frozenset[str]]:
        """Methods that the forward does not call and that take data: the children that they call."""
        kind = type(frame.module)
        if kind not in self._beside:
            self._beside[kind] = dict(_uncalled(kind))
        return self._beside[kind]

    def _read(self, frame: Frame, methods: frozenset[str]) -> Mapping[fx.Node, str]:
        codes = {
            function.__code__: name
            for name in methods
            if isinstance(function := _function(type(frame.module), name), FunctionType)
        }
        names: dict[fx.Node, str] = {}

        def note(node: fx.Node) -> None:
            names[node] = _outermost(sys._getframe(1), codes)

        again = trace(frame.module, frame.trace.arguments, on_node=note)
        if not isinstance(again, Trace):
            return {}
        nodes = zip(frame.trace.graph.nodes, again.graph.nodes, strict=True)
        return {node: names[same] for node, same in nodes if same in names}


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
    """What a method does for another value of one of its optional arguments, where that is something else."""
    module = frame.module
    parameters = inspect.signature(getattr(module, method)).parameters
    spec = frame.trace.arguments if method == "forward" else default_arguments(module, method)
    if isinstance(spec, Unread):
        return
    usual = frame.trace if method == "forward" else trace(module, spec, method=method)
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty:
            continue
        value = spec.get(name, parameter.default)
        other = not value if isinstance(value, bool) else (HOLE if not has_hole(value) else parameter.default)
        traced = trace(module, {**spec, name: other}, method=method)
        if isinstance(traced, Unread) and traced.raised and has_hole(value):
            continue  # it asks for this one
        if not (_has_one_outcome(usual) and _has_one_outcome(traced) and same_graph(traced.graph, usual.graph)):
            yield name, traced


def _has_one_outcome(traced: Trace | Unread) -> TypeGuard[Trace]:
    return isinstance(traced, Trace) and not traced.otherwise


def _outermost(frame: FrameType | None, codes: Mapping[CodeType, str]) -> str:
    found = ""
    while frame is not None:
        if frame.f_code in codes:
            found = codes[frame.f_code]
        frame = frame.f_back
    return found


def _function(kind: type, name: str) -> object:
    return next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), None)


def _called(kind: type) -> Iterator[str]:
    """Entry points of a class that its forward calls, directly or through other methods."""
    return (name for name in _reached(kind) if name.startswith(ENTRY_NAMES))


def _reached(kind: type) -> set[str]:
    """Methods of a class that its forward calls, directly or through other methods."""
    pending, seen = ["forward"], {"forward"}
    while pending:
        function = _function(kind, pending.pop())
        for name in getattr(getattr(function, "__code__", None), "co_names", ()):
            if name not in seen and name not in OWN and isinstance(_function(kind, name), FunctionType):
                seen.add(name)
                pending.append(name)
    return seen


def _uncalled(kind: type) -> Iterator[tuple[str, frozenset[str]]]:
    """Methods that the forward does not call, with the children that they call.

    One that is named as the forward of a fused module (``forward_fuse``) is left out: it is right once the norms that
    it skips are folded.
    """
    reached = _reached(kind)
    for base in kind.__mro__:
        if base.__module__.startswith("torch.nn.modules"):
            return
        for name, function in vars(base).items():
            if name in reached or name in OWN or name.startswith("__") or not isinstance(function, FunctionType):
                continue
            if AFTER_FUSING.search(name):
                continue
            required = function.__code__.co_argcount - 1 - len(function.__defaults__ or ())
            if required > 0:
                yield name, frozenset(_called_of_self(function.__code__))


def _called_of_self(code: CodeType) -> Iterator[str]:
    """Attributes of its first argument that a method calls."""
    owner = ""
    for instruction in dis.get_instructions(code):
        calls = instruction.opname == "LOAD_METHOD"  # until Python 3.11
        later = instruction.opname == "LOAD_ATTR" and sys.version_info >= (3, 12) and bool((instruction.arg or 0) & 1)
        calls = calls or later
        if calls and owner == code.co_varnames[0]:
            yield str(instruction.argval)
        owner = str(instruction.argval) if instruction.opname.startswith("LOAD_FAST") else ""
