"""Methods that no forward calls: they find the children that they use as they are, or fused in the same way."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import final

from torch import fx, nn

from reparam.graph.entries import EntryPoints
from reparam.graph.entry_methods import uncalled, used_by
from reparam.graph.joined import CONTAINERS
from reparam.graph.net import Frame, Value
from reparam.graph.placing import Mode, Place


@final
class Uncalled:
    """Methods that no forward calls, of the modules that are called, and of those of which only children are."""

    def __init__(self, frames: Iterable[Frame], entries: EntryPoints) -> None:
        self._entries = entries
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
                reason = self._entries.uncalled(module, home, method, steps) if covered else ""
                if reason:
                    return reason
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
        """What the forward of a class uses, which nobody calls, and its other methods."""
        if kind not in self._all:
            self._all[kind] = {"forward": used_by(kind, "forward"), **uncalled(kind)}
        return self._all[kind]


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
