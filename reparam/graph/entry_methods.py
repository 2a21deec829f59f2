"""Methods of a class beside its forward, from its code alone: those that the forward calls, and those it does not."""

import inspect
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from types import CodeType, FunctionType
from typing import Any, Final

from torch import nn

from reparam.graph.bytecode import names, strings
from reparam.graph.mentions import LISTING, Mention, mentions

ENTRY_NAMES: Final = ("forward_", "get_", "extract", "encode", "decode", "features")
OWN: Final = frozenset(name for name in dir(nn.Module)) | {"forward"}
AFTER_FUSING: Final = re.compile("forward.*(fus|deploy|reparam)|(fus|deploy|reparam).*forward")
SETTING_UP: Final = re.compile(
    "(add|build|convert|export|freeze|fuse|init|load|log|make|print|prune|register|replace|reset|save|set|switch|unfreeze"
    "|update)(_|$)"
)
TENSORS: Final = frozenset(("weight", "bias", "running_mean", "running_var"))
TORCH: Final = "torch.nn.modules"
STANDARD: Final = ("torch", "reparam", "builtins", "numpy")
_Found = tuple[FunctionType, bool]  # a function of a class; whether its first argument is a module of that class
_HELPERS: Final = 64  # functions that are looked into for one class
_CALLED: Final[dict[type, Mapping[CodeType, str]]] = {}
_UNCALLED: Final[dict[type, Mapping[str, frozenset[str]]]] = {}
_PUBLIC: Final[dict[type, Mapping[str, bool]]] = {}


def forget_classes() -> None:
    """Forget what is remembered of classes: their methods may have been replaced since."""
    _CALLED.clear()
    _UNCALLED.clear()
    _PUBLIC.clear()


def called_methods(kind: type) -> Mapping[CodeType, str]:
    """Methods of a class that its forward calls, directly or through other methods: their names, by code."""
    if kind not in _CALLED:
        firsts = (name for name in {name for name, *_ in _reached(kind, "forward")} if name != "forward")
        functions = {name: _function(kind, name) for name in firsts}
        _CALLED[kind] = {f.__code__: name for name, f in functions.items() if f is not None}
    return _CALLED[kind]


def uncalled(kind: type) -> Mapping[str, frozenset[str]]:
    """Methods of a class that its forward does not call and that take data: what they use of it, as dotted paths."""
    if kind not in _UNCALLED:
        _UNCALLED[kind] = dict(_uncalled(kind))
    return _UNCALLED[kind]


def all_methods(kind: type) -> Mapping[str, frozenset[str]]:
    """The forward of a class, and its public methods that take data, with what they use."""
    public = {name: used_by(kind, name, required) for name, required in _public(kind).items()}
    return {"forward": used_by(kind, "forward"), **public}


def method_with_data(kind: type) -> str:
    """A public method of a class beside its forward that is called with data; empty if there is none."""
    return next((name for name, required in _public(kind).items() if required), "")


def codes_of(kind: type) -> Iterator[CodeType]:
    """The code of the forward of a class, of the methods that it calls, and of those that ``uncalled`` names."""
    yield from (function.__code__ for function in methods_of(kind, "forward"))
    for name in uncalled(kind):
        function = _function(kind, name)
        if function is not None:
            yield function.__code__


def is_method(kind: type, code: CodeType) -> bool:
    """Whether a class has a method, and not its forward, of this code."""
    function = None if code.co_name == "forward" else _function(kind, code.co_name)
    return function is not None and function.__code__ is code


def methods_of(kind: type, method: str) -> Iterator[FunctionType]:
    """A method of a class, and the methods that it calls."""
    return (function for _, function, _ in _reached(kind, method))


def functions_of(functions: Iterable[FunctionType], *, of_other_files: bool = False) -> Iterator[FunctionType]:
    """Functions, and the functions that they call, of the same files or of others; none that are torch's or numpy's."""
    pending = list(functions)
    seen: set[int] = set()
    while pending and len(seen) < _HELPERS:
        function = pending.pop(0)
        if id(function) in seen or str(function.__module__).partition(".")[0] in STANDARD:
            continue
        seen.add(id(function))
        yield function
        for name in names(function.__code__):
            called = (f for f in _table(function.__globals__.get(name)) if isinstance(f, FunctionType))
            pending += (f for f in called if of_other_files or f.__globals__ is function.__globals__)


def _table(value: Any) -> Iterable[Any]:
    """What a global variable holds: elements of a dict, list or tuple, or itself."""
    elements = value.values() if type(value) is dict else value if type(value) in (list, tuple) else (value,)
    return itertools.islice(elements, _HELPERS)


