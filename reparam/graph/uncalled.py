"""Methods that no forward calls: they find the children that they use as they are, or fused in the same way."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import final

from torch import fx, nn

from reparam.graph.arguments import default_arguments
from reparam.graph.entries import Name, links_among, name_of
from reparam.graph.entry_methods import all_methods, uncalled
from reparam.graph.net import Frame, Value
from reparam.graph.placing import Mode, Place
from reparam.graph.trace import Trace, trace
from reparam.graph.unread import Unread
from reparam.graph.unread_methods import CONTAINERS, UnreadMethod
from reparam.graph.used import join
from reparam.graph.variants import variants


@final
class Uncalled:
    """Methods that no forward calls, of the modules that are called, and of those of which only children are."""

    def __init__(self, frames: Iterable[Frame]) -> None:
        self._read: dict[tuple[str, str], _Method] = {}
        self._all: dict[type, Mapping[str, frozenset[str]]] = {}
        self._methods = {frame: methods for frame in frames if (methods := uncalled(type(frame.module)))}

    def using_a_part(self, values: Collection[Value], steps: Mapping[Frame, Collection[fx.Node]]) -> str:
        """Why a method may use some of ``values`` and not others; empty if none does.

        Args:
            values: what is to become one operation.
            steps: the operations that they are, or in which they are computed, by call.
        """
        paths = {value.path for value in values if value.module is not None}
        homes = {frame.path: (frame.module, self._methods[frame]) for frame in steps if frame in self._methods}
        passed_over = {path: module for value in values for path, module in _passed_over(value)}
        homes |= {path: (module, self._all_methods(type(module))) for path, module in passed_over.items()}
        for home, (module, methods) in homes.items():
            below = [_within(path, home) for path in paths]
            for method, used in methods.items():
                covered = sum(_covers(used, path) for path in below)
                if 0 < covered < len(below):
                    return f"the method {method} of {home or 'the model'} uses some of them"
                links = _links_inside(home, steps) if covered else []
                if not links:
                    continue
                if (home, method) not in self._read:
                    self._read[home, method] = _Method(module, home, method)
                reason = self._read[home, method].apart(links)
                if reason:
                    return f"the method {method} of {home or 'the model'} {reason}"
        return ""

    def missing(self, value: Value, where: Place) -> str:
        """A method that would miss a child which goes with the rewrite of a forward; empty if none would."""
        home = where.frame if where.mode is Mode.EDIT else where.container
        if home is None:
            return ""
        above = (value.frame if where.mode is Mode.EDIT else home).upwards()
        homes = [(f.path, self._methods[f]) for f in above if f in self._methods and f is not where.container]
        homes += [(path, self._all_methods(type(module))) for path, module in _passed_over(value)]
        for path, methods in homes:
            for method, used in methods.items():
                whole = home.path != path and _covers(used, _within(home.path, path))
                if not whole and _covers(used, _within(value.path, path)):
                    return f"the method {method} of {path or 'the model'} uses {value.path}"
        return ""

    def _all_methods(self, kind: type) -> Mapping[str, frozenset[str]]:
        """What the methods of a class use if nobody calls its forward."""
        if kind not in self._all:
            self._all[kind] = all_methods(kind)
        return self._all[kind]


@final
class _Method:
    """A method that no forward calls. It is run for a reading only if its code leaves a doubt."""

    def __init__(self, module: nn.Module, path: str, method: str) -> None:
        self._module, self._path, self._method = module, path, method
        self._code = UnreadMethod(module, method)
        self._ways: list[Trace | Unread] | None = None

    def apart(self, links: Sequence[tuple[Name, Name]]) -> str:
        """Why not all operations of pairs follow each other; empty if they do."""
        if not self._code.may_take_apart([(_called(first), _called(second)) for first, second in links]):
            return ""
        if self._ways is None:
            self._ways = list(self._read())
        for traced in self._ways:
            if isinstance(traced, Unread):
                return f"may use some of them; it cannot be read: {traced}"
            if traced.doubtful or not all(_joined(way, links) for way in (traced, *traced.otherwise)):
                return "uses some of them"
        return ""

    def _read(self) -> Iterator[Trace | Unread]:
        """What it does, also for other values of its arguments, unless it raises an error for these."""
        spec = default_arguments(self._module, self._method)
        usual = spec if isinstance(spec, Unread) else trace(self._module, spec, method=self._method)
        yield usual
        if isinstance(usual, Trace):
            for _, traced in variants(Frame(self._module, self._path, usual), self._method):
                if isinstance(traced, Trace) or not traced.raised:
                    yield traced


def _passed_over(value: Value) -> Iterator[tuple[str, nn.Module]]:
    """Modules above the one that a value calls that are not called themselves: a forward calls what is in them."""
    path = value.path if value.module is not None else ""
    for frame in value.frame.upwards():
        path = path.rpartition(".")[0]
        while len(path) > len(frame.path):
            module = frame.module.get_submodule(_within(path, frame.path))
            if type(module) not in CONTAINERS and type(module).forward is not nn.Module.forward:
                yield path, module
            path = path.rpartition(".")[0]
        path = frame.path


def _within(path: str, home: str) -> str:
    """A path from another one on; empty if it is not below that."""
    if not home:
        return path
    return path[len(home) + 1 :] if path.startswith(home + ".") else ""


def _covers(used: Collection[str], path: str) -> bool:
    """Whether a path, or one above it, is among some."""
    while path and path not in used:
        path = path.rpartition(".")[0]
    return bool(path)


def _links_inside(path: str, steps: Mapping[Frame, Collection[fx.Node]]) -> list[tuple[Name, Name]]:
    """The names of operations that read each other, of which at least one calls a module below a path."""
    start = len(path) + 1 if path else 0

    def inside(node: fx.Node, frame: Frame) -> Name:
        called = join(frame.path, str(node.target))
        if node.op != "call_module":
            return name_of(node)
        return (node.op, called[start:]) if not path or called.startswith(path + ".") else ("", called)

    found = [(inside(a, frame), inside(b, frame)) for frame, nodes in steps.items() for a, b in links_among(nodes)]
    return [(a, b) for a, b in found if "call_module" in (a[0], b[0])]


def _joined(traced: Trace, links: Sequence[tuple[Name, Name]]) -> bool:
    """Whether each module of a pair is called on the result of the other one alone, which nothing else reads."""
    after, before = dict(links), {b: a for a, b in links}
    for node in traced.graph.nodes:
        name = name_of(node)
        if node.op != "call_module":
            continue
        if name in after and {name_of(user) for user in node.users} != {after[name]}:
            return False
        if name in before and {name_of(source) for source in node.all_input_nodes} != {before[name]}:
            return False
    return True


def _called(name: Name) -> str:
    """The path of the module that an operation calls; empty if it calls none."""
    return name[1] if name[0] == "call_module" else ""
