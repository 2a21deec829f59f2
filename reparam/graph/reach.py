"""Which modules a function reaches through what it knows, from its code alone.

What it knows are the variables of its closure, its defaults, global variables, and arguments that are given. From these
the attributes are followed that it names, also through methods.
"""

import inspect
from collections.abc import Iterator, Mapping
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any, Final, NamedTuple

import torch
from torch import nn

from reparam.graph.bytecode import MOST, names, nested, steps
from reparam.graph.contents import content
from reparam.graph.entry_methods import STANDARD

ELEMENT: Final = "[]"  # any of what a module holds
GOES_THROUGH: Final = frozenset(
    (
        ELEMENT,
        "__call__", "apply", "buffers", "children", "forward", "get_parameter", "get_submodule", "load_state_dict",
        "modules", "named_buffers", "named_children", "named_modules", "named_parameters", "parameters", "state_dict",
        "_buffers", "_modules", "_parameters",
    )
)  # fmt: skip
_LOADS: Final = ("LOAD_FAST", "LOAD_DEREF", "LOAD_CLASSDEREF")
_ATTRIBUTES: Final = ("LOAD_ATTR", "LOAD_METHOD")
_CONSTANTS: Final = ("LOAD_CONST", "LOAD_SMALL_INT")
_BETWEEN: Final = ("COPY", "PUSH_NULL", "CACHE")
_METHODS: Final = 32  # that are looked into for one function


class Reached(NamedTuple):
    """A module or object, and what is used of it: an attribute, or all of it (an empty string)."""

    holder: Any
    attribute: str
    is_set: bool


def reached(function: FunctionType, given: Mapping[str, Any]) -> Iterator[Reached]:
    """What a function reaches.

    Args:
        function: the function.
        given: arguments by name; what else it knows is found out.
    """
    pending = [(function, {**_known(function), **given})]
    seen: set[tuple[CodeType, int]] = set()
    while pending and len(seen) < _METHODS:
        current, variables = pending.pop()
        code = current.__code__
        for name, start in variables.items():
            if (code, id(start)) in seen:
                continue
            seen.add((code, id(start)))
            for path, is_set in _uses(code, name):
                holder, attribute = _follow(start, path)
                method = _method(holder, attribute)
                if method is not None and not is_set:
                    pending.append((method, {**_known(method), method.__code__.co_varnames[0]: holder}))
                else:
                    yield Reached(holder, attribute, is_set)


def is_standard(function: FunctionType) -> bool:
    """Whether a function is torch's, Python's, or numpy's."""
    return str(function.__module__).partition(".")[0] in STANDARD


def _known(function: FunctionType) -> dict[str, Any]:
    """What a function knows beside its arguments, by the names that it has there."""
    code = function.__code__
    found = dict(zip(code.co_freevars, map(content, function.__closure__ or ()), strict=True))
    defaults = function.__defaults__ or ()
    found |= dict(zip(code.co_varnames[code.co_argcount - len(defaults) : code.co_argcount], defaults, strict=True))
    found |= function.__kwdefaults__ or {}
    scope = function.__globals__
    return found | {name: scope[name] for name in names(code) if isinstance(scope.get(name), nn.Module)}


def _follow(start: Any, path: tuple[str, ...]) -> tuple[Any, str]:
    """The last module or object on a path of attributes, and the first name that leads to none."""
    holder = start
    if not hasattr(start, "__dict__"):
        return start, ""
    for name in path:
        below = _inside(holder).get(name)
        if below is None or not (isinstance(below, nn.Module) or hasattr(below, "__dict__")):
            return holder, name
        holder = below
    return holder, ""


def _inside(holder: Any) -> Mapping[str, Any]:
    """The children of a module, also by their positions; the attributes of an object."""
    if isinstance(holder, torch.jit.ScriptModule):
        return {}
    if not isinstance(holder, nn.Module):
        attributes: dict[str, Any] = vars(holder)
        return attributes
    from_behind = {f"-{at}": child for at, child in enumerate(reversed(holder._modules.values()), 1)}
    return {**from_behind, **holder._modules}


def _method(holder: Any, name: str) -> FunctionType | None:
    """A method of a class that is not torch's; None if the name is that of something else."""
    name = name or ("" if isinstance(holder, nn.Module | FunctionType) else "__call__")
    found = inspect.getattr_static(type(holder), name, None) if name else None
    found = found.fget if isinstance(found, property) else found
    if not isinstance(found, FunctionType) or name == "forward" or is_standard(found):
        return None
    return found if found.__code__.co_argcount else None


@lru_cache(maxsize=MOST)
def _uses(code: CodeType, variable: str) -> frozenset[tuple[tuple[str, ...], bool]]:
    """Attributes that a code follows from a variable on; whether the last of them is set."""
    found: set[tuple[tuple[str, ...], bool]] = set()
    for part in nested(code):
        instructions = [one for one in steps(part) if one[0] not in _BETWEEN]
        for at, (load, value, _) in enumerate(instructions):
            if value != variable or not (load.startswith(_LOADS) or load in ("LOAD_GLOBAL", "LOAD_NAME")):
                continue
            found.add(_path(instructions[at + 1 :]))
    return frozenset(found)


def _path(instructions: list[tuple[str, Any, str]]) -> tuple[tuple[str, ...], bool]:
    """The attributes and indices that are read one after the other; whether one is set in the end."""
    path: list[str] = []
    at = 0
    while at < len(instructions):
        name, value, _ = instructions[at]
        following = instructions[at + 1] if at + 1 < len(instructions) else ("", "", "")
        if name in _ATTRIBUTES:
            path.append(str(value))
        elif name == "GET_ITER":
            return (*path, ELEMENT), False
        elif name.startswith("LOAD_") and (following[0] == "BINARY_SUBSCR" or following[2] == "[]"):
            path.append(str(value) if name in _CONSTANTS else ELEMENT)
            at += 1
        else:
            return ((*path, str(value)), True) if name == "STORE_ATTR" else (tuple(path), False)
        at += 1
    return tuple(path), False
