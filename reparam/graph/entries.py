"""Other entry points of a module than its forward.

A method that the forward calls and whose name says that it computes a part of the net (``forward_features``, ``get_...``,
``encode``) can be called by a user, too. No rewrite may reach across its ends, and a forward that is generated anew would
leave it behind.
"""

import sys
from collections.abc import Iterator, Mapping
from types import CodeType, FrameType, FunctionType
from typing import Final, final

from torch import fx, nn

from reparam.graph.net import Frame
from reparam.graph.trace import Trace, trace

ENTRY_NAMES: Final = ("forward_", "get_", "extract", "encode", "decode", "features")
OWN: Final = frozenset(name for name in dir(nn.Module)) | {"forward"}


@final
class EntryPoints:
    """For every operation of a frame: the public method in which it is computed."""

    def __init__(self) -> None:
        self._methods: dict[type, frozenset[str]] = {}
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

    def _read(self, frame: Frame, methods: frozenset[str]) -> Mapping[fx.Node, str]:
        codes = {
            function.__code__: name
            for name in methods
            if isinstance(function := _function(type(frame.module), name), FunctionType)
        }
        names: list[str] = []

        def note() -> None:
            names.append(_outermost(sys._getframe(1), codes))

        again = trace(frame.module, frame.trace.arguments, on_node=note)
        if not isinstance(again, Trace):
            return {}
        return dict(zip(frame.trace.graph.nodes, names, strict=False))


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
    pending, seen = ["forward"], {"forward"}
    while pending:
        function = _function(kind, pending.pop())
        for name in getattr(getattr(function, "__code__", None), "co_names", ()):
            if name in seen or name in OWN or not isinstance(_function(kind, name), FunctionType):
                continue
            seen.add(name)
            pending.append(name)
            if name.startswith(ENTRY_NAMES):
                yield name