def is_entry_point(name: str, calls: int, outer: bool) -> bool:
    """Whether a method that a forward calls may be called by a user, too.

    Args:
        name: of the method, with a path if it is that of a child.
        calls: how often the forward calls it.
        outer: whether it is only given what the forward, or another entry point, is given or returns.
    """
    name = name.rpartition(".")[2]
    return name.startswith(ENTRY_NAMES) or (calls == 1 and outer and not name.startswith("_"))


def _function(kind: type, name: str) -> FunctionType | None:
    """The function that a class defines by a name, inside of its decorators; None if it is torch's, or none."""
    return next((function for function, bound in _definitions(kind, name) if bound), None)


def _found(value: Any) -> _Found | None:
    """The function that an attribute of a class is; None if it is none."""
    bound = not isinstance(value, staticmethod | classmethod)
    value = value.fget if isinstance(value, property) else value
    inner: object = inspect.unwrap(value) if callable(value) or not bound else None
    return (inner, bound) if isinstance(inner, FunctionType) else None


def _definitions(kind: type, name: str, *, of_bases: bool = False) -> list[_Found]:
    """The function that a class has by a name, if it is not torch's; with those of its bases that it hides."""
    defining = [base for base in kind.__mro__ if name in vars(base)][: None if of_bases else 1]
    values = (vars(base)[name] for base in defining if not base.__module__.startswith(TORCH))
    return [found for value in values if (found := _found(value)) is not None]


def _reached(kind: type, start: str) -> list[tuple[str, FunctionType, bool]]:
    """A method, and those that it calls, directly or through others, also of a base in its place."""
    pending = [(start, *found) for found in _definitions(kind, start)]
    reached: dict[CodeType, tuple[str, FunctionType, bool]] = {}
    while pending:
        name, function, bound = pending.pop()
        code = function.__code__
        if code in reached:
            continue
        reached[code] = name, function, bound
        mentioned = set(names(code))
        of_bases = "super" in mentioned or any(base.__name__ in mentioned for base in kind.__mro__[1:])
        for below in mentioned:
            if below not in OWN or (below == "forward" and of_bases):
                pending += [(below, *found) for found in _definitions(kind, below, of_bases=of_bases)]
    return list(reached.values())


def _public(kind: type) -> Mapping[str, bool]:
    """Public methods that may take data, and whether they require it.

    One that is named as the forward of a fused module (``forward_fuse``) is left out: it is right once the norms that
    it skips are folded; so is one that sets up the module (``set_in_channels``, ``reset_classifier``).
    """
    if kind not in _PUBLIC:
        bases = (base for base in kind.__mro__ if not base.__module__.startswith(TORCH))
        found = {name: _definitions(kind, name) for base in bases for name in vars(base) if _is_for_data(name)}
        required = {name: _requires_data(*first) for name, definitions in found.items() for first in definitions}
        _PUBLIC[kind] = {name: answer for name, answer in required.items() if answer is not None}
    return _PUBLIC[kind]


def _is_for_data(name: str) -> bool:
    setting_up = AFTER_FUSING.search(name) or SETTING_UP.match(name)
    return name not in OWN and not name.startswith("_") and not setting_up


def _uncalled(kind: type) -> Iterator[tuple[str, frozenset[str]]]:
    """Public methods that the forward does not call, with what they use.

    Of one that can be called without data, only what it calls itself counts.
    """
    reached = {name for name, *_ in _reached(kind, "forward")}
    for name, required in _public(kind).items():
        used = frozenset() if name in reached else used_by(kind, name, required)
        if used:
            yield name, used


def used_by(kind: type, method: str, required: bool = True) -> frozenset[str]:
    """What a method of a class, and what it calls, use of a module of the class, as dotted paths.

    Args:
        kind: the class.
        method: name of the method.
        required: whether it requires data.
    """
    methods = {function: bound for _, function, bound in _reached(kind, method)}
    used: set[str] = set()
    for function in functions_of(methods, of_other_files=True):
        code = function.__code__
        found = mentions(code, of_all=not methods.get(function, False))
        used |= {_used(mention, required) for mention in found} - {""}
        if "getattr" in names(code):
            used.update(strings(code))
    return frozenset(used)


def _used(mention: Mention, required: bool) -> str:
    """The path up to the module that is called, or of which weights or children are read; empty if it is neither."""
    if not (required or mention.called):
        return ""
    path, _, last = mention.path.rpartition(".")
    return path if last == "forward" or last in LISTING or (required and last in TENSORS) else mention.path


def _requires_data(function: FunctionType, bound: bool) -> bool | None:
    """Whether a method requires an argument; None if it takes none that could be data.

    One that is not given the module itself may be given it as an argument, but does not show that there is data.
    """
    if not bound:
        return False
    parameters = [*inspect.signature(function, follow_wrapped=False).parameters.values()][1:]
    if any(p.default is p.empty and p.kind is not p.VAR_KEYWORD for p in parameters):
        return True
    return False if any(parameter.default is None for parameter in parameters) else None
