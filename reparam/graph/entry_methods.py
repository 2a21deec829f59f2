"""Methods of a class that compute a part of what its forward computes, from its code alone."""

import dis
import re
import sys
from collections.abc import Iterator, Mapping
from functools import lru_cache
from types import CodeType, FrameType, FunctionType
from typing import Final

from torch import nn

ENTRY_NAMES: Final = ("forward_", "get_", "extract", "encode", "decode", "features")
OWN: Final = frozenset(name for name in dir(nn.Module)) | {"forward"}
AFTER_FUSING: Final = re.compile("forward.*(fus|deploy|reparam)|(fus|deploy|reparam).*forward")
MOST: Final = 4096  # methods that are remembered
_ENTRIES: Final[dict[type, Mapping[CodeType, str]]] = {}
_UNCALLED: Final[dict[type, Mapping[str, frozenset[str]]]] = {}


def forget_classes() -> None:
    """Forget what is remembered of classes: their methods may have been replaced since."""
    _ENTRIES.clear()
    _UNCALLED.clear()


def entry_codes(kind: type) -> Mapping[CodeType, str]:
    """Entry points of a class that its forward calls, directly or through other methods: their names, by code."""
    if kind not in _ENTRIES:
        functions = {name: _function(kind, name) for name in _called(kind)}
        _ENTRIES[kind] = {f.__code__: name for name, f in functions.items() if isinstance(f, FunctionType)}
    return _ENTRIES[kind]


def uncalled(kind: type) -> Mapping[str, frozenset[str]]:
    """Methods of a class that its forward does not call and that take data: the children that they call."""
    if kind not in _UNCALLED:
        _UNCALLED[kind] = dict(_uncalled(kind))
    return _UNCALLED[kind]


def codes_of(kind: type) -> Iterator[CodeType]:
    """The code of the forward of a class, of the methods that it calls, and of those that ``uncalled`` names."""
    for name in (*_reached(kind), *uncalled(kind)):
        code = getattr(_function(kind, name), "__code__", None)
        if isinstance(code, CodeType):
            yield code


def methods_of(kind: type, method: str) -> Iterator[object]:
    """A method of a class, and the methods that it calls."""
    return (_function(kind, name) for name in (method, *_reached(kind, method)))


def outermost(frame: FrameType | None, codes: Mapping[CodeType, str]) -> str:
    """The outermost of some functions that a frame was called from; empty if none."""
    found = ""
    while frame is not None:
        if frame.f_code in codes:
            found = codes[frame.f_code]
        frame = frame.f_back
    return found


def _function(kind: type, name: str) -> object:
    return next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), None)


def _called(kind: type) -> Iterator[str]:
    """Entry points of a class that its forward calls."""
    return (name for name in _reached(kind) if name.startswith(ENTRY_NAMES))


def _reached(kind: type, method: str = "forward") -> set[str]:
    """Methods of a class that its forward calls, directly or through other methods."""
    pending, seen = [method], {method}
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
            code = function.__code__
            required = code.co_argcount - 1 - len(function.__defaults__ or ())
            required += code.co_kwonlyargcount - len(function.__kwdefaults__ or ())
            if required > 0:
                yield name, _called_of_self(code)


@lru_cache(maxsize=MOST)
def _called_of_self(code: CodeType) -> frozenset[str]:
    """Attributes of its first argument that a method calls."""
    found: set[str] = set()
    owner = ""
    for instruction in dis.get_instructions(code):
        calls = instruction.opname == "LOAD_METHOD"  # until Python 3.11
        later = instruction.opname == "LOAD_ATTR" and sys.version_info >= (3, 12) and bool((instruction.arg or 0) & 1)
        calls = calls or later
        if calls and owner == code.co_varnames[0]:
            found.add(str(instruction.argval))
        owner = str(instruction.argval) if instruction.opname.startswith("LOAD_FAST") else ""
    return frozenset(found)
