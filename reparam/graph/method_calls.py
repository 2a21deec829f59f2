"""Which methods run while a forward is traced."""

import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import cast, final

from torch import nn

from reparam.graph.entry_methods import called_methods, is_method


@final
class MethodCalls:
    """Calls of methods of a module, and of modules below it, in the forward of the module.

    Args:
        kind: class of the module.
        path: gives the dotted path of a module below it; None for a stranger.
    """

    def __init__(self, kind: type, path: Callable[[nn.Module], str | None]) -> None:
        self._names: dict[CodeType, str] = dict(called_methods(kind))
        self._path = path
        self._calls: dict[FrameType, tuple[str, int] | None] = {}

    def note(self, module: nn.Module) -> None:
        """Remember the method in which a module looks at its own children: it was called instead of the module."""
        call = sys._getframe(1)
        while call.f_globals.get("__name__", "").startswith("reparam."):
            call = cast(FrameType, call.f_back)
        if is_method(type(module), call.f_code):
            self._names[call.f_code] = call.f_code.co_name

    def now(self) -> tuple[tuple[str, int], ...]:
        """Names and numbers of the calls that run, outermost first; with a path, if it is a method of a descendant."""
        if not self._names:
            return ()
        found = []
        call: FrameType | None = sys._getframe(1)
        while call is not None:
            if call.f_code in self._names:
                if call not in self._calls:
                    self._calls[call] = self._numbered(call)
                known = self._calls[call]
                if known is not None:
                    found.append(known)
            call = call.f_back
        return tuple(reversed(found))

    def _numbered(self, call: FrameType) -> tuple[str, int] | None:
        code = call.f_code
        module = call.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        path = self._path(module) if isinstance(module, nn.Module) else None
        if path is None:
            return None
        name = self._names[code]
        return f"{path}.{name}" if path else name, len(self._calls)

    def forget(self) -> None:
        """Let go of the calls, and of what they hold."""
        self._calls.clear()
