"""What the code of a forward contains, and that of the methods and functions which it calls."""

import dis
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any, Final, final

from torch import nn

from reparam.graph.bytecode import MOST, has, names, nested, steps
from reparam.graph.contents import content
from reparam.graph.entry_methods import STANDARD, functions_of, methods_of

CATCHES: Final = "its forward catches errors"
ASKS_NONE: Final = "its forward asks whether a part of its input is None"
COMPARES: Final = "its forward asks whether two values are one object"
CHANGES: Final = frozenset(("append", "appendleft", "extend", "insert", "update", "setdefault", "pop", "clear"))
MATCHES: Final = "its forward matches values by their classes"
NONE_TESTS: Final = tuple(name for name in dis.opmap if name == "IS_OP" or name.endswith("_NONE"))
_WRITES: Final = ("STORE_SUBSCR", "DELETE_SUBSCR", "BINARY_OP")
_CODES: Final[dict[tuple[object, ...], "Code"]] = {}


@final
@dataclass(frozen=True, slots=True)
class Code:
    """What stands in the code that is run with a forward.

    Args:
        functions: the forward, the methods that it calls, and the functions of their files.
        doubtful: why another way may be taken through it than one reading shows; empty if none.
        catching: of the codes that catch errors and go on, the instructions between which they do.
        asks_none: whether it is asked of something else than an attribute of the module, or an argument, if it is None.
        asks_class: whether the attribute ``__class__`` of something else than the module is read, or a function is
            called that looks at the class of its argument.
        written: names of global variables that are set, with the variables of their file.
        named: names of global variables that are read, alike.
    """

    functions: tuple[FunctionType, ...]
    doubtful: str
    catching: Mapping[CodeType, tuple[tuple[int, int], ...]]
    asks_none: bool
    asks_class: bool
    written: tuple[tuple[dict[str, Any], str], ...]
    named: tuple[tuple[dict[str, Any], str], ...]


NOTHING: Final = Code((), "", {}, asks_none=False, asks_class=False, written=(), named=())


def forget_code() -> None:
    """Forget what is remembered of classes: their methods may have been replaced since."""
    _CODES.clear()


def code_of(kind: type, method: str = "forward", held: tuple[FunctionType, ...] = ()) -> Code:
    """What stands in the code of a method of a class, in what it calls, and in functions that attributes hold."""
    key = (kind, method, *(function.__code__ for function in held))
    if key not in _CODES:
        functions = tuple(functions_of((*methods_of(kind, method), *held)))
        codes = [(function, code) for function in functions for code in nested(function.__code__)]
        doubtful = COMPARES if any(_compares_values(code) for _, code in codes) else ""
        doubtful = MATCHES if any(has(code, "MATCH_CLASS") for _, code in codes) else doubtful
        catching = {code: _caught(code) for _, code in codes if code.co_exceptiontable and _swallows(code)}
        written = tuple((f.__globals__, name) for f, code in codes for name in _set_globals(code))
        named = tuple((f.__globals__, name) for f, code in codes for name in code.co_names if name in f.__globals__)
        asks = any(_asks_class(code) for _, code in codes) or any(_dispatches(kind, f) for f in functions)
        nothing = any(_asks_none(code) for _, code in codes)
        _CODES[key] = Code(functions, doubtful, catching, nothing, asks, written, named)
    return _CODES[key]


@lru_cache(maxsize=MOST)
def _swallows(code: CodeType) -> bool:
    """Whether a handler of errors goes on; those of ``with`` and ``finally`` raise again."""
    if "suppress" in code.co_names:
        return True
    if not has(code, "POP_EXCEPT"):
        return False
    names = [instruction.opname for instruction in dis.get_instructions(code)]
    ends = sum(name == "POP_EXCEPT" and names[at - 1] != "COPY" for at, name in enumerate(names))
    return ends > names.count("WITH_EXCEPT_START")


@lru_cache(maxsize=MOST)
def _caught(code: CodeType) -> tuple[tuple[int, int], ...]:
    """Where errors are caught: offsets of the first instruction, and of the one behind the last."""
    found = {one.offset: at for at, one in enumerate(dis.get_instructions(code))}
    names = [one.opname for one in dis.get_instructions(code)]
    suppresses = "suppress" in code.co_names
    entries = ((entry, found[entry.target]) for entry in dis.Bytecode(code).exception_entries)  # type: ignore[attr-defined]
    return tuple(
        (entry.start, entry.end)
        for entry, at in entries
        if names[at] == "PUSH_EXC_INFO" and (suppresses or names[at + 1] != "WITH_EXCEPT_START")
    )


