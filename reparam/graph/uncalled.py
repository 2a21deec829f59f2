"""Methods that no forward calls: they find the children that they use as they are, or fused in the same way."""

from collections.abc import Collection, Iterable, Mapping
from typing import final

from torch import fx

from reparam.graph.entries import EntryPoints
from reparam.graph.entry_methods import uncalled
from reparam.graph.net import Frame, Value
from reparam.graph.placing import Mode, Place


@final
class Uncalled:
    """Methods that no forward calls, by the calls of the modules that have some."""

    def __init__(self, frames: Iterable[Frame], entries: EntryPoints) -> None:
        self._entries = entries
        self._methods = {frame: methods for frame in frames if (methods := uncalled(type(frame.module)))}

    def using_a_part(
        self, frame: Frame, values: Iterable[Value], steps: Mapping[Frame, Collection[fx.Node]]
    ) -> str:
        """Why a method of the module of ``frame`` may use some of ``values`` and not others; empty if none does.

        Args:
            frame: the call of a module.
            values: what is to become one operation.
            steps: the operations that they are, or in which they are computed, by call.
        """
        methods = self._methods.get(frame)
        if methods is None:
            return ""
        start = len(frame.path) + 1 if frame.path else 0
        below = {value.path[start:] for value in values if value.module is not None}
        for method, used in methods.items():
            covered = sum(_covers(used, path) for path in below)
            if 0 < covered < len(below):
                return f"the method {method} of {frame.path or 'the model'} uses some of them"
            reason = self._entries.uncalled(frame, method, steps) if covered else ""
            if reason:
                return reason
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