def inside(frame: FrameType | None, catching: Mapping[CodeType, tuple[tuple[int, int], ...]]) -> bool:
    """Whether a frame, or one that it was called from, would catch an error now."""
    while frame is not None:
        if any(start <= frame.f_lasti < end for start, end in catching.get(frame.f_code, ())):
            return True
        frame = frame.f_back
    return False


def writes_arguments(module: nn.Module) -> bool:
    """Whether a forward in a module may change a list or dict that it is given."""
    return any(
        _writes_arguments(code)
        for kind in {type(child) for child in module.modules()}
        for function in code_of(kind).functions
        for code in [function.__code__]
    )


@lru_cache(maxsize=MOST)
def _writes_arguments(code: CodeType) -> bool:
    if CHANGES.isdisjoint(code.co_names) and not any(has(code, name) for name in _WRITES):
        return False
    arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    found = steps(code)
    loads = [value if name.startswith("LOAD_FAST") and value in arguments else "" for name, value, _ in found]
    for at, (name, value, text) in enumerate(found):
        if name == "BINARY_OP" and text == "+=" and found[at + 1][1] in arguments:
            return True
        if name in ("LOAD_METHOD", "LOAD_ATTR") and value in CHANGES and loads[at - 1]:
            return True
        if name in ("STORE_SUBSCR", "DELETE_SUBSCR") and loads[at - 2]:
            return True
    return False


@lru_cache(maxsize=MOST)
def _compares_values(code: CodeType) -> bool:
    """Whether ``is`` stands before a variable or an element, and behind no constant."""
    if not has(code, "IS_OP"):
        return False
    names = [name for name, _, _ in steps(code)]
    for at, name in enumerate(names):
        if name == "IS_OP" and at > 1:
            right, left = names[at - 1], names[at - 2]
            if right in ("BINARY_SUBSCR", "BINARY_OP"):
                return True
            if right.startswith(("LOAD_FAST", "LOAD_DEREF")) and left != "LOAD_CONST":
                return True
    return False


@lru_cache(maxsize=MOST)
def _asks_none(code: CodeType) -> bool:
    if not any(has(code, name) for name in NONE_TESTS):
        return False
    found = steps(code)
    own, *arguments = code.co_varnames[: code.co_argcount] or [""]
    for at, (name, _, _) in enumerate(found):
        if name not in NONE_TESTS or (name == "IS_OP" and found[at - 1][:2] != ("LOAD_CONST", None)):
            continue
        last = start = at - (2 if name == "IS_OP" else 1)
        while start > 0 and found[start][0] == "LOAD_ATTR":
            start -= 1
        variable = found[start][1] if found[start][0].startswith(("LOAD_FAST", "LOAD_DEREF")) else None
        if not (variable == own or (variable in arguments and start == last)):
            return True
    return False


@lru_cache(maxsize=MOST)
def _asks_class(code: CodeType) -> bool:
    if "_get_name" in code.co_names:
        return True
    if "__class__" not in code.co_names:
        return False
    found = steps(code)
    asked = (at for at, (name, value, _) in enumerate(found) if name == "LOAD_ATTR" and value == "__class__")
    return any(at and found[at - 1][1] not in ("self", *code.co_varnames[:1]) for at in asked)


def _dispatches(kind: type, function: FunctionType) -> bool:
    """Whether a function names one of ``functools.singledispatch``, or a method alike."""
    mentioned = names(function.__code__)
    scope = function.__globals__
    cells = map(content, function.__closure__ or ())
    for found in (*(scope[name] for name in mentioned if name in scope), *cells):
        if _is_dispatcher(found):
            return True
        own = isinstance(found, ModuleType) and found.__name__.partition(".")[0] not in STANDARD
        if own and any(_is_dispatcher(vars(found).get(name)) for name in mentioned):
            return True
    bases = (vars(base) for base in kind.__mro__ if base.__module__.partition(".")[0] not in STANDARD)
    return any(isinstance(defined.get(name), functools.singledispatchmethod) for defined in bases for name in mentioned)


def _is_dispatcher(value: object) -> bool:
    return isinstance(value, FunctionType) and {"dispatch", "registry"} <= vars(value).keys()


@lru_cache(maxsize=MOST)
def _set_globals(code: CodeType) -> tuple[str, ...]:
    if not has(code, "STORE_GLOBAL"):
        return ()
    return tuple(one.argval for one in dis.get_instructions(code) if one.opname == "STORE_GLOBAL")
